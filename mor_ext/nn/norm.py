"""RMSNorm, which also gathers where the active tokens are taken out of a packed tensor."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_ext import ops


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x ** 2) + eps) * weight`` (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def gather(self, x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows ``index`` of x ``[N, size]`` (None: all), as they are and normed, in one pass."""
        if index is None:
            return x, self(x)
        rows, normed, _ = ops.gather_rms_norm(x, index, self.weight, self.eps)
        return rows, normed  # [k, size] each
