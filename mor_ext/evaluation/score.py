"""What a model makes of each token: its loss, whether it was foreseen, and how deep it went."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_ext.models import MoRForCausalLM

LOGITS = 1 << 24  # held at once, for models that let us: 64 MiB in fp32
ONE_RULE = {"none", "fixed_depth", "token_choice"}  # routings that train by the causal rule
IGNORED = -100


@dataclass
class Scores:
    """Of windows ``[batch, length]``; position t is scored on token t + 1."""

    nll: Tensor  # at least fp32 [batch, length], nats; 0 where not scored
    correct: Tensor  # bool [batch, length], the scored token is the most likely one
    scored: Tensor  # bool [batch, length]
    depth: Tensor  # int32 [batch, length], see MoROutput
    layers: Tensor  # int32 [batch, length]
    stage_depth: Tensor  # int32 [batch, length, stages]


@torch.no_grad()
def score(
    model: Any,
    input_ids: Tensor,
    labels: Tensor | None = None,
    causal: bool = True,
    dtype: torch.dtype | None = None,
) -> Scores:
    """Scores by one of the routing rules; the model is in eval mode.

    A model of ours never has more than ``LOGITS`` logits at a time; one of transformers gives those
    of the whole batch. For the latter a token's depth is 1, and its layers are all there are.

    Args:
        model: :class:`MoRForCausalLM`, or any causal language model of transformers.
        input_ids: integers ``[batch, length]``, on the model's device.
        labels: ``[batch, length]``, -100 is not scored; None is input_ids.
        causal: the rule.
        dtype: of autocast; None is no autocast.
    """
    targets = (input_ids if labels is None else labels).roll(-1, dims=1)
    targets[:, -1] = IGNORED
    with torch.autocast(input_ids.device.type, dtype=dtype, enabled=dtype is not None):
        if not isinstance(model, MoRForCausalLM):
            logits = model(input_ids=input_ids, use_cache=False).logits
            nll, correct = _judge(logits.flatten(0, 1), targets.flatten())
            depth = torch.ones_like(input_ids, dtype=torch.int32)
            layers = depth * model.config.get_text_config().num_hidden_layers
            stage_depth = depth.unsqueeze(-1)
        else:
            with _last_hidden(model) as kept:
                output = model(input_ids, causal=causal, logits_to_keep=1)
            nll, correct = _judge_in_parts(model, kept[0], targets.flatten())
            depth, layers, stage_depth = output.depth, output.layers, output.stage_depth
    nll, correct = nll.view_as(targets), correct.view_as(targets)
    return Scores(nll, correct, targets != IGNORED, depth, layers, stage_depth)


@contextmanager
def _last_hidden(model: MoRForCausalLM) -> Iterator[list[Tensor]]:
    """What the head would get: ``[total, hidden_size]``."""
    kept: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda _, inputs, output: kept.append(output))
    try:
        yield kept
    finally:
        handle.remove()


def _judge_in_parts(
    model: MoRForCausalLM, hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    rows = max(1, LOGITS // model.config.vocab_size)
    parts = [
        _judge(F.linear(some, model.head_weight()), of_these)
        for some, of_these in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    nll, correct = zip(*parts, strict=True)
    return torch.cat(nll), torch.cat(correct)


def _judge(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """nll and correct of logits ``[n, vocab_size]`` and targets ``[n]``."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return nll, logits.argmax(dim=-1) == targets
