"""attention and attention_bwd: accuracy, masks, layouts, special values, determinism, errors."""

import math
from collections.abc import Callable
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
    backend_dtypes,
    cu_seqlens_of,
    in_fp64,
    key_limit_of,
    map_tensors,
    scaled_atol,
    sized,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mor_ext.ops.attention import attention
from mor_ext.reference.attention import attention as reference

pytestmark = pytest.mark.usefixtures("backend")

Args = dict[str, Any]
Pairs = list[tuple[int, int]]  # (len_q, len_k) of every sequence

KINDS = ["causal", *KEY_LIMITS]
SHORT = [(0, 0), (0, 7), (2, 0), (31, 31), (129, 129), (3, 2), (1, 129), (31, 129), (2, 1)]
# Lengths around the sizes that tiles and vectors have.
EDGES = [(n + d, n + e) for n in (16, 32, 64, 128, 256) for d, e in ((-1, 0), (0, 1), (1, -1))]
LONG = [(1134, 1134), (0, 31), (129, 1134), (1, 1134), (31, 2)]
# The same where a kernel takes some thousand times longer.
FEW_SHORT = [(0, 0), (0, 7), (2, 0), (31, 31), (3, 2), (1, 70), (37, 65)]
FEW_EDGES = [(31, 33), (65, 64), (63, 129)]
FEW_LONG = [(150, 150), (0, 31), (40, 200), (1, 260), (31, 2)]


def make(
    pairs: Pairs,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    kind: str = "causal",
) -> Args:
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


def random_grads(args: Args) -> tuple[Tensor, Tensor]:
    """Gradients of out and of lse."""
    query = args["query"]
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse_shape = (query.shape[1], query.shape[0])
    return torch.randn(query.shape).to(query.dtype), torch.randn(lse_shape).to(lse_dtype)


