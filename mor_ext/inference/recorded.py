"""A walk whose work is recorded once for each size, and replayed from then on.

A step of a small model is some hundred kernels, which take less time than the host needs to launch
them one by one. A CUDA graph launches them all, but always with the same sizes and addresses: so
passes are padded to a few sizes. Rows of padding are those of slots that no token has, and each is
a group of its own whose lane is the spare block of the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mor_ext._engine import BLOCK_SIZE, Entry, Pass, Scheduler
from mor_ext.inference.arrays import on_device
from mor_ext.inference.graphs import FixedWork, Record, padded
from mor_ext.inference.pool import KVPool, PassTensors, PoolView
from mor_ext.inference.walk import Flags, Int32s, Routed, Walk, depths_of, flags
from mor_ext.nn.kv import CARRIED

if TYPE_CHECKING:  # models make caches
    from mor_ext.models import MoRForCausalLM

LEAST_PAGES = 8  # of the tables of a pass
NONE = np.empty(0, dtype=np.int32)


class RecordedWalk(Walk):
    """A walk in fixed sizes.

    Args:
        slots: of tokens; as many more are for padding.
        record: makes of work on tensors that stay where they are what does the same again.
    """

    def __init__(
        self,
        model: MoRForCausalLM,
        scheduler: Scheduler,
        pool: KVPool,
        slots: int,
        depthwise: bool,
        record: Record,
    ) -> None:
        most = padded(slots)
        super().__init__(model, scheduler, pool, slots + most, depthwise)
        self.record = record
        self.spare_slots = np.arange(slots, slots + most, dtype=np.int32)
        self.works: dict[tuple[Any, ...], FixedWork] = {}

    def forget(self) -> None:
        super().forget()
        self.works.clear()

    def _work(self, kind: Callable[..., FixedWork], *how: Any) -> FixedWork:
        """Of a kind and a size, recorded when it is first asked for."""
        key = (kind, *how)
        if key not in self.works:
            self.works[key] = kind(self, *how)
        return self.works[key]

    def _enter(self, stage: Routed, entry: Entry) -> Flags | None:
        count = len(entry.rows)
        keep = self._work(FixedEntry, stage, padded(count))(entry)
        return flags([part_of(keep, slice(count))], [count])

    def _pass(self, stage: Routed, batch: Pass) -> Flags | None:
        if len(batch.exited_rows) > 0:
            stage.block.leave(self.hidden, self._view(stage, batch))
        if len(batch.rows) == 0:
            return None
        size, pages = padded(len(batch.rows)), max(LEAST_PAGES, padded(batch.tables.shape[2]))
        longest = 1 if batch.longest == 1 else size
        keep = self._work(FixedPass, stage, size, pages, longest)(batch)  # by depth
        depths = depths_of(batch)
        parts = [part_of(keep[depth - 1], at) for depth, at in depths]
        return flags(parts, [at.stop - at.start for _, at in depths])

    def _logits(self, rows: Int32s) -> Tensor:
        if len(rows) == 0:
            return super()._logits(rows)
        return self._work(FixedHead, padded(len(rows)))(rows)[: len(rows)]


def part_of(keep: Tensor | bool, at: slice) -> Tensor | bool:
    return keep if isinstance(keep, bool) else keep[at]


class FixedEntry(FixedWork):
    def __init__(self, walk: RecordedWalk, stage: Routed, size: int) -> None:
        shapes = dict.fromkeys(("rows", "positions", "ids"), (size,))
        super().__init__(shapes, walk.hidden.device)
        self.walk, self.stage, self.size = walk, stage, size
        self.record(walk.record, SimpleNamespace(rows=NONE, positions=NONE, ids=NONE))

    def put(self, arrays: Any) -> None:  # an Entry
        self.buffers.put("rows", arrays.rows, self.walk.spare_slots[len(arrays.rows) : self.size])
        self.buffers.put("positions", arrays.positions, 0)
        self.buffers.put("ids", arrays.ids, 0)

    def work(self) -> Tensor | bool:
        on = self.on
        return self.walk._entered(self.stage, on["rows"], on["positions"], on["ids"])


class FixedHead(FixedWork):
    def __init__(self, walk: RecordedWalk, size: int) -> None:
        super().__init__({"rows": (size,)}, walk.hidden.device)
        self.walk, self.size = walk, size
        self.record(walk.record, NONE)

    def put(self, arrays: Int32s) -> None:
        self.buffers.put("rows", arrays, self.walk.spare_slots[len(arrays) : self.size])

    def work(self) -> Tensor:
        return self.walk._head(self.on["rows"])


class FixedPass(FixedWork):
    """Of any number of groups up to the number of rows."""

    def __init__(
        self, walk: RecordedWalk, stage: Routed, size: int, pages: int, longest: int
    ) -> None:
        self.walk, self.stage, self.size, self.longest = walk, stage, size, longest
        layers = len(stage.block.numbers)
        by_row = ("rows", "positions", "depths", "key_limit", "before", "after")
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(by_row, (size,))
        shapes |= {"cu_rows": (size + 1,), "tables": (layers, size, pages)}
        if walk.strategy in CARRIED:
            shapes["writes"] = (layers, size)
        elif walk.strategy == "shared":
            shapes["first_groups"] = (1,)
        super().__init__(shapes, walk.hidden.device)
        self.spare_slots = on_device(walk.spare_slots[:size], walk.hidden.device)
        nothing = dict.fromkeys((*by_row, "cu_rows"), NONE)
        tables, writes = np.empty((layers, 0, 0), np.int32), np.empty((layers, 0), np.int32)
        self.record(
            walk.record, SimpleNamespace(**nothing, tables=tables, writes=writes, first_groups=0)
        )

    def put(self, arrays: Any) -> None:  # a Pass
        put, host, spare_block = self.buffers.put, self.buffers.host, self.walk.pool.spare
        rows, groups = len(arrays.rows), len(arrays.before)
        put("rows", arrays.rows, self.walk.spare_slots[rows : self.size])
        put("positions", arrays.positions, 0)
        put("depths", arrays.depths, -1)
        put("key_limit", arrays.key_limit, 1)
        put("before", arrays.before, 0)
        put("after", arrays.after, 1)
        ends = np.arange(rows, rows + self.size + 1 - groups, dtype=np.int32)
        put("cu_rows", arrays.cu_rows[:groups], np.minimum(ends, self.size))
        host["tables"][:, :groups, : arrays.tables.shape[2]] = arrays.tables
        host["tables"][:, groups:, 0] = spare_block
        if "writes" in host:
            put("writes", arrays.writes, spare_block * BLOCK_SIZE)
        if "first_groups" in host:
            host["first_groups"][0] = arrays.first_groups
            host["before"][arrays.first_groups :] = 0

    def work(self) -> list[Tensor | bool]:
        """Flags of all rows, for each depth that they may go on to: right for those before it."""
        walk, on = self.walk, self.on
        tensors = PassTensors(
            positions=on["positions"],
            key_limit=on["key_limit"],
            cu_rows=on["cu_rows"],
            before=on["before"],
            after=on["after"],
            tables=on["tables"],
            longest=self.longest,
        )
        if "writes" in on:
            tensors.writes = on["writes"].long()
        if "first_groups" in on:  # the K/V of the others are to go nowhere
            groups = torch.arange(self.size, device=walk.hidden.device)
            first = (groups < on["first_groups"]).unsqueeze(1)
            tensors.append_tables = torch.where(first, on["tables"], walk.pool.spare)
        view = PoolView(walk.pool, walk.model.rotary, self.stage.block.numbers, tensors)
        self.stage.run(walk.hidden, view, on["rows"], on["depths"])
        return [self._goes_on(depth) for depth in range(1, self.stage.num_recursions)]

    def _goes_on(self, depth: int) -> Tensor | bool:
        here = self.on["depths"] == depth - 1
        rows = torch.where(here, self.on["rows"], self.spare_slots)
        return self.stage.goes_on(depth, self.walk.hidden, rows)
