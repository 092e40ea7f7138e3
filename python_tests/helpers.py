"""What tests of several families share: tolerances, dtypes, random packed batches."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LENGTHS = [0, 1, 2, 31, 129, 1134]


def assert_accurate(actual: Tensor, eager: Tensor, exact: Tensor, atol: float = 1e-6) -> None:
    """The rule for every kernel: err(kernel) <= 2 * err(PyTorch in the same dtype) + atol.

    actual: from the kernel. eager: plain PyTorch on the same inputs in the same dtype. exact:
    plain PyTorch on the same inputs in fp64. Errors are maxima over all elements; infinities and
    NaN must stand in the same places.
    """
    assert actual.shape == exact.shape, f"{actual.shape} != {exact.shape}"
    assert actual.dtype == eager.dtype, f"{actual.dtype} != {eager.dtype}"
    if exact.numel() == 0:
        return
    actual, eager = actual.double(), eager.double()
    special = ~exact.isfinite()
    assert torch.equal(actual[special].nan_to_num(nan=0.5), exact[special].nan_to_num(nan=0.5))
    actual, eager, exact = (t.masked_fill(special, 0) for t in (actual, eager, exact))
    error = (actual - exact).abs().max().item()
    bound = 2 * (eager - exact).abs().max().item() + atol
    assert error <= bound, f"error {error:.3e} > bound {bound:.3e}"


def cu_seqlens_of(lengths: list[int]) -> Tensor:
    """int32 ``[len(lengths) + 1]``."""
    return torch.tensor([0, *lengths]).cumsum(0).int()
