"""Attention on a GPU: against SDPA by backend, and FlexAttention where the mask is our own."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from bench_attention import BLOCK, padded
from gpu_case import BF16, F16, F32, Call, Goal, Sizes, Tensors, Work, backward_pass, cases
from harness import cu_seqlens, flat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mor_ext.reference import attention as plain

mor = torch.ops.mor

FLASH = SDPBackend.FLASH_ATTENTION
CUDNN = SDPBackend.CUDNN_ATTENTION
EFFICIENT = SDPBackend.EFFICIENT_ATTENTION

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(backend: SDPBackend, **options: Any) -> Attention:
    """With this backend or not at all; on the CPU, which has none of them, with any."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend) if query.is_cuda else nullcontext():
            return F.scaled_dot_product_attention(query, key, value, **options)

    return call


def flex(limit: Tensor, len_k: int, gqa: bool) -> Attention:
    """FlexAttention for limit int32 [batch, len_q]; its mask is made beforehand."""
    batch, len_q = limit.shape
    mask = create_block_mask(
        lambda b, h, q, k: k < limit[b, q], batch, None, len_q, len_k, device=limit.device.type
    )
    call = flex_attention
    if limit.is_cuda:
        torch._functorch.config.donated_buffer = False  # else no backward pass runs twice
        call = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: call(query, key, value, block_mask=mask, enable_gqa=gqa)


