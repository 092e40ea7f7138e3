"""Everything that is done on a machine with an NVIDIA GPU, in one command of a few minutes.

    python bench/gpu.py                                  # build, test, sanitizers, every bench
    python bench/gpu.py --library PATH                   # with a libmor_ext.so built elsewhere
    python bench/gpu.py --only paged --no-tests --no-sanitizer      # a short run, for tuning
    python bench/gpu.py --dry-run                        # no GPU: every call once, no times

It measures the ceilings (copy, matrix product), runs the tests on the GPU and small cases under
compute-sanitizer, times the engine end to end (bench/bench_engine.py), checks every benched result
against fp64, times it beside PyTorch's, and writes one JSON file, to bench/results if it did
everything, else to bench/out, and a table.
bench/report.py shows the files of bench/results.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_report import judged, summary

BENCH = Path(__file__).parent.resolve()
ROOT = BENCH.parent
LIBRARY = ROOT / "mor_ext" / "libmor_ext.so"
WORKER = BENCH / "gpu_worker.py"

# Seconds that a stage may take, so that enough are left for the benches.
BUILD_LIMIT, CEILINGS_LIMIT, TESTS_LIMIT, SANITIZER_LIMIT, ENGINE_LIMIT = 300, 60, 150, 60, 180
FATAL = 3  # as the worker has it


# ---- programs ----


@dataclass
class Done:
    status: int | None  # None: stopped at its limit
    output: str
    seconds: float

    def record(self) -> dict[str, Any]:
        return {
            "ok": self.status == 0,
            "timed_out": self.status is None,
            "seconds": round(self.seconds, 1),
        }


def run(
    command: Iterable[object],
    limit: float,
    quiet: bool = True,
    grace: float = 10,
    **environment: str,
) -> Done:
    """Runs a program; at its limit it is interrupted, with all that it started, then killed."""
    start = time.monotonic()
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        start_new_session=True,
    )
    status: int | None
    try:
        output, _ = process.communicate(timeout=max(limit, 1))
        status = process.returncode
    except subprocess.TimeoutExpired:
        status = None
        os.killpg(process.pid, signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=grace)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
    return Done(status, output or "", time.monotonic() - start)


def said(*command: object) -> str:
    """What a program prints; nothing if it is not there or fails."""
    try:
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


# ---- the stages ----

Description = dict[str, Any]  # of a case, from the worker's list


@dataclass
class Run:
    """One run: its options, its time, and what has been found so far."""

    options: argparse.Namespace
    scratch: Path
    found: dict[str, Any]
    start: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        return self.options.minutes * 60 - (time.monotonic() - self.start)

    def save(self, path: Path) -> None:
        self.found["seconds"] = round(time.monotonic() - self.start, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.found, indent=1) + "\n")


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def about_commit(given: str | None) -> dict[str, Any]:
    """given: as `git describe --always --abbrev=40 --dirty` writes it, where .git is elsewhere."""
    if given:
        return {"commit": given.removesuffix("-dirty"), "dirty": given.endswith("-dirty")}
    changes = said("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return {"commit": said("git", "rev-parse", "HEAD") or "unknown", "dirty": bool(changes)}


def build(run_: Run) -> None:
    """mor_ext in its source folder, from source or around a library that was built elsewhere."""
    library = run_.options.library
    say(f"build of {'mor_ext._engine' if library else 'mor_ext'}")
    prebuilt = [f"--prebuilt={library.resolve()}"] if library else []
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", *prebuilt]
    done = run(command, min(BUILD_LIMIT, run_.left()))
    run_.found["build"] = done.record()
    if done.status != 0:
        sys.exit(f"{done.output[-4000:]}\nthe build failed")


def about_library(prebuilt: bool) -> dict[str, Any]:
    """Of mor_ext, imported where an error does no harm."""
    program = (
        "import json, torch, mor_ext\n"
        "cuda = torch._C._dispatch_has_kernel_for_dispatch_key('mor::gather_tokens', 'CUDA')\n"
        "print(json.dumps({**mor_ext.build_info(), 'has_cuda': cuda}))"
    )
    done = run([sys.executable, "-c", program], 120)
    if done.status != 0:
        sys.exit(f"{done.output[-4000:]}\nmor_ext cannot be imported")
    found = json.loads(done.output.splitlines()[-1])
    if not found.pop("has_cuda"):
        sys.exit("this mor_ext has no CUDA kernels: nvcc is needed, or --library")
    code = LIBRARY.read_bytes()
    digest = hashlib.sha256(code).hexdigest()
    return {**found, "prebuilt": prebuilt, "bytes": len(code), "sha256": digest}


def listed(words: list[str] | None) -> dict[int, Description]:
    """The cases with one of the words in what describes them; all where there are no words."""
    done = run([sys.executable, WORKER, "list"], 120)
    if done.status != 0:
        sys.exit(done.output)
    cases = enumerate(json.loads(done.output.splitlines()[-1]))
    found = {n: c for n, c in cases if not words or any(word in text(c) for word in words)}
    if not found:
        sys.exit(f"no bench has {' or '.join(words or [])} in its name: see --list")
    return found


def text(case: Description) -> str:
    return f"{case['family']}: {case['op']}, {case['dtype']}, {case['shape']}"


def each_kind(cases: dict[int, Description]) -> list[int]:
    """One case of every op, pass and dtype: at small sizes the others are the same."""
    kinds: dict[tuple[str, str], int] = {}
    for number, case in cases.items():
        kinds.setdefault((case["op"], case["dtype"]), number)
    return list(kinds.values())


def ceilings(run_: Run) -> None:
    say("ceilings")
    out = run_.scratch / "ceilings.json"
    done = run([sys.executable, WORKER, "ceilings", out], min(CEILINGS_LIMIT, run_.left()))
    if done.status != 0:
        sys.exit(f"{done.output[-4000:]}\nno use of the GPU")
    run_.found |= json.loads(out.read_text())
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.limit"
    state = said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    run_.found["device"] |= dict(zip(query.split(","), state.split(", "), strict=False))
    nvcc = re.search(r"V([\d.]+)", said("nvcc", "--version"))
    run_.found["software"]["nvcc"] = nvcc[1] if nvcc else None
    print(", ".join(f"{name} {value:.4g}" for name, value in run_.found["ceilings"].items()))


def tests(run_: Run) -> None:
    say("tests on the GPU")
    xml = run_.scratch / "tests.xml"
    plugins = {"xdist": ["-n", 8], "pytest_timeout": ["--timeout=60", "--timeout-method=thread"]}
    found_plugins = [name for name in plugins if importlib.util.find_spec(name)]
    options = [option for name in found_plugins for option in plugins[name]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += [*options, "-k", "cuda and not simt", f"--junitxml={xml}", "python_tests"]
    done = run(command, min(TESTS_LIMIT, run_.left()))
    found: dict[str, Any] = done.record()
    if xml.exists():
        suite = ElementTree.parse(xml).getroot()[0]
        found |= {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
        found["failed"] = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ][:100]
    run_.found["tests"] = found
    print(done.output[-6000 if done.status else -300 :].strip())


def sanitizer(run_: Run, cases: dict[int, Description]) -> None:
    """Each op at small sizes; only kernels with mor in their (mangled) namespace are looked at."""
    beside_nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    places = f"{os.environ['PATH']}{os.pathsep}{beside_nvcc}"
    program = shutil.which("compute-sanitizer", path=places)
    if program is None:
        say("no compute-sanitizer")
        run_.found["sanitizer"] = "not found"
        return
    run_.found["sanitizer"] = {}
    for tool in ("memcheck", "racecheck"):
        say(tool)
        command = [program, "--tool", tool, "--kernel-name", "kns=3mor", "--error-exitcode", 1]
        command += [sys.executable, WORKER, "check", *each_kind(cases)]
        limit = min(SANITIZER_LIMIT, run_.left())
        done = run(command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        lines = [line for line in done.output.splitlines() if "SUMMARY" in line]
        found = {"summary": lines[-1].strip("= ") if lines else "", **done.record()}
        found["right"] = done.output.count("right: ")
        run_.found["sanitizer"][tool] = found
        print(done.output[-3000:].strip() if done.status else found["summary"])


def engine(run_: Run) -> None:
    """Whole models in the engine, in few rounds."""
    say("the engine")
    out = run_.scratch / "engine.json"
    command = [sys.executable, BENCH / "bench_engine.py", "--device", "cuda", "--json", out]
    command += ["--rounds", 2, "--requests", 2]
    done = run(command, min(ENGINE_LIMIT, run_.left()))
    run_.found["engine"] = done.record()
    if out.exists():
        run_.found["engine"] |= json.loads(out.read_text())
    print(done.output[-6000:].strip())


def benches(run_: Run, cases: dict[int, Description]) -> None:
    """In a worker; where one dies, a new one goes on with the next case."""
    say("benches")
    out = run_.scratch / "benches.jsonl"
    out.touch()
    pending = list(cases)
    while pending and run_.left() > 20:
        command = [sys.executable, WORKER, "bench", out, run_.left() - 15, *pending]
        done = run(command, run_.left(), quiet=False)
        finished = [json.loads(line)["case"] for line in out.read_text().splitlines()]
        pending = [number for number in pending if number not in finished]
        if done.status in (0, None):
            break
        if pending and done.status != FATAL:
            note = {"case": pending.pop(0), "failed": f"its process ended with {done.status}"}
            with out.open("a") as lines:
                print(json.dumps(note), file=lines)
    results = {found.pop("case"): found for found in map(json.loads, out.open())}
    run_.found["benchmarks"] = [
        judged(case, results.get(number, {"failed": "no time left"}), run_.found["ceilings"])
        for number, case in cases.items()
    ]


# ---- the command ----


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="WORD", help="benches with it in a name")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--no-engine", action="store_true")
    parser.add_argument("--no-benches", action="store_true")
    parser.add_argument("--no-build", action="store_true", help="mor_ext is built already")
    parser.add_argument("--library", type=Path, help="a libmor_ext.so to use instead of building")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the JSON file")
    parser.add_argument("--minutes", type=float, default=9, help="stop after them (9)")
    parser.add_argument("--commit", metavar="ID", help="the commit, where git cannot say")
    parser.add_argument("--list", action="store_true", help="print the cases")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="simt",
        choices=("simt", "cpu"),
        help="call everything once at small sizes on the CPU: the CUDA kernels by csrc/simt, or "
        "the CPU kernels",
    )
    parser.add_argument(
        "--simt-library",
        type=Path,
        default=ROOT / "build" / "simt" / "libmor_simt.so",
        help="what `make simt` built",
    )
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.list:
        print("\n".join(map(text, listed(options.only).values())))
        return
    if options.dry_run:
        chosen = [options.dry_run, options.simt_library, *each_kind(listed(options.only))]
        sys.exit(run([sys.executable, WORKER, "dry-run", *chosen], 600, quiet=False).status or 0)
    if not said("nvidia-smi", "-L"):
        sys.exit("no NVIDIA GPU, says nvidia-smi -L; --dry-run needs none")
    left_out = (options.no_tests, options.no_sanitizer, options.no_engine, options.no_benches)
    whole = not (options.only or any(left_out))
    now = datetime.now(timezone.utc)
    out = (options.out or BENCH / ("results" if whole else "out")) / f"gpu-{now:%Y-%m-%d-%H%M}.json"
    with tempfile.TemporaryDirectory() as scratch:
        date = f"{now:%Y-%m-%d %H:%M} UTC"
        run_ = Run(options, Path(scratch), {"date": date, **about_commit(options.commit)})
        if not options.no_build:
            build(run_)
        run_.found["library"] = about_library(options.library is not None)
        cases = listed(options.only)
        ceilings(run_)
        run_.save(out)
        if not options.no_tests:
            tests(run_)
            run_.save(out)
        if not options.no_sanitizer:
            sanitizer(run_, cases)
            run_.save(out)
        if not (options.no_engine or options.only):
            engine(run_)
            run_.save(out)
        if not options.no_benches:
            benches(run_, cases)
            run_.save(out)
    print(summary(run_.found))
    print(f"\n{out}")


if __name__ == "__main__":
    main()
