"""attention_bwd beyond what test_attention.py asks of it: tiles, groups, what nobody sees, bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers import (
    DTYPES,
    Backend,
    assert_accurate,
    assert_bitwise,
    backend_dtypes,
    in_fp64,
    scaled_atol,
    sized,
    unchecked,
)
from test_attention import Args, Pairs, assert_same, make, random_grads, run
from torch import Tensor

from mor_ext.ops.attention import attention
from mor_ext.reference.attention import attention as reference

pytestmark = pytest.mark.usefixtures("backend")
not_on_cpu = pytest.mark.backends(Backend.SIMT, Backend.CUDA)

Grads = tuple[Tensor, Tensor]  # of out and lse

# Around the tiles of keys and, times a group, of rows.
EDGES: Pairs = [
    (n + d, m + e) for n in (16, 43, 128) for m in (33, 64, 128) for d, e in ((0, 1), (1, -1))
]
FEW_EDGES: Pairs = [(43, 129), (11, 33), (5, 64), (22, 31)]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN until a kernel writes them."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_gradients(args: Args, grads: Grads) -> None:
    with poisoned_memory():
        actual = run(attention, args, grads)
    eager = run(reference, args, grads)
    exact = run(reference, in_fp64(args), (grads[0].double(), grads[1].double()))
    for name in ("grad_query", "grad_key", "grad_value"):
        atol = scaled_atol(exact[name], args["query"].dtype)
        assert_accurate(actual[name], eager[name], exact[name], atol, name)


# ---- accuracy ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tile_edges(dtype: torch.dtype, head_dim: int, seed: int) -> None:
    place = DTYPES.index(dtype) + head_dim // 64
    group = (1, 3, 8)[place % 3]
    kind = ("causal", "kv_sharing", "random", "bidirectional")[place % 4]
    args = make(sized(EDGES, FEW_EDGES), group, 1, head_dim, dtype, kind)
    check_gradients(args, random_grads(args))


@pytest.mark.parametrize("group", [2, 5, 7, 16, 33])
def test_groups(group: int, seed: int) -> None:
    dtypes = backend_dtypes()
    args = make([(7, 9), (0, 3), (13, 40)], 2 * group, 2, 8, dtypes[group % len(dtypes)], "random")
    check_gradients(args, random_grads(args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", ["out", "lse"])
def test_one_gradient(dtype: torch.dtype, used: str, seed: int) -> None:
    args = make([(9, 70), (31, 31)], 4, 2, 64, dtype)
    grad_out, grad_lse = random_grads(args)
    (grad_lse if used == "out" else grad_out).zero_()
    check_gradients(args, (grad_out, grad_lse))


# ---- what nobody sees ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_keys_that_nobody_sees(dtype: torch.dtype, head_dim: int, seed: int) -> None:
    """Their gradients are written all the same, and are zeros."""
    args = make([(0, 130), (6, 200), (3, 0), (5, 5)], 4, 2, head_dim, dtype, "random")
    args["key_limit"][:6] = torch.tensor([0, 0, 1, 2, 2, 3])
    with poisoned_memory():
        result = run(attention, args, random_grads(args))
    for name in ("grad_key", "grad_value"):
        grad = result[name]
        assert grad.isfinite().all() and (grad[:130] == 0).all() and (grad[133:330] == 0).all()
        assert (grad[130:133] != 0).any(dim=-1).all()
    assert (result["grad_query"][[0, 1, 6, 7, 8]] == 0).all()


def test_no_queries_at_all(seed: int) -> None:
    args = make([(0, 70), (0, 0), (0, 1)], 4, 2, 16)
    with poisoned_memory():
        result = run(attention, args, random_grads(args))
    assert (result["grad_key"] == 0).all() and (result["grad_value"] == 0).all()


# ---- the same bits ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_same_bits_every_time(dtype: torch.dtype, head_dim: int, seed: int) -> None:
    """Blocks end in another order every time."""
    args = make(sized([(300, 700), (129, 129)], [(20, 150), (9, 9)]), 4, 2, head_dim, dtype)
    grads = random_grads(args)
    assert_same(run(attention, args, grads), run(attention, args, grads))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_batch(dtype: torch.dtype, seed: int) -> None:
    """A sequence's neighbours, before and behind it, change nothing."""
    pair, others = sized([(130, 300), (77, 50)], [(40, 150), (9, 20)])
    alone = make([pair], 3, 1, 64, dtype)
    grads = random_grads(alone)
    expected = run(attention, alone, grads)
    batch = make([others, pair, (0, 5), others], 3, 1, 64, dtype)
    rows, keys = (slice(n, n + length) for n, length in zip(others, pair, strict=True))
    batch_grads = random_grads(batch)
    batch["query"][rows], batch_grads[0][rows] = alone["query"], grads[0]
    batch_grads[1][:, rows] = grads[1]
    batch["key"][keys], batch["value"][keys] = alone["key"], alone["value"]
    result = run(attention, batch, batch_grads)
    for name, part in (("grad_query", rows), ("grad_key", keys), ("grad_value", keys)):
        assert_bitwise(result[name][part], expected[name], name)


# ---- contents that make no sense, unchecked ----


def backward(args: Args, grads: Grads) -> tuple[Tensor, ...]:
    """attention_bwd among rows of NaN, on outputs of the right sizes."""

    def among_foreign_memory(tensor: Tensor) -> Tensor:
        beyond = torch.full_like(tensor[:3], torch.nan)
        return torch.cat([beyond, tensor, beyond])[3:-3]

    tensors = [grads[0], *(args[name] for name in ("query", "key", "value")), grads[0] * 0.5]
    grad_out, query, key, value, out = map(among_foreign_memory, tensors)
    rest = [a for name, a in args.items() if name not in ("query", "key", "value")]
    result = torch.ops.mor.attention_bwd(
        grad_out, grads[1], query, key, value, out, grads[1].abs(), *rest
    )
    assert isinstance(result, tuple)
    return result


@not_on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_limits_out_of_range_are_clamped(dtype: torch.dtype, seed: int) -> None:
    args = make([(20, 40), (9, 70)], 4, 2, 16, dtype, "bidirectional")
    grads = random_grads(args)
    args["key_limit"][:5] = 0
    expected = backward(args, grads)
    args["key_limit"][:5] = torch.tensor([-(2**31), -7, -1, -1, 0])
    args["key_limit"][18:20] = torch.tensor([41, 2**31 - 1])
    with unchecked():
        for actual, wanted in zip(backward(args, grads), expected, strict=True):
            assert_bitwise(actual, wanted)


@not_on_cpu
@pytest.mark.parametrize("argument", ["cu_seqlens_q", "cu_seqlens_k", "key_limit"])
def test_any_contents_stay_inside(argument: str, seed: int) -> None:
    """Results are anything; nothing outside of the tensors is read or written."""
    for _ in range(sized(50, 6)):
        args = make([(20, 40), (9, 70), (33, 5)], 4, 2, 16, torch.bfloat16, "random")
        size = args[argument].shape
        args[argument] = torch.randint(-200, 200, size).int()
        args[argument][torch.randint(size[0], ())] = 2**31 - 1
        with unchecked():
            grads = backward(args, random_grads(args))
        for name, grad in zip(("query", "key", "value"), grads, strict=True):
            assert grad.shape == args[name].shape
