"""Which tokens of a packed batch a computation works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass
class Tokens:
    """Tokens of a packed batch: all of them, or those active at one depth.

    The lengths are known on the host too, because they size every tensor that follows.
    """

    lengths: tuple[int, ...]  # number of tokens of each sequence
    cu_seqlens: Tensor  # int32 [batch + 1]
    positions: Tensor  # int32 [k], of each token in its sequence
    index: Tensor | None = None  # int32 [k], rows in the packed batch; None is every row
    gate: Tensor | None = None  # fp32 [k], the router's weight on each token's update; None is 1

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    @staticmethod
    def of_batch(
        lengths: Sequence[int], device: torch.device, past: Tensor | None = None
    ) -> Tokens:
        """Every token of a batch; the sequences continue ``past`` (int32 ``[batch]``) tokens."""
        cu_seqlens = cu_seqlens_of(lengths, device)
        total = sum(lengths)
        start = cu_seqlens[:-1] if past is None else cu_seqlens[:-1] - past
        start = torch.repeat_interleave(start, cu_seqlens.diff(), output_size=total)
        rows = torch.arange(total, dtype=torch.int32, device=device)
        return Tokens(tuple(lengths), cu_seqlens, rows - start)

    def select(
        self,
        rows: Tensor,
        lengths: Sequence[int],
        cu_seqlens: Tensor,
        gate: Tensor | None = None,
    ) -> Tokens:
        """Those of these tokens whose numbers (ascending, int32 ``[k]``) are in ``rows``."""
        index = rows if self.index is None else self.index[rows]
        return Tokens(tuple(lengths), cu_seqlens, self.positions[rows], index, gate)


def cu_seqlens_of(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int32 ``[len(lengths) + 1]`` on ``device``."""
    if len(set(lengths)) == 1:  # made on the device: no copy to wait for
        return torch.arange(len(lengths) + 1, dtype=torch.int32, device=device) * lengths[0]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
