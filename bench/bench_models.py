"""A training step of a Mixture-of-Recursions model: against vanilla, and the share of routing."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from harness import OURS, Call, Case
from torch import Tensor

from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.training import routing_shares


def training_step(config: MoRConfig, text: Tensor) -> Call:
    model = MoRForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> tuple[()]:
        optimizer.zero_grad()
        model(text, labels=text).loss.backward()
        optimizer.step()
        return ()  # the models differ, so do their losses

    return step


@lru_cache(1)
def training_case(
    batch: int, length: int, hidden_size: int, layers: int, recursions: int, kv_strategy: str
) -> Case:
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": hidden_size // 64,
        "max_position_embeddings": length,
    }
    routed = MoRConfig(
        **sizes, num_recursions=recursions, routing="expert_choice", kv_strategy=kv_strategy
    )
    text = torch.randint(routed.vocab_size, (batch, length))
    return Case(
        op="training step",
        shape=f"MoR-{recursions} {kv_strategy}, {layers} layers of {hidden_size}, "
        f"{batch} x {length} tokens",
        dtype=torch.float32,
        peers={
            OURS: training_step(routed, text),
            "vanilla": training_step(MoRConfig(**sizes), text),
        },
    )


@pytest.mark.parametrize("peer", [OURS, "vanilla"])
@pytest.mark.parametrize("kv_strategy", ["recursion_wise", "shared"])
def test_training_step(benchmark: Any, measure: Any, kv_strategy: str, peer: str) -> None:
    case = training_case(2, 512, 512, 14, 3, kv_strategy)
    measure(case, peer)
    if peer == OURS:
        benchmark.extra_info["routing_shares"] = routing_shares(case.peers[OURS])
        benchmark.extra_info["largest_share"] = 0.01
