"""compact_depth, gather, scatter and gather_rms_norm against the reference, and their gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import (
    DTYPES,
    LENGTHS,
    Backend,
    assert_accurate,
    assert_bitwise,
    backend_dtypes,
    cu_seqlens_of,
    scaled_atol,
    sized,
    unchecked,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mor_ext import ops
from mor_ext.reference import compact as reference

pytestmark = pytest.mark.usefixtures("backend")
mor = torch.ops.mor
EPS = 1e-5


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def random_index(num_rows: int, active: str, padding: bool = True) -> Tensor:
    """Unique rows in random order, among them some -1."""
    count = {"none": 0, "some": (num_rows + 1) // 2, "all": num_rows}[active]
    rows = torch.randperm(num_rows)[:count]
    index = torch.cat([rows, torch.full((3 if padding else 0,), -1)])
    return index[torch.randperm(len(index))].int()


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def repeating_index(num_rows: int, count: int) -> Tensor:
    """Rows that may repeat, and -1."""
    return torch.randint(-1, num_rows, (count,)).int()


def scatter_inputs(
    num_rows: int, row_shape: tuple[int, ...], dtype: torch.dtype, gate: str, active: str = "some"
) -> tuple[Any, ...]:
    index = random_index(num_rows, active)
    gates = {"none": None, "float32": torch.randn(len(index))}
    x = torch.randn(num_rows, *row_shape).to(dtype)
    update = torch.randn(len(index), *row_shape).to(dtype)
    return x, update, index, gates.get(gate, torch.randn(len(index)).to(dtype))


def tensors_of(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def in_fp64(*inputs: Any) -> tuple[Any, ...]:
    """Floating tensors in fp64, the rest as it is."""
    return tuple(
        t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs
    )


def assert_follows(
    op: Callable[..., Any], plain: Callable[..., Any], inputs: tuple[Any, ...]
) -> None:
    """Outputs and gradients of op are as accurate as those of the reference in the same dtype.

    The reference is run in the inputs' dtype and, for the exact result, in fp64.
    """

    dtype = inputs[0].dtype

    def run(f: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
        leaves = [
            a.detach().clone().requires_grad_()
            if isinstance(a, Tensor) and a.is_floating_point()
            else a
            for a in args
        ]
        outputs = tensors_of(f(*leaves))
        generator = generator_of(0)
        grads = [torch.randn(out.shape, generator=generator).to(dtype) for out in outputs]
        grads = [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)]
        wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]

    # Gradients of gates and weights are sums: their error grows with the terms, not the result.
    terms = max(1, inputs[0][:1].numel() / 64) ** 0.5
    actual, eager, exact = run(op, inputs), run(plain, inputs), run(plain, in_fp64(*inputs))
    for i, (a, e, x) in enumerate(zip(actual, eager, exact, strict=True)):
        assert_accurate(a, e, x, atol=terms * scaled_atol(x, a.dtype), name=f"result {i}")


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided rows": lambda t: t.repeat_interleave(2, dim=0)[::2],
    "part of wider rows": lambda t: torch.cat([t, t, t], dim=-1)[
        ..., t.shape[-1] : 2 * t.shape[-1]
    ],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "misaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view_as(t),
    "expanded": lambda t: t[:1].expand_as(t),
}


# ---- compact_depth ----


@pytest.mark.parametrize("recursions", [1, 3, 7])
def test_compact_depth_is_the_reference(seed: int, recursions: int) -> None:
    lengths = [*LENGTHS, 0]
    for low, high in ((0, recursions), (0, 0), (recursions, recursions)):
        depth = torch.randint(low, high + 1, (sum(lengths),)).int()
        args = (depth, cu_seqlens_of(lengths), recursions)
        for actual, expected in zip(
            ops.compact_depth(*args), reference.compact_depth(*args), strict=True
        ):
            assert_bitwise(actual, expected)


@pytest.mark.parametrize(
    ("lengths", "recursions"),
    [
        pytest.param([1024, 1024], 2, id="whole tiles of the CUDA kernel"),
        pytest.param([3] * 1500, 2, id="many sequences"),
        pytest.param([0, 50, 33], 1024, id="many recursions"),
        pytest.param([40_000, 0, 7], 9, id="many tokens"),
    ],
)
def test_compact_depth_of_extreme_sizes(seed: int, lengths: list[int], recursions: int) -> None:
    depth = torch.randint(0, recursions + 1, (sum(lengths),)).int()
    args = (depth, cu_seqlens_of(lengths), recursions)
    for actual, expected in zip(
        ops.compact_depth(*args), reference.compact_depth(*args), strict=True
    ):
        assert_bitwise(actual, expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=4))
def test_compact_depth_loses_no_token(sequences: list[list[int]]) -> None:
    depth = int32(*(d for s in sequences for d in s))
    index, cu_seqlens_out = ops.compact_depth(depth, cu_seqlens_of([len(s) for s in sequences]), 4)
    for r in range(4):
        per_sequence = [sum(d > r for d in s) for s in sequences]
        assert cu_seqlens_out[r].tolist() == cu_seqlens_of(per_sequence).tolist()
        count = sum(per_sequence)
        assert (index[r, count:] == -1).all()
        assert (depth[index[r, :count].long()] > r).all()
    # A token's depth is the number of lists that name it.
    named = torch.bincount(index.flatten().long() + 1, minlength=len(depth) + 1)[1:]
    assert named.tolist() == depth.tolist()


def test_compact_depth_layouts() -> None:
    depth = torch.randint(0, 4, (20, 2)).int()[:, 0]
    cu_seqlens = cu_seqlens_of([12, 8]).repeat_interleave(2)[::2]
    expected = reference.compact_depth(depth, cu_seqlens, 3)
    for actual, e in zip(ops.compact_depth(depth, cu_seqlens, 3), expected, strict=True):
        assert_bitwise(actual, e)


# ---- values and gradients, every dtype ----


@pytest.mark.parametrize(
    "row_shape", [(), (1,), (2,), (4,), (7,), (64,), (3, 8), (0,), (2051,), (8200,)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_tokens_is_accurate(
    seed: int, dtype: torch.dtype, row_shape: tuple[int, ...]
) -> None:
    few, many = (1, 2, 31), (1, 2, 31, 129, 1134)
    for num_rows in few if max(row_shape, default=1) > 2000 else sized(many, many[:-1]):
        x = torch.randn(num_rows, *row_shape).to(dtype)
        index = repeating_index(num_rows, num_rows + 5)
        assert_bitwise(ops.gather_tokens(x, index), reference.gather_tokens(x, index))
        assert_follows(ops.gather_tokens, reference.gather_tokens, (x, index))


def test_entries_of_a_row_are_summed_in_order(seed: int) -> None:
    """In fp32, and rounded once."""
    index = torch.randint(-1, 3, (700,)).int()
    for dtype in backend_dtypes():
        grad = (torch.randn(700, 9) * torch.logspace(-3, 3, 700).unsqueeze(1)).to(dtype)
        expected = torch.zeros(5, 9, dtype=torch.promote_types(dtype, torch.float32))
        for entry, row in enumerate(index.tolist()):
            if row >= 0:
                expected[row] += grad[entry]
        assert_bitwise(mor.gather_tokens_bwd(grad, index, 5), expected.to(dtype))


@pytest.mark.parametrize("active", ["none", "some", "all"])
@pytest.mark.parametrize("gate", ["none", "float32", "same"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_tokens_is_accurate(seed: int, dtype: torch.dtype, gate: str, active: str) -> None:
    lengths = sized(LENGTHS, LENGTHS[:-1])
    shapes = [*((n, (37,)) for n in lengths), (31, ()), (31, (3, 8)), (5, (2051,)), (3, (8200,))]
    for num_rows, row_shape in shapes:
        inputs = scatter_inputs(num_rows, row_shape, dtype, gate, active)
        assert_follows(ops.scatter_tokens, reference.scatter_tokens, inputs)
        x = inputs[0].clone()
        ops.scatter_tokens_(x, *inputs[1:])
        assert_bitwise(x, ops.scatter_tokens(*inputs))


def test_scatter_knows_nothing_of_earlier_calls(seed: int) -> None:
    """On CUDA, scratch memory that was not cleared may hold the rows of one."""
    x = torch.randn(300, 8)
    for count in (300, 200, 50, 1, 0, 7):
        index, update = torch.randperm(300)[:count].int(), torch.randn(count, 8)
        y = ops.scatter_tokens(x, update, index)
        assert_bitwise(y, reference.scatter_tokens(x, update, index))


@pytest.mark.parametrize("hidden", [1, 8, 100, 512, 2051])
@pytest.mark.parametrize("weight", ["float32", "same"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_rms_norm_is_accurate(
    seed: int, dtype: torch.dtype, weight: str, hidden: int
) -> None:
    many = sized((1, 2, 31, 129, 1134), (1, 2, 31, 129))
    # One element normed is 1 but for eps, so its gradient is what eps leaves of two equal terms: of
    # a small eps nothing but their rounding.
    eps = EPS if hidden > 1 else 1.0
    for num_rows in many if hidden == 100 else (1, sized(31, 9)):
        x = torch.randn(num_rows, hidden).to(dtype)
        w = torch.rand(hidden).to(torch.float32 if weight == "float32" else dtype)
        for index in (random_index(num_rows, "some"), repeating_index(num_rows, num_rows + 5)):
            assert_follows(
                lambda x, w, index=index: ops.gather_rms_norm(x, index, w, eps)[:2],
                lambda x, w, index=index: reference.gather_rms_norm(x, index, w, eps)[:2],
                (x, w),
            )
            rstd = ops.gather_rms_norm(x, index, w, eps)[2]
            exact = reference.gather_rms_norm(x.double(), index, w.double(), eps)[2]
            torch.testing.assert_close(rstd.double(), exact, rtol=1e-5, atol=0)
            assert not rstd.requires_grad


@pytest.mark.parametrize("pieces", [1, 32, 33, 64, 65, 128, 129, 512, 513, 1024, 1025])
def test_gather_rms_norm_around_the_limits_of_cuda_kernels(seed: int, pieces: int) -> None:
    """Rows of so many times 16 bytes: their teams of threads and what these keep in registers."""
    index = int32(2, -1, 0, 2)
    for dtype in backend_dtypes():
        hidden = pieces * 16 // dtype.itemsize
        x, weight = torch.randn(4, hidden).to(dtype), torch.rand(hidden).to(dtype)
        for w in (weight, weight.float()):
            assert_follows(
                lambda x, w: ops.gather_rms_norm(x, index, w, EPS)[:2],
                lambda x, w: reference.gather_rms_norm(x, index, w, EPS)[:2],
                (x, w),
            )


@pytest.mark.backends(Backend.CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_larger_than_the_cache(seed: int, dtype: torch.dtype) -> None:
    """Their rows go past the cache by other instructions; the row size is odd on purpose."""
    num_rows, hidden = 2 * 1400, 2051
    x, update, index, gate = scatter_inputs(num_rows, (hidden,), dtype, "same")
    rows = reference.gather_tokens(x, index)
    assert_bitwise(ops.gather_tokens(x, index), rows)
    assert_bitwise(
        mor.gather_tokens_bwd(rows, index, num_rows)[index[index >= 0].long()], rows[index >= 0]
    )
    assert_accurate(
        ops.scatter_tokens(x, update, index, gate),
        reference.scatter_tokens(x, update, index, gate),
        reference.scatter_tokens(*in_fp64(x, update, index, gate)),
    )
    grad_update, _ = mor.scatter_tokens_bwd(x, index, None, None)
    assert_bitwise(grad_update, rows)
    weight = torch.ones(hidden)
    assert_bitwise(ops.gather_rms_norm(x, index, weight, EPS)[0], rows)
    assert_accurate(
        ops.gather_rms_norm(x, index, weight, EPS)[1],
        reference.gather_rms_norm(x, index, weight, EPS)[1],
        reference.gather_rms_norm(*in_fp64(x, index, weight), EPS)[1],
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(seed: int, layout: str) -> None:
    view = LAYOUTS[layout]
    x, update, index, gate = scatter_inputs(31, (3, 8), torch.float32, "same")
    wide_index = index.repeat_interleave(2)[::2]
    wide_gate = gate.repeat_interleave(2)[::2]
    assert_follows(
        lambda x: ops.gather_tokens(view(x), wide_index),
        lambda x: reference.gather_tokens(view(x), index),
        (x,),
    )
    assert_follows(
        lambda x, u: ops.scatter_tokens(view(x), view(u), wide_index, wide_gate),
        lambda x, u: reference.scatter_tokens(view(x), view(u), index, gate),
        (x, update),
    )
    assert_follows(
        lambda x: ops.gather_rms_norm(view(x.flatten(1)), wide_index, torch.ones(24), EPS)[:2],
        lambda x: reference.gather_rms_norm(view(x.flatten(1)), index, torch.ones(24), EPS)[:2],
        (x,),
    )
    grads = view(torch.randn(len(index), 3, 8))
    exact = mor.gather_tokens_bwd(grads.contiguous(), index, 31)
    assert_bitwise(mor.gather_tokens_bwd(grads, wide_index, 31), exact)
    grads = view(torch.randn(31, 3, 8))
    for a, b in zip(
        mor.scatter_tokens_bwd(grads, wide_index, view(update), wide_gate),
        mor.scatter_tokens_bwd(grads.contiguous(), index, view(update).contiguous(), gate),
        strict=True,
    ):
        assert_bitwise(a, b)
    rows, normed, rstd = ops.gather_rms_norm(x.flatten(1), index, torch.ones(24), EPS)
    for a, b in zip(
        mor.gather_rms_norm_bwd(
            view(rows), view(normed), view(rows), rstd, index, torch.ones(24), 31
        ),
        mor.gather_rms_norm_bwd(
            *(view(t).contiguous() for t in (rows, normed, rows)), rstd, index, torch.ones(24), 31
        ),
        strict=True,
    ):
        assert_bitwise(a, b)


# ---- what gather and scatter promise together ----


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 20), st.integers(0, 6), st.integers(0, 2**31 - 1))
def test_scatter_then_gather_gives_the_update(num_rows: int, hidden: int, number: int) -> None:
    torch.manual_seed(number)
    index = random_index(num_rows, "some")
    update = torch.randn(len(index), hidden)
    x = torch.randn(num_rows, hidden)
    x.index_fill_(0, index[index >= 0].long(), 0)
    scattered = ops.scatter_tokens(x, update, index)
    active = (index >= 0).unsqueeze(1)
    assert torch.equal(ops.gather_tokens(scattered, index), update * active)
    untouched = torch.ones(num_rows, dtype=torch.bool)
    untouched[index[index >= 0].long()] = False
    assert_bitwise(scattered[untouched], x[untouched])
    # <gather(x), y> = <x, gather_bwd(y)>, also where rows repeat.
    index = repeating_index(num_rows, 9) if num_rows else index
    y = torch.randn(len(index), hidden)
    left = (ops.gather_tokens(x, index).double() * y.double()).sum()
    right = (x.double() * mor.gather_tokens_bwd(y, index, num_rows).double()).sum()
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


# ---- scatter_tokens_ ----


def test_inplace_scatter_touches_nothing_else(seed: int) -> None:
    buffer = torch.randn(40, 30)
    view = buffer[4:35, 5:22]
    before = buffer.clone()
    index = random_index(31, "some")
    update = torch.randn(len(index), 17)
    ops.scatter_tokens_(view, update, index)
    before[4:35, 5:22] = reference.scatter_tokens(before[4:35, 5:22], update, index)
    assert_bitwise(buffer, before)


def test_inplace_scatter_into_columns(seed: int) -> None:
    """The elements of a row are not dense here."""
    x, update, index, gate = scatter_inputs(31, (8,), torch.float32, "same")
    columns = x.t().contiguous()
    ops.scatter_tokens_(columns.t(), update, index, gate)
    assert_bitwise(columns.t().contiguous(), ops.scatter_tokens(x, update, index, gate))


def test_inplace_scatter_of_its_own_rows(seed: int) -> None:
    x, index = torch.randn(12, 12), torch.randperm(12).int()
    expected = ops.scatter_tokens(x, x.clone(), index, x[:, 3].clone())
    ops.scatter_tokens_(x, x, index, x[:, 3])
    assert_bitwise(x, expected)


def test_inplace_scatter_is_seen_by_autograd(seed: int) -> None:
    x, update, index, gate = scatter_inputs(12, (4,), torch.float32, "same")
    weight = torch.randn(12, 4, requires_grad=True)
    loss = (x * weight).sum()  # saves x
    ops.scatter_tokens_(x, update, index, gate)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # has no versions
        ops.scatter_tokens_(torch.zeros(12, 4), update, index, gate)


# ---- gradients ----


@pytest.mark.backends(Backend.CPU)
@pytest.mark.parametrize("gate", [True, False])
def test_gradcheck(seed: int, gate: bool) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.double, requires_grad=True)

    index = repeating_index(6, 9)
    assert torch.autograd.gradcheck(lambda x: ops.gather_tokens(x, index), (leaf(6, 3, 2),))
    for output in (slice(0, 1), slice(1, 2), slice(0, 2)):
        assert torch.autograd.gradcheck(
            lambda x, w, output=output: ops.gather_rms_norm(x, index, w, EPS)[output],
            (leaf(6, 5), leaf(5)),
        )
    unique = random_index(6, "some")
    inputs = (leaf(6, 5), leaf(len(unique), 5), unique, leaf(len(unique)) if gate else None)
    assert torch.autograd.gradcheck(ops.scatter_tokens, inputs)


def test_only_wanted_gradients(seed: int) -> None:
    x, update, index, gate = scatter_inputs(12, (4,), torch.float32, "float32")
    update.requires_grad_()
    ops.scatter_tokens(x, update, index, gate).sum().backward()
    padding = index < 0
    assert_bitwise(
        update.grad, gate.masked_fill(padding, 0).unsqueeze(1).expand(-1, 4).contiguous()
    )
    weight = torch.ones(4, requires_grad=True)
    rows, _, _ = ops.gather_rms_norm(x, index, weight, EPS)
    rows.sum().backward()
    assert_bitwise(weight.grad, torch.zeros(4))


# ---- contents that nobody has checked ----


@pytest.mark.backends(Backend.SIMT, Backend.CUDA)
def test_unchecked_index_names_only_rows_that_there_are(seed: int) -> None:
    """Numbers out of range count as -1."""
    num_rows = 31
    for hidden in (24, 7):
        x, update, index, gate = scatter_inputs(num_rows, (hidden,), torch.float32, "same")
        wild = torch.randint(-(2**31), 2**31, index.shape)
        wild = torch.where((wild >= 0) & (wild < num_rows), -1, wild).int()
        wild[:4] = int32(num_rows, 2**31 - 1, -2, -(2**31))
        bad = torch.where(torch.rand(len(index)) < 0.5, wild, index)
        bad[0] = num_rows
        good = torch.where((bad >= 0) & (bad < num_rows), bad, -1)
        weight = torch.rand(hidden)
        rows, normed, rstd = ops.gather_rms_norm(x, good, weight, EPS)
        cases: list[Callable[[Tensor], Any]] = [
            lambda index, x=x: ops.gather_tokens(x, index),
            lambda index, u=update: mor.gather_tokens_bwd(u, index, num_rows),
            lambda index, x=x, u=update, g=gate: ops.scatter_tokens(x, u, index, g),
            lambda index, x=x, u=update, g=gate: mor.scatter_tokens_bwd(x, index, u, g),
            lambda index, x=x, w=weight: ops.gather_rms_norm(x, index, w, EPS),
            lambda index, r=rows, n=normed, s=rstd, w=weight: mor.gather_rms_norm_bwd(
                r, n, r, s, index, w, num_rows
            ),
        ]
        with unchecked():
            for case in cases:
                for a, b in zip(tensors_of(case(bad)), tensors_of(case(good)), strict=True):
                    assert_bitwise(a, b)
            buffer = torch.randn(num_rows + 20, hidden + 8)
            view, expected = buffer[10:-10, 4:-4], buffer.clone()
            expected[10:-10, 4:-4] = ops.scatter_tokens(view, update, good, gate)
            ops.scatter_tokens_(view, update, bad, gate)
            assert_bitwise(buffer, expected)


@pytest.mark.backends(Backend.SIMT, Backend.CUDA)
def test_unchecked_repeats_in_scatter(seed: int) -> None:
    """One of the entries of a row wins."""
    x, update, gate = torch.randn(9, 24), torch.randn(40, 24), torch.randn(40)
    index = torch.randint(-1, 8, (40,)).int()
    inplace = x.clone()
    with unchecked():
        y = ops.scatter_tokens(x, update, index, gate)
        ops.scatter_tokens_(inplace, update, index, gate)
    assert_bitwise(y[8], x[8])
    assert_bitwise(inplace[8], x[8])
    for row in range(8):
        entries = (index == row).nonzero().flatten()
        one = x[row] + gate[entries].unsqueeze(1) * update[entries]
        assert torch.isclose(y[row], one, atol=1e-5).all(dim=1).any() or len(entries) == 0
        assert inplace[row].isfinite().all()


@pytest.mark.backends(Backend.SIMT, Backend.CUDA)
def test_unchecked_depths_and_lengths(seed: int) -> None:
    """Wild depths count as the nearest in range; wild lengths leave the lists as they are."""
    tokens, recursions = 3000, 10
    depth = torch.randint(-(2**31), 2**31, (tokens,)).int()
    depth = torch.where(torch.rand(tokens) < 0.5, depth % (recursions + 1), depth)
    good = (depth.clamp(0, recursions), cu_seqlens_of([2000, 1000]), recursions)
    for batch in (3, 1500):
        wild = torch.randint(-(2**31), 2**31, (batch + 1,)).int()
        near = torch.randint(-tokens, 2 * tokens, (batch + 1,)).int()
        for cu_seqlens in (wild, near, near.sort().values, near.sort(descending=True).values):
            with unchecked():
                index, cu_seqlens_out = ops.compact_depth(depth, cu_seqlens, recursions)
            assert_bitwise(index, reference.compact_depth(*good)[0])
            assert cu_seqlens_out.shape == (recursions, batch + 1)
    with unchecked():
        cu_seqlens_out = ops.compact_depth(depth, *good[1:])[1]
    assert_bitwise(cu_seqlens_out, reference.compact_depth(*good)[1])
