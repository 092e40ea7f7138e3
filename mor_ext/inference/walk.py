"""A step of the engine: all units of work through the model's stages, each at its own depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mor_ext._engine import Pass, Scheduler
from mor_ext.inference.arrays import on_device
from mor_ext.inference.pool import KVPool, PoolView
from mor_ext.nn import Linear, PackedWeight, Recursion, Router

if TYPE_CHECKING:  # models make caches
    from mor_ext.models import MoRForCausalLM

Flags = NDArray[np.bool_]


class Routed:
    """What a stage's router has decided about the tokens in flight, by slot."""

    def __init__(self, router: Router, slots: int) -> None:
        self.router = router
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

    def merge(self, hidden: Tensor, output: Tensor, rows: Tensor, depths: Tensor) -> None:
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
        self.stages = [(stage, Routed(stage.router, slots)) for stage in model.recursions()]
        self.head = PackedWeight()
        for module in model.modules():
            if isinstance(module, Linear) and module.packed is None:
                module.packed = PackedWeight()

    def step(self) -> tuple[list[int], Tensor]:
        """After ``scheduler.plan()``: sequences to be given a token, and logits ``[n, vocab]``."""
        for number, (stage, routed) in enumerate(self.stages):
            self._enter(number, routed)
            while (batch := self.scheduler.run(number)) is not None:
                self._run(stage, routed, batch)
                if self.depthwise:
                    break
        sampled = self.scheduler.finish_step()
        _, normed = self.model.norm.gather(self.hidden, self._tensor(sampled.rows))
        return sampled.ids.tolist(), self.head(normed, self.model.head_weight())

    def _tensor(self, array: NDArray[np.int32]) -> Tensor:
        return on_device(array, self.hidden.device)

    def _enter(self, number: int, routed: Routed) -> None:
        entry = self.scheduler.enter(number)
        if len(entry.rows) == 0:
            return
        rows = self._tensor(entry.rows)
        if number == 0:
            self.hidden[rows] = self.model.embed_tokens(self._tensor(entry.ids))
        routed.enter(self.hidden, rows, self._tensor(entry.positions))
        self.scheduler.choose(flags([routed.goes_on(0, self.hidden, rows)], [len(rows)]))

    def _run(self, stage: Recursion, routed: Routed, batch: Pass) -> None:
        self.pool.copy_blocks(batch.block_copies)
        self.pool.copy_entries(batch.carried)
        rows = self._tensor(batch.rows)
        if len(rows) > 0 or len(batch.exited_rows) > 0:
            view = PoolView(self.pool, self.model.rotary, self.strategy, batch, stage.block.numbers)
            output = stage.block(self.hidden, view, rows)
            routed.merge(self.hidden, output, rows, self._tensor(batch.depths))
        keep, sizes = [], []
        for depth in range(1, stage.num_recursions):
            at = slice(batch.depth_rows[depth - 1], batch.depth_rows[depth])
            if at.start < at.stop:
                keep.append(routed.goes_on(depth, self.hidden, rows[at]))
                sizes.append(at.stop - at.start)
        carry = self.scheduler.advance(flags(keep, sizes))
        self.pool.copy_blocks(carry.blocks)
        self.pool.copy_entries(carry.entries)


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
