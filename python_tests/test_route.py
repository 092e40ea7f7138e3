"""route_topk and route_depth against the reference and against what they promise."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import (
    DTYPES,
    LENGTHS,
    Backend,
    assert_bitwise,
    backend_dtypes,
    cu_seqlens_of,
    map_tensors,
    sized,
    unchecked,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mor_ext import ops
from mor_ext.reference import route as reference

pytestmark = pytest.mark.usefixtures("backend")

NAN, INF = float("nan"), float("inf")
# What one block of the CUDA kernels holds, by the number of its threads.
BLOCKS = [512, 2048, 4096, 8192, 16384]
CHUNK = 8192  # of the CUDA kernels for longer sequences


def special(count: int) -> Tensor:
    """NaN, infinities, zeros of both signs, denormals of every dtype and a few ordinary numbers."""
    tiny = [2.0**-149, -(2.0**-149), 2.0**-140, 2.0**-24, -(2.0**-24), 2.0**-20, 5e-324]
    values = torch.tensor(
        [NAN, -NAN, INF, -INF, 0.0, -0.0, *tiny, 1.0, -1.0, 65504.0], dtype=torch.double
    )
    return values[torch.randint(len(values), (count,))]


SCORES: dict[str, Callable[[int], Tensor]] = {
    "normal": lambda n: torch.randn(n),
    "sigmoid": lambda n: torch.randn(n).sigmoid(),
    "ties": lambda n: torch.randint(-2, 3, (n,)).double(),
    "equal": lambda n: torch.full((n,), -1.5),
    "special": special,
    "nan": lambda n: torch.full((n,), NAN),
    "descending": lambda n: -torch.arange(n).double(),
}
PICKS: dict[str, Callable[[int], int]] = {
    "none": lambda n: 0,
    "one": lambda n: min(n, 1),
    "third": lambda n: n // 3,
    "all but one": lambda n: max(n - 1, 0),
    "all": lambda n: n,
}


def topk_args(
    scores: Tensor, lengths: list[int], picks: list[int], max_seqlen: int | None = None
) -> dict[str, Any]:
    return {
        "scores": scores,
        "cu_seqlens": cu_seqlens_of(lengths),
        "cu_seqlens_out": cu_seqlens_of(picks),
        "total_out": sum(picks),
        "max_seqlen": max(lengths, default=0) if max_seqlen is None else max_seqlen,
    }


def random_topk_args(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    lengths = [0, 700, 1, 0, 1134, 129]
    picks = [int(torch.randint(n + 1, ())) for n in lengths]
    return topk_args(torch.randn(sum(lengths)).to(dtype), lengths, picks)


# ---- route_topk ----


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_route_topk_is_the_reference(seed: int, dtype: torch.dtype, kind: str, pick: str) -> None:
    lengths = [*LENGTHS, 0]
    scores = SCORES[kind](sum(lengths)).to(dtype)
    args = topk_args(scores, lengths, [PICKS[pick](n) for n in lengths])
    assert_bitwise(ops.route_topk(**args), reference.route_topk(**args))


@pytest.mark.parametrize("length", [n + step for n in BLOCKS for step in (-1, 0, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_route_topk_where_blocks_end(seed: int, dtype: torch.dtype, length: int) -> None:
    args = topk_args(torch.randn(length).to(dtype), [length], [length // 3])
    assert_bitwise(ops.route_topk(**args), reference.route_topk(**args))


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_route_topk_of_a_long_sequence(seed: int, dtype: torch.dtype, kind: str) -> None:
    length = sized(300001, 30001)
    args = topk_args(SCORES[kind](length).to(dtype), [length], [length // 3])
    assert_bitwise(ops.route_topk(**args), reference.route_topk(**args))


MIXTURES: dict[str, Callable[[], list[int]]] = {
    "one token": lambda: [1],
    "short": lambda: [5, 700, 0, 513],
    "short and long": lambda: [5, 17001, 0, 300, 16384, 16385, 1],
    "at chunks": lambda: [CHUNK, 3 * CHUNK, 0, 16385, CHUNK - 1, 2 * CHUNK + 1],
    "random": lambda: [int(torch.randint(20000, ())) for _ in range(5)],
    "one of many": lambda: [0] * 30 + [1] * 9 + [17000] + [2] * 5,
}


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_route_topk_of_a_generous_max_seqlen(seed: int, mixture: str, pick: str) -> None:
    lengths = MIXTURES[mixture]()
    scores = torch.randn(sum(lengths)).half()  # some ties
    args = topk_args(scores, lengths, [PICKS[pick](n) for n in lengths], max_seqlen=2**40)
    assert_bitwise(ops.route_topk(**args), reference.route_topk(**args))


@pytest.mark.parametrize("length", [100, 8000, 40000])
def test_route_topk_tells_scores_apart_by_any_bit(seed: int, length: int) -> None:
    for bit in range(1, 32, 6):
        scores = torch.randint(2, (length,), dtype=torch.int32) << bit
        args = topk_args(scores.view(torch.float32), [length], [length // 3])
        assert_bitwise(ops.route_topk(**args), reference.route_topk(**args))


def nan_first(score: float) -> tuple[bool, float]:
    """A sort key: NaN, then the numbers from high to low."""
    return (False, 0.0) if score != score else (True, -score)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_route_topk_keeps_its_promises(data: st.DataObject) -> None:
    value = st.floats(width=16) | st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0])
    sequences = data.draw(st.lists(st.lists(value, max_size=20), max_size=4))
    lengths = [len(s) for s in sequences]
    picks = [data.draw(st.integers(0, n)) for n in lengths]
    dtype = data.draw(st.sampled_from(backend_dtypes()))
    scores = torch.tensor([v for s in sequences for v in s]).to(dtype)
    index = ops.route_topk(**topk_args(scores, lengths, picks))

    assert index.dtype == torch.int32
    start = 0
    for length, rows in zip(lengths, index.split(picks), strict=True):
        chosen = rows.tolist()
        assert chosen == sorted(set(chosen)), "ascending and unique"
        assert all(start <= row < start + length for row in chosen)
        # Higher scores first, then lower rows; NaN is the highest score.
        rank = {row: (nan_first(scores[row].item()), row) for row in range(start, start + length)}
        assert chosen == sorted(sorted(rank, key=rank.__getitem__)[: len(chosen)])
        start += length


def test_route_topk_compares_denormals_as_given() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, -1.0]) * 2.0**-149
    args = topk_args(scores, [4], [2])
    try:
        torch.set_flush_denormal(True)
        assert ops.route_topk(**args).tolist() == [1, 2]
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.backends(Backend.CPU)
def test_route_topk_compares_doubles_as_doubles() -> None:
    scores = torch.tensor([1.0, 1.0 + 2.0**-50, 1.0 - 2.0**-50], dtype=torch.double)
    assert ops.route_topk(**topk_args(scores, [3], [1])).tolist() == [1]


@pytest.mark.parametrize(
    "layout",
    [
        lambda s: s.repeat(3, 1).t()[:, 1],
        lambda s: torch.cat([s[:3], s])[3:],
        lambda s: s[:1].expand(len(s)),
    ],
    ids=["strided", "offset", "expanded"],
)
def test_route_topk_layouts(seed: int, layout: Callable[[Tensor], Tensor]) -> None:
    args = random_topk_args()
    args["scores"] = layout(args["scores"])
    args["cu_seqlens"] = args["cu_seqlens"].repeat_interleave(2)[::2]
    assert_bitwise(ops.route_topk(**args), reference.route_topk(**args))


def test_route_topk_of_no_sequence() -> None:
    assert ops.route_topk(**topk_args(torch.zeros(0), [], [])).shape == (0,)


# ---- route_depth ----


@pytest.mark.parametrize("bias", ["none", "float32", "same"])
@pytest.mark.parametrize("recursions", [*range(1, 10), 40, 129, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_route_depth_is_the_reference(
    seed: int, dtype: torch.dtype, recursions: int, bias: str
) -> None:
    given_bias = {
        "none": None,
        "float32": torch.randn(recursions),
        "same": torch.randn(recursions).to(dtype),
    }[bias]
    for tokens in LENGTHS if recursions < 1000 else LENGTHS[:-1]:
        logits = torch.randint(-3, 4, (tokens, recursions)).to(dtype)  # many ties
        for x in (logits, logits + torch.randn(logits.shape).to(dtype)):
            actual = ops.route_depth(x, given_bias)
            expected = reference.route_depth(x, given_bias)
            assert_bitwise(actual[0], expected[0])
            assert_bitwise(actual[1], expected[1])


@pytest.mark.parametrize("more", [0, 13], ids=["few", "many"])
def test_route_depth_of_special_logits(more: int) -> None:
    logits = torch.tensor(
        [[-INF, -INF, -INF], [1.0, NAN, -NAN], [0.0, -0.0, -1.0], [-INF, 2.0, INF], [NAN, INF, 0.0]]
    )
    logits = torch.cat([logits, torch.full((5, more), -INF)], dim=1)
    depth, load = ops.route_depth(logits)
    assert depth.tolist() == [1, 2, 1, 3, 1]
    assert load.tolist() == [3, 1, 1] + [0] * more


@pytest.mark.parametrize("recursions", [3, 8, 16, 21])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "layout",
    [
        lambda n, r: torch.randn(r, n).t(),
        lambda n, r: torch.randn(n + 3, r + 2)[3:, 1:-1],
        lambda n, r: torch.randn(n * r + 1)[1:].view(n, r),
        lambda n, r: torch.randn(1, r).expand(n, r),
    ],
    ids=["strided", "offset", "unaligned", "expanded"],
)
def test_route_depth_layouts(
    seed: int, layout: Callable[[int, int], Tensor], dtype: torch.dtype, recursions: int
) -> None:
    logits = layout(50, recursions).to(dtype)
    for actual, expected in zip(
        ops.route_depth(logits), reference.route_depth(logits), strict=True
    ):
        assert_bitwise(actual, expected)


# ---- both ----


@pytest.mark.backends(Backend.CPU)
def test_results_do_not_depend_on_threads(seed: int) -> None:
    args, logits = random_topk_args(torch.bfloat16), torch.randn(20000, 3)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            results.append((ops.route_topk(**args), *ops.route_depth(logits)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_bitwise(a, b)


def test_concurrent_calls(seed: int) -> None:
    inputs = [random_topk_args() for _ in range(8)]
    expected = [ops.route_topk(**args) for args in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            actual = list(pool.map(lambda args: ops.route_topk(**args), inputs))
            for a, e in zip(actual, expected, strict=True):
                assert_bitwise(a, e)


def test_opcheck(seed: int) -> None:
    torch.library.opcheck(torch.ops.mor.route_topk.default, tuple(random_topk_args().values()))
    for bias in (None, torch.randn(3)):
        torch.library.opcheck(torch.ops.mor.route_depth.default, (torch.randn(20, 3), bias))


def test_one_graph_serves_all_lengths(seed: int) -> None:
    def route(scores: Tensor, lengths: Tensor, picks: Tensor, total: int, longest: int) -> Tensor:
        index = ops.route_topk(scores, lengths, picks, total, longest)
        depth, load = ops.route_depth(scores.view(-1, 1) * torch.ones(3))
        return index.sum() + depth.sum() + load.sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(route, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ([5, 9], [30, 2], [7, 100], [64, 64]):
        args = topk_args(torch.randn(sum(lengths)), lengths, [n // 2 for n in lengths])
        assert compiled(*args.values()) == route(*args.values())
    assert counter.frame_count == 1


# ---- bad input ----


def on_device(args: dict[str, Any]) -> dict[str, Any]:
    """Tensors made outside of a test may be elsewhere than the backend's."""
    return map_tensors(args, lambda t: t.to(torch.get_default_device()))


