"""RMSNorm, which also gathers where the active tokens are taken out of a packed tensor."""

import torch
from torch import Tensor, nn

from mor_ext import ops


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x ** 2) + eps) * weight`` (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:  # [N, size]
        return self.beside(x)[1]

    def beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[N, size]`` as it is and normed: a residual stream that goes on from the first has
        the gradients of both added in the one pass of the norm's backward."""
        # The op beats F.rms_norm and its backward even with a gather of every row.
        index = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
        rows, normed, _ = ops.gather_rms_norm(x, index, self.weight, self.eps)
        return rows, normed  # [N, size] each

    def gather(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``index`` of x ``[N, size]``, as they are and normed, in one pass over memory."""
        rows, normed, _ = ops.gather_rms_norm(x, index, self.weight, self.eps)
        return rows, normed  # [k, size] each
