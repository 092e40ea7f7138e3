"""The K/V of all running sequences in one pool of blocks, which the scheduler hands out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mor_ext import ops
from mor_ext._engine import BLOCK_SIZE, Copies, Pass
from mor_ext.inference.arrays import on_device
from mor_ext.nn import Rotary, Tokens, cu_seqlens_of
from mor_ext.nn.kv import CARRIED, KeepingView

if TYPE_CHECKING:  # models make caches
    from mor_ext.models import MoRConfig


class KVPool:
    """A block holds 16 entries of one layer, so blocks of all layers, stages and depths are alike.

    Attributes:
        key, value: ``[num_blocks, 16, kv_heads, head_dim]``.
    """

    def __init__(self, config: MoRConfig, num_blocks: int, like: Tensor) -> None:
        """like: of the dtype and on the device of the K/V."""
        assert config.num_key_value_heads is not None and config.head_dim is not None
        shape = (num_blocks, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
        self.key, self.value = like.new_zeros(shape), like.new_zeros(shape)

    @staticmethod
    def block_bytes(config: MoRConfig, dtype: torch.dtype) -> int:
        """Of a block, key and value."""
        assert config.num_key_value_heads is not None and config.head_dim is not None
        return 2 * BLOCK_SIZE * config.num_key_value_heads * config.head_dim * dtype.itemsize

    def copy_blocks(self, copies: Copies) -> None:
        self._copy((self.key, self.value), copies)

    def copy_entries(self, copies: Copies) -> None:
        self._copy(self.entries(), copies)

    def _copy(self, caches: tuple[Tensor, Tensor], copies: Copies) -> None:
        if len(copies) == 0:
            return
        source = on_device(copies.source, self.key.device)
        target = on_device(copies.target, self.key.device).long()
        for cache in caches:
            cache.index_copy_(0, target, cache.index_select(0, source))

    def entries(self) -> tuple[Tensor, Tensor]:
        """``[num_blocks * 16, kv_heads, head_dim]`` each, the same memory."""
        return self.key.flatten(0, 1), self.value.flatten(0, 1)


class PoolView(KeepingView):
    """What the rows of a pass see: each the lane of its sequence, stage and depth."""

    def __init__(
        self, pool: KVPool, rotary: Rotary, strategy: str, batch: Pass, layers: Sequence[int]
    ) -> None:
        """layers: the numbers in the model of those that the pass goes through."""
        device = pool.key.device
        self.pool, self.rotary = pool, rotary
        self.number = {layer: i for i, layer in enumerate(layers)}
        self.positions = on_device(batch.positions, device)
        self.key_limit = on_device(batch.key_limit, device)
        self.cu_rows = on_device(batch.cu_rows, device)
        self.before = on_device(batch.before, device)
        self.after = on_device(batch.after, device)
        self.tables = on_device(batch.tables, device)
        self.longest = batch.longest
        self.writes: Tensor | None = None
        if strategy in CARRIED:
            self.writes = on_device(batch.writes, device).long()
        elif strategy == "shared":
            self.first_groups = batch.first_groups
            first_rows = batch.depth_rows[1]
            self.new_rows = None if first_rows == len(batch.rows) else first_rows
        if len(batch.exited_rows) > 0:
            rows = on_device(batch.exited_rows, device)
            positions = on_device(batch.exited_positions, device)
            lengths = (len(rows),)
            self.exited = Tokens(lengths, cu_seqlens_of(lengths, device), positions, rows)
            self.exited_writes = on_device(batch.exited_writes, device).long()

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        assert self.exited is not None
        key = self.rotary.query(key, self.exited.positions)
        self._write(self.exited_writes[self.number[layer]], key, value)

    def _write(self, where: Tensor, key: Tensor, value: Tensor) -> None:
        """where: int64 ``[k]``, entries of the pool."""
        for cache, new in zip(self.pool.entries(), (key, value), strict=True):
            cache.index_copy_(0, where, new)

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        number = self.number[layer]
        if key is None or value is None:
            query = self.rotary.query(query, self.positions)
        elif self.writes is not None:
            query, key = self.rotary(query, key, self.positions)
            self._write(self.writes[number], key, value)
        elif self.new_rows is None:
            query = self._append(number, query, key, value, len(self.before))
        else:  # queries of deeper depths stand behind those that bring K/V
            rows = self.new_rows
            new = self._append(number, query[:rows], key, value, self.first_groups)
            old = self.rotary.query(query[rows:], self.positions[rows:])
            query = torch.cat([new, old])
        out, _ = ops.paged_attention(
            query,
            self.pool.key,
            self.pool.value,
            self.tables[number],
            self.after,
            self.cu_rows,
            self.key_limit,
            self.longest,
            query.shape[-1] ** -0.5,
        )
        return out

    def _append(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, groups: int
    ) -> Tensor:
        """K/V to the lanes of the first groups, which have as many rows; the rotated query."""
        return ops.rotary_kv_append(
            query,
            key,
            value,
            self.rotary.cos,
            self.rotary.sin,
            self.positions[: len(query)],
            self.pool.key,
            self.pool.value,
            self.tables[number, :groups],
            self.before[:groups],
            self.cu_rows[: groups + 1],
        )
