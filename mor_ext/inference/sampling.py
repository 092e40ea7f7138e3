"""From logits to tokens: each row by the parameters of its own request."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mor_ext.inference.arrays import column, integers


@dataclass(frozen=True)
class SamplingParams:
    """How a request is continued.

    Attributes:
        max_new_tokens: None is as many as the model's positions leave room for.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: of so many most likely tokens; 0 is of all.
        top_p: of the fewest most likely tokens that have this probability together.
        min_p: of those at least ``min_p`` times as likely as the most likely one.
        repetition_penalty: what logits of tokens that there are already are divided by if positive
            and multiplied with if negative (Keskar et al., arXiv 1909.05858); before temperature.
        stop: strings that end a continuation, and are left out of it; they need a tokenizer.
        stop_token_ids: tokens that do, besides the model's end of sequence.
        ignore_eos: the model's end of sequence ends nothing.
        seed: makes the samples repeatable, whatever else the engine runs.
        logprobs: log-probabilities of the tokens and of so many most likely ones, by the model
            itself: before penalty and temperature. None is not even those of the tokens.
    """

    max_new_tokens: int | None = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens is None or self.max_new_tokens >= 1, ">= 1"),
            "temperature": (0 <= self.temperature < float("inf"), ">= 0"),
            "top_k": (self.top_k >= 0, ">= 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "> 0"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "non-empty strings"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, ">= 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")


@dataclass
class Sampled:
    """By row: what was sampled; ``valid`` is False where the logits hold a NaN."""

    tokens: list[int]
    valid: list[bool]
    logprobs: list[float] | None = None
    top: list[dict[int, float]] | None = None


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    uniform: Sequence[float],
    seen: Sequence[Sequence[int]],
) -> Sampled:
    """One token for each row; the device is waited for once, or twice for log-probabilities.

    Args:
        logits: ``[n, vocab_size]``.
        uniform: a number in [0, 1) for each row. A row's token depends on nothing but its own
            logits and number, so not on its batch.
        seen: the tokens of each row's sequence, for the repetition penalty.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    invalid = logits.isnan().any(dim=-1)
    shaped = penalised(logits, params, seen)
    tokens = shaped.argmax(dim=-1)
    drawn = [i for i, p in enumerate(params) if p.temperature > 0]
    if drawn:
        rows = integers(drawn, logits.device)
        chosen = draw(shaped[rows], [params[i] for i in drawn], [uniform[i] for i in drawn])
        tokens[rows] = chosen
    both = torch.stack([tokens, invalid.long()]).tolist()
    result = Sampled(both[0], [not flag for flag in both[1]])
    most = max((p.logprobs for p in params if p.logprobs is not None), default=None)
    if most is not None:
        add_logprobs(result, logits, tokens, min(most, logits.shape[-1]))
    return result


def penalised(
    logits: Tensor, params: Sequence[SamplingParams], seen: Sequence[Sequence[int]]
) -> Tensor:
    """A copy if it changes anything."""
    rows = [i for i, p in enumerate(params) if p.repetition_penalty != 1]
    if not rows:
        return logits
    logits = logits.clone()
    for i in rows:
        index = integers(sorted(set(seen[i])), logits.device)
        penalty = params[i].repetition_penalty
        old = logits[i, index]
        logits[i, index] = torch.where(old > 0, old / penalty, old * penalty)
    return logits


def draw(logits: Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> Tensor:
    """int64 ``[n]``: from logits ``[n, vocab_size]`` by the inverse of the distribution function.

    Rows with a top-k or a top-p are sorted, and the others are not: in both cases a row's result is
    its own.
    """
    result = torch.empty(len(params), dtype=torch.long, device=logits.device)
    for cut in (True, False):
        group = [i for i, p in enumerate(params) if (p.top_k > 0 or p.top_p < 1) == cut]
        if not group:
            continue
        rows = integers(group, logits.device)
        weights = probabilities(logits[rows], [params[i].temperature for i in group])
        order = None
        if cut:
            weights, order = weights.sort(dim=-1, descending=True, stable=True)
            weights = cut_off(weights, [params[i] for i in group])
        least = column([params[i].min_p for i in group], weights)
        weights = weights.masked_fill(weights < least * weights.amax(dim=-1, keepdim=True), 0)
        picked = invert(weights, column([uniform[i] for i in group], weights))
        result[rows] = (picked if order is None else order.gather(1, picked)).squeeze(1)
    return result


def probabilities(logits: Tensor, temperature: Sequence[float]) -> Tensor:
    """The largest logit is taken off first: small temperatures overflow nothing."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    return (shifted / column(temperature, logits)).softmax(dim=-1)


def cut_off(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Zeros in descending weights ``[n, vocab_size]`` where top-k or top-p end."""
    vocab = weights.shape[-1]
    rank = torch.arange(vocab, device=weights.device)
    top_k = integers([p.top_k or vocab for p in params], weights.device).unsqueeze(1)
    weights = weights.masked_fill(rank >= top_k, 0)
    before = weights.cumsum(dim=-1) - weights
    top_p = column([p.top_p for p in params], weights)
    # A top-p of 1 is off: rounding must not cut the tail.
    return weights.masked_fill((before >= top_p * weights.sum(-1, keepdim=True)) & (top_p < 1), 0)


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """int64 ``[n, 1]``: the first with more than ``uniform`` of the sum at and before it."""
    total = weights.cumsum(dim=-1)
    picked = torch.searchsorted(total, uniform * total[:, -1:], right=True)
    # Rounding can point behind the last one that has a weight.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(dim=-1, keepdim=True)
    return torch.minimum(picked, last)


def add_logprobs(result: Sampled, logits: Tensor, tokens: Tensor, most: int) -> None:
    logprobs = logits.log_softmax(dim=-1)
    result.logprobs = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1).tolist()
    values, index = logprobs.topk(most, dim=-1)
    pairs = zip(index.tolist(), values.tolist(), strict=True)
    result.top = [dict(zip(i, v, strict=True)) for i, v in pairs]
