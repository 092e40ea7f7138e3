"""Where the time of a training step goes."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mor_ext.models import MoRForCausalLM
from mor_ext.nn import Router

ROUTING = "routing"
FUSED = ("mor::gather_rms_norm", "mor::gather_rms_norm_bwd")


def routing_share(model: MoRForCausalLM, step: Callable[[], Any]) -> float:
    """The part of a training step's CPU time that goes to routing, gather and scatter.

    That is everything inside the routers' methods with the backward nodes it leaves behind, and
    all of the gather that is fused with a norm.

    Args:
        step: forward and backward, and whatever else belongs to a step; it runs twice.
    """
    routers = {type(m) for m in model.modules() if isinstance(m, Router) and type(m) is not Router}
    with ExitStack() as stack:
        for router in routers:
            for name in ("begin", "select", "merge"):
                stack.enter_context(patch.object(router, name, _traced(getattr(router, name))))
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("step"):
            step()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CPU]
    total = next(e for e in events if e.name == "step").cpu_time_total
    ranges = [e.time_range for e in events if e.name == ROUTING]

    # An op carries the number of the next backward node to be made, so the last op to start with
    # a number is the one that made the node.
    makers: dict[int, float] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and event.scope == 0:
            makers[event.sequence_nr] = event.time_range.start
    routed = {
        number for number, start in makers.items() if any(r.start <= start < r.end for r in ranges)
    }
    spent = sum(r.elapsed_us() for r in ranges)
    for event in events:
        backward = event.name.startswith("autograd::engine::evaluate_function")
        if event.name in FUSED or (backward and event.sequence_nr in routed):
            spent += event.cpu_time_total
    return spent / total


def _traced(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with record_function(ROUTING):
            return method(*args)

    return call
