"""The training loop: AdamW, warm-up and cosine, clipping; and evaluation by the causal rule."""

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mor_ext.models import MoRForCausalLM
from mor_ext.training.data import Text


@dataclass
class Recipe:
    steps: int
    batch_size: int = 8
    length: int = 256
    learning_rate: float = 3e-3
    warmup: float = 0.1  # share of the steps
    final: float = 0.1  # of the learning rate, at the last step
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step, from 0: linear to the peak, then half a cosine."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final + (1 - self.final) * cosine)


def train(model: MoRForCausalLM, text: Text, recipe: Recipe) -> Iterator[float]:
    """Trains the model, yielding each step's loss in nats a byte; batches repeat with the seed."""
    generator = torch.Generator().manual_seed(recipe.seed)
    device = model.embed_tokens.weight.device
    decayed: dict[str, Any] = {"params": [p for p in model.parameters() if p.dim() > 1]}
    others: dict[str, Any] = {"params": [p for p in model.parameters() if p.dim() <= 1]}
    optimizer = torch.optim.AdamW(
        [decayed | {"weight_decay": recipe.weight_decay}, others | {"weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    model.train()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        batch = text.batch(recipe.batch_size, recipe.length, generator).to(device)
        output = model(batch, labels=batch)
        assert output.loss is not None and output.nll is not None
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        yield output.nll.item()


@dataclass
class Evaluation:
    nll: float  # nats a byte, tokens routed by the causal rule
    depth: float  # mean recursions of a token by that rule
    agreement: float  # share of tokens to which the training rule gives the same depth

    @property
    def bits(self) -> float:
        return self.nll / math.log(2)


@torch.no_grad()
def evaluate(model: MoRForCausalLM, windows: Tensor, batch_size: int = 8) -> Evaluation:
    """Mean over windows, int64 ``[count, length]``."""
    model.eval()
    device = model.embed_tokens.weight.device
    nll = depth = agree = 0.0
    for batch in windows.to(device).split(batch_size):
        output = model(batch, labels=batch)
        trained = model(batch, causal=False)
        assert output.nll is not None
        nll += output.nll.item() * len(batch)
        depth += output.depth.float().mean().item() * len(batch)
        agree += (output.depth == trained.depth).float().mean().item() * len(batch)
    count = len(windows)
    return Evaluation(nll / count, depth / count, agree / count)


def keep_freed_memory() -> None:
    """Has glibc keep freed memory instead of returning it to the system at every step.

    By default it maps each large tensor anew and unmaps it when freed, and the page faults cost
    more than many an op. Does nothing where the C library is another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold, gigabyte = -1, -3, 1 << 30
        mallopt(m_mmap_threshold, gigabyte)
        mallopt(m_trim_threshold, gigabyte)