def run(op: Callable[..., Any], args: Args, grads: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Outputs and gradients, by name."""
    leaves = {name: args[name].detach().requires_grad_() for name in ("query", "key", "value")}
    out, lse = op(**{**args, **leaves})
    found = torch.autograd.grad((out, lse), tuple(leaves.values()), grads)
    named = zip(("grad_query", "grad_key", "grad_value"), found, strict=True)
    return {"out": out.detach(), "lse": lse.detach(), **dict(named)}


def check(args: Args) -> None:
    grads = random_grads(args)
    actual, eager = (run(op, args, grads) for op in (attention, reference))
    exact = run(reference, in_fp64(args), (grads[0].double(), grads[1].double()))
    for name, result in actual.items():
        atol = scaled_atol(exact[name], args["query"].dtype)
        assert_accurate(result, eager[name], exact[name], atol, name)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, result in actual.items():
        assert_bitwise(result, expected[name], name)


# ---- accuracy ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("group", GROUPS)
def test_accuracy(dtype: torch.dtype, head_dim: int, group: int, seed: int) -> None:
    # The masks rotate, so that each meets every dtype, head_dim and group.
    place = DTYPES.index(dtype) + HEAD_DIMS.index(head_dim) + GROUPS.index(group)
    kv_heads = 1 if group == 8 else 2
    check(
        make(
            sized(SHORT, FEW_SHORT),
            group * kv_heads,
            kv_heads,
            head_dim,
            dtype,
            KINDS[place % len(KINDS)],
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "kv_sharing", "random"])
def test_accuracy_long(dtype: torch.dtype, kind: str, seed: int) -> None:
    head_dim = {"causal": 64, "kv_sharing": 80, "random": 128}[kind]
    check(make(sized(LONG, FEW_LONG), 3, 1, head_dim, dtype, kind))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["causal", "random"])
def test_accuracy_at_tile_edges(dtype: torch.dtype, kind: str, seed: int) -> None:
    check(make(sized(EDGES, FEW_EDGES), 2, 1, 64, dtype, kind))


@pytest.mark.parametrize("head_dim", [64, 128, 224])
def test_gradients_of_rows_that_see_few_keys(head_dim: int, seed: int) -> None:
    """What is left there of two large numbers must not be their rounding errors."""
    for _ in range(sized(20, 1)):
        check(make([(19, 35), (7, 3)], 2, 1, head_dim, torch.float32, "random"))


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_every_head_dim(head_dim: int, seed: int) -> None:
    dtype = backend_dtypes()[head_dim // 8 % len(backend_dtypes())]
    check(make([(19, 35), (7, 3)], 2, 1, head_dim, dtype, "random"))


def test_none_is_causal(seed: int) -> None:
    pairs = sized(SHORT, FEW_SHORT)
    args = make(pairs, 2, 1, 64)
    explicit = {**args, "key_limit": key_limit_of("chunked_prefill", pairs)}
    grads = random_grads(args)
    assert_same(run(attention, args, grads), run(attention, explicit, grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_queries_that_see_nothing(dtype: torch.dtype, seed: int) -> None:
    args = make([(3, 5), (4, 0), (5, 3)], 4, 2, 16, dtype)
    blind = [*range(3, 7), 7, 8]  # an empty KV list; before the first key
    result = run(attention, args, random_grads(args))
    assert (result["out"][blind] == 0).all()
    assert (result["lse"][:, blind] == -math.inf).all()
    assert (result["grad_query"][blind] == 0).all()
    assert all(grad.isfinite().all() for name, grad in result.items() if name != "lse")


@pytest.mark.parametrize("pairs", [[(0, 0)], [(0, 0), (0, 0)], [(0, 5)], [(5, 0)]], ids=str)
def test_empty(pairs: Pairs, seed: int) -> None:
    check(make(pairs, 4, 2, 16))


def test_empty_batch() -> None:
    args = make([(0, 0)], 4, 2, 16)
    zero = torch.zeros(1, dtype=torch.int32)
    out, lse = attention(**{**args, "cu_seqlens_q": zero, "cu_seqlens_k": zero})
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0)


@pytest.mark.parametrize("used", ["out", "lse"])
def test_gradient_through_one_output(used: str, seed: int) -> None:
    args = make(sized(SHORT, FEW_SHORT), 2, 1, 64)
    grad_out, grad_lse = random_grads(args)
    (grad_lse if used == "out" else grad_out).zero_()
    expected = run(attention, args, (grad_out, grad_lse))
    leaves = {name: args[name].requires_grad_() for name in ("query", "key", "value")}
    output = dict(zip(("out", "lse"), attention(**args), strict=True))[used]
    found = torch.autograd.grad(
        output, tuple(leaves.values()), grad_out if used == "out" else grad_lse
    )
    for name, grad in zip(leaves, found, strict=True):
        torch.testing.assert_close(grad, expected[f"grad_{name}"], msg=name)


@pytest.mark.backends(Backend.CPU)
@pytest.mark.parametrize("kind", ["causal", "bidirectional", "kv_sharing"])
def test_gradcheck(kind: str, seed: int) -> None:
    args = make([(3, 4), (0, 2), (2, 2)], 4, 2, 8, torch.float64, kind)
    leaves = [args[name].requires_grad_() for name in ("query", "key", "value")]
    rest = [a for name, a in args.items() if name not in ("query", "key", "value")]
    torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, *rest), leaves, fast_mode=True)


# ---- layouts ----


def fused_projection(args: Args) -> Args:
    """Query, key and value as slices of one [total, heads + 2 * kv_heads, head_dim] tensor."""
    names = ("query", "key", "value")
    heads = [args[name].shape[1] for name in names]
    parts = torch.cat([args[name] for name in names], dim=1).split(heads, dim=1)
    return {**args, **dict(zip(names, parts, strict=True))}


def expanded_kv(args: Args) -> Args:
    """One KV head that stands for all of them."""
    shape = args["key"].shape
    return {**args, **{name: args[name][:, :1].expand(shape) for name in ("key", "value")}}


def large_floats(f: Callable[[Tensor], Tensor]) -> Callable[[Args], Args]:
    return lambda args: map_tensors(args, lambda t: f(t) if t.is_floating_point() else t)


LAYOUTS: dict[str, Callable[[Args], Args]] = {
    "fused_projection": fused_projection,
    "expanded_kv": expanded_kv,
    "heads_first": large_floats(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
    "head_dim_strided": large_floats(lambda t: t.repeat_interleave(2, dim=2)[..., ::2]),
    "head_dim_first": large_floats(lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0)),
    "offset": large_floats(lambda t: torch.cat([t.flatten()[:3], t.flatten()])[3:].view(t.shape)),
    "rows_reused": large_floats(lambda t: t[:1].expand(t.shape)),
    "strided_integers": lambda args: map_tensors(
        args, lambda t: t if t.is_floating_point() else t.repeat_interleave(3)[1::3]
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(layout: str, dtype: torch.dtype, seed: int) -> None:
    args = LAYOUTS[layout](
        make(
            sized([(31, 31), (0, 0), (140, 140)], [(31, 31), (0, 0), (40, 40)]),
            4,
            2,
            64,
            dtype,
            "random",
        )
    )
    grad_out, grad_lse = random_grads(args)
    views = (
        grad_out.transpose(0, 1).contiguous().transpose(0, 1),
        grad_lse.T.contiguous().T,
    )
    dense = map_tensors(args, Tensor.contiguous)
    assert_same(run(attention, args, views), run(attention, dense, (grad_out, grad_lse)))


def test_expanded_gradients(seed: int) -> None:
    args = make([(31, 31)], 4, 2, 64)
    ones = tuple(torch.ones_like(g) for g in random_grads(args))
    one = tuple(torch.ones(()).expand(g.shape) for g in ones)
    assert_same(run(attention, args, (one[0], one[1])), run(attention, args, (ones[0], ones[1])))


def test_past_2_to_the_31_elements(seed: int) -> None:
    # Four GiB of address space, of which only the rows in use are ever touched.
    room = torch.empty(2**31 + 2 * 16, dtype=torch.bfloat16)
    args = make([(2, 2)], 2, 1, 16, torch.bfloat16)
    far = room.as_strided((2, 2, 16), (2**31, 16, 1)).copy_(args["query"])
    grads = random_grads(args)
    assert_same(run(attention, {**args, "query": far}, grads), run(attention, args, grads))


# ---- special values ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype: torch.dtype, seed: int) -> None:
    """Integers keep the scores exact; they reach 1e4, far past the range of exp."""
    args = make([(31, 129), (129, 31)], 2, 1, 64, dtype, "random")
    for name in ("query", "key"):
        args[name] = torch.randint(-4, 5, args[name].shape).to(dtype)
    args["softmax_scale"] = 32.0
    scores = torch.einsum("qhd,khd->hqk", args["query"][:, :1].double(), args["key"].double())
    assert scores.abs().max() * args["softmax_scale"] > 5e3
    check(args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softmax_scale", [0.0, -0.5, 1e-30])
def test_unusual_scales(dtype: torch.dtype, softmax_scale: float, seed: int) -> None:
    check(
        {**make(sized(SHORT, FEW_SHORT), 2, 1, 64, dtype, "random"), "softmax_scale": softmax_scale}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_minus_infinity(dtype: torch.dtype, seed: int) -> None:
    """A key of score -inf counts as not seen; the first query sees nothing else."""
    args = make([(70, 70)], 2, 1, 64, dtype)
    args["query"][..., 0] = 1
    args["key"][[0, 1, 33, 69], :, 0] = -math.inf
    actual, eager, exact = attention(**args), reference(**args), reference(**in_fp64(args))
    assert (actual[0][:2] == 0).all() and (actual[1][:, :2] == -math.inf).all()
    for results in zip(actual, eager, exact, strict=True):
        assert_accurate(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [math.inf, math.nan])
def test_special_scores_stay_visible(dtype: torch.dtype, special: float, seed: int) -> None:
    """Queries that see the key give NaN; the others are not touched by it."""
    args = make([(70, 70), (5, 5)], 2, 1, 64, dtype)
    args["query"][..., 0] = 1
    expected_out, expected_lse = attention(**args)
    args["key"][40, :, 0] = special
    out, lse = attention(**args)
    assert out[40:70].isnan().all() and not lse[:, 40:70].isfinite().any()
    others = [*range(40), *range(70, 75)]
    assert_bitwise(out[others], expected_out[others])
    assert_bitwise(lse[:, others], expected_lse[:, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_denormals(dtype: torch.dtype, seed: int) -> None:
    """Denormal values come out as denormals; bf16 dot products may take them for zero."""
    args = make([(31, 31)], 2, 1, 64, dtype, "bidirectional")
    tiny = torch.finfo(dtype).tiny / 8
    args["value"] = torch.full_like(args["value"], tiny)
    out, _ = attention(**args)
    tolerance = tiny if dtype == torch.bfloat16 else 0.01 * tiny
    assert ((out.double() - tiny).abs() <= tolerance).all()
    args["query"], args["key"] = args["query"] * tiny, args["key"] * tiny
    assert (attention(**args)[1] - math.log(31)).abs().max() < 1e-6


# ---- what a query does not see has no effect ----

PAIR = st.tuples(st.integers(0, 40), st.integers(0, 150))


def test_keys_past_every_limit() -> None:
    @settings(max_examples=sized(40, 8), deadline=None)
    @given(
        pairs=st.lists(PAIR, min_size=1, max_size=4).filter(lambda p: any(q for q, _ in p)),
        dtype=st.sampled_from(backend_dtypes()),
        kind=st.sampled_from(KINDS),
        junk=st.sampled_from([0.0, 1e4, math.inf, math.nan]),
        number=st.integers(0, 2**31),
    )
    def holds(pairs: Pairs, dtype: torch.dtype, kind: str, junk: float, number: int) -> None:
        torch.manual_seed(number)
        args = make(pairs, 4, 2, 16, dtype, kind)
        grads = random_grads(args)
        expected = run(attention, args, grads)
        limits = args["key_limit"] if kind != "causal" else key_limit_of("chunked_prefill", pairs)
        hidden = torch.ones(args["key"].shape[0], dtype=torch.bool)
        starts_q, starts_k = args["cu_seqlens_q"].tolist(), args["cu_seqlens_k"].tolist()
        for b in range(len(pairs)):
            limit = limits[starts_q[b] : starts_q[b + 1]]
            hidden[starts_k[b] : starts_k[b] + int(limit.max() if limit.numel() else 0)] = False
        for name in ("key", "value"):
            args[name][hidden] = junk
            assert (expected[f"grad_{name}"][hidden] == 0).all()
        assert_same(run(attention, args, grads), expected)

    holds()


def test_keys_past_the_limit_of_a_query() -> None:
    @settings(max_examples=sized(40, 8), deadline=None)
    @given(
        pair=st.tuples(st.integers(1, 40), st.integers(1, 150)),
        dtype=st.sampled_from(backend_dtypes()),
        kind=st.sampled_from(KINDS),
        number=st.integers(0, 2**31),
    )
    def holds(pair: tuple[int, int], dtype: torch.dtype, kind: str, number: int) -> None:
        torch.manual_seed(number)
        args = make([pair], 4, 2, 16, dtype, kind)
        limits = args["key_limit"] if kind != "causal" else key_limit_of("chunked_prefill", [pair])
        i = int(torch.randint(pair[0], ()))
        out, lse = attention(**args)
        for name in ("key", "value"):
            later = args[name][int(limits[i]) :]
            later.copy_(torch.randn(later.shape) * 100)
        changed_out, changed_lse = attention(**args)
        assert_bitwise(changed_out[: i + 1], out[: i + 1])
        assert_bitwise(changed_lse[:, : i + 1], lse[:, : i + 1])

    holds()


# ---- determinism ----


@pytest.mark.backends(Backend.CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "random"])
def test_same_bits_on_any_number_of_threads(dtype: torch.dtype, kind: str, seed: int) -> None:
    args = make([(257, 300), (1, 900), (31, 31)], 6, 2, 64, dtype, kind)
    grads = random_grads(args)
    threads = torch.get_num_threads()
    expected = run(attention, args, grads)
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            assert_same(run(attention, args, grads), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_does_not_depend_on_its_batch(dtype: torch.dtype, seed: int) -> None:
    pairs = [(130, 200), (0, 0), (40, 40), (1, 300)]
    args = make(pairs, 4, 2, 64, dtype, "random")
    grads = random_grads(args)
    batched = run(attention, args, grads)
    starts_q, starts_k = args["cu_seqlens_q"].tolist(), args["cu_seqlens_k"].tolist()
    for b, pair in enumerate(pairs):
        rows, keys = (slice(starts[b], starts[b + 1]) for starts in (starts_q, starts_k))
        alone = make([pair], 4, 2, 64, dtype)
        alone["query"], alone["key_limit"] = args["query"][rows], args["key_limit"][rows]
        alone["key"], alone["value"] = args["key"][keys], args["value"][keys]
        result = run(attention, alone, (grads[0][rows], grads[1][:, rows]))
        for name, part in zip(
            ("out", "lse", "grad_query", "grad_key", "grad_value"),
            (rows, (slice(None), rows), rows, keys, keys),
            strict=True,
        ):
            assert_bitwise(result[name], batched[name][part], name)


def test_generous_maxima(seed: int) -> None:
    """max_seqlen_* are bounds: larger ones change nothing and cost no memory."""
    args = make(sized(SHORT, FEW_SHORT), 2, 1, 64)
    grads = random_grads(args)
    generous = {**args, "max_seqlen_q": 2**40, "max_seqlen_k": 2**40}
    assert_same(run(attention, generous, grads), run(attention, args, grads))
