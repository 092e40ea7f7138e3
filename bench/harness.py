"""What every bench shares: cases, fair turns between peers, the machine's ceilings."""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

OURS = "mor"
SECONDS = 0.5  # of measuring, a peer
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}

Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One piece of work that several peers do: equal inputs, equal results.

    bytes and flops are what the work needs at least, whoever does it; goals maps a peer to the
    least ratio of its time to ours.
    """

    op: str
    shape: str
    dtype: torch.dtype
    peers: dict[str, Call]
    bytes: int = 0
    flops: int = 0
    goals: dict[str, float] = field(default_factory=dict)
    reset: Call = lambda: None  # undoes what in-place peers did to their targets

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def check(self, peer: str) -> None:
        """Peers that compute different things have no ratio."""
        self.reset()
        ours, theirs = flat(self.peers[OURS]()), flat(self.peers[peer]())
        assert len(ours) == len(theirs), f"{peer}: {len(theirs)} results, not {len(ours)}"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            b = b.reshape(a.shape)
            if not a.is_floating_point():
                assert torch.equal(a, b.to(a.dtype)), f"{peer}: result {i} differs"
                continue
            error = (a.double() - b.double()).abs().max()
            bound = TOLERANCE[self.dtype] * b.double().abs().max()
            assert error <= bound, f"{peer}: result {i} is off by {error:.1e} > {bound:.1e}"


def flat(results: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [results] if isinstance(results, Tensor) else results


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for fixed shapes, its own cache entry for every case."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def forward_backward(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Call:
    """The forward pass and the gradients of all inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    torch.manual_seed(1)  # the same gradients for every peer, whatever its layout
    grads = [torch.randn(out.shape, dtype=out.dtype) for out in flat(function(*leaves))]
    return lambda: torch.autograd.grad(flat(function(*leaves)), leaves, grads)


def differentiable_peers(
    functions: dict[str, Callable[..., Any]], inputs: Sequence[Tensor], backward: bool
) -> dict[str, Call]:
    """Peers that do the same to the same inputs, forward alone or with the backward pass."""
    if backward:
        return {name: forward_backward(f, inputs) for name, f in functions.items()}
    return {name: partial(f, *inputs) for name, f in functions.items()}


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(benchmark: Any, case: Case, peer: str) -> None:
    """Times a peer with pytest-benchmark; its rounds take turns with ours.

    The ratio is the median over the rounds of (peer's time / our time just before): what else
    the machine does hits both alike.
    """
    ours, theirs = case.peers[OURS], case.peers[peer]
    mine: list[float] = []
    if peer == OURS:
        ours()
        once, turns = seconds(ours), {}
    else:
        case.check(peer)
        once, turns = seconds(ours) + seconds(theirs), {"setup": lambda: mine.append(seconds(ours))}
    rounds = min(max(int(SECONDS / once), 3), 500)

    benchmark.group = f"{case.op} {case.shape} {case.dtype_name}"
    benchmark.pedantic(theirs, rounds=rounds, warmup_rounds=max(1, rounds // 10), **turns)
    if benchmark.stats is None:  # --benchmark-disable
        return
    times = benchmark.stats.stats.data
    peak = max(case.bytes / copy_bandwidth(), case.flops / flop_rate(case.dtype))
    benchmark.extra_info.update(
        op=case.op,
        shape=case.shape,
        dtype=case.dtype_name,
        peer=peer,
        bytes=case.bytes,
        flops=case.flops,
        share_of_ceiling=peak / statistics.median(times),
    )
    if peer != OURS:
        pairs = zip(times, mine[-len(times) :], strict=True)
        benchmark.extra_info["ratio"] = statistics.median(t / m for t, m in pairs)
        benchmark.extra_info["goal"] = case.goals.get(peer)


def best_of(call: Call, rounds: int) -> float:
    call()
    return min(seconds(call) for _ in range(rounds))


@lru_cache
def copy_bandwidth() -> float:
    """Bytes read and written a second by the better of torch's copy and one memmove a thread.

    glibc's memmove stores past the cache at such sizes, which torch's copy does not.
    """
    size, threads = 1 << 28, torch.get_num_threads()
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.zeros_like(source)
    part = size // threads
    with ThreadPoolExecutor(threads) as pool:

        def move(i: int) -> None:
            offset = i * part
            ctypes.memmove(target.data_ptr() + offset, source.data_ptr() + offset, part)

        by_libc = best_of(lambda: list(pool.map(move, range(threads))), 7)
    return 2 * size / min(by_libc, best_of(lambda: target.copy_(source), 7))


@lru_cache
def flop_rate(dtype: torch.dtype) -> float:
    """FLOP/s of torch's matrix product; int32 work counts no FLOPs, its rate is fp32's.

    Of matrices of 2048 rows, or of fewer where the processor has no instructions for 16-bit
    products, which then take a hundred times as long.
    """
    if not dtype.is_floating_point:
        dtype = torch.float32
    a = torch.randn(256, 256, dtype=dtype)
    while len(a) < 2048 and best_of(partial(torch.mm, a, a), 1) < 0.1:
        a = a.repeat(2, 2)
    return 2 * len(a) ** 3 / best_of(partial(torch.mm, a, a), 5)


def ceilings() -> dict[str, float]:
    return {
        "copy_gb_s": copy_bandwidth() / 1e9,
        **{
            f"{str(dtype).removeprefix('torch.')}_gemm_gflop_s": flop_rate(dtype) / 1e9
            for dtype in TOLERANCE
        },
    }


def cu_seqlens(batch: int, length: int) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32) * length
