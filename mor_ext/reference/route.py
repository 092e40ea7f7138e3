"""Routing decisions in plain PyTorch."""

import torch
from torch import Tensor


def route_topk(
    scores: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_out: Tensor,
    total_out: int,
    max_seqlen: int,
) -> Tensor:
    starts, counts = cu_seqlens.tolist(), cu_seqlens_out.diff().tolist()
    index = [scores.new_empty(0, dtype=torch.long)]
    for b, k in enumerate(counts):
        # A stable sort leaves equal scores in row order; it puts NaN first, as descending.
        order = scores[starts[b] : starts[b + 1]].sort(descending=True, stable=True).indices
        index.append(starts[b] + order[:k].sort().values)
    return torch.cat(index).int()


def route_depth(logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    choice = (wide if bias is None else wide + bias).argmax(dim=1)
    load = torch.bincount(choice, minlength=logits.shape[1])
    return choice.int() + 1, load.int()
