"""paged_attention: decode, chunked prefill and mixtures over lanes of a paged cache."""

from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    GROUPS,
    HEAD_DIMS,
    KEY_LIMITS,
    assert_accurate,
    assert_bitwise,
    cu_seqlens_of,
    in_fp64,
    key_limit_of,
    map_tensors,
    scaled_atol,
)
from torch import Tensor

from mor_ext.ops.attention import attention, paged_attention
from mor_ext.reference.attention import attention as reference
from mor_ext.reference.attention import paged_attention as paged_reference

Args = dict[str, Any]
Pairs = list[tuple[int, int]]  # (queries, entries) of every lane

KINDS = ["causal", *KEY_LIMITS]
BLOCK_SIZES = [1, 3, 16, 64]
STEPS: dict[str, Pairs] = {
    "decode": [(1, 1), (1, 2), (1, 31), (1, 129), (1, 64), (1, 1134)],
    "prefill": [(31, 31), (129, 129), (64, 300), (2, 33)],
    "mixed": [(1, 129), (0, 40), (31, 62), (0, 0), (1, 1), (2, 0), (129, 129), (3, 2), (1, 700)],
}


def contiguous(
    pairs: Pairs, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, kind: str
) -> Args:
    """Arguments of attention, with the entries of the lanes one after the other."""
    total_q, total_k = (sum(lengths) for lengths in zip(*pairs, strict=True))
    return {
        "query": torch.randn(total_q, heads, head_dim).to(dtype),
        "key": torch.randn(total_k, kv_heads, head_dim).to(dtype),
        "value": torch.randn(total_k, kv_heads, head_dim).to(dtype),
        "cu_seqlens_q": cu_seqlens_of([pair[0] for pair in pairs]),
        "cu_seqlens_k": cu_seqlens_of([pair[1] for pair in pairs]),
        "key_limit": key_limit_of(kind, pairs),
        "max_seqlen_q": max(pair[0] for pair in pairs),
        "max_seqlen_k": max(pair[1] for pair in pairs),
        "softmax_scale": head_dim**-0.5,
    }


