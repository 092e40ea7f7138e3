"""Attention against scaled_dot_product_attention and plain softmax, each in its own layout."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import OURS, Case, compiled, cu_seqlens, differentiable_peers
from torch import Tensor

mor = torch.ops.mor

BLOCK = 16


def padded(x: Tensor, batch: int) -> Tensor:
    """Packed [batch * length, heads, D] as PyTorch's [batch, heads, length, D], contiguous."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value


def attention_peers(
    batch: int,
    packed: tuple[Tensor, Tensor, Tensor],
    functions: dict[str, Callable[..., Tensor]],
    backward: bool,
) -> dict[str, Callable[[], Any]]:
    """Ours over packed tensors, the others over padded ones; results are views ordered as ours."""
    ours = differentiable_peers({OURS: functions.pop(OURS)}, packed, backward)
    by_length = {name: lambda *x, f=f: f(*x).transpose(1, 2) for name, f in functions.items()}
    theirs = differentiable_peers(by_length, [padded(x, batch) for x in packed], backward)
    if not backward:
        return ours | theirs
    return ours | {
        name: lambda f=f: [grad.transpose(1, 2) for grad in f()] for name, f in theirs.items()
    }


@lru_cache(1)
def causal_case(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, backward: bool = False
) -> Case:
    packed = torch.randn(3, batch * length, heads, head_dim, dtype=dtype).unbind()
    cu, scale = cu_seqlens(batch, length), head_dim**-0.5
    visible = torch.ones(length, length, dtype=torch.bool).tril()

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mor.attention(query, key, value, cu, cu, None, length, length, scale)[0]

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return softmax_attention(query, key, value, visible)

    functions = {OURS: ours, "sdpa": sdpa, "eager": eager, "compiled": compiled(eager)}
    pairs = batch * heads * length * (length + 1) // 2
    speedup = 1.0 if backward else {torch.float32: 1.2, torch.bfloat16: 2.0}.get(dtype)
    return Case(
        op="attention causal" + " fwd+bwd" * backward,
        shape=f"B{batch} H{heads} S{length} D{head_dim}",
        dtype=dtype,
        peers=attention_peers(batch, packed, functions, backward),
        bytes=4 * packed[0].nbytes * (3 if backward else 1),
        flops=4 * head_dim * pairs + (10 * head_dim * pairs if backward else 0),
        goals={"sdpa": speedup} if speedup else {},
    )


@lru_cache(1)
def shared_kv_case(
    batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, backward: bool = False
) -> Case:
    """A deeper recursion under KV sharing: the active third looks back at all tokens."""
    active, scale = length // 3, head_dim**-0.5
    query = torch.randn(batch * active, heads, head_dim, dtype=dtype)
    key, value = torch.randn(2, batch * length, heads, head_dim, dtype=dtype)
    position = torch.stack([torch.randperm(length)[:active].sort().values for _ in range(batch)])
    key_limit = (position + 1).int().flatten()
    visible = (torch.arange(length) <= position[..., None])[:, None]  # [batch, 1, active, length]
    cu_q, cu_k = cu_seqlens(batch, active), cu_seqlens(batch, length)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mor.attention(query, key, value, cu_q, cu_k, key_limit, active, length, scale)[0]

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible)

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return softmax_attention(query, key, value, visible)

    functions = {OURS: ours, "sdpa": sdpa, "eager": eager, "compiled": compiled(eager)}
    pairs = heads * int(key_limit.sum())
    speedup = 1.0 if backward else {torch.float32: 2.0, torch.bfloat16: 3.0}.get(dtype)
    return Case(
        op="attention KV sharing" + " fwd+bwd" * backward,
        shape=f"B{batch} H{heads} S{active} of {length} D{head_dim}",
        dtype=dtype,
        peers=attention_peers(batch, (query, key, value), functions, backward),
        bytes=2 * (query.nbytes + key.nbytes) * (3 if backward else 1),
        flops=4 * head_dim * pairs + (10 * head_dim * pairs if backward else 0),
        goals={"sdpa": speedup} if speedup else {},
    )


@pytest.mark.parametrize("peer", [OURS, "sdpa", "eager", "compiled"])
@pytest.mark.parametrize(
    ("dtype", "backward"),
    [
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.float32, True),
        (torch.bfloat16, True),
    ],
)
@pytest.mark.parametrize("case", [causal_case, shared_kv_case])
def test_attention(
    measure: Any, case: Callable[..., Case], dtype: torch.dtype, backward: bool, peer: str
) -> None:
    measure(case(4, 8, 1024, 64, dtype, backward), peer)


@pytest.mark.parametrize("peer", [OURS, "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_d128(measure: Any, dtype: torch.dtype, peer: str) -> None:
    measure(causal_case(2, 8, 1024, 128, dtype), peer)


@pytest.mark.parametrize("peer", [OURS, "sdpa"])
def test_attention_fp16(measure: Any, peer: str) -> None:
    measure(causal_case(4, 8, 1024, 64, torch.float16), peer)


@lru_cache(1)
def paged_case(
    lanes: int, new: int, longest: int, heads: int, kv_heads: int, dtype: torch.dtype
) -> Case:
    """Lanes between half full and full; each asks with its last `new` tokens."""
    head_dim, lane_blocks = 64, longest // BLOCK
    lengths = torch.linspace(longest, longest // 2, lanes).int()
    block_table = torch.randperm(lanes * lane_blocks).view(lanes, lane_blocks).int()
    keys, values = torch.randn(2, lanes * lane_blocks, BLOCK, kv_heads, head_dim, dtype=dtype)
    query = torch.randn(lanes * new, heads, head_dim, dtype=dtype)
    cu, scale = cu_seqlens(lanes, new), head_dim**-0.5
    limit = lengths[:, None] - new + 1 + torch.arange(new)  # [lanes, new]
    visible = (torch.arange(longest) < limit[..., None])[:, None]
    query_padded = padded(query, lanes)

    def ours() -> Tensor:
        out, _ = mor.paged_attention(
            query, keys, values, block_table, lengths, cu, None, new, scale
        )
        return out

    def dense(cache: Tensor) -> Tensor:
        """[lanes, kv_heads, longest, D]"""
        return cache[block_table].flatten(1, 2).transpose(1, 2)

    def sdpa(key: Tensor, value: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(
            query_padded, key, value, attn_mask=visible, enable_gqa=heads != kv_heads
        )
        return out.transpose(1, 2)

    def eager() -> Tensor:
        return sdpa(dense(keys), dense(values))

    # What an unpaged cache would give: no gather, every lane at its full width.
    dense_key, dense_value = dense(keys).contiguous(), dense(values).contiguous()
    eager_compiled = compiled(eager)
    return Case(
        op="paged_attention",
        shape=f"{lanes} lanes, {new} on up to {longest}, H{heads}/{kv_heads} D64",
        dtype=dtype,
        peers={
            OURS: ours,
            "sdpa": lambda: sdpa(dense_key, dense_value),
            "eager": eager,
            "compiled": lambda: eager_compiled(),
        },
        bytes=2 * int(lengths.sum()) * kv_heads * head_dim * keys.itemsize + 2 * query.nbytes,
        flops=4 * head_dim * heads * int(limit.sum()),
    )


@pytest.mark.parametrize("peer", [OURS, "sdpa", "eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lanes", "new"), [(32, 1), (1, 1), (4, 128)])
def test_paged_attention(measure: Any, lanes: int, new: int, dtype: torch.dtype, peer: str) -> None:
    longest = 8192 if lanes == 1 else 1024
    measure(paged_case(lanes, new, longest, 8, 2, dtype), peer)
