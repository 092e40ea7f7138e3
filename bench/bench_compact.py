"""Compaction: gather the active rows, scatter their gated updates back."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import OURS, Case, compiled, cu_seqlens, differentiable_peers
from torch import Tensor

mor = torch.ops.mor

EPS = 1e-6
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def active_rows(tokens: int, active: int) -> Tensor:
    """int32 [active], ascending."""
    return torch.randperm(tokens)[:active].sort().values.int()


def with_compiled(
    ours: Callable[..., Any], eager: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    return {OURS: ours, "eager": eager, "compiled": compiled(eager)}


@lru_cache(1)
def depth_case(batch: int, length: int, recursions: int) -> Case:
    tokens = batch * length
    depth = torch.randint(1, recursions + 1, (tokens,), dtype=torch.int32)
    lengths = cu_seqlens(batch, length)

    def eager() -> tuple[Tensor, Tensor]:
        active = depth > torch.arange(recursions, dtype=torch.int32)[:, None]
        rows = [row.nonzero().int().flatten() for row in active]
        index = torch.stack([F.pad(row, (0, tokens - len(row)), value=-1) for row in rows])
        ends = F.pad(active.cumsum(1, dtype=torch.int32), (1, 0))
        return index, ends[:, lengths]

    return Case(
        op="compact_depth",
        shape=f"{batch} x {length}, {recursions} recursions",
        dtype=torch.int32,
        peers={OURS: lambda: mor.compact_depth(depth, lengths, recursions), "eager": eager},
        bytes=depth.nbytes * (1 + recursions),
    )


@pytest.mark.parametrize("peer", [OURS, "eager"])
def test_compact_depth(measure: Any, peer: str) -> None:
    measure(depth_case(32, 2048, 3), peer)


@lru_cache(1)
def gather_case(
    tokens: int, active: int, width: int, dtype: torch.dtype, backward: bool = False
) -> Case:
    x, index = torch.randn(tokens, width, dtype=dtype), active_rows(tokens, active)
    moved = 2 * active + (active + tokens if backward else 0)  # rows read and written
    return Case(
        op="gather_tokens fwd+bwd" if backward else "gather_tokens",
        shape=f"{active} of {tokens} x {width}",
        dtype=dtype,
        peers=differentiable_peers(
            with_compiled(
                lambda x: mor.gather_tokens(x, index), lambda x: x.index_select(0, index)
            ),
            (x,),
            backward,
        ),
        bytes=moved * width * x.itemsize,
    )


@lru_cache(1)
def scatter_case(
    tokens: int, active: int, width: int, dtype: torch.dtype, backward: bool = False
) -> Case:
    x, index = torch.randn(tokens, width, dtype=dtype), active_rows(tokens, active)
    update, gate = torch.randn(active, width, dtype=dtype), torch.rand(active).to(dtype)
    # The backward pass reads the active gradients and updates, writes gradients of both.
    moved = 2 * tokens + active + (tokens + 3 * active if backward else 0)
    return Case(
        op="scatter_tokens fwd+bwd" if backward else "scatter_tokens",
        shape=f"{active} into {tokens} x {width}",
        dtype=dtype,
        peers=differentiable_peers(
            with_compiled(
                lambda x, update, gate: mor.scatter_tokens(x, update, index, gate),
                lambda x, update, gate: x.index_add(0, index, update * gate[:, None]),
            ),
            (x, update, gate),
            backward,
        ),
        bytes=moved * width * x.itemsize,
        goals={} if backward else {"eager": 2.0},
    )


@lru_cache(1)
def scatter_inplace_case(tokens: int, active: int, width: int, dtype: torch.dtype) -> Case:
    x, index = torch.randn(tokens, width, dtype=dtype), active_rows(tokens, active)
    # Small: every round adds to the same rows.
    update, gate = torch.randn(active, width, dtype=dtype), torch.rand(active).to(dtype) / 64

    def eager(x: Tensor) -> Tensor:
        return x.index_add_(0, index, update * gate[:, None])

    def ours(x: Tensor) -> Tensor:
        mor.scatter_tokens_(x, update, index, gate)
        return x

    functions = with_compiled(ours, eager)
    targets = {name: x.clone() for name in functions}

    def reset() -> None:
        for target in targets.values():
            target.copy_(x)

    return Case(
        op="scatter_tokens_",
        shape=f"{active} into {tokens} x {width}",
        dtype=dtype,
        peers={name: partial(f, targets[name]) for name, f in functions.items()},
        bytes=3 * active * width * x.itemsize,
        goals={"eager": 3.0},
        reset=reset,
    )


@lru_cache(1)
def rms_norm_case(
    tokens: int, active: int, width: int, dtype: torch.dtype, backward: bool = False
) -> Case:
    x, index = torch.randn(tokens, width, dtype=dtype), active_rows(tokens, active)
    weight = torch.randn(width, dtype=dtype)

    def ours(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return mor.gather_rms_norm(x, index, weight, EPS)[:2]

    def eager(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.index_select(0, index)
        return rows, F.rms_norm(rows, (width,), weight, EPS)

    moved = 3 * active + (4 * active + tokens if backward else 0)
    return Case(
        op="gather_rms_norm fwd+bwd" if backward else "gather_rms_norm",
        shape=f"{active} of {tokens} x {width}",
        dtype=dtype,
        peers=differentiable_peers(with_compiled(ours, eager), (x, weight), backward),
        bytes=moved * width * x.itemsize,
        goals={} if backward else {"eager": 1.5},
    )


PEERS = [OURS, "eager", "compiled"]
SIZE = (8192, 4096, 512)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", [gather_case, scatter_case, scatter_inplace_case, rms_norm_case])
def test_forward(measure: Any, case: Callable[..., Case], dtype: torch.dtype, peer: str) -> None:
    measure(case(*SIZE, dtype), peer)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [gather_case, scatter_case, rms_norm_case])
def test_forward_backward(
    measure: Any, case: Callable[..., Case], dtype: torch.dtype, peer: str
) -> None:
    measure(case(*SIZE, dtype, backward=True), peer)
