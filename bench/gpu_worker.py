"""What bench/gpu.py does with torch: in a process of its own, which may die of an error on the GPU.

    python bench/gpu_worker.py list                          # the cases, as JSON
    python bench/gpu_worker.py ceilings OUT                  # writes what the device is and reaches
    python bench/gpu_worker.py bench OUT SECONDS CASE...     # appends a line of JSON a case
    python bench/gpu_worker.py check CASE...                 # ours, once, at small sizes
    python bench/gpu_worker.py dry-run BACKEND LIBRARY CASE...    # ours and the peers, on the CPU

CASE is a place in the list.
"""

import faulthandler
import gc
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_attention
import gpu_compact
import gpu_kv_cache
import gpu_route
import torch
from gpu_case import Call, Case, Work
from gpu_measure import METHOD, TOLERANCE, Clock, ceilings, error_of, poisoned

CASES: list[Case] = [
    *gpu_route.CASES,
    *gpu_compact.CASES,
    *gpu_kv_cache.CASES,
    *gpu_attention.CASES,
]


CASE_LIMIT = 90  # seconds; a kernel that never ends must not take all the time there is
FATAL = 3  # exit status after a failure, already written, that has spoilt the process


class WrongResultError(Exception):
    """A call gives something else than the reference."""


def checked(call: Call, work: Work, exact: Any, dtype: torch.dtype) -> float:
    """The relative error."""
    error = error_of(work.part(call()), exact)
    if not error <= TOLERANCE[dtype]:
        raise WrongResultError(f"relative error {error:.1e}, at most {TOLERANCE[dtype]:.0e}")
    return error


def check(case: Case, work: Work) -> Any:
    """Compares our result with the exact one, and returns that and the error."""
    exact = work.exact()
    with poisoned():
        return exact, checked(work.ours, work, exact, case.dtype)


def failure(error: Exception) -> dict[str, str]:
    return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:300]}


def is_fatal(error: Exception) -> bool:
    """After which this process can do nothing more on the GPU."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return isinstance(error, getattr(torch, "AcceleratorError", ()))


def measure(case: Case, clock: Clock) -> dict[str, Any]:
    """Everything about a case but what follows from the ceilings."""
    work = case.build()
    exact, error = check(case, work)
    ours = clock.record(work.ours, work.bytes) | {"error": error}
    peers = {}
    for name, call in work.peers.items():
        try:
            error = checked(call, work, exact, case.dtype)
            peers[name] = clock.record(call, work.bytes) | {"error": error}
        except Exception as problem:
            if is_fatal(problem):
                raise
            peers[name] = failure(problem)
    yardsticks = {
        name: clock.record(call, work.bytes) | {"flops": flops}
        for name, (call, flops) in work.yardsticks.items()
    }
    ours["again_us"] = clock.time(work.ours, ours["flushed"]).us
    return {
        "bytes": work.bytes,
        "flops": work.flops,
        "fixed_us": work.fixed_us,
        "ours": ours,
        "peers": peers,
        "yardsticks": yardsticks,
    }


def described(case: Case) -> dict[str, Any]:
    return {
        "family": case.family,
        "op": case.name,
        "dtype": case.dtype_name,
        "shape": case.shape,
        "goals": [{"goal": str(goal), **asdict(goal)} for goal in case.goals],
    }


def about() -> dict[str, Any]:
    found = torch.cuda.get_device_properties()
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    return {
        "device": {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
            "l2_bytes": found.L2_cache_size,
        },
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": triton,
        },
        "method": METHOD,
    }


def bench(out: Path, seconds: float, numbers: list[int]) -> None:
    end, clock = time.monotonic() + seconds, Clock()
    with out.open("a") as lines, torch.cuda.stream(clock.stream):
        for number in numbers:
            if time.monotonic() > end:
                return
            faulthandler.dump_traceback_later(CASE_LIMIT, exit=True)
            case, seed = CASES[number], torch.seed() % 2**31
            torch.manual_seed(seed)
            fatal = False
            try:
                found = measure(case, clock)
            except Exception as error:
                found, fatal = failure(error), is_fatal(error)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps({"case": number, "seed": seed, **found}), file=lines, flush=True)
            us = f"{found['ours']['us']:.1f} us" if "ours" in found else found["failed"]
            print(f"{case}: {us}", flush=True)
            if fatal:
                sys.exit(FATAL)
            gc.collect()
            torch.cuda.empty_cache()


def dry_run(backend_name: str, library: Path, numbers: list[int]) -> int:
    """How many results are wrong."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "python_tests"))
    from helpers import Backend, use_backend

    backend, wrong = Backend(backend_name), 0
    print(f"dry run on {backend.value}: no numbers")
    with use_backend(backend, library):
        ops = "mor_simt" if backend == Backend.SIMT else "mor"
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        for number in numbers:
            case = CASES[number]
            missing = [op for op in case.ops if not has_kernel(f"{ops}::{op}", "CPU")]
            outcome = f"missing: {', '.join(missing)}" if missing else tried(case)
            wrong += outcome.startswith("wrong")
            print(f"{case.family}: {case.name}, {case.dtype_name}: {outcome}", flush=True)
    print(f"{wrong or 'none'} wrong; no numbers, for no GPU was used")
    return wrong


def tried(case: Case) -> str:
    """Every call of a case once, at small sizes."""
    said = ["ours"]
    try:
        work = case.build(small=True)
        exact, _ = check(case, work)
        for name, peer in work.peers.items():
            said.append(name)
            checked(peer, work, exact, case.dtype)
        for name, (call, _) in work.yardsticks.items():
            said.append(name)
            call()
    except Exception as error:
        return f"wrong: {said[-1]}: {failure(error)['failed']}"
    return f"right: {', '.join(said)}"


def main(mode: str, *arguments: str) -> None:
    if mode == "list":
        print(json.dumps(list(map(described, CASES))))
        return
    if mode == "dry-run":
        backend, library, *numbers = arguments
        sys.exit(min(dry_run(backend, Path(library), list(map(int, numbers))), 1))
    torch.set_default_device("cuda")
    if mode == "bench":
        out, seconds, *numbers = arguments
        bench(Path(out), float(seconds), list(map(int, numbers)))
    elif mode == "ceilings":
        clock = Clock()
        with torch.cuda.stream(clock.stream):
            found = about() | {"ceilings": ceilings(clock)}
        Path(arguments[0]).write_text(json.dumps(found) + "\n")
    elif mode == "check":
        for case in (CASES[int(number)] for number in arguments):
            check(case, case.build(small=True))
            print(f"right: {case.name}, {case.dtype_name}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