def on_packed(
    batch: int,
    ours: Attention,
    peers: dict[str, Attention],
    packed: Tensors,
    limit: Tensor,
    backward: bool,
) -> dict[str, Any]:
    """ours over packed tensors and peers over padded ones; exact is of one sequence and KV head.

    packed: query [batch * len_q, heads, D], key and value [batch * len_k, kv_heads, D]; limit int32
    [batch, len_q]. The results are the output, or the gradients of query, key and value.
    """
    query, key, _ = packed
    (len_q, len_k), group = (len(x) // batch for x in (query, key)), query.shape[1] // key.shape[1]
    b, kv_head = (int(torch.randint(n, ())) for n in (batch, key.shape[1]))
    kv_heads = slice(kv_head, kv_head + 1)
    heads = slice(kv_head * group, (kv_head + 1) * group)

    def chosen(x: Tensor, heads: slice) -> Tensor:
        """[len, heads, D] out of packed [batch * len, H, D] or padded [batch, H, len, D]."""
        by_batch = x.unflatten(0, (batch, -1)) if x.dim() == 3 else x.transpose(1, 2)
        return by_batch[b, :, heads]

    def part(results: Any) -> list[Tensor]:
        return [chosen(x, kv_heads if i else heads) for i, x in enumerate(flat(results))]

    def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cu_q, cu_k, scale = cu_seqlens(1, len_q), cu_seqlens(1, len_k), query.shape[-1] ** -0.5
        args = (query, key, value, cu_q, cu_k, limit[b], len_q, len_k, scale)
        return plain.attention(*args)[0]

    def run(function: Attention, inputs: Tensors, grad: Tensor) -> Call:
        if backward:
            return backward_pass(function, inputs, [grad])
        return lambda: function(*inputs)

    grad = torch.randn_like(query)
    by_padding = [padded(x, batch) for x in packed]
    return {
        "ours": run(ours, packed, grad),
        "peers": {n: run(f, by_padding, padded(grad, batch)) for n, f in peers.items()},
        "exact": lambda: run(
            reference, [x.double() for x in part(packed)], chosen(grad, heads).double()
        )(),
        "part": part,
    }


def flops_of(heads: int, head_dim: int, pairs: int, backward: bool = False) -> int:
    """Of that many visible pairs: two matrix products forward, five backward."""
    return (10 if backward else 4) * heads * head_dim * pairs


def causal(
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    backward: bool = False,
) -> Work:
    query = torch.randn(batch * length, heads, head_dim, dtype=dtype)
    key, value = torch.randn(2, batch * length, kv_heads, head_dim, dtype=dtype)
    cu, scale = cu_seqlens(batch, length), head_dim**-0.5

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mor.attention(query, key, value, cu, cu, None, length, length, scale)[0]

    options = {"is_causal": True, "enable_gqa": heads != kv_heads}
    backends = {"efficient": EFFICIENT} if dtype == F32 else {"flash": FLASH, "cudnn": CUDNN}
    return Work(
        **on_packed(
            batch,
            ours,
            {name: sdpa(backend, **options) for name, backend in backends.items()},
            (query, key, value),
            torch.arange(1, length + 1, dtype=torch.int32).expand(batch, -1),
            backward,
        ),
        bytes=2 * (query.nbytes + key.nbytes) * (2 if backward else 1),
        flops=flops_of(heads, head_dim, batch * length * (length + 1) // 2, backward),
    )


def shared_kv(
    batch: int,
    active: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    backward: bool = False,
) -> Work:
    """A deeper recursion under KV sharing: the active tokens look back at all tokens."""
    query = torch.randn(batch * active, heads, head_dim, dtype=dtype)
    key, value = torch.randn(2, batch * length, kv_heads, head_dim, dtype=dtype)
    position = torch.stack([torch.randperm(length)[:active].sort().values for _ in range(batch)])
    limit = (position + 1).int()
    cu_q, cu_k, scale = cu_seqlens(batch, active), cu_seqlens(batch, length), head_dim**-0.5
    gqa = heads != kv_heads

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return mor.attention(query, key, value, cu_q, cu_k, limit.flatten(), active, length, scale)[
            0
        ]

    peers: dict[str, Attention] = {}
    if query.is_cuda or not backward:  # FlexAttention has no backward pass on the CPU
        peers["flex"] = flex(limit, length, gqa)
    if not gqa:  # which this backend lacks
        visible = (torch.arange(length) <= position[..., None])[:, None]
        peers["dense mask"] = sdpa(EFFICIENT, attn_mask=visible)
    plain_causal = causal(batch, length, heads, kv_heads, head_dim, dtype, backward)
    return Work(
        **on_packed(batch, ours, peers, (query, key, value), limit, backward),
        bytes=2 * (query.nbytes + key.nbytes) * (2 if backward else 1),
        flops=flops_of(heads, head_dim, int(limit.sum()), backward),
        yardsticks={"own causal": (plain_causal.ours, plain_causal.flops)},
    )


def paged(
    lanes: int,
    new: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> Work:
    """Every lane holds `length` entries and asks with its last `new` tokens."""
    blocks = -(-length // BLOCK)
    block_table = torch.randperm(lanes * blocks).view(lanes, blocks).int()
    keys, values = torch.randn(2, lanes * blocks, BLOCK, kv_heads, head_dim, dtype=dtype)
    query = torch.randn(lanes * new, heads, head_dim, dtype=dtype)
    lengths = torch.full((lanes,), length, dtype=torch.int32)
    cu, scale = cu_seqlens(lanes, new), head_dim**-0.5

    def dense(cache: Tensor) -> Tensor:
        """[lanes, kv_heads, length, D]"""
        return cache[block_table].flatten(1, 2)[:, :length].transpose(1, 2)

    mask = {} if new == 1 else {"attn_mask": causal_lower_right(new, length)}
    unpaged = sdpa(FLASH, enable_gqa=heads != kv_heads, **mask)
    query_padded, key, value = (
        padded(query, lanes),
        *(dense(c).contiguous() for c in (keys, values)),
    )
    lane, kv_head = int(torch.randint(lanes, ())), int(torch.randint(kv_heads, ()))
    group = heads // kv_heads
    chosen = slice(kv_head * group, (kv_head + 1) * group)

    def part(out: Tensor) -> Tensor:
        """[new, group, D] of packed or padded."""
        by_lane = out.unflatten(0, (lanes, -1)) if out.dim() == 3 else out.transpose(1, 2)
        return by_lane[lane, :, chosen]

    def exact() -> Tensor:
        caches = [cache[:, :, kv_head : kv_head + 1].double() for cache in (keys, values)]
        at = slice(lane, lane + 1)
        rows = part(query).double()
        args = (rows, *caches, block_table[at], lengths[at], cu_seqlens(1, new), None, new, scale)
        return plain.paged_attention(*args)[0]

    return Work(
        ours=lambda: mor.paged_attention(
            query, keys, values, block_table, lengths, cu, None, new, scale
        )[0],
        exact=exact,
        peers={
            "flash, unpaged cache": lambda: unpaged(query_padded, key, value),
            "gather + flash": lambda: unpaged(query_padded, dense(keys), dense(values)),
        },
        bytes=lanes * length * 2 * kv_heads * head_dim * keys.itemsize + 2 * query.nbytes,
        flops=flops_of(heads, head_dim, lanes * (new * length - new * (new - 1) // 2)),
        fixed_us=4,
        part=part,
    )


def heads(heads: int, kv_heads: int, head_dim: int) -> Sizes:
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}


def tokens_16k(length: int, of: Sizes) -> Sizes:
    return {"batch": 16384 // length, "length": length} | of


def decode(lanes: int, new: int, length: int, of: Sizes) -> Sizes:
    return {"lanes": lanes, "new": new, "length": length} | of


SMALL, D64, D128 = heads(4, 2, 16), heads(32, 32, 64), heads(16, 16, 128)
GQA, SMOL = heads(32, 8, 128), heads(15, 5, 64)
PEERS = Goal("ratio", 0.9, "flash"), Goal("ratio", 0.85, "cudnn", stretch=1.0)
OWN = Goal("rate", 0.9, "own causal")
LONG, BOTH = Goal("share", 0.80, stretch=0.92), ((), ("backward",))
SMALL_SHARED = {"batch": 2, "active": 11, "length": 35} | heads(2, 2, 16)

CASES = [
    *cases("attention", "attention", causal, {"batch": 2, "length": 37} | SMALL, [
        (tokens_16k(2048, D64), BF16, Goal("tflop_s", 300, stretch=360)),
        (tokens_16k(8192, D64), BF16, Goal("tflop_s", 400, stretch=460)),
        *((tokens_16k(length, D128), BF16, *PEERS) for length in (2048, 4096, 8192, 16384)),
        (tokens_16k(4096, D128), F16, *PEERS),
        (tokens_16k(4096, GQA), BF16, *PEERS),
        (tokens_16k(2048, SMOL), BF16),
        (tokens_16k(2048, D64), F32),
    ], label="causal"),
    *cases("attention", "attention", causal, {"batch": 2, "length": 37} | SMALL, [
        (tokens_16k(2048, D64), BF16, Goal("tflop_s", 270)),
        (tokens_16k(8192, D64), BF16, Goal("tflop_s", 360)),
        *((tokens_16k(length, D128), BF16, *PEERS) for length in (2048, 4096, 8192, 16384)),
        (tokens_16k(4096, GQA), BF16, *PEERS),
        (tokens_16k(2048, D64), F32),
    ], label="causal", flags=("backward",)),
    *cases("attention", "paged_attention", paged, decode(3, 2, 70, SMALL), [
        (decode(1, 1, 1024, SMOL), BF16, Goal("us", 9, stretch=5.5)),
        (decode(1, 1, 1024, GQA), BF16, Goal("us", 9, stretch=5.5)),
        (decode(1, 1, 131072, GQA), BF16, LONG),
        (decode(64, 1, 4096, GQA), BF16, LONG),
        (decode(4, 512, 4096, GQA), BF16),
    ]),
    *(case for flags in BOTH for case in cases("attention", "attention", shared_kv, SMALL_SHARED, [
        ({"batch": 4, "active": 2048, "length": 6144} | D64, BF16, OWN),
        ({"batch": 4, "active": 2048, "length": 6144} | D128, BF16, OWN),
    ], label="KV sharing", flags=flags)),
]  # fmt: skip
