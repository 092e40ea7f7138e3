"""Sampling token by token, each token as deep as its own router says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mor_ext.inference.cache import PagedKV

if TYPE_CHECKING:  # models make caches
    from mor_ext.models import MoRForCausalLM


@dataclass
class Generated:
    tokens: Tensor  # int64 [length], the prompt and what follows it
    depth: Tensor  # int32 [length], how many recursions each token took


@torch.no_grad()
def generate(
    model: MoRForCausalLM,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[Generated]:
    """Continues every prompt by ``max_new_tokens`` tokens.

    Args:
        prompts: int64 ``[length]`` each, at least one token.
        temperature: divides the logits; 0 takes the most likely token.
        generator: of random numbers, for repeatable samples.

    Raises:
        ValueError: a prompt is empty, or longer than the model's positions leave room for.
    """
    room = model.config.max_position_embeddings - max_new_tokens
    for prompt in prompts:
        if not 0 < len(prompt) <= room:
            raise ValueError(f"prompts must have 1 to {room} tokens, got {len(prompt)}")
    longest = max(map(len, prompts), default=0)
    store = PagedKV(model, len(prompts), longest + max_new_tokens)
    tokens: list[list[Tensor]] = [[prompt] for prompt in prompts]
    depths: list[list[Tensor]] = [[] for _ in prompts]
    for _ in range(max_new_tokens + 1):  # the last pass gives the last token its depth
        step = [parts[-1] for parts in tokens]  # what the model has not seen yet
        lengths = [len(part) for part in step]
        output = model(torch.cat(step), lengths=lengths, cache=store)
        last = torch.tensor(lengths, device=output.logits.device).cumsum(0) - 1
        sampled = _sample(output.logits[last], temperature, generator)
        for b, depth in enumerate(output.depth.split(lengths)):
            depths[b].append(depth)
            tokens[b].append(sampled[b : b + 1])
    return [Generated(torch.cat(t[:-1]), torch.cat(d)) for t, d in zip(tokens, depths, strict=True)]


def _sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    weights = (logits.float() / temperature).softmax(dim=-1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(-1)