FLOATING = "float32, bfloat16 or float16 (float64 too on CPU)"
TOPK_ERRORS: list[tuple[str, Any, str]] = [
    ("scores", torch.zeros(8, dtype=torch.int32), f"{FLOATING}, got int32"),
    ("scores", torch.zeros(8, 1), "of shape [N], got shape [8, 1]"),
    ("cu_seqlens", torch.tensor([0, 5, 8]), "int32, got int64"),
    ("cu_seqlens", torch.zeros(2, 2).int(), "of shape [batch + 1], got shape [2, 2]"),
    ("cu_seqlens", torch.zeros(0).int(), "of shape [batch + 1], got shape [0]"),
    ("cu_seqlens", torch.tensor([1, 5, 8]).int(), "0 in its first element, got 1"),
    ("cu_seqlens", torch.tensor([0, 9, 8]).int(), "non-decreasing, got 9 then 8 at element 2"),
    ("cu_seqlens", torch.tensor([0, 5, 7]).int(), "8 in its last element, got 7"),
    ("cu_seqlens_out", torch.tensor([0.0, 2, 3]), "int32, got float32"),
    ("cu_seqlens_out", torch.zeros(4).int(), "of shape [batch + 1], got shape [4]"),
    ("cu_seqlens_out", torch.tensor([-1, 2, 3]).int(), "0 in its first element, got -1"),
    ("cu_seqlens_out", torch.tensor([0, 4, 3]).int(), "non-decreasing, got 4 then 3 at element 2"),
    (
        "cu_seqlens",
        torch.tensor([0, 1, 8]).int(),
        "cu_seqlens_out must be steps of at most the length of the sequence, "
        "got 2 for length 1 of sequence 0",
    ),
    (
        "cu_seqlens_out",
        torch.tensor([0, -2, 3]).int(),
        "non-decreasing, got 0 then -2 at element 1",
    ),
    ("total_out", 4, "cu_seqlens_out must be 4 in its last element, got 3"),
    ("total_out", -1, "cu_seqlens_out must be -1 in its last element, got 3"),
    ("max_seqlen", 4, "at least the longest sequence, got 4 for length 5 of sequence 0"),
]


