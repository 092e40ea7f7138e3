"""Times and errors of calls on a GPU."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from gpu_case import BF16, F16, F32, I32, Call
from harness import flat
from torch import Tensor

# ||result - exact|| / ||exact|| at most; also of peers, for what is wrong has no time.
TOLERANCE = {F32: 2e-5, BF16: 1e-2, F16: 2e-3, I32: 0.0}

SECONDS = 0.15  # of replays of one call
METHOD = (
    "us: median of CUDA events around replays of a CUDA graph of one call (method graph), or "
    "around the call itself where it cannot be captured (method events); flushed: before every "
    "replay a buffer larger than the L2 cache is written; back_to_back_us: a call's share of a "
    "graph of 20, with whatever stays in the cache; again_us: ours once more, after the peers"
)


@dataclass(frozen=True)
class Timing:
    us: float  # median
    low_us: float  # quartiles
    high_us: float
    replays: int
    method: str  # graph or events
    flushed: bool


class Clock:
    """Runs calls on a stream of its own, on which they can be captured."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.l2_bytes = torch.cuda.get_device_properties().L2_cache_size
        self.buffer = torch.empty(max(4 * self.l2_bytes, 1 << 28), dtype=torch.uint8, device="cuda")

    def record(self, call: Call, working_set: int) -> dict[str, Any]:
        """What goes into the results: with short calls, also how they do back to back."""
        timing = self.time(call, flush=working_set < 4 * self.l2_bytes)
        found = asdict(timing)
        if timing.us < 100 and timing.method == "graph":
            found["back_to_back_us"] = self.time(call, flush=False, calls=20).us
        return found

    def time(self, call: Call, flush: bool, calls: int = 1) -> Timing:
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                call()
            self.stream.synchronize()
            graph = self.captured(call, calls)
            once = graph.replay if graph else call
            first = self.durations(once, 3, flush)
            replays = min(max(int(SECONDS * 1e6 / statistics.median(first)), 20), 300)
            durations = self.durations(once, replays, flush)
        low, middle, high = (x / calls for x in statistics.quantiles(durations, n=4))
        return Timing(middle, low, high, replays, "graph" if graph else "events", flush)

    def captured(self, call: Call, calls: int) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for _ in range(calls):
                    call()
        except Exception as error:
            torch.cuda.synchronize()  # an error of the device itself shows here
            if calls > 1:
                raise
            print(f"  not captured: {type(error).__name__}: {str(error).splitlines()[0]}")
            return None
        graph.replay()
        return graph

    def durations(self, once: Call, count: int, flush: bool) -> list[float]:
        """In microseconds. The host is ahead of the device while a flush is running."""
        pairs = []
        for _ in range(count):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            if flush:
                self.buffer.zero_()
            pair[0].record()
            once()
            pair[1].record()
            pairs.append(pair)
        self.stream.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in pairs]


def ceilings(clock: Clock) -> dict[str, float]:
    """What this GPU reaches: bytes read plus written by a copy, products of random matrices."""
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.randint(256, (1 << 31,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = clock.time(partial(target.copy_, source), flush=False)
    found = {"copy_gb_s": 2 * source.nbytes / copy.us / 1e3}
    for dtype, size in ((BF16, 8192), (F32, 4096)):
        a, b = torch.randn(2, size, size, dtype=dtype, device="cuda")
        out = torch.empty_like(a)
        product = clock.time(partial(torch.mm, a, b, out=out), flush=False)
        name = str(dtype).removeprefix("torch.")
        found[f"{name}_matmul_tflop_s"] = 2 * size**3 / product.us / 1e6
    one = torch.zeros(1, device="cuda")
    found["one_element_us"] = clock.time(lambda: one.add_(1), flush=True).us
    return found


# ---- results ----


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN or the largest integer, so that what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def error_of(results: Tensor | Sequence[Tensor], exact: Tensor | Sequence[Tensor]) -> float:
    """The largest ||result - exact|| / ||exact||; of integers 0 or infinite."""
    errors = []
    for result, expected in zip(flat(results), flat(exact), strict=True):
        assert result.shape == expected.shape, f"{tuple(result.shape)}, {tuple(expected.shape)}"
        if not expected.is_floating_point():
            errors.append(0.0 if torch.equal(result, expected) else float("inf"))
            continue
        wide, norm = expected.double(), expected.double().norm()
        errors.append(float((result.double() - wide).norm() / norm.clamp(min=1e-30)))
    return max(float("inf") if error != error else error for error in errors)
