"""How well a model predicts text, and how deep its tokens go, by both of its routing rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mor_ext.evaluation.score import ONE_RULE, Scores, score
from mor_ext.models import MoRForCausalLM
from mor_ext.nn import Router

Windows = Tensor | Dataset[dict[str, Tensor]] | Iterable[Mapping[str, Tensor]]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Measures:
    """By one routing rule. Losses are over the scored tokens, depths over all positions."""

    nll: float  # nats a token
    nll_error: float | None  # standard error over windows; None of a single one
    bits_per_byte: float | None  # None where the bytes are not known
    accuracy: float  # share of tokens that were the most likely ones
    layers: float  # effective depth: layers a token went through, the mean
    depth: float  # passes through shared blocks, the mean
    load: list[float]  # share of tokens with 0, 1, .. passes, over the blocks that recur or route
    dead: float  # share of a window's places that took all passes of such a block in no window

    @property
    def perplexity(self) -> float:
        return torch.tensor(self.nll, dtype=torch.float64).exp().item()  # inf where math.exp raises


@dataclass(frozen=True)
class Evaluation:
    windows: int
    tokens: int  # that were scored
    num_bytes: int | None  # of text that these stand for
    training: Measures  # the rule of training: top-k where tokens are chosen from a whole window
    causal: Measures | None  # the rule of inference; None for a model that has none
    agreement: float | None  # share of tokens that get the same depth by both rules, over blocks

    def to_dict(self) -> dict[str, Any]:
        """For JSON; perplexities included."""
        result = asdict(self)
        for name in ("training", "causal"):
            measures = getattr(self, name)
            if measures is not None:
                result[name]["perplexity"] = measures.perplexity
        return result


def evaluate(
    model: Any,
    windows: Windows,
    batch_size: int = 8,
    limit: int | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    on_batch: Callable[[Batch, Scores], None] | None = None,
) -> Evaluation:
    """Runs a model over windows of text, each of which begins without context.

    Every token of a window but its first is scored. With a stride of ``length - 1``, windows of
    :class:`~mor_ext.training.dataset.PackedDataset` score every token of a text but the first
    exactly once, with half a window of context in the mean.

    Where training and inference have the same rule (no routing, fixed depth, token choice, models
    of transformers) one pass gives both. Random draws are the same in every call, and the caller's
    generators stay as they were; so does the model's mode.

    Args:
        model: :class:`MoRForCausalLM`, or any causal language model of transformers.
        windows: of one length: integers ``[count, length]``, or items with ``input_ids`` and
            ``labels`` (``[length]``, -100 is not scored) and perhaps ``num_bytes`` (``[]``, of the
            tokens that are scored). They are read a batch at a time.
        limit: windows; None is all.
        dtype: of autocast, such as ``torch.bfloat16``.
        progress: shows a progress bar; needs ``rich``.
        on_batch: called with every batch and its scores by the causal rule, or, if there is none,
            by that of training; :class:`~mor_ext.evaluation.dump.DepthWriter` is one.

    Raises:
        ValueError: no windows, nothing to score, or windows of different lengths.
    """
    tallies = {rule: _Tally(model) for rule in _rules(model)}
    agreed = places = 0
    mode = model.training
    model.eval()
    try:
        with _own_generators(model.device):
            for batch in _shown(windows, batch_size, limit, progress):
                ids, labels = (batch[name].to(model.device) for name in ("input_ids", "labels"))
                scores = {}
                for rule, tally in tallies.items():
                    scores[rule] = score(model, ids, labels, rule, dtype)
                    tally.add(scores[rule], batch.get("num_bytes"))
                if len(scores) == 2:
                    same = scores[True].stage_depth == scores[False].stage_depth
                    same = same[..., tallies[True].blocks]
                    agreed, places = agreed + int(same.sum()), places + same.numel()
                if on_batch is not None:
                    on_batch(batch, scores[max(scores)])
    finally:
        model.train(mode)
    return _conclude(tallies, agreed, places)


def _rules(model: Any) -> list[bool]:
    """The values of ``causal`` to run, False for the rule of training."""
    if not isinstance(model, MoRForCausalLM) or model.config.routing in ONE_RULE:
        return [True]
    return [False, True] if model.causal else [False]


def _conclude(tallies: dict[bool, _Tally], agreed: int, places: int) -> Evaluation:
    measures = {rule: tally.measures() for rule, tally in tallies.items()}
    tally = next(iter(tallies.values()))
    agreement = agreed / places if places else 1.0
    return Evaluation(
        windows=len(tally.counts),
        tokens=sum(tally.counts),
        num_bytes=tally.num_bytes,
        training=measures.get(False) or measures[True],
        causal=measures.get(True),
        agreement=agreement if True in measures else None,
    )


class _Tally:
    """Sums over batches, so that no more than a batch is ever there."""

    def __init__(self, model: Any) -> None:
        ours = isinstance(model, MoRForCausalLM)
        self.passes = model.config.num_recursions if ours else 1
        self.blocks = [  # stages that recur or route
            number
            for number, stage in enumerate(model.stages if ours else [])
            if stage.num_recursions > 1 or type(stage.router) is not Router
        ]
        self.sums: list[float] = []  # nats of each window
        self.counts: list[int] = []  # scored tokens of each window
        self.num_bytes: int | None = 0
        self.correct = self.positions = self.layers = self.depth = 0
        self.load = torch.zeros(self.passes + 1, dtype=torch.long)
        self.reached: Tensor | None = None  # bool [length, blocks]

    def add(self, scores: Scores, num_bytes: Tensor | None) -> None:
        self.sums += scores.nll.double().sum(dim=1).tolist()
        self.counts += scores.scored.sum(dim=1).tolist()
        if num_bytes is None:
            self.num_bytes = None
        elif self.num_bytes is not None:
            self.num_bytes += int(num_bytes.sum())
        self.correct += int((scores.correct & scores.scored).sum())
        self.positions += scores.depth.numel()
        self.layers += int(scores.layers.sum())
        self.depth += int(scores.depth.sum())
        chosen = scores.stage_depth[..., self.blocks]  # [batch, length, blocks]
        self.load += chosen.flatten().long().bincount(minlength=self.passes + 1).cpu()
        reached = (chosen == self.passes).any(dim=0).cpu()
        self.reached = reached if self.reached is None else reached | self.reached

    def measures(self) -> Measures:
        tokens = sum(self.counts)
        if tokens == 0:
            raise ValueError(f"windows must have tokens to score, got {len(self.counts)} windows")
        nats = math.fsum(self.sums)
        bits = nats / math.log(2) / self.num_bytes if self.num_bytes else None
        blocks = len(self.blocks)
        assert self.reached is not None
        return Measures(
            nll=nats / tokens,
            nll_error=self._error(nats / tokens),
            bits_per_byte=bits,
            accuracy=self.correct / tokens,
            layers=self.layers / self.positions,
            depth=self.depth / self.positions,
            load=(self.load.double() / (self.positions * blocks)).tolist() if blocks else [],
            dead=1 - self.reached.double().mean().item() if blocks else 0.0,
        )

    def _error(self, nll: float) -> float | None:
        """Of a mean over tokens whose windows are the samples: that of a ratio of two sums."""
        n = len(self.sums)
        if n < 2:
            return None
        squares = math.fsum(
            (nats - nll * count) ** 2 for nats, count in zip(self.sums, self.counts, strict=True)
        )
        return math.sqrt(squares * n / (n - 1)) / sum(self.counts)


def _shown(windows: Windows, size: int, limit: int | None, progress: bool) -> Iterable[Batch]:
    batches = _batches(windows, size, limit)
    if not progress:
        return batches
    from rich.progress import track

    total = len(cast(Any, windows)) if hasattr(windows, "__len__") else limit
    if total is not None:
        total = -(-min(total, limit or total) // size)
    return track(batches, "evaluating", total=total, transient=True)


def _batches(windows: Windows, size: int, limit: int | None) -> Iterator[Batch]:
    if isinstance(windows, Tensor):
        if windows.dim() != 2:
            raise ValueError(f"windows must be [count, length], got shape {list(windows.shape)}")
        windows = [{"input_ids": row, "labels": row} for row in windows]
    # A map-style data set iterates as a sequence does, up to its IndexError.
    items = islice(iter(cast(Iterable[Mapping[str, Tensor]], windows)), limit)
    length = None
    while some := list(islice(items, size)):
        lengths = {len(item["input_ids"]) for item in some}
        length = length or min(lengths)
        if lengths != {length}:
            raise ValueError(f"windows must be of one length, got {length} and {max(lengths)}")
        yield {name: torch.stack([item[name] for item in some]) for name in some[0]}
    if length is None:
        raise ValueError("windows must be at least one, got none")


@contextmanager
def _own_generators(device: torch.device) -> Iterator[None]:
    """Draws from seed 0, apart from what the caller's generators go on with."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(0)
        yield
