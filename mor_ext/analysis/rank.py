"""Spearman's rank correlation, and how far it can be trusted on text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Correlation:
    rho: float  # in [-1, 1]; NaN where all values of one side are equal
    low: float  # 95 % confidence interval
    high: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.rho:+.3f} (95 %: {self.low:+.3f} to {self.high:+.3f}; {self.tokens:,} tokens)"
        )


def correlate(
    x: Tensor, y: Tensor, lengths: Sequence[int] | None = None, samples: int = 1000, seed: int = 0
) -> Correlation:
    """Spearman's rank correlation of two numbers per token, such as depth and loss.

    The interval is the bootstrap's percentile interval over whole sequences: tokens of one text
    are alike, so that drawing them one by one would make it too narrow. More than 64 sequences are
    drawn as 64 runs of neighbours, which bounds the work. It is NaN for a single sequence.

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
    known = ~(x.isnan() | y.isnan())
    count = min(64, len(lengths))
    run = torch.arange(len(lengths)) * count // max(1, len(lengths))
    run = run.repeat_interleave(torch.tensor(lengths, dtype=torch.long))[known]  # [n], < count
    a, b = (_centred_ranks(values[known], run, count) for values in (x, y))
    moments = torch.stack([_moments(*pair, run, count) for pair in ((a, b), (a, a), (b, b))])

    rho = _spearman(moments, torch.ones(1, count, dtype=torch.float64)).item()
    low = high = float("nan")
    if count > 1:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(count, (samples, count), generator=generator)
        times = F.one_hot(drawn, count).sum(dim=1).double()  # [samples, runs]
        rhos = _spearman(moments, times)
        low, high = rhos.nanquantile(rhos.new_tensor([0.025, 0.975])).tolist()
    return Correlation(rho, low, high, len(run))


def _centred_ranks(values: Tensor, run: Tensor, count: int) -> Tensor:
    """fp64 ``[n, count]``: each value's rank less the mean rank, as a sum over the runs.

    With run s drawn t_s times, the rank of a value is 1/2 + sum_s t_s * (values of s below it,
    equal ones half, so that they share their mean rank), and the mean 1/2 + sum_s t_s * size_s / 2.
    """
    distinct, group = values.unique(return_inverse=True)
    size = torch.zeros(len(distinct), count, dtype=torch.float64)
    size.index_put_((group, run), torch.ones_like(values), accumulate=True)
    return (size.cumsum(dim=0) - size / 2)[group] - size.sum(dim=0) / 2


def _moments(a: Tensor, b: Tensor, run: Tensor, count: int) -> Tensor:
    """``[count, count * count]``: of each run's tokens, a ``[n, count]`` times b."""
    return torch.stack([(a[run == r].T @ b[run == r]).flatten() for r in range(count)])


def _spearman(moments: Tensor, times: Tensor) -> Tensor:
    """``[samples]``, with each run there ``times`` (fp64 ``[samples, runs]``) times.

    moments: covariance and both variances, ``[3, runs, runs * runs]``: cubic forms in ``times``.
    """
    pairs = (times.unsqueeze(2) * times.unsqueeze(1)).flatten(1)  # [samples, runs * runs]
    covariance, *variances = ((times @ moment * pairs).sum(dim=1) for moment in moments)
    return covariance / (variances[0] * variances[1]).sqrt()