def page(args: Args, block_size: int) -> Args:
    """The same as arguments of paged_attention: entries in randomly placed blocks.

    Whatever no lane uses is NaN in the caches and far out of range in block_table.
    """
    cu_seqlens_k = args["cu_seqlens_k"].tolist()
    lengths = args["cu_seqlens_k"].diff().tolist()
    counts = [-(-length // block_size) for length in lengths]
    blocks = torch.randperm(sum(counts) + 3).tolist()
    shape = (len(blocks), block_size, *args["key"].shape[1:])
    caches = [torch.full(shape, torch.nan, dtype=args["key"].dtype) for _ in range(2)]
    block_table = torch.full((len(lengths), max(counts) + 2), 2**31 - 1, dtype=torch.int32)
    for lane, count in enumerate(counts):
        used = [blocks.pop() for _ in range(count)]
        block_table[lane, :count] = torch.tensor(used, dtype=torch.int32)
        entries = slice(cu_seqlens_k[lane], cu_seqlens_k[lane + 1])
        for cache, source in zip(caches, (args["key"], args["value"]), strict=True):
            lane_rows = torch.full((count * block_size, *shape[2:]), torch.nan, dtype=source.dtype)
            lane_rows[: lengths[lane]] = source[entries]
            cache[used] = lane_rows.unflatten(0, (count, block_size))
    return {
        "query": args["query"],
        "key_cache": caches[0],
        "value_cache": caches[1],
        "block_table": block_table,
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        **{n: args[n] for n in ("cu_seqlens_q", "key_limit", "max_seqlen_q", "softmax_scale")},
    }


def check(args: Args, block_size: int) -> None:
    results = (paged_attention(**page(args, block_size)), reference(**args))
    exact = reference(**in_fp64(args))
    for name, actual, eager, truth in zip(("out", "lse"), *results, exact, strict=True):
        atol = scaled_atol(truth, args["query"].dtype)
        assert_accurate(actual, eager, truth, atol, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("step", STEPS)
def test_accuracy(dtype: torch.dtype, head_dim: int, step: str, seed: int) -> None:
    # Block sizes, groups and masks rotate, so that each meets the others.
    place = DTYPES.index(dtype) + HEAD_DIMS.index(head_dim) + list(STEPS).index(step)
    group = GROUPS[place % len(GROUPS)]
    kv_heads = 1 if group == 8 else 2
    kind = KINDS[place % len(KINDS)]
    args = contiguous(STEPS[step], group * kv_heads, kv_heads, head_dim, dtype, kind)
    check(args, BLOCK_SIZES[place % len(BLOCK_SIZES)])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_size(block_size: int, kind: str, seed: int) -> None:
    check(contiguous(STEPS["mixed"], 6, 2, 64, torch.float32, kind), block_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_one_long_lane(dtype: torch.dtype, queries: int, seed: int) -> None:
    """What is split over its keys."""
    check(contiguous([(queries, 6007)], 8, 1, 64, dtype, "causal"), 16)


def test_reference(seed: int) -> None:
    args = contiguous(STEPS["mixed"], 4, 2, 16, torch.float64, "random")
    for name, paged, packed in zip(
        ("out", "lse"), paged_reference(**page(args, 16)), reference(**args), strict=True
    ):
        torch.testing.assert_close(paged, packed, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_like_attention(dtype: torch.dtype, seed: int) -> None:
    """The order in which tokens arrive changes nothing beyond rounding."""
    args = contiguous([(200, 200), (31, 31)], 4, 2, 64, dtype, "causal")
    whole, _ = attention(**args)
    starts = args["cu_seqlens_q"].tolist()
    for lane, length in enumerate((200, 31)):
        for rank in (0, 1, 15, 30, length - 1):
            keys = slice(starts[lane], starts[lane] + rank + 1)
            one = contiguous([(1, rank + 1)], 4, 2, 64, dtype, "causal")
            one["query"] = args["query"][keys][-1:]
            one["key"], one["value"] = args["key"][keys], args["value"][keys]
            out, _ = paged_attention(**page(one, 16))
            torch.testing.assert_close(out[0], whole[starts[lane] + rank])


@pytest.mark.parametrize("step", ["prefill", "mixed"])
def test_empty(step: str) -> None:
    args = page(contiguous(STEPS[step], 4, 2, 16, torch.float32, "causal"), 16)
    nothing = {
        "query": args["query"][:0],
        "block_table": args["block_table"][:0],
        "cache_seqlens": args["cache_seqlens"][:0],
        "cu_seqlens_q": args["cu_seqlens_q"][:1],
    }
    out, lse = paged_attention(**{**args, **nothing})
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0)
    no_cache = {name: args[name][:0] for name in ("key_cache", "value_cache")}
    no_entries = torch.zeros_like(args["cache_seqlens"])
    no_blocks = args["block_table"][:, :0]
    blind = {**args, **no_cache, "cache_seqlens": no_entries, "block_table": no_blocks}
    out, lse = paged_attention(**blind)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_shared_blocks(seed: int) -> None:
    """Lanes with a common prefix may share its blocks, and a lane may name a block twice."""
    args = page(contiguous([(2, 48), (2, 48)], 4, 2, 16, torch.float32, "causal"), 16)
    args["block_table"][1, :2] = args["block_table"][0, 0]
    eager = paged_reference(**args)
    exact = paged_reference(**in_fp64(args))
    for results in zip(paged_attention(**args), eager, exact, strict=True):
        assert_accurate(*results)


# ---- layouts ----


def fused_cache(cache: Tensor, other: Tensor) -> Tensor:
    return torch.stack([cache, other], dim=1)[:, 0]


def heads_first(cache: Tensor, _: Tensor) -> Tensor:
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def head_dim_strided(cache: Tensor, _: Tensor) -> Tensor:
    return cache.repeat_interleave(2, dim=3)[..., ::2]


@pytest.mark.parametrize("layout", [fused_cache, heads_first, head_dim_strided])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout: Any, dtype: torch.dtype, seed: int) -> None:
    args = page(contiguous(STEPS["mixed"], 4, 2, 64, dtype, "random"), 16)
    key_cache, value_cache = args["key_cache"], args["value_cache"]
    strided = {
        **map_tensors(args, lambda t: t.repeat_interleave(2, dim=0)[::2]),
        "key_cache": layout(key_cache, value_cache),
        "value_cache": layout(value_cache, key_cache),
        "block_table": args["block_table"].T.contiguous().T,
    }
    for actual, expected in zip(paged_attention(**strided), paged_attention(**args), strict=True):
        assert_bitwise(actual, expected)


def test_past_2_to_the_31_elements(seed: int) -> None:
    # Four GiB of address space a cache, of which only the blocks in use are ever touched.
    args = page(contiguous([(1, 20), (2, 30)], 2, 1, 64, torch.bfloat16, "causal"), 16)
    offset = 2**31 // (16 * 64) - 2
    far = dict(args)
    for name in ("key_cache", "value_cache"):
        cache = args[name]
        far[name] = torch.empty(offset + len(cache), *cache.shape[1:], dtype=cache.dtype)
        far[name][offset:] = cache
    far["block_table"] = (args["block_table"].long() + offset).clamp(max=2**31 - 1).int()
    for actual, expected in zip(paged_attention(**far), paged_attention(**args), strict=True):
        assert_bitwise(actual, expected)


# ---- determinism ----


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_any_number_of_threads(step: str, dtype: torch.dtype, seed: int) -> None:
    args = page(contiguous([*STEPS[step], (1, 3000)], 8, 2, 64, dtype, "random"), 16)
    threads = torch.get_num_threads()
    expected = paged_attention(**args)
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            for name, actual, first in zip(
                ("out", "lse"), paged_attention(**args), expected, strict=True
            ):
                assert_bitwise(actual, first, name)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lane_does_not_depend_on_its_batch(dtype: torch.dtype, seed: int) -> None:
    args = page(contiguous([*STEPS["mixed"], (1, 3000)], 8, 2, 64, dtype, "random"), 16)
    out, lse = paged_attention(**args)
    starts = args["cu_seqlens_q"].tolist()
    for lane in range(len(starts) - 1):
        rows = slice(starts[lane], starts[lane + 1])
        alone = {
            **args,
            **{name: args[name][rows] for name in ("query", "key_limit")},
            **{name: args[name][lane : lane + 1] for name in ("block_table", "cache_seqlens")},
            "cu_seqlens_q": cu_seqlens_of([rows.stop - rows.start]),
        }
        alone_out, alone_lse = paged_attention(**alone)
        assert_bitwise(alone_out, out[rows], f"out of lane {lane}")
        assert_bitwise(alone_lse, lse[:, rows], f"lse of lane {lane}")


def test_generous_maximum(seed: int) -> None:
    args = page(contiguous(STEPS["mixed"], 4, 2, 64, torch.float32, "causal"), 16)
    generous = {**args, "max_seqlen_q": 2**40}
    for actual, expected in zip(paged_attention(**generous), paged_attention(**args), strict=True):
        assert_bitwise(actual, expected)
