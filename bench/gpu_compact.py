"""Compaction on a GPU: rows in, rows out, at sizes that fill the memory and at a small model's."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_compact import active_rows
from gpu_case import BF16, F32, I32, Call, Goal, Work, cases, one_pass, wide
from harness import cu_seqlens
from torch import Tensor

from mor_ext.reference import compact as plain

mor = torch.ops.mor


def compact_depth(batch: int, length: int, recursions: int, dtype: torch.dtype) -> Work:
    tokens, lengths = batch * length, cu_seqlens(batch, length)
    depth = torch.randint(1, recursions + 1, (tokens,), dtype=dtype)
    at_least, places = torch.arange(recursions, dtype=dtype)[:, None], torch.arange(tokens)

    def sort() -> tuple[Tensor, Tensor]:
        """Without nonzero, the size of whose result the host has to wait for."""
        active = depth > at_least
        rows = (~active).int().argsort(dim=1, stable=True)
        index = torch.where(places < active.sum(1, keepdim=True), rows, -1)
        ends = F.pad(active.cumsum(1), (1, 0))
        return index.int(), ends[:, lengths].int()

    return Work(
        ours=lambda: mor.compact_depth(depth, lengths, recursions),
        exact=lambda: plain.compact_depth(depth, lengths, recursions),
        peers={"argsort": sort},
        bytes=depth.nbytes * (1 + recursions),
    )


def gather(
    tokens: int, active: int, width: int, dtype: torch.dtype, backward: bool = False
) -> Work:
    x, index = torch.randn(tokens, width, dtype=dtype), active_rows(tokens, active)
    return Work(
        **one_pass(
            lambda x: mor.gather_tokens(x, index),
            lambda x: plain.gather_tokens(x, index),
            {"index_select": lambda x: x.index_select(0, index)},
            inputs=[x],
            grads=[torch.randn(active, width, dtype=dtype)] if backward else [],
        ),
        bytes=(active + (tokens if backward else active)) * width * x.itemsize,
    )


def scatter(
    tokens: int, active: int, width: int, dtype: torch.dtype, backward: bool = False
) -> Work:
    x, index = torch.randn(tokens, width, dtype=dtype), active_rows(tokens, active)
    update, gate = torch.randn(active, width, dtype=dtype), torch.rand(active).to(dtype)
    places = index.long()[:, None].expand(-1, width)
    # Rows read and written; the backward pass hands the gradient of x on as it is.
    moved = 3 * active if backward else 2 * tokens + active
    return Work(
        **one_pass(
            lambda x, update, gate: mor.scatter_tokens(x, update, index, gate),
            lambda x, update, gate: plain.scatter_tokens(x, update, index, gate),
            {
                "scatter_add": lambda x, update, gate: x.scatter_add(
                    0, places, update * gate[:, None]
                ),
                "index_add": lambda x, update, gate: x.index_add(0, index, update * gate[:, None]),
            },
            inputs=[x, update, gate],
            grads=[torch.randn(tokens, width, dtype=dtype)] if backward else [],
        ),
        bytes=moved * width * x.itemsize,
    )


def scatter_inplace(tokens: int, active: int, width: int, dtype: torch.dtype) -> Work:
    x, index = torch.randn(tokens, width, dtype=dtype), active_rows(tokens, active)
    # Small, for every call adds to the same rows; results are compared after the first.
    update, gate = torch.randn(active, width, dtype=dtype), torch.rand(active).to(dtype) / 64
    places = index.long()[:, None].expand(-1, width)

    def on_copy(function: Callable[[Tensor], Any]) -> Call:
        target = x.clone()

        def call() -> Tensor:
            function(target)
            return target

        return call

    return Work(
        ours=on_copy(lambda x: mor.scatter_tokens_(x, update, index, gate)),
        exact=lambda: plain.scatter_tokens(*wide(x, update), index, gate.double()),
        peers={
            "scatter_add_": on_copy(lambda x: x.scatter_add_(0, places, update * gate[:, None])),
            "index_add_": on_copy(lambda x: x.index_add_(0, index, update * gate[:, None])),
        },
        bytes=3 * active * width * x.itemsize,
    )


def rms_norm(
    tokens: int, active: int, width: int, dtype: torch.dtype, backward: bool = False
) -> Work:
    x, index = torch.randn(tokens, width, dtype=dtype), active_rows(tokens, active)
    weight, eps = torch.randn(width, dtype=dtype), 1e-6
    rows = x.index_select(0, index)

    def eager(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.index_select(0, index)
        return rows, F.rms_norm(rows, (width,), weight, eps)

    alone = {"rms_norm alone": (lambda: F.rms_norm(rows, (width,), weight, eps), 0)}
    return Work(
        **one_pass(
            lambda x, weight: mor.gather_rms_norm(x, index, weight, eps)[:2],
            lambda x, weight: plain.gather_rms_norm(x, index, weight, eps)[:2],
            {"index_select + rms_norm": eager},
            inputs=[x, weight],
            grads=list(torch.randn(2, active, width, dtype=dtype)) if backward else [],
        ),
        bytes=(3 * active + (tokens if backward else 0)) * width * x.itemsize,
        yardsticks={} if backward else alone,
    )


SMALL = {"tokens": 40, "active": 13, "width": 24}
LARGE = {"tokens": 65536, "active": 32768, "width": 1024}
WIDE = {"tokens": 32768, "active": 16384, "width": 2048}
MODEL = {"tokens": 8192, "active": 2730, "width": 512}
DEPTHS = {"batch": 32, "length": 2048, "recursions": 3}
NEAR_COPY, NORM = Goal("share", 0.80), Goal("ratio", 0.91, "rms_norm alone")
ADD, ADD_ = Goal("ratio", 2, "scatter_add"), Goal("ratio", 2, "scatter_add_")
BACKWARD = [(LARGE, BF16, NEAR_COPY), (MODEL, BF16)]

CASES = [
    *cases("compact", "compact_depth", compact_depth, DEPTHS | {"length": 150}, [(DEPTHS, I32)]),
    *cases("compact", "gather_tokens", gather, SMALL, [
        (LARGE, BF16, NEAR_COPY),
        (WIDE, BF16, NEAR_COPY),
        (LARGE, F32, NEAR_COPY),
        (MODEL, BF16),
    ]),
    *cases("compact", "gather_rms_norm", rms_norm, SMALL, [
        (LARGE, BF16, NEAR_COPY, NORM),
        (WIDE, BF16, NEAR_COPY, NORM),
        (LARGE, F32, NEAR_COPY),
        (MODEL, BF16),
    ]),
    *cases("compact", "scatter_tokens", scatter, SMALL, [
        (LARGE, BF16, NEAR_COPY, ADD),
        (WIDE, BF16, NEAR_COPY, ADD),
        (LARGE, F32, NEAR_COPY, ADD),
        (MODEL, BF16),
    ]),
    *cases("compact", "scatter_tokens_", scatter_inplace, SMALL, [
        (LARGE, BF16, NEAR_COPY, ADD_),
        (MODEL, BF16),
    ]),
    *cases("compact", "gather_tokens", gather, SMALL, BACKWARD, flags=("backward",)),
    *cases("compact", "gather_rms_norm", rms_norm, SMALL, BACKWARD, flags=("backward",)),
    *cases("compact", "scatter_tokens", scatter, SMALL, BACKWARD, flags=("backward",)),
]  # fmt: skip
