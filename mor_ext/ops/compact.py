"""Token compaction: the rows that a recursion works on, out of a packed tensor and back."""

import torch
from torch import Tensor


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a packed tensor.

    Args:
        x: ``[N, ...]``, fp32, bf16 or fp16 (fp64 too on CPU).
        index: int32 ``[K]``, rows in ``[0, N)``; -1 gives a zero row.

    Returns:
        ``[K, ...]`` of x's dtype. Differentiable in x.

    Raises:
        RuntimeError: ``mor::gather_tokens: <argument> must be <rule>, got <value>``.
    """
    return torch.ops.mor.gather_tokens(x, index)


@torch.library.register_fake("mor::gather_tokens")
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((index.shape[0], *x.shape[1:]))
