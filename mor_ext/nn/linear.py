"""Linear layers, and weights laid out for products of few rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Part = tuple[int, int]
LEAST_PACKED = 1 << 17  # elements: of fewer the product takes less time than to ask oneDNN for it


class Linear(nn.Linear):
    """``x @ weight.T``.

    Attributes:
        packed: what products take instead of the weight where no gradient is wanted, if set.
    """

    packed: PackedWeight | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, part: Part | None = None) -> Tensor:
        """``[k, in_features]`` to ``[k, out_features]``, or to the outputs [start, stop) only."""
        if self.packed is not None and not torch.is_grad_enabled():
            return self.packed(x, self.weight, part)
        return F.linear(x, part_of(self.weight, part))


class PackedWeight:
    """A copy of a weight in the order in which oneDNN's kernels read it, on a CPU.

    Without it every call brings the weight into such an order anew, which for 16 rows takes as long
    as the product itself. The copy takes the weight's memory once more. It is made when it is first
    asked for, and again after the weight has changed; after changes through ``weight.data``, which
    PyTorch does not count, call ``clear``. Copies and pickles of this object start without it.
    Where oneDNN has no kernel for the dtype, and of small weights, products take the weight itself.
    """

    def __init__(self) -> None:
        self.parts: dict[Part | None, Tensor] = {}
        # What they were made of. That it is kept means that nothing else comes to its address.
        self.source: Tensor | None = None
        self.version = 0

    def __call__(self, x: Tensor, weight: Tensor, part: Part | None = None) -> Tensor:
        """``x @ weight.T`` ``[k, out_features]`` of x ``[k, in_features]``; part as in Linear."""
        if not can_pack(weight):
            return F.linear(x, part_of(weight, part))
        same = self.source is not None and self.source.data_ptr() == weight.data_ptr()
        if not same or self.version != weight._version:
            self.clear()
            self.source, self.version = weight.detach(), weight._version
        packed = self.parts.get(part)
        if packed is None:
            assert self.source is not None
            rows = part_of(self.source, part)
            packed = self.parts[part] = torch.ops.mkldnn._reorder_linear_weight(rows)
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    def clear(self) -> None:
        self.parts.clear()
        self.source = None

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, ()


def can_pack(weight: Tensor) -> bool:
    large = weight.numel() >= LEAST_PACKED
    return large and weight.is_cpu and not weight.is_inference() and packable(weight.dtype)


@cache
def packable(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bf16 or dtype == torch.float32


def part_of(weight: Tensor, part: Part | None) -> Tensor:
    return weight if part is None else weight[part[0] : part[1]]
