"""Token compaction in plain PyTorch."""

import torch
from torch import Tensor


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    rows = x[index.clamp(min=0).long()]
    padding = (index < 0).view(-1, *[1] * (x.dim() - 1))
    return torch.where(padding, torch.zeros_like(rows), rows)
