"""The K/V of all running sequences in one pool of blocks, which the scheduler hands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        key, value: ``[num_blocks + 1, 16, kv_heads, head_dim]``.
        spare: the last block, which the scheduler does not know: for K/V that nobody wants.
    """

    def __init__(self, config: MoRConfig, num_blocks: int, like: Tensor) -> None:
        """like: of the dtype and on the device of the K/V."""
        assert config.num_key_value_heads is not None and config.head_dim is not None
        shape = (num_blocks + 1, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
        self.key, self.value = like.new_zeros(shape), like.new_zeros(shape)
        self.spare = num_blocks

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


@dataclass
class PassTensors:
    """What a :class:`Pass` says, on the device."""

    positions: Tensor  # int32 [k]
    key_limit: Tensor  # int32 [k]
    cu_rows: Tensor  # int32 [groups + 1]
    before: Tensor  # int32 [groups]
    after: Tensor  # int32 [groups]
    tables: Tensor  # int32 [layers, groups, pages]
    longest: int  # rows of a group at most
    append_tables: Tensor | None = None  # of the lanes that K/V go to, if they are others
    writes: Tensor | None = None  # int64 [layers, k], entries, if K/V go there instead
    new_rows: int | None = None  # so many rows, the first, bring K/V, and so many groups;
    new_groups: int | None = None  # None is all
    exited: Tokens | None = None
    exited_writes: Tensor | None = None  # int64 [layers, e], entries

    @classmethod
    def of(cls, batch: Pass, strategy: str, device: torch.device) -> PassTensors:
        tensors = cls(
            positions=on_device(batch.positions, device),
            key_limit=on_device(batch.key_limit, device),
            cu_rows=on_device(batch.cu_rows, device),
            before=on_device(batch.before, device),
            after=on_device(batch.after, device),
            tables=on_device(batch.tables, device),
            longest=batch.longest,
        )
        if strategy in CARRIED:
            tensors.writes = on_device(batch.writes, device).long()
        elif strategy == "shared" and batch.depth_rows[1] < len(batch.rows):
            tensors.new_rows, tensors.new_groups = batch.depth_rows[1], batch.first_groups
        if len(batch.exited_rows) > 0:
            rows = on_device(batch.exited_rows, device)
            positions = on_device(batch.exited_positions, device)
            lengths = (len(rows),)
            tensors.exited = Tokens(lengths, cu_seqlens_of(lengths, device), positions, rows)
            tensors.exited_writes = on_device(batch.exited_writes, device).long()
        return tensors


class PoolView(KeepingView):
    """What the rows of a pass see: each the lane of its sequence, stage and depth."""

    def __init__(
        self, pool: KVPool, rotary: Rotary, layers: Sequence[int], tensors: PassTensors
    ) -> None:
        """layers: the numbers in the model of those that the pass goes through."""
        self.pool, self.rotary, self.tensors = pool, rotary, tensors
        self.number = {layer: i for i, layer in enumerate(layers)}
        self.new_rows = tensors.new_rows
        self.exited = tensors.exited

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        assert self.exited is not None and self.tensors.exited_writes is not None
        key = self.rotary.query(key, self.exited.positions)
        self._write(self.tensors.exited_writes[self.number[layer]], key, value)

    def _write(self, where: Tensor, key: Tensor, value: Tensor) -> None:
        """where: int64 ``[k]``, entries of the pool."""
        for cache, new in zip(self.pool.entries(), (key, value), strict=True):
            cache.index_copy_(0, where, new)

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        tensors, number = self.tensors, self.number[layer]
        if key is None or value is None:
            query = self.rotary.query(query, tensors.positions)
        elif tensors.writes is not None:
            query, key = self.rotary(query, key, tensors.positions)
            self._write(tensors.writes[number], key, value)
        elif self.new_rows is None:
            query = self._append(number, query, key, value)
        else:  # queries of deeper depths stand behind those that bring K/V
            rows = self.new_rows
            new = self._append(number, query[:rows], key, value, tensors.new_groups)
            old = self.rotary.query(query[rows:], tensors.positions[rows:])
            query = torch.cat([new, old])
        out, _ = ops.paged_attention(
            query,
            self.pool.key,
            self.pool.value,
            tensors.tables[number],
            tensors.after,
            tensors.cu_rows,
            tensors.key_limit,
            tensors.longest,
            query.shape[-1] ** -0.5,
        )
        return out

    def _append(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, groups: int | None = None
    ) -> Tensor:
        """K/V to the lanes of the first groups, which have as many rows; the rotated query."""
        tensors = self.tensors
        tables = tensors.tables if tensors.append_tables is None else tensors.append_tables
        return ops.rotary_kv_append(
            query,
            key,
            value,
            self.rotary.cos,
            self.rotary.sin,
            tensors.positions[: len(query)],
            self.pool.key,
            self.pool.value,
            tables[number, :groups],
            tensors.before[:groups],
            tensors.cu_rows[: None if groups is None else groups + 1],
        )
