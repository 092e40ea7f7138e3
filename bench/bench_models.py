"""A training step of a Mixture-of-Recursions model: against vanilla, and the share of routing."""

from contextlib import ExitStack
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from harness import OURS, Call, Case
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.nn import ExpertChoiceRouter

RANGE = "routing"
FUNCTION = 0  # at::RecordScope of an op
FUSED = ("mor::gather_rms_norm", "mor::gather_rms_norm_bwd")


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


def start_of(event: Any) -> float:
    return event.time_range.start


def routing_shares(step: Call) -> dict[str, float]:
    """The parts of a step's CPU time spent in routing, gather and scatter.

    forward: everything inside the router's methods; backward: the nodes it left behind; fused:
    the gather that does a norm too, both ways.
    """

    def traced(name: str) -> Any:
        method = getattr(ExpertChoiceRouter, name)

        def call(*args: Any) -> Any:
            with record_function(RANGE):
                return method(*args)

        return patch.object(ExpertChoiceRouter, name, call)

    with ExitStack() as stack:
        for name in ("begin", "select", "merge"):
            stack.enter_context(traced(name))
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("step"):
            step()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CPU]
    total = next(e for e in events if e.name == "step").cpu_time_total
    ranges = [e.time_range for e in events if e.name == RANGE]
    numbered = [e for e in events if e.sequence_nr >= 0]
    backward = [e for e in numbered if e.name.startswith("autograd::engine::evaluate_function")]

    # A forward op carries the number of the next backward node to be made, so the last op to start
    # with a number is the one that made the node. The others that carry it run in the node.
    forward = [e for e in numbered if e.scope == FUNCTION and not e.name.startswith("autograd::")]
    makers = {e.sequence_nr: e.time_range.start for e in sorted(forward, key=start_of)}
    routed = {
        number for number, start in makers.items() if any(r.start <= start < r.end for r in ranges)
    }
    parts = {
        "forward": sum(r.elapsed_us() for r in ranges),
        "backward": sum(e.cpu_time_total for e in backward if e.sequence_nr in routed),
        "fused": sum(e.cpu_time_total for e in events if e.name in FUSED),
    }
    return {name: part / total for name, part in parts.items()}


@pytest.mark.parametrize("peer", [OURS, "vanilla"])
@pytest.mark.parametrize("kv_strategy", ["recursion_wise", "shared"])
def test_training_step(benchmark: Any, measure: Any, kv_strategy: str, peer: str) -> None:
    case = training_case(2, 512, 512, 14, 3, kv_strategy)
    measure(case, peer)
    if peer == OURS:
        benchmark.extra_info["routing_shares"] = routing_shares(case.peers[OURS])
        benchmark.extra_info["largest_share"] = 0.01
