"""paged_attention: decode, chunked prefill and mixtures over lanes of a paged cache."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import (
    DTYPES,
    GROUPS,
    HEAD_DIMS,
    KEY_LIMITS,
    Backend,
    assert_accurate,
    assert_bitwise,
    cu_seqlens_of,
    in_fp64,
    key_limit_of,
    map_tensors,
    scaled_atol,
    sized,
    unchecked,
)
from torch import Tensor

from mor_ext.ops.attention import attention, paged_attention
from mor_ext.reference.attention import attention as reference
from mor_ext.reference.attention import paged_attention as paged_reference

pytestmark = pytest.mark.usefixtures("backend")
not_on_cpu = pytest.mark.backends(Backend.SIMT, Backend.CUDA)

Args = dict[str, Any]
Pairs = list[tuple[int, int]]  # (queries, entries) of every lane

KINDS = ["causal", *KEY_LIMITS]
BLOCK_SIZES = [1, 3, 16, 64]
STEPS: dict[str, Pairs] = {
    "decode": [(1, 1), (1, 2), (1, 31), (1, 129), (1, 64), (1, 1134)],
    "prefill": [(31, 31), (129, 129), (64, 300), (2, 33)],
    "mixed": [(1, 129), (0, 40), (31, 62), (0, 0), (1, 1), (2, 0), (129, 129), (3, 2), (1, 700)],
}
# The same where a kernel takes some thousand times longer.
FEW_STEPS: dict[str, Pairs] = {
    "decode": [(1, 1), (1, 31), (1, 260)],
    "prefill": [(31, 31), (70, 75), (2, 33)],
    "mixed": [(1, 129), (0, 40), (24, 62), (0, 0), (2, 0), (35, 40), (3, 2)],
}


def steps(name: str) -> Pairs:
    return sized(STEPS, FEW_STEPS)[name]


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
    args = contiguous(steps(step), group * kv_heads, kv_heads, head_dim, dtype, kind)
    check(args, BLOCK_SIZES[place % len(BLOCK_SIZES)])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_size(block_size: int, kind: str, seed: int) -> None:
    check(contiguous(steps("mixed"), 6, 2, 64, torch.float32, kind), block_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_one_long_lane(dtype: torch.dtype, queries: int, seed: int) -> None:
    """What is split over its keys."""
    check(contiguous([(queries, sized(6007, 1503))], 8, 1, 64, dtype, "causal"), 16)


@pytest.mark.parametrize("kind", ["causal", "random"])
@pytest.mark.parametrize("kv_heads", [1, 16])
def test_where_pieces_begin_and_end(kind: str, kv_heads: int, seed: int) -> None:
    """Lengths around those where another piece begins, and so many that pieces grow."""
    longest = 2049 if kv_heads == 16 else 512
    lengths = [63, 64, 65, 127, 128, 129, 193, 255, 256, 257, longest]
    pairs = [(1 + i % 2, length) for i, length in enumerate(sized(lengths, lengths[3::3]))]
    check(contiguous(pairs, kv_heads, kv_heads, 8, torch.bfloat16, kind), 16)


@pytest.mark.parametrize("group", [1, 8, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_rows_and_many(group: int, dtype: torch.dtype, seed: int) -> None:
    """As many queries as one way of working takes, and one more."""
    few = max(1, 64 // group)
    check(contiguous([(few, 300), (few + 1, 140), (few, few)], group, 1, 16, dtype, "causal"), 3)


def test_many_lanes(seed: int) -> None:
    lengths = torch.randint(-20, 20, (100,)).clamp(min=0).tolist()
    pairs = [(int(torch.randint(3, ())), length) for length in lengths]
    check(contiguous([*pairs, (1, 140), (0, 0)], 2, 1, 8, torch.bfloat16, "random"), 4)


@pytest.mark.backends(Backend.CPU)
def test_reference(seed: int) -> None:
    args = contiguous(STEPS["mixed"], 4, 2, 16, torch.float64, "random")
    for name, paged, packed in zip(
        ("out", "lse"), paged_reference(**page(args, 16)), reference(**args), strict=True
    ):
        torch.testing.assert_close(paged, packed, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_like_attention(dtype: torch.dtype, backend: Backend, seed: int) -> None:
    """The order in which tokens arrive changes nothing beyond rounding."""
    eps = torch.finfo(dtype).eps
    # Tensor cores take weights of 16 bits, rounded in another order.
    on_tensor_cores = {"atol": max(1e-5, eps / 2), "rtol": max(1e-6, 2 * eps)}
    tolerance = {} if backend == Backend.CPU else on_tensor_cores
    lengths = sized((200, 31), (140, 31))
    args = contiguous([(length, length) for length in lengths], 4, 2, 64, dtype, "causal")
    whole, _ = attention(**args)
    starts = args["cu_seqlens_q"].tolist()
    for lane, length in enumerate(lengths):
        for rank in (0, 1, 15, 30, length - 1):
            keys = slice(starts[lane], starts[lane] + rank + 1)
            one = contiguous([(1, rank + 1)], 4, 2, 64, dtype, "causal")
            one["query"] = args["query"][keys][-1:]
            one["key"], one["value"] = args["key"][keys], args["value"][keys]
            out, _ = paged_attention(**page(one, 16))
            torch.testing.assert_close(out[0], whole[starts[lane] + rank], **tolerance)


@pytest.mark.parametrize("step", ["prefill", "mixed"])
def test_empty(step: str) -> None:
    args = page(contiguous(steps(step), 4, 2, 16, torch.float32, "causal"), 16)
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


# ---- special values, in one piece and over several ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softmax_scale", [0.0, -0.5, 1e-30])
def test_unusual_scales(dtype: torch.dtype, softmax_scale: float, seed: int) -> None:
    args = contiguous([(3, 300), (2, 40)], 2, 1, 16, dtype, "random")
    check({**args, "softmax_scale": softmax_scale}, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype: torch.dtype, seed: int) -> None:
    """Integers keep the scores exact; they reach 1e4, far past the range of exp."""
    args = contiguous([(3, 300), (2, 40)], 2, 1, 64, dtype, "random")
    for name in ("query", "key"):
        args[name] = torch.randint(-4, 5, args[name].shape).to(dtype)
    check({**args, "softmax_scale": 32.0}, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_minus_infinity(dtype: torch.dtype, seed: int) -> None:
    """An entry of score -inf counts as not seen, also where a lane or a piece has no others."""
    args = contiguous([(2, 300), (1, 2)], 2, 1, 64, dtype, "causal")
    args["query"][..., 0] = 1
    args["key"][[*range(100, 290), 300, 301], :, 0] = -torch.inf
    paged = page(args, 16)
    actual = paged_attention(**paged)
    assert (actual[0][2] == 0).all() and (actual[1][:, 2] == -torch.inf).all()
    for results in zip(actual, reference(**args), reference(**in_fp64(args)), strict=True):
        assert_accurate(*results, scaled_atol(results[-1], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [torch.inf, torch.nan])
def test_special_scores_stay_visible(dtype: torch.dtype, special: float, seed: int) -> None:
    """Queries that see the entry give NaN; the others are not touched by it."""
    args = contiguous([(5, 300), (5, 20)], 2, 1, 64, dtype, "causal")
    args["query"][..., 0] = 1
    args["key"][[297, 317], :, 0] = 0
    expected_out, expected_lse = paged_attention(**page(args, 16))
    args["key"][[297, 317], :, 0] = special
    out, lse = paged_attention(**page(args, 16))
    sees, others = [2, 3, 4, 7, 8, 9], [0, 1, 5, 6]
    assert out[sees].isnan().all() and not lse[:, sees].isfinite().any()
    assert_bitwise(out[others], expected_out[others])
    assert_bitwise(lse[:, others], expected_lse[:, others])


# ---- layouts ----


def fused_cache(cache: Tensor, other: Tensor) -> Tensor:
    return torch.stack([cache, other], dim=1)[:, 0]


def heads_first(cache: Tensor, _: Tensor) -> Tensor:
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def head_dim_strided(cache: Tensor, _: Tensor) -> Tensor:
    return cache.repeat_interleave(2, dim=3)[..., ::2]


def unaligned(cache: Tensor, _: Tensor) -> Tensor:
    return torch.cat([cache.flatten()[:3], cache.flatten()])[3:].view(cache.shape)


@pytest.mark.parametrize("layout", [fused_cache, heads_first, head_dim_strided, unaligned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout: Any, dtype: torch.dtype, seed: int) -> None:
    args = page(contiguous(steps("mixed"), 4, 2, 64, dtype, "random"), 16)
    key_cache, value_cache = args["key_cache"], args["value_cache"]
    strided = {
        **map_tensors(args, lambda t: t.repeat_interleave(2, dim=0)[::2]),
        "key_cache": layout(key_cache, value_cache),
        "value_cache": layout(value_cache, key_cache),
        "block_table": args["block_table"].T.contiguous().T,
    }
    for actual, expected in zip(paged_attention(**strided), paged_attention(**args), strict=True):
        assert_bitwise(actual, expected)


FAR_CACHES: dict[str, Callable[[int], Sequence[Tensor]]] = {
    "dense": lambda n: [torch.empty(n, 16, 2, 64, dtype=torch.bfloat16) for _ in range(2)],
    "fused": lambda n: torch.empty(n, 2, 16, 2, 64, dtype=torch.bfloat16).unbind(1),
    "heads_first": lambda n: torch.empty(2, n, 2, 16, 64, dtype=torch.bfloat16).mT.mT.transpose(
        2, 3
    ),
}


@pytest.mark.parametrize("layout", FAR_CACHES)
def test_past_2_to_the_31_elements(layout: str, seed: int) -> None:
    """Of 4 GiB of address space a cache only the blocks in use are touched: nothing copies one."""
    args = page(contiguous([(1, 20), (40, 70)], 4, 2, 64, torch.bfloat16, "causal"), 16)
    blocks = len(args["key_cache"])
    offset = 2**31 // args["key_cache"][0].numel() - 2
    far = dict(args)
    far["key_cache"], far["value_cache"] = FAR_CACHES[layout](offset + blocks)
    for name in ("key_cache", "value_cache"):
        far[name][offset:] = args[name]
    far["block_table"] = (args["block_table"].long() + offset).clamp(max=2**31 - 1).int()
    for actual, expected in zip(paged_attention(**far), paged_attention(**args), strict=True):
        assert_bitwise(actual, expected)


# ---- contents that make no sense, unchecked ----


def among_foreign_memory(tensor: Tensor) -> Tensor:
    """The same between rows of NaN."""
    beyond = torch.full_like(tensor[:3], torch.nan)
    return torch.cat([beyond, tensor, beyond])[3:-3]


@not_on_cpu
@pytest.mark.parametrize("pairs", [[(2, 300), (1, 20)], [(70, 90)]], ids=["decode", "prefill"])
@pytest.mark.parametrize("bad", [-(2**31), -1, 0, 2**31 - 1])
def test_blocks_out_of_range_count_as_zeros(pairs: Pairs, bad: int, seed: int) -> None:
    args = page(contiguous(pairs, 4, 2, 16, torch.bfloat16, "causal"), 16)
    caches = [args[name].nan_to_num(1.0) for name in ("key_cache", "value_cache")]
    zeros = len(caches[0])
    args["key_cache"], args["value_cache"] = (torch.cat([c, c[:1] * 0]) for c in caches)
    args["block_table"][0, 1::2] = zeros
    args["block_table"].clamp_(max=zeros)
    expected = paged_attention(**args)
    args["key_cache"], args["value_cache"] = map(among_foreign_memory, caches)
    args["block_table"][0, 1::2] = bad if bad != 0 else zeros
    with unchecked():
        for actual, wanted in zip(paged_attention(**args), expected, strict=True):
            assert_bitwise(actual, wanted)


@not_on_cpu
@pytest.mark.parametrize("queries", [1, 70])
def test_lengths_out_of_range_are_clamped(queries: int, seed: int) -> None:
    args = page(contiguous([(queries, 96), (queries, 80)], 2, 1, 16, torch.bfloat16, "causal"), 16)
    args["block_table"] = args["block_table"][:, :6].contiguous()  # room for 96 entries
    args["block_table"][1, 5] = 0
    for name in ("key_cache", "value_cache"):
        args[name].nan_to_num_(1.0)
    for bad, meant in ((-1, 0), (-(2**31), 0), (97, 96), (2**31 - 1, 96)):
        args["cache_seqlens"][1] = meant
        expected = paged_attention(**args)
        args["cache_seqlens"][1] = bad
        with unchecked():
            for actual, wanted in zip(paged_attention(**args), expected, strict=True):
                assert_bitwise(actual, wanted)


@not_on_cpu
@pytest.mark.parametrize("pairs", [[(3, 300), (1, 20), (2, 9)], [(70, 90), (2, 9)]], ids=str)
def test_garbage(pairs: Pairs, seed: int) -> None:
    """Whatever indices hold, only the tensors' own memory is touched, and the call returns."""
    for _ in range(sized(40, 6)):
        args = page(contiguous(pairs, 4, 2, 16, torch.bfloat16, "random"), 16)
        args["max_seqlen_q"] = int(torch.randint(100, ()))
        for name in ("block_table", "cache_seqlens", "cu_seqlens_q", "key_limit"):
            index = args[name]
            junk = torch.randint(-(2**31), 2**31, index.shape).int()
            junk = torch.where(torch.rand(index.shape) < 0.5, junk, junk % 100)
            args[name] = torch.where(torch.rand(index.shape) < 0.3, junk, index)
        with unchecked():
            out, lse = paged_attention(**args)
        assert out.shape == args["query"].shape and lse.shape == (4, len(out))


# ---- determinism ----


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(step: str, dtype: torch.dtype, seed: int) -> None:
    """On any number of threads, in any order of blocks."""
    args = page(contiguous([*steps(step), (1, sized(3000, 300))], 8, 2, 64, dtype, "random"), 16)
    threads = torch.get_num_threads()
    expected = paged_attention(**args)
    try:
        for count in sized((1, 2, 3, 3), (1,)):
            torch.set_num_threads(count)
            for name, actual, first in zip(
                ("out", "lse"), paged_attention(**args), expected, strict=True
            ):
                assert_bitwise(actual, first, name)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lane_does_not_depend_on_its_batch(dtype: torch.dtype, seed: int) -> None:
    longest = sized(3000, 400)
    args = page(contiguous([*steps("mixed"), (1, longest)], 8, 2, 64, dtype, "random"), 16)
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
    args = page(contiguous(steps("mixed"), 4, 2, 64, torch.float32, "causal"), 16)
    generous = {**args, "max_seqlen_q": 2**40}
    for actual, expected in zip(paged_attention(**generous), paged_attention(**args), strict=True):
        assert_bitwise(actual, expected)
