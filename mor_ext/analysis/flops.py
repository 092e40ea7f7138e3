"""Floating point operations of a forward pass, per token, for every variant of the config.

A product of ``[m, k]`` with ``[k, n]`` counts 2 m k n. Counted are the matrix products and, for
attention, the pairs of a query and a key that it sees: 4 * head_dim a pair and head, half of it for
the scores and half for the values. Norms, rotary embedding, softmax, activations, gates and the
look-up of the embedding count nothing, as in ``torch.utils.flop_counter``.

Training counts three times the forward pass: each product has a gradient for both of its factors.
The scores that a flash-style backward computes again, gradient checkpointing and the optimizer are
left out, as in the model FLOPs of Chowdhery et al. (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_ext.models import MoRConfig
from mor_ext.models.layout import stages_of
from mor_ext.nn import ActionRouter, ExpertChoiceRouter, Recursion, Router, TokenChoiceRouter
from mor_ext.nn.routers.router import Scorer


@dataclass(frozen=True, eq=False)
class Flops:
    """FLOPs by part; tensors of one shape, ``[*shape]`` for tokens or ``[]`` for a mean."""

    head: Tensor  # hidden state to logits; the embedding is a look-up
    projections: Tensor  # query, key, value and output
    attention: Tensor  # visible pairs
    mlp: Tensor
    router: Tensor

    @property
    def total(self) -> Tensor:
        return self.head + self.projections + self.attention + self.mlp + self.router

    def parts(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def mean(self) -> Flops:
        """Per token: fp64 ``[]``."""
        return Flops(**{name: part.double().mean() for name, part in self.parts().items()})

    def training(self) -> Flops:
        """Forward and backward; the head of this file says what is assumed."""
        return Flops(**{name: 3 * part for name, part in self.parts().items()})


def expected_flops(config: MoRConfig, length: int, shares: Sequence[float] | None = None) -> Flops:
    """Mean FLOPs per token of a forward pass over sequences of ``length`` tokens, fp64 ``[]``.

    Args:
        shares: of all tokens, those that go through a routed block at each depth,
            ``[num_recursions]``; they are taken to lie evenly over a sequence. None is what the
            routing aims at, see :func:`aimed_shares`.

    Raises:
        ValueError: length below 1; shares outside of [0, 1], growing, or not one a recursion.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    n = config.num_recursions
    shares = aimed_shares(config, length) if shares is None else list(shares)
    if len(shares) != n or not all(
        a >= b for a, b in zip([1.0, *shares], [*shares, 0.0], strict=True)
    ):
        raise ValueError(f"shares must be {n} numbers from 1 down to 0, got {shares}")
    everyone = torch.ones((), dtype=torch.float64)
    stages = layout(config)
    active = [
        [everyone * share for share in shares] if is_routed(stage) else [everyone] * n
        for stage in stages
    ]
    return _count(config, stages, everyone, active, lambda now, seen: now * (seen * length + 1) / 2)


def executed_flops(
    config: MoRConfig, stage_depth: Tensor, lengths: Sequence[int] | None = None
) -> Flops:
    """FLOPs of the forward pass that gave ``stage_depth``, int64 ``[*shape]``.

    A token's FLOPs are those of its own rows, and of its query with every key that it sees. As in
    evaluation, a depth that no token of the batch reaches costs nothing.

    Args:
        stage_depth: integers ``[*shape, stages]``, applications of each stage's block to each
            token, from :class:`~mor_ext.models.MoROutput`. shape is ``[batch, length]``, or
            ``[total]`` with ``lengths``. Padding is no token: pass
            ``stage_depth[attention_mask.bool()]`` with ``attention_mask.sum(1).tolist()``.
        lengths: tokens of each packed sequence.

    Raises:
        ValueError: a shape that does not fit the config or the lengths.
    """
    stages = layout(config)
    shape = stage_depth.shape[:-1]
    if lengths is None and len(shape) == 2:
        lengths = [shape[1]] * shape[0]
    if lengths is None or stage_depth.shape[-1] != len(stages) or sum(lengths) != shape.numel():
        raise ValueError(
            f"stage_depth must be [batch, length, {len(stages)}], or [total, {len(stages)}] with "
            f"lengths that add up to total, got {list(stage_depth.shape)} and lengths {lengths}"
        )
    depths = stage_depth.reshape(-1, len(stages))  # [total, stages]
    sizes = torch.tensor(lengths, dtype=torch.long, device=depths.device)
    start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # [total], of a token's sequence
    everyone = torch.ones_like(depths[:, 0], dtype=torch.long)
    active = [
        [(depths[:, number] > depth).long() for depth in range(stage.num_recursions)]
        for number, stage in enumerate(stages)
    ]
    flops = _count(config, stages, everyone, active, lambda now, seen: now * _until(seen, start))
    return Flops(**{name: part.view(shape) for name, part in flops.parts().items()})


