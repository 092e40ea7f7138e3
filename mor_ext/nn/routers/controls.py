"""Routers that learn nothing: what a learnt one has to beat at the same cost."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mor_ext.nn.routers.expert_choice import top
from mor_ext.nn.routers.router import Router, rows_where
from mor_ext.nn.tokens import Tokens


@dataclass
class RandomPlan:
    scores: Tensor  # fp32 [total] in [0, 1), the lower the deeper
    lengths: tuple[int, ...] | None  # that capacities refer to; None is the causal rule


class RandomRouter(Router):
    """Tokens drawn at random: expert choice's capacities, with one gate for all.

    Every token has a number in [0, 1) for all depths. In training it is new in every pass, and
    depth r keeps the lowest ``max(1, int(c_r * T))``. The causal rule keeps numbers below c_r, and
    takes them from the position alone, so that every way to run a model draws the same.
    """

    def __init__(
        self, capacity: tuple[float, ...], alpha: float = 0.1, update: str = "output"
    ) -> None:
        super().__init__(update)
        self.capacity = capacity
        self.alpha = alpha

    def begin(self, hidden: Tensor, tokens: Tokens, causal: bool) -> RandomPlan:
        if causal:
            return RandomPlan(hashed(tokens.positions), None)
        return RandomPlan(torch.rand(tokens.total, device=hidden.device), tokens.lengths)

    def select(
        self, depth: int, hidden: Tensor, active: Tokens, plan: RandomPlan
    ) -> tuple[Tokens, Tensor | None]:
        scores = plan.scores if active.index is None else plan.scores[active.index]
        if plan.lengths is None:
            rows, lengths, cu_seqlens = rows_where(scores < self.capacity[depth], active)
        else:
            rows, lengths, cu_seqlens = top(self.capacity[depth], -scores, active, plan.lengths)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        gate = torch.full_like(rows, self.alpha, dtype=dtype)
        return active.select(rows, lengths, cu_seqlens, gate), None

    def enter(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return (hashed(positions),)

    def goes_on(
        self, depth: int, hidden: Tensor, rows: Tensor, entered: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        gate = torch.full_like(rows, self.alpha, dtype=dtype)
        return entered[0][rows] < self.capacity[depth], gate


class FixedDepthRouter(Router):
    """Every token takes the same ``fixed_depth`` of the recursions there are."""

    def __init__(self, fixed_depth: int, update: str = "delta") -> None:
        super().__init__(update)
        self.fixed_depth = fixed_depth

    def select(
        self, depth: int, hidden: Tensor, active: Tokens, plan: None
    ) -> tuple[Tokens, Tensor | None]:
        return (active, None) if depth < self.fixed_depth else (nobody(active), None)

    def goes_on(
        self, depth: int, hidden: Tensor, rows: Tensor, entered: tuple[Tensor, ...]
    ) -> tuple[bool, None]:
        return depth < self.fixed_depth, None


def nobody(active: Tokens) -> Tokens:
    none = active.positions[:0]
    return replace(
        active,
        lengths=(0,) * len(active.lengths),
        cu_seqlens=torch.zeros_like(active.cu_seqlens),
        positions=none,
        index=none,
        gate=none.float(),
    )


def hashed(positions: Tensor) -> Tensor:
    """fp32 in [0, 1) by position: two rounds of xor-shift and multiply, modulo 2 ** 32."""
    x = positions.long() + 1
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    return (x >> 8).float() / (1 << 24)
