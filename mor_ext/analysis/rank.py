"""Spearman's rank correlation, and how far it can be trusted on text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Correlation:
    rho: float  # in [-1, 1]; NaN where all values of one side are equal
    low: float  # 95 % confidence interval
    high: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.rho:+.3f} [{self.low:+.3f}, {self.high:+.3f}], {self.tokens:,} tokens"


def correlate(
    x: Tensor, y: Tensor, lengths: Sequence[int] | None = None, samples: int = 1000, seed: int = 0
) -> Correlation:
    """Spearman's rank correlation of two numbers per token, such as depth and loss.

    The interval is the bootstrap's percentile interval over whole sequences: tokens of one text
    are alike, so that drawing them one by one would make it too narrow. It is NaN for a single
    sequence.

    Args:
        x, y: ``[batch, length]``, or packed ``[total]`` with ``lengths``; a token where either is
            NaN is left out.
        samples: of the bootstrap.

    Raises:
        ValueError: shapes that do not fit.
    """
    if lengths is None and x.dim() == 2:
        lengths = [x.shape[1]] * x.shape[0]
    if lengths is None or x.shape != y.shape or sum(lengths) != x.numel():
        raise ValueError(
            "x and y must be [batch, length], or [total] with lengths that add up to total, "
            f"got {list(x.shape)}, {list(y.shape)} and lengths {lengths}"
        )
    x, y = x.flatten().double().cpu(), y.flatten().double().cpu()
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    known = ~(x.isnan() | y.isnan())
    x, y, sequence = x[known], y[known], sequence[known]
    groups = [values.unique(return_inverse=True)[1] for values in (x, y)]

    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(lengths), (samples, len(lengths)), generator=generator)
    resampled = torch.stack(
        [_spearman(*groups, row.bincount(minlength=len(lengths)).double()[sequence]) for row in drawn]
    )
    low, high = resampled.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    if len(lengths) < 2:
        low = high = float("nan")
    return Correlation(_spearman(*groups, torch.ones_like(x)).item(), low, high, len(x))


def mean_ranks(group: Tensor, weight: Tensor) -> Tensor:
    """Ranks from 1 of values of which there are ``weight`` each; equal ones share their mean.

    group: int64 ``[n]``, the number of each value among the distinct values in ascending order.
    """
    size = torch.zeros_like(weight).index_add(0, group, weight)
    return (size.cumsum(0) - (size - 1) / 2)[group]


def _spearman(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Of values given by their groups, each counted ``weight`` times."""
    ranks = torch.stack([mean_ranks(x, weight), mean_ranks(y, weight)])
    centred = ranks - (ranks * weight).sum(dim=1, keepdim=True) / weight.sum()
    covariance = (centred * weight) @ centred.T
    return covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()
