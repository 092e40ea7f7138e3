"""Rotary embedding and the paged KV cache on a GPU: thousands of tokens, and a few."""

from typing import Any

import torch
from bench_kv_cache import BLOCK, rotate_both
from gpu_case import BF16, I32, Call, Goal, Sizes, Work, cases, one_pass, wide
from harness import cu_seqlens
from torch import Tensor

from mor_ext.reference import kv_cache as plain

mor = torch.ops.mor


def tables(positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [positions, head_dim / 2]."""
    angle = torch.arange(positions)[:, None] * 1e4 ** -(torch.arange(0, head_dim, 2) / head_dim)
    return angle.cos(), angle.sin()


def rotary(
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    backward: bool = False,
) -> Work:
    query = torch.randn(tokens, heads, head_dim, dtype=dtype)
    key = torch.randn(tokens, kv_heads, head_dim, dtype=dtype)
    positions = torch.randperm(2 * tokens)[:tokens].sort().values.int()
    cos, sin = tables(2 * tokens, head_dim)
    return Work(
        **one_pass(
            lambda query, key: mor.rotary(query, key, cos, sin, positions),
            lambda query, key: plain.rotary(query, key, *wide(cos, sin), positions),
            {"eager": lambda query, key: rotate_both(query, key, cos, sin, positions)},
            inputs=[query, key],
            grads=[torch.randn_like(query), torch.randn_like(key)] if backward else [],
        ),
        bytes=2 * (query.nbytes + key.nbytes),
    )


def append(
    lanes: int,
    new: int,
    old: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    rotate: bool = False,
) -> Work:
    """Every lane holds `old` entries and gets `new` more."""
    tokens, blocks = lanes * new, -(-(old + new) // BLOCK)
    query = torch.randn(tokens, heads, head_dim, dtype=dtype)
    key, value = torch.randn(2, tokens, kv_heads, head_dim, dtype=dtype)
    cos, sin = tables(old + new, head_dim)
    positions = torch.arange(old, old + new, dtype=I32).repeat(lanes)
    block_table = torch.randperm(lanes * blocks).view(lanes, blocks).int()
    lengths, cu = torch.full((lanes,), old, dtype=I32), cu_seqlens(lanes, new)
    token = torch.arange(tokens, dtype=I32)

    def into_cache(kv_append: Any, rotary_kv_append: Any, widen: bool = False) -> Call:
        data = (query, key, value, cos, sin)
        q, k, v, c, s = wide(*data) if widen else data
        caches = [k.new_zeros(lanes * blocks, BLOCK, kv_heads, head_dim) for _ in range(2)]

        def call() -> tuple[Tensor, ...]:
            if rotate:
                where = (positions, *caches, block_table, lengths, cu)
                return rotary_kv_append(q, k, v, c, s, *where), *caches
            kv_append(k, v, *caches, block_table, lengths, cu)
            return tuple(caches)

        return call

    def index_copy(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, *_: Tensor) -> None:
        lane = torch.searchsorted(cu, token, right=True) - 1
        entry = lengths[lane] + token - cu[lane]
        slot = (block_table[lane, entry // BLOCK] * BLOCK + entry % BLOCK).long()
        keys.flatten(0, 1).index_copy_(0, slot, key)
        values.flatten(0, 1).index_copy_(0, slot, value)

    def rotate_index_copy(
        query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, *where: Tensor
    ) -> Tensor:
        query, key = rotate_both(query, key, cos, sin, where[0])
        index_copy(key, value, *where[1:])
        return query

    return Work(
        ours=into_cache(mor.kv_append, mor.rotary_kv_append),
        exact=into_cache(plain.kv_append, plain.rotary_kv_append, widen=True),
        peers={"index_copy_": into_cache(index_copy, rotate_index_copy)},
        bytes=2 * (key.nbytes + value.nbytes + rotate * query.nbytes),
    )


def heads(heads: int, kv_heads: int, head_dim: int) -> Sizes:
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}


def lanes(lanes: int, new: int, old: int) -> Sizes:
    return {"lanes": lanes, "new": new, "old": old}


SMALL, GQA64, GQA128 = heads(4, 2, 16), heads(16, 8, 64), heads(32, 8, 128)
FEW, NEAR_COPY = Goal("us", 4), Goal("share", 0.75)
PREFILL = {"tokens": 16384}
ROTARY = [(PREFILL | GQA64, BF16), (PREFILL | GQA128, BF16)]
APPEND = [
    (lanes(8, 2048, 0) | GQA128, BF16, NEAR_COPY),
    (lanes(32, 1024, 1000) | GQA64, BF16, NEAR_COPY),
    (lanes(512, 1, 1000) | GQA64, BF16, FEW),
    (lanes(32, 1, 1000) | GQA64, BF16, FEW),
]
SMALL_LANES = lanes(3, 5, 14) | SMALL

CASES = [
    *cases("kv_cache", "rotary", rotary, {"tokens": 30} | SMALL, ROTARY),
    *cases("kv_cache", "rotary", rotary, {"tokens": 30} | SMALL, ROTARY, flags=("backward",)),
    *cases("kv_cache", "kv_append", append, SMALL_LANES, APPEND),
    *cases("kv_cache", "rotary_kv_append", append, SMALL_LANES, APPEND, flags=("rotate",)),
]
