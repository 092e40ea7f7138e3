"""What the layers of a model do in their own way for speed and memory, against plain PyTorch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, assert_accurate, scaled_atol
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mor_ext.nn import RMSNorm, SwiGLU, mlp

pytestmark = pytest.mark.usefixtures("one_thread")


def plain(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def with_gradient(function: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = function(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows of the smallest dtype, so that small inputs have several chunks."""
    monkeypatch.setattr(mlp, "CHUNK_BYTES", 5 * 2 * 22)


@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_matches_plain(dtype: torch.dtype, rows: int, small_chunks: None, seed: int) -> None:
    x, grad = 3 * torch.randn(rows, 22).to(dtype), torch.randn(rows, 11).to(dtype)
    exact = with_gradient(plain, x.double(), grad.double())
    eager, actual = with_gradient(plain, x, grad), with_gradient(mlp.gated, x, grad)
    for a, e, ref in zip(actual, eager, exact, strict=True):
        assert_accurate(a, e, ref, scaled_atol(ref, dtype))


def test_gated_gradcheck(small_chunks: None, seed: int) -> None:
    x = torch.randn(7, 22, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mlp.gated, x)


def test_gated_takes_gradients_of_any_layout(seed: int) -> None:
    x, column = torch.randn(9, 22), torch.randn(9, 1)
    expanded = with_gradient(mlp.gated, x, column.expand(9, 11))
    torch.testing.assert_close(expanded, with_gradient(plain, x, column.expand(9, 11)))


def test_swiglu_keeps_three_tensors(seed: int) -> None:
    """Its input, gate_up and the product: what is kept in every layer is most of the memory."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.itemsize
        return x

    module, x = SwiGLU(6, 11), torch.randn(40, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        module(x)
    weights = [parameter.numel() for parameter in module.parameters()]
    assert sorted(kept.values()) == sorted([40 * 6, 40 * 22, 40 * 11, *weights])


def test_swiglu_compiles(seed: int) -> None:
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    module = SwiGLU(6, 11)
    compiled = torch.compile(module, fullgraph=True, backend=frames)
    for rows in (8, 13, 40, 21):
        x, grad = torch.randn(rows, 6), torch.randn(rows, 6)
        torch.testing.assert_close(with_gradient(compiled, x, grad), with_gradient(module, x, grad))
    assert frames.frame_count <= 2


def test_beside_gives_the_residual_and_its_gradient(seed: int) -> None:
    norm, x = RMSNorm(16, 1e-5).double(), torch.randn(9, 16, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    grads = torch.randn(2, 9, 16, dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        return torch.stack(norm.beside(x))

    def separately(x: Tensor) -> Tensor:
        return torch.stack([x, F.rms_norm(x, (16,), norm.weight, 1e-5)])

    torch.testing.assert_close(with_gradient(ours, x, grads), with_gradient(separately, x, grads))
