"""Whole models on the CUDA kernels: what the CPU kernels give, forward, backward and decoding."""

from typing import Any

import pytest
import torch
from helpers import Backend, use_backend
from torch import Tensor

from mor_ext.inference import generate
from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.models.config import CHOICES

ROUTINGS = ("none", "expert_choice", "token_choice")  # the others call no other op
VARIANTS = [(routing, kv) for routing in ROUTINGS for kv in CHOICES["kv_strategy"]]


def small(routing: str, kv_strategy: str) -> MoRForCausalLM:
    return MoRForCausalLM(
        MoRConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=5,
            num_recursions=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.15,  # tokens differ in depth, and rounding is not blown up
            max_position_embeddings=64,
            routing=routing,
            kv_strategy=kv_strategy,
        )
    )


def results(model: MoRForCausalLM, text: Tensor) -> dict[str, Tensor]:
    """Loss and gradients of a training step, logits and greedy text of an evaluation."""
    model.train()
    model.zero_grad()
    loss = model(text, labels=text).loss
    loss.backward()
    named = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.eval()
    with torch.no_grad():
        logits = model(text).logits
        (continued,) = generate(model, [text[0, :5]], max_new_tokens=6, temperature=0)
    return {"loss": loss.detach(), **named, "logits": logits, "text": continued.tokens}


@pytest.mark.parametrize("backend", [Backend.SIMT, Backend.CUDA], ids=lambda b: b.value)
@pytest.mark.parametrize(("routing", "kv_strategy"), VARIANTS)
def test_a_model_gives_the_same(
    routing: str, kv_strategy: str, backend: Backend, seed: int, request: Any
) -> None:
    model = small(routing, kv_strategy)
    text = torch.stack([torch.randperm(50)[:19] for _ in range(2)])  # equal tokens could tie
    expected = results(model, text)
    with use_backend(backend, request.config.getoption("simt_library")):
        device = torch.get_default_device()
        actual = results(model.to(device), text.to(device))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].cpu(), value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
