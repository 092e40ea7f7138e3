"""Rotary position embedding."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mor_ext import ops


class Rotary(nn.Module):
    """Rotary embedding at the tokens' original positions (Su et al., arXiv 2104.09864).

    Position p turns the pair (x[i], x[i + head_dim / 2]) by ``p * theta ** (-2 i / head_dim)``.
    """

    cos: Tensor  # fp32 (fp64 in an fp64 model) [max_positions, head_dim / 2]
    sin: Tensor

    def __init__(self, head_dim: int, max_positions: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.max_positions, self.theta = head_dim, max_positions, theta
        self.tabulate(torch.empty(0))

    def forward(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """query, key ``[k, heads, head_dim]``, turned; positions int32 ``[k]``."""
        return ops.rotary(query, key, self.cos, self.sin, positions)

    def query(self, query: Tensor, positions: Tensor) -> Tensor:
        return self(query, query[:, :0], positions)[0]  # a key without heads

    def tabulate(self, like: Tensor | None = None) -> None:
        """Computes the angles anew, for the device of ``like`` (of the tables there are)."""
        like = self.cos if like is None else like
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        position = torch.arange(self.max_positions, dtype=torch.float64)
        angle = torch.outer(position, self.theta**-exponent)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.register_buffer("cos", angle.cos().to(like.device, dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(like.device, dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        """Follows the model to another device or dtype, without rounding the angles."""
        super()._apply(fn, recurse)
        self.tabulate()
        return self
