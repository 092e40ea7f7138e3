"""Routing: which tokens go on, against the chain of PyTorch ops that gives the same rows."""

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import OURS, Case, compiled, cu_seqlens
from torch import Tensor

mor = torch.ops.mor


def distinct_scores(batch: int, length: int, dtype: torch.dtype) -> Tensor:
    """[batch, length], no ties within a row: among equal scores torch.topk takes any."""
    values = torch.arange(0x3000, 0x4000, dtype=torch.int16).view(torch.bfloat16)  # 0 < x < 2
    rows = [values[torch.randperm(len(values))[:length]] for _ in range(batch)]
    return torch.stack(rows).to(dtype)


@lru_cache(1)
def topk_case(batch: int, length: int, k: int, dtype: torch.dtype) -> Case:
    scores = distinct_scores(batch, length, dtype)
    packed, starts = scores.flatten(), torch.arange(batch)[:, None] * length
    lengths, lengths_out = cu_seqlens(batch, length), cu_seqlens(batch, k)

    def sort(scores: Tensor) -> Tensor:
        rows = scores.topk(k, sorted=False).indices.sort().values
        return (rows + starts).int().flatten()

    def mask(scores: Tensor) -> Tensor:
        rows = scores.topk(k, sorted=False).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, rows, True)
        return chosen.flatten().nonzero().int().flatten()

    sort_compiled = compiled(sort)
    return Case(
        op="route_topk",
        shape=f"{batch} x {length}, k {k}",
        dtype=dtype,
        peers={
            OURS: lambda: mor.route_topk(packed, lengths, lengths_out, batch * k, length),
            "eager": lambda: sort(scores),
            "eager mask": lambda: mask(scores),
            "compiled": lambda: sort_compiled(scores),
        },
        bytes=packed.nbytes + 4 * batch * k,
        goals={"eager": 8.0} if batch == 32 else {},
    )


@pytest.mark.parametrize("peer", [OURS, "eager", "eager mask", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length", "k"), [(32, 2048, 683), (4, 512, 341)])
def test_route_topk(
    measure: Any, batch: int, length: int, k: int, dtype: torch.dtype, peer: str
) -> None:
    measure(topk_case(batch, length, k, dtype), peer)


@lru_cache(1)
def depth_case(tokens: int, recursions: int, dtype: torch.dtype) -> Case:
    logits, bias = torch.randn(tokens, recursions, dtype=dtype), torch.zeros(recursions)

    def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
        choice = (logits + bias).argmax(1)
        load = F.one_hot(choice, recursions).sum(0)
        return (choice + 1).int(), load.int()

    eager_compiled = compiled(eager)
    return Case(
        op="route_depth",
        shape=f"{tokens} x {recursions}",
        dtype=dtype,
        peers={
            OURS: lambda: mor.route_depth(logits, bias),
            "eager": lambda: eager(logits),
            "compiled": lambda: eager_compiled(logits),
        },
        bytes=logits.nbytes + 4 * tokens,
    )


@pytest.mark.parametrize("peer", [OURS, "eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32])
def test_route_depth(measure: Any, dtype: torch.dtype, peer: str) -> None:
    measure(depth_case(65536, 3, dtype), peer)
