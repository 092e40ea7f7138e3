"""From the scheduler's arrays to tensors."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """On the CPU the same memory, which the scheduler's next call of the kind writes anew."""
    return torch.from_numpy(array).to(device)
