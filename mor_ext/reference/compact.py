"""Token compaction in plain PyTorch."""

import torch
from torch import Tensor


def compact_depth(depth: Tensor, cu_seqlens: Tensor, num_recursions: int) -> tuple[Tensor, Tensor]:
    index = torch.full((num_recursions, len(depth)), -1, dtype=torch.int32, device=depth.device)
    cu_seqlens_out = cu_seqlens.new_zeros((num_recursions, len(cu_seqlens)))
    for r in range(num_recursions):
        active = depth > r
        rows = active.nonzero().flatten().int()
        index[r, : len(rows)] = rows
        active_before = torch.nn.functional.pad(active.cumsum(0), (1, 0))
        cu_seqlens_out[r] = active_before[cu_seqlens.long()]
    return index, cu_seqlens_out


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    padded = torch.cat([x, x.new_zeros((1, *x.shape[1:]))])
    return padded[index.long()]  # -1 is the last row, of zeros


def scatter_tokens(x: Tensor, update: Tensor, index: Tensor, gate: Tensor | None = None) -> Tensor:
    wide = _accumulate_dtype(x)
    keep = index >= 0
    rows = index[keep].long()
    step = update[keep].to(wide)
    if gate is not None:
        step = step * gate[keep].to(wide).view(-1, *[1] * (x.dim() - 1))
    return x.to(wide).index_add(0, rows, step).to(x.dtype)


def scatter_tokens_(x: Tensor, update: Tensor, index: Tensor, gate: Tensor | None = None) -> None:
    x.copy_(scatter_tokens(x, update, index, gate))


def gather_rms_norm(
    x: Tensor, index: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _accumulate_dtype(x)
    rows = gather_tokens(x, index)
    rstd = (rows.to(wide).square().mean(dim=1) + eps).rsqrt() * (index >= 0)
    normed = rows.to(wide) * rstd.unsqueeze(1) * weight.to(wide)
    return rows, normed.to(x.dtype), rstd


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