@pytest.mark.parametrize(("argument", "value", "message"), TOPK_ERRORS)
def test_route_topk_errors(argument: str, value: Any, message: str) -> None:
    args = on_device({**topk_args(torch.randn(8), [5, 3], [2, 1]), argument: value})
    full = message if " must be " in message else f"{argument} must be {message}"
    with pytest.raises(RuntimeError, match=re.escape(f"mor::route_topk: {full}")):
        ops.route_topk(**args)


DEPTH_ERRORS: list[tuple[Tensor, Tensor | None, str]] = [
    (torch.zeros(4, 3).int(), None, f"logits must be {FLOATING}, got int32"),
    (torch.zeros(4), None, "logits must be of shape [N, num_recursions], got shape [4]"),
    (torch.zeros(4, 0), None, "logits must be of at least one recursion"),
    (torch.zeros(4, 3), torch.zeros(2), "bias must be of shape [num_recursions], got shape [2]"),
    (torch.zeros(4, 3), torch.zeros(3).half(), "bias must be float32, got float16"),
    (
        torch.zeros(4, 3).half(),
        torch.zeros(3).bfloat16(),
        "bias must be float32 or float16, got bfloat16",
    ),
]


@pytest.mark.parametrize(("logits", "bias", "message"), DEPTH_ERRORS)
def test_route_depth_errors(logits: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"mor::route_depth: {message}")):
        ops.route_depth(**on_device({"logits": logits, "bias": bias}))


