"""A step of the engine: all units of work through the model's stages, each at its own depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mor_ext._engine import Entry, Pass, Scheduler
from mor_ext.inference.arrays import on_device
from mor_ext.inference.pool import KVPool, PassTensors, PoolView
from mor_ext.nn import Linear, PackedWeight, Recursion, Router

if TYPE_CHECKING:  # models make caches
    from mor_ext.models import MoRForCausalLM

Int32s = NDArray[np.int32]
Flags = NDArray[np.bool_]


class Routed:
    """A stage, and what its router has decided about the tokens in flight, by slot."""

    def __init__(self, number: int, stage: Recursion, slots: int) -> None:
        self.number = number  # among the model's stages
        self.block, self.num_recursions = stage.block, stage.num_recursions
        self.router: Router = stage.router
        self.slots = slots
        self.entered: tuple[Tensor, ...] = ()  # [slots, ...] each
        self.gate: Tensor | None = None  # [slots]

    def enter(self, hidden: Tensor, rows: Tensor, positions: Tensor) -> None:
        entered = self.router.enter(hidden[rows], positions)
        if not self.entered:
            self.entered = tuple(new.new_zeros(self.slots, *new.shape[1:]) for new in entered)
        for table, new in zip(self.entered, entered, strict=True):
            table.index_copy_(0, rows.long(), new)

    def goes_on(self, depth: int, hidden: Tensor, rows: Tensor) -> Tensor | bool:
        keep, gate = self.router.goes_on(depth, hidden, rows, self.entered)
        if gate is not None:
            if self.gate is None:
                self.gate = gate.new_zeros(self.slots)
            self.gate.index_copy_(0, rows.long(), gate)
        return keep

    def run(self, hidden: Tensor, view: PoolView, rows: Tensor, depths: Tensor) -> None:
        """The block, on rows of hidden ``[slots, hidden_size]``, which it changes."""
        output = self.block(hidden, view, rows)
        gate = None if self.gate is None else self.gate[rows]
        self.router.merge_rows(hidden, output, rows, gate, depths, self.entered)


class Walk:
    """Runs what a scheduler plans.

    Attributes:
        hidden: ``[slots, hidden_size]``, of the tokens in flight.
    """

    def __init__(
        self, model: MoRForCausalLM, scheduler: Scheduler, pool: KVPool, slots: int, depthwise: bool
    ) -> None:
        self.model, self.scheduler, self.pool = model, scheduler, pool
        self.depthwise = depthwise
        assert model.config.kv_strategy is not None
        self.strategy = model.config.kv_strategy
        weight = model.embed_tokens.weight
        self.hidden = weight.new_zeros(slots, model.config.hidden_size)
        self.stages = [Routed(i, stage, slots) for i, stage in enumerate(model.recursions())]
        self.packed_head = PackedWeight()
        self.packed = [self.packed_head]
        for module in model.modules():
            if isinstance(module, Linear):
                module.packed = module.packed or PackedWeight()
                self.packed.append(module.packed)

    def forget(self) -> None:
        """Drops what has been made of the model's parameters and thresholds."""
        for packed in self.packed:
            packed.clear()

    def step(self) -> tuple[list[int], Tensor]:
        """After ``scheduler.plan()``: sequences to be given a token, and logits ``[n, vocab]``."""
        for stage in self.stages:
            entry = self.scheduler.enter(stage.number)
            if len(entry.rows) > 0:
                self.scheduler.choose(self._enter(stage, entry))
            while (batch := self.scheduler.run(stage.number)) is not None:
                self._run(stage, batch)
                if self.depthwise:
                    break
        sampled = self.scheduler.finish_step()
        return sampled.ids.tolist(), self._logits(sampled.rows)

    def _run(self, stage: Routed, batch: Pass) -> None:
        self.pool.copy_blocks(batch.block_copies)
        self.pool.copy_entries(batch.carried)
        carry = self.scheduler.advance(self._pass(stage, batch))
        self.pool.copy_blocks(carry.blocks)
        self.pool.copy_entries(carry.entries)

    def _tensor(self, array: Int32s) -> Tensor:
        return on_device(array, self.hidden.device)

    # ---- what may be recorded ----

    def _enter(self, stage: Routed, entry: Entry) -> Flags | None:
        """Flags of the tokens at a stage's entry: who goes through its first depth."""
        rows, positions = self._tensor(entry.rows), self._tensor(entry.positions)
        keep = self._entered(stage, rows, positions, self._tensor(entry.ids))
        return flags([keep], [len(rows)])

    def _pass(self, stage: Routed, batch: Pass) -> Flags | None:
        """Flags of the rows of all depths but the last: who goes through the next."""
        rows = self._tensor(batch.rows)
        if len(rows) > 0 or len(batch.exited_rows) > 0:
            stage.run(self.hidden, self._view(stage, batch), rows, self._tensor(batch.depths))
        keep, sizes = [], []
        for depth, at in depths_of(batch):
            keep.append(stage.goes_on(depth, self.hidden, rows[at]))
            sizes.append(at.stop - at.start)
        return flags(keep, sizes)

    def _logits(self, rows: Int32s) -> Tensor:
        return self._head(self._tensor(rows))

    # ---- on the device ----

    def _entered(
        self, stage: Routed, rows: Tensor, positions: Tensor, ids: Tensor
    ) -> Tensor | bool:
        if stage.number == 0:
            self.hidden[rows] = self.model.embed_tokens(ids)
        stage.enter(self.hidden, rows, positions)
        return stage.goes_on(0, self.hidden, rows)

    def _view(self, stage: Routed, batch: Pass) -> PoolView:
        tensors = PassTensors.of(batch, self.strategy, self.hidden.device)
        return PoolView(self.pool, self.model.rotary, stage.block.numbers, tensors)

    def _head(self, rows: Tensor) -> Tensor:
        _, normed = self.model.norm.gather(self.hidden, rows)
        return self.packed_head(normed, self.model.head_weight())


def depths_of(batch: Pass) -> list[tuple[int, slice]]:
    """The depths that rows of a pass may go on to, and which rows those are."""
    slices = map(slice, batch.depth_rows, batch.depth_rows[1:-1])
    return [(depth, at) for depth, at in enumerate(slices, 1) if at.start < at.stop]


def flags(parts: list[Tensor | bool], sizes: list[int]) -> Flags | None:
    """One array of the flags of all parts, one copy from the device; None if all are set."""
    if all(part is True for part in parts):
        return None
    if not any(isinstance(part, Tensor) for part in parts):
        return np.repeat(np.array(parts, dtype=bool), sizes)
    device = next(part.device for part in parts if isinstance(part, Tensor))
    tensors = [
        part if isinstance(part, Tensor) else torch.full((size,), part, device=device)
        for part, size in zip(parts, sizes, strict=True)
    ]
    return torch.cat(tensors).cpu().numpy()
