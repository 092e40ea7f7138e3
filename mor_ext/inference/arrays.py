"""From the host's arrays and lists to tensors, without waiting for the device."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """On the CPU the same memory, which the scheduler's next call of the kind writes anew; on CUDA
    it has been read when this returns."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """``[n, 1]``, of the dtype and on the device of another tensor."""
    on_host = torch.tensor(values, dtype=like.dtype, device="cpu")
    return on_host.unsqueeze(1).to(like.device, non_blocking=True)


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 ``[n]``."""
    on_host = torch.tensor(values, dtype=torch.long, device="cpu")
    return on_host.to(device, non_blocking=True)