def garbage(count: int, size: int) -> Tensor:
    """int32 ``[count]``, of all kinds: plausible, slightly and wildly wrong."""
    ranges = [(0, size + 1), (-3, size + 4), (-(2**31), 2**31)]
    low, high = ranges[int(torch.randint(len(ranges), ()))]
    values = torch.randint(low, high, (count,))
    return (values.sort().values if torch.rand(()) < 0.5 else values).int()


@pytest.mark.backends(Backend.SIMT, Backend.CUDA)
@pytest.mark.parametrize("tokens", [0, 1, 40, 3000, 40000])
def test_route_topk_survives_garbage(seed: int, tokens: int) -> None:
    """Without checks of what is in device memory nothing outside the tensors is touched, which
    `make sanitize` sees, and the result is indices or -1."""
    for _ in range(sized(100, 8 if tokens == 40000 else 30)):
        batch, total_out = int(torch.randint(6, ())), int(torch.randint(tokens + 1, ()))
        max_seqlen = [-1, 0, tokens // 2, tokens, 2**40][int(torch.randint(5, ()))]
        scores = torch.randn(tokens)
        lengths, counts = garbage(batch + 1, tokens), garbage(batch + 1, total_out)
        torch.full((total_out,), 2**30, dtype=torch.int32)  # its memory is likely to be reused
        with unchecked():
            index = ops.route_topk(scores, lengths, counts, total_out, max_seqlen)
        assert index.shape == (total_out,)
        assert ((index >= -1) & (index < tokens)).all(), (lengths, counts, max_seqlen)


@pytest.mark.backends(Backend.SIMT, Backend.CUDA)
@pytest.mark.parametrize("max_seqlen", [12, 17000])
def test_route_topk_of_too_small_a_max_seqlen(seed: int, max_seqlen: int) -> None:
    """Unchecked, sequences are as if they ended there."""
    length, many, few = max_seqlen + 300, max_seqlen + 200, max_seqlen // 3
    args = topk_args(torch.randn(2 * length), [length] * 2, [many, few], max_seqlen)
    with unchecked():
        first, second = ops.route_topk(**args).split([many, few])
    assert_bitwise(first[:max_seqlen], torch.arange(max_seqlen).int())
    assert (first[max_seqlen:] == -1).all()
    cut = topk_args(args["scores"][length : length + max_seqlen], [max_seqlen], [few])
    assert_bitwise(second - length, reference.route_topk(**cut))


@pytest.mark.backends(Backend.SIMT, Backend.CUDA)
@pytest.mark.parametrize("total_out", [-1, 9])
def test_route_topk_checks_total_out_without_debug(total_out: int) -> None:
    args = {**topk_args(torch.randn(8), [5, 3], [2, 1]), "total_out": total_out}
    message = f"mor::route_topk: total_out must be in [0, 8], got {total_out}"
    with unchecked(), pytest.raises(RuntimeError, match=re.escape(message)):
        ops.route_topk(**args)
