"""Thresholds of the causal rule for a wanted mean depth: one checkpoint, several budgets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from mor_ext.evaluation.score import Scores, score
from mor_ext.models import MoRForCausalLM
from mor_ext.nn import ExpertChoiceRouter
from mor_ext.training.dataset import PackedDataset

Thresholds = tuple[float | None, ...]
TRIES = 8
TOLERANCE = 0.005  # passes
MARGIN = 1e-6  # passes, to the ends of the range
GREATEST = 2.0**40  # p


@dataclass(frozen=True)
class Setting:
    """A model under some thresholds, by the causal rule, over all windows."""

    wanted: float | None  # mean depth; None is what the model came with
    thresholds: Thresholds
    depth: float  # passes through shared blocks, the mean
    layers: float  # a token went through, the mean
    nll: float  # nats a token
    bits_per_byte: float


class Calibration:
    """Of a model with an expert-choice router, on windows of text.

    A token goes on at a depth if its logit is at least that depth's threshold, so thresholds are
    quantiles of the logits of those that got so far, found depth by depth. What shares of tokens
    depths keep is a family with one parameter: c_r ** p of the model's capacities c_r. p = 1 is
    what training had, less makes tokens deeper, more shallower; a depth of capacity 1 keeps all.

    Args:
        model: is put in evaluation mode.
        windows: each begins without context.
        batch_size: windows at once.
        limit: of windows; None is all.

    Raises:
        ValueError: the model has no such router, or no causal rule.
    """

    def __init__(
        self,
        model: MoRForCausalLM,
        windows: PackedDataset,
        batch_size: int = 8,
        limit: int | None = None,
    ) -> None:
        stages = list(model.recursions())
        self.routers = [s.router for s in stages if isinstance(s.router, ExpertChoiceRouter)]
        if not self.routers:
            raise ValueError(
                "model must have routing 'expert_choice' or 'mixture_of_depths', whose thresholds "
                f"can be chosen, got {model.config.routing!r}"
            )
        if not model.causal:
            raise ValueError("model must have a causal rule, got causal_rule 'none'")
        self.model = model.eval()
        self.first = self.routers[0].thresholds
        self.windows, self.batch_size = windows, batch_size
        self.count = min(len(windows), limit or len(windows))
        self.capacity = self.routers[0].capacity  # the same in all
        # Passes that nobody chooses: every second block of Mixture-of-Depths.
        self.always = len(stages) - model.config.unshared_layers - len(self.routers)

    @property
    def range(self) -> tuple[int, int]:
        """The mean depth where all take only what none may skip, and where all take everything."""
        least = sum(c == 1 for c in self.capacity)
        blocks = len(self.routers)
        return self.always + blocks * least, self.always + blocks * len(self.capacity)

    def for_depth(self, wanted: float) -> Setting:
        """Leaves the model with the thresholds found.

        The quantiles give what is wanted where one block recurs. Where several do, the logits in
        one depend on who went deep in those before; then something else is asked for, by how
        the depth has followed what was asked for before.

        Args:
            wanted: mean depth: passes through shared blocks.

        Raises:
            ValueError: it is not within :attr:`range`.
        """
        low, high = self.range
        if not low < wanted < high:
            raise ValueError(f"depth must be between {low} and {high}, got {wanted:g}")
        tried: list[Setting] = []
        depth_of: dict[float, float] = {}  # by what was asked for
        aim = wanted
        while len(tried) < TRIES:
            self._choose(shares_of(self.capacity, (aim - self.always) / len(self.routers)))
            tried.append(self.measure(wanted))
            depth_of[aim] = tried[-1].depth
            if abs(wanted - tried[-1].depth) <= TOLERANCE:
                break
            aim = min(max(next_aim(aim, depth_of, wanted), low + MARGIN), high - MARGIN)
        best = min(tried, key=lambda setting: abs(setting.depth - wanted))
        self.model.set_thresholds(best.thresholds)
        return best

    def _choose(self, shares: Sequence[float]) -> None:
        """Thresholds under which these shares of all tokens go through each depth."""
        self.model.set_thresholds(self.first)  # so that what is found depends on the shares alone
        thresholds: list[float | None] = [None] * len(shares)
        before = 1.0
        for depth, share in enumerate(shares):
            if share < before:
                thresholds[depth] = threshold_for(self._logits(depth), share / before)
                self.model.set_thresholds(thresholds)
            before = share

    def _logits(self, depth: int) -> Tensor:
        """fp32 ``[k]``: what decides at a depth, of all tokens that get there in any block."""
        seen: list[Tensor] = []
        handles = [
            (router.predictors or router.scorers)[depth].register_forward_hook(
                lambda _, inputs, logits: seen.append(logits.flatten())
            )
            for router in self.routers
        ]
        try:
            for _ in self._scores():
                pass
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(seen)

    def measure(self, wanted: float | None = None) -> Setting:
        """Under the thresholds that the model has."""
        nats = depth = layers = 0.0
        tokens = positions = num_bytes = 0
        for scores, of_bytes in self._scores():
            nats += scores.nll.double().sum().item()
            tokens += int(scores.scored.sum())
            num_bytes += of_bytes
            positions += scores.depth.numel()
            depth += int(scores.depth.sum())
            layers += int(scores.layers.sum())
        return Setting(
            wanted,
            self.routers[0].thresholds,
            depth / positions,
            layers / positions,
            nats / tokens,
            nats / math.log(2) / num_bytes,
        )

    def _scores(self) -> Iterator[tuple[Scores, int]]:
        """Of each batch, by the causal rule, and the bytes that its scored tokens stand for."""
        for start in range(0, self.count, self.batch_size):
            numbers = range(start, min(start + self.batch_size, self.count))
            items = [self.windows[number] for number in numbers]
            ids, labels = (
                torch.stack([item[name] for item in items]).to(self.model.device)
                for name in ("input_ids", "labels")
            )
            yield score(self.model, ids, labels), sum(int(item["num_bytes"]) for item in items)


def next_aim(last: float, depth_of: Mapping[float, float], wanted: float) -> float:
    """Between the closest that fell short and that went too far, or, as long as there are not both,
    by what the last one missed."""
    closest = sorted(depth_of.items(), key=lambda tried: abs(tried[1] - wanted))
    short = next((tried for tried in closest if tried[1] < wanted), None)
    far = next((tried for tried in closest if tried[1] > wanted), None)
    if short is None or far is None:
        return last + wanted - depth_of[last]
    return short[0] + (far[0] - short[0]) * (wanted - short[1]) / (far[1] - short[1])


def shares_of(capacity: Sequence[float], total: float) -> list[float]:
    """c_r ** p that add up to ``total``; never more than at the depth before."""

    def shares(p: float) -> list[float]:
        return list(accumulate((c**p for c in capacity), min))

    low, high = 0.0, 1.0
    while sum(shares(high)) > total and high < GREATEST:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(shares(middle)) > total else (low, middle)
    return shares(high)


def threshold_for(logits: Tensor, share: float) -> float:
    """One that this share of logits ``[k]`` reaches, one of them at least: halfway to the next."""
    ordered = logits.sort(descending=True).values
    kept = max(1, round(share * len(ordered)))
    return ordered[kept - 1 : kept + 1].double().mean().item()


def save_thresholds(folder: str | Path, thresholds: Thresholds) -> None:
    """Into the config of a saved model: all that loads it has them from then on."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["thresholds"] = list(thresholds)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
