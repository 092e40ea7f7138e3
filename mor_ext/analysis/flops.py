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

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_ext.models import MoRConfig


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Stage:
    """A block of layers that runs up to ``recursions`` times."""

    layers: int
    recursions: int
    routed: bool


def expected_flops(config: MoRConfig, length: int, shares: Sequence[float] | None = None) -> Flops:
    """Mean FLOPs per token of a forward pass over sequences of ``length`` tokens, fp64 ``[]``.

    Args:
        shares: of all tokens, those that go through a routed block at each depth,
            ``[num_recursions]``; they are taken to lie evenly over a sequence. None is what the
            routing aims at: the capacities, in whole tokens as the training rule picks them;
            depths in balance for token choice and the action router.

    Raises:
        ValueError: length below 1; shares outside of [0, 1], growing, or not one a recursion.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    n = config.num_recursions
    shares = aimed_shares(config, length) if shares is None else list(shares)
    falling = all(a >= b for a, b in zip([1.0, *shares], [*shares, 0.0], strict=True))
    if len(shares) != n or not falling:
        raise ValueError(f"shares must be {n} numbers from 1 down to 0, got {shares}")
    everyone = torch.ones((), dtype=torch.float64)
    counter = _Counter(config, everyone)
    for stage in stages_of(config):
        active = [everyone * share for share in (shares if stage.routed else [1.0])]
        before = everyone
        for depth in range(stage.recursions):
            visible = {"recursion_wise": active[depth], "frozen": everyone}.get(
                config.kv_strategy, active[0]
            )
            pairs = active[depth] * (visible * length + 1) / 2
            counter.add(stage, depth, active[depth], before, pairs)
            before = active[depth]
    return counter.flops


def executed_flops(
    config: MoRConfig, stage_depth: Tensor, lengths: Sequence[int] | None = None
) -> Flops:
    """FLOPs of the forward pass that gave ``stage_depth``, int64 ``[*shape]``.

    A token's FLOPs are those of its own rows, and of its query with every key that it sees.

    Args:
        stage_depth: integers ``[*shape, stages]``, applications of each stage's block to each
            token, from :class:`~mor_ext.models.MoROutput`. shape is ``[batch, length]``, or
            ``[total]`` with ``lengths``. Padding is no token: pass
            ``stage_depth[attention_mask.bool()]`` with ``attention_mask.sum(1).tolist()``.
        lengths: tokens of each packed sequence.

    Raises:
        ValueError: a shape that does not fit the config or the lengths.
    """
    stages = stages_of(config)
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
    counter = _Counter(config, everyone)
    for number, stage in enumerate(stages):
        active = [(depths[:, number] >= depth).long() for depth in range(stage.recursions + 1)]
        for depth in range(stage.recursions):
            if not active[depth].any():
                break  # as the loop does
            now = active[depth + 1]
            visible = {"recursion_wise": now, "frozen": everyone}.get(config.kv_strategy, active[1])
            pairs = now * _until(visible, start)
            counter.add(stage, depth, now, active[depth], pairs)
    return Flops(**{name: part.view(shape) for name, part in counter.flops.parts().items()})


def stages_of(config: MoRConfig) -> list[Stage]:
    """How the model lays out its layers; one for each of ``model.stages``."""
    routed = config.routing != "none"
    sequence = config.sharing.endswith("sequence")
    blocks = [1] * config.shared_layers if sequence else [config.shared_layers]
    stages = [Stage(layers, config.num_recursions, routed) for layers in blocks]
    edge = [Stage(1, 1, False)] if config.unshared_layers else []
    return [*edge, *stages, *edge]


def aimed_shares(config: MoRConfig, length: int) -> list[float]:
    """Shares of tokens by depth that a routing aims at; see :func:`expected_flops`."""
    n = config.num_recursions
    if config.routing == "none":
        return [1.0] * n
    if config.routing == "token_choice":
        return [(n - r) / n for r in range(n)]
    capacity = config.capacity or [(n - r) / n for r in range(n)]
    kept = [max(1, int(c * length)) / length for c in capacity]
    return [min(kept[: r + 1]) for r in range(n)]


class _Counter:
    """Adds up the work of blocks; ``everyone`` has a 1 for each token, in the shape of results."""

    def __init__(self, config: MoRConfig, everyone: Tensor) -> None:
        self.config = config
        self.everyone = everyone
        zero = torch.zeros_like(everyone)
        head = everyone * (2 * config.hidden_size * config.vocab_size)
        self.flops = Flops(head, zero, zero, zero, zero)

    def add(self, stage: Stage, depth: int, now: Tensor, before: Tensor, pairs: Tensor) -> None:
        """A stage at a depth (from 0).

        now: 1 for each token that goes through the block, or the share of those that do.
        before: the same of the depth before, everyone at depth 0.
        pairs: keys that each token's query sees.
        """
        config, flops = self.config, self.flops
        d, width = config.hidden_size, config.num_attention_heads * config.head_dim
        kv_width = 2 * config.num_key_value_heads * config.head_dim
        # Those that have just left leave their K/V for all later depths.
        keys = before if config.kv_strategy == "frozen" else now
        if config.kv_strategy == "shared" and depth > 0:
            keys = torch.zeros_like(now)
        row = 2 * d * 2 * width  # query and output
        projections = stage.layers * (row * now + 2 * d * kv_width * keys)
        self.flops = Flops(
            flops.head,
            flops.projections + projections,
            flops.attention + stage.layers * 4 * width * pairs,
            flops.mlp + stage.layers * 2 * 3 * d * config.intermediate_size * now,
            flops.router + self._router(stage, depth, before),
        )

    def _router(self, stage: Stage, depth: int, before: Tensor) -> Tensor:
        d = self.config.hidden_size
        zero = torch.zeros_like(before)
        if not stage.routed:
            return zero
        if self.config.routing == "token_choice":  # once, at the entry
            return 2 * d * stage.recursions * self.everyone if depth == 0 else zero
        return 2 * d * self.everyone


def _until(mask: Tensor, start: Tensor) -> Tensor:
    """How many ones of mask ``[total]`` each token's sequence has up to the token, itself too."""
    counted = F.pad(mask.cumsum(0), (1, 0))
    return counted[1:] - counted[start]
