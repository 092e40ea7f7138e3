"""Where the time of a training step goes."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mor_ext.nn import RMSNorm, Router

RANGE = "routing"
FUNCTION = 0  # at::RecordScope of an op
METHODS = ("begin", "select", "merge")  # of routers


def routing_shares(step: Callable[[], Any]) -> dict[str, float]:
    """The parts of a training step's CPU time that go to routing, gather and scatter.

    forward: everything inside the routers' methods, scatter among it, and the gather that is a
    norm too; backward: the nodes that these leave behind.

    Args:
        step: forward and backward, and whatever else belongs to a step; it runs twice.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler announces itself on stderr
    with ExitStack() as stack:
        for owner, name, method in [*_routing_methods()]:
            stack.enter_context(patch.object(owner, name, _traced(method)))
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
    makers = {e.sequence_nr: _start(e) for e in sorted(forward, key=_start)}
    routed = {
        number for number, start in makers.items() if any(r.start <= start < r.end for r in ranges)
    }
    parts = {
        "forward": sum(r.elapsed_us() for r in ranges),
        "backward": sum(e.cpu_time_total for e in backward if e.sequence_nr in routed),
    }
    return {name: part / total for name, part in parts.items()}


def _routing_methods() -> Iterator[tuple[type, str, Callable[..., Any]]]:
    """Of every router but the one that picks every token, and the gather that is a norm too."""
    yield RMSNorm, "gather", RMSNorm.gather
    routers = [Router]
    for router in routers:
        routers += router.__subclasses__()
        if router is not Router:
            yield from ((router, name, getattr(router, name)) for name in METHODS)


def _start(event: Any) -> float:
    return event.time_range.start


def _traced(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with record_function(RANGE):
            return method(*args)

    return call
