"""Rotary embedding at original positions, and the append to a paged cache."""

from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from harness import OURS, Case, compiled, cu_seqlens, differentiable_peers
from torch import Tensor

mor = torch.ops.mor

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 8, 4, 64, 16
FLOATS = [torch.float32, torch.bfloat16]


def tables(positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [positions, HEAD_DIM / 2]."""
    frequency = 1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angle = torch.arange(positions)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As Llama does: tables of x's dtype, both halves; x [N, heads, D], cos and sin [N, 1, D]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def rotate_both(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    cos, sin = (t.to(query.dtype)[positions].repeat(1, 2)[:, None] for t in (cos, sin))
    return rotate(query, cos, sin), rotate(key, cos, sin)


@lru_cache(1)
def rotary_case(tokens: int, dtype: torch.dtype, backward: bool = False) -> Case:
    query = torch.randn(tokens, HEADS, HEAD_DIM, dtype=dtype)
    key = torch.randn(tokens, KV_HEADS, HEAD_DIM, dtype=dtype)
    positions = torch.randperm(2 * tokens)[:tokens].sort().values.int()
    cos, sin = tables(2 * tokens)

    def ours(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return mor.rotary(query, key, cos, sin, positions)

    def eager(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return rotate_both(query, key, cos, sin, positions)

    functions = {OURS: ours, "eager": eager, "compiled": compiled(eager)}
    return Case(
        op="rotary fwd+bwd" if backward else "rotary",
        shape=f"{tokens} x ({HEADS} + {KV_HEADS}) x {HEAD_DIM}",
        dtype=dtype,
        peers=differentiable_peers(functions, (query, key), backward),
        bytes=2 * (query.nbytes + key.nbytes) * (2 if backward else 1),
    )


@pytest.mark.parametrize("peer", [OURS, "eager", "compiled"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backward", [False, True])
def test_rotary(measure: Any, backward: bool, dtype: torch.dtype, peer: str) -> None:
    measure(rotary_case(4096, dtype, backward), peer)


@lru_cache(1)
def append_case(lanes: int, old: int, new: int, dtype: torch.dtype, rotary: bool) -> Case:
    """Every lane holds `old` entries and gets `new` more."""
    tokens, lane_blocks = lanes * new, -(-(old + new) // BLOCK)
    query = torch.randn(tokens, HEADS, HEAD_DIM, dtype=dtype)
    key, value = torch.randn(2, tokens, KV_HEADS, HEAD_DIM, dtype=dtype)
    block_table = torch.randperm(lanes * lane_blocks).view(lanes, lane_blocks).int()
    lengths, cu = torch.full((lanes,), old, dtype=torch.int32), cu_seqlens(lanes, new)
    positions = torch.arange(old, old + new, dtype=torch.int32).repeat(lanes)
    cos, sin = tables(old + new)

    def caches() -> list[Tensor]:
        """Keys and values for one peer."""
        shape = (lanes * lane_blocks, BLOCK, KV_HEADS, HEAD_DIM)
        return [torch.zeros(shape, dtype=dtype) for _ in range(2)]

    def ours(keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        if rotary:
            rotated = mor.rotary_kv_append(
                query, key, value, cos, sin, positions, keys, values, block_table, lengths, cu
            )
            return rotated, keys, values
        mor.kv_append(key, value, keys, values, block_table, lengths, cu)
        return keys, values

    def pytorch(keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        # Not repeat_interleave: under torch.compile it would make a copy of the whole cache.
        token = torch.arange(tokens, dtype=torch.int32)
        lane = torch.searchsorted(cu, token, right=True) - 1
        entry = lengths[lane] + token - cu[lane]
        slot = (block_table[lane, entry // BLOCK] * BLOCK + entry % BLOCK).long()
        new_query, new_key = query, key
        if rotary:
            new_query, new_key = rotate_both(query, key, cos, sin, positions)
        keys.flatten(0, 1).index_copy_(0, slot, new_key)
        values.flatten(0, 1).index_copy_(0, slot, value)
        return (new_query, keys, values) if rotary else (keys, values)

    functions = {OURS: ours, "eager": pytorch, "compiled": compiled(pytorch)}
    return Case(
        op="rotary_kv_append" if rotary else "kv_append",
        shape=f"{lanes} lanes, {new} on {old}, {KV_HEADS} x {HEAD_DIM}",
        dtype=dtype,
        peers={name: partial(f, *caches()) for name, f in functions.items()},
        bytes=2 * (key.nbytes + value.nbytes + rotary * query.nbytes),
    )


@pytest.mark.parametrize("peer", [OURS, "eager", "compiled"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rotary", [False, True], ids=["append", "rotary_append"])
@pytest.mark.parametrize(("lanes", "old", "new"), [(32, 1000, 1), (8, 512, 512)])
def test_append(
    measure: Any, lanes: int, old: int, new: int, rotary: bool, dtype: torch.dtype, peer: str
) -> None:
    measure(append_case(lanes, old, new, dtype, rotary), peer)