def aimed_shares(config: MoRConfig, length: int) -> list[float]:
    """Shares of tokens that go through a routed block at each depth, as the routing aims at.

    The capacities, in whole tokens as the training rule picks them; every depth (token choice) or
    every action equally often; everyone up to a fixed depth.
    """
    n = config.num_recursions
    match config.routing:
        case "token_choice":
            return [(n - r) / n for r in range(n)]
        case "action":
            return [(n - r) / (n + 1) for r in range(n)]
        case "fixed_depth":
            return [float(r < (config.fixed_depth or 0)) for r in range(n)]
        case "none":
            return [1.0] * n
    assert isinstance(config.capacity, tuple)
    kept = [max(1, int(capacity * length)) / length for capacity in config.capacity]
    return [min(kept[: r + 1]) for r in range(n)]  # of those of the depth before


def layout(config: MoRConfig) -> list[Recursion]:
    """The stages of a model of this config, without memory for their weights."""
    with torch.device("meta"):
        return list(stages_of(config))


def is_routed(stage: Recursion) -> bool:
    return type(stage.router) is not Router


def _count(
    config: MoRConfig,
    stages: Sequence[Recursion],
    everyone: Tensor,
    active: Sequence[Sequence[Tensor]],
    pairs: Callable[[Tensor, Tensor], Tensor],
) -> Flops:
    """Follows the loop of :class:`Recursion`.

    Args:
        everyone: ones, in the shape of the result.
        active: by stage and depth, 1 for each token that goes through, or the share of those.
        pairs: from the tokens that query and those that have keys to the visible pairs.
    """
    assert config.head_dim is not None and config.num_key_value_heads is not None
    d, width = config.hidden_size, config.num_attention_heads * config.head_dim
    kv_width = 2 * config.num_key_value_heads * config.head_dim
    zero = torch.zeros_like(everyone)
    projections = attention = mlp = router = zero
    for stage, now_at in zip(stages, active, strict=True):
        layers, before = len(stage.block.layers), everyone
        for depth in range(stage.num_recursions):
            now = now_at[depth]
            router = router + _router(stage.router, depth, everyone, before)
            if not now.any():
                break
            keys, seen = _keys(config.kv_strategy, depth, now, before, everyone, now_at[0])
            projections = projections + layers * 2 * d * (2 * width * now + kv_width * keys)
            attention = attention + layers * 4 * width * pairs(now, seen)
            mlp = mlp + layers * 6 * d * config.intermediate_size * now
            before = now
    return Flops(2 * d * config.vocab_size * everyone, projections, attention, mlp, router)


def _keys(
    strategy: str | None, depth: int, now: Tensor, before: Tensor, everyone: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens whose K/V are computed at a depth, and those whose K/V are seen there."""
    match strategy:
        case "shared":
            return (now if depth == 0 else torch.zeros_like(now)), first
        case "hybrid":
            return now, first
        case "frozen":  # those that have just left leave theirs for all later depths
            return before, everyone
    return now, now


def _router(router: Router, depth: int, everyone: Tensor, before: Tensor) -> Tensor:
    """A router's products at a depth; ``before`` are the tokens that it chooses from."""
    entry = everyone if depth == 0 else torch.zeros_like(everyone)  # chosen once
    match router:
        case ExpertChoiceRouter():
            flops = _scorer(router.scorers[depth], everyone, before)
            if router.predictors is not None:
                flops = flops + _scorer(router.predictors[depth], everyone, before)
            return flops
        case TokenChoiceRouter():
            return _scorer(router.scorer, entry, entry)
        case ActionRouter():
            return 2 * (router.up.weight.numel() + router.down.weight.numel()) * entry
        case _ if any(True for _ in router.parameters()):
            raise ValueError(f"router must be one whose products are counted, got {router}")
    return torch.zeros_like(everyone)


def _scorer(scorer: nn.Module, everyone: Tensor, chosen_from: Tensor) -> Tensor:
    assert isinstance(scorer, Scorer)
    if scorer.up is None:  # linear: every row, for that is cheaper than a gather before it
        return 2 * scorer.weight.numel() * everyone
    return 2 * (scorer.up.weight.numel() + scorer.weight.numel()) * chosen_from


def _until(mask: Tensor, start: Tensor) -> Tensor:
    """How many ones of mask ``[total]`` each token's sequence has up to the token, itself too.

    start: int64 ``[total]``, the first row of each token's sequence.
    """
    counted = F.pad(mask.cumsum(0), (1, 0))
    return counted[1:] - counted[start]
