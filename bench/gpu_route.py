"""Routing on a GPU: short sequences by the batch, and single long ones."""

import torch
import torch.nn.functional as F
from gpu_case import BF16, F32, Goal, Sizes, Work, cases
from harness import cu_seqlens
from torch import Tensor

from mor_ext.reference import route as plain

mor = torch.ops.mor


def route_topk(batch: int, length: int, k: int, dtype: torch.dtype) -> Work:
    # No ties within a row: among equal scores torch.topk takes any.
    values = torch.arange(0x3000, 0x4000, dtype=torch.int16).view(BF16)  # 0 < x < 2
    distinct = values if dtype == BF16 else ((torch.arange(length) + 0.5) / length).to(dtype)
    rows = [distinct[torch.randperm(len(distinct))[:length]] for _ in range(batch)]
    scores = torch.stack(rows)
    packed, starts = scores.flatten(), torch.arange(batch)[:, None] * length
    args = (packed, cu_seqlens(batch, length), cu_seqlens(batch, k), batch * k, length)

    def topk_sort() -> Tensor:
        picked = scores.topk(k, sorted=False).indices.sort().values
        return (picked + starts).int().flatten()

    return Work(
        ours=lambda: mor.route_topk(*args),
        exact=lambda: plain.route_topk(*args),
        peers={"topk + sort": topk_sort},
        bytes=packed.nbytes + 4 * batch * k,
        fixed_us=3.5,
    )


def route_depth(tokens: int, recursions: int, dtype: torch.dtype) -> Work:
    logits, bias = torch.randn(tokens, recursions, dtype=dtype), torch.randn(recursions)

    def eager() -> tuple[Tensor, Tensor]:
        choice = (logits.float() + bias).argmax(1)
        return (choice + 1).int(), F.one_hot(choice, recursions).sum(0).int()

    return Work(
        ours=lambda: mor.route_depth(logits, bias),
        exact=lambda: plain.route_depth(logits, bias),
        peers={"argmax + one_hot": eager},
        bytes=logits.nbytes + 4 * tokens,
    )


def topk(batch: int, length: int, k: int) -> Sizes:
    return {"batch": batch, "length": length, "k": k}


SHORT, PEER = Goal("us", 8, stretch=5), Goal("ratio", 8, "topk + sort")
DEPTHS = {"tokens": 65536, "recursions": 3}

CASES = [
    *cases("route", "route_topk", route_topk, topk(2, 70, 23), [
        (topk(32, 2048, 683), F32, SHORT, PEER),
        (topk(32, 2048, 683), BF16, SHORT, PEER),
        (topk(8, 8192, 2731), F32, SHORT, PEER),
        (topk(1, 16384, 5461), F32, Goal("us", 15, stretch=8)),
        (topk(1, 65536, 21845), F32, Goal("us", 25, stretch=12)),
        (topk(1, 131072, 43691), F32, Goal("us", 35, stretch=18)),
        (topk(1, 1 << 20, 349525), F32),
    ]),
    *cases("route", "route_depth", route_depth, DEPTHS | {"tokens": 300}, [
        (DEPTHS, F32),
        (DEPTHS, BF16),
    ]),
]  # fmt: skip
