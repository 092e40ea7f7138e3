"""The benches compare equals, and the report reads what they write."""

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
OWN_PEERS = ("eager", "eager mask", "sdpa")  # compiling takes long and is torch's to get right

CASES: list[tuple[str, str, tuple[Any, ...]]] = [
    ("route", "topk_case", (3, 40, 7, torch.float32)),
    ("route", "topk_case", (3, 40, 7, torch.bfloat16)),
    ("route", "depth_case", (50, 3, torch.float32)),
    ("compact", "depth_case", (3, 20, 3)),
    *(
        ("compact", case, (40, 13, 24, dtype))
        for case in ("gather_case", "scatter_case", "scatter_inplace_case", "rms_norm_case")
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        ("compact", case, (40, 13, 24, torch.float32, True))
        for case in ("gather_case", "scatter_case", "rms_norm_case")
    ),
    ("kv_cache", "rotary_case", (30, torch.float32)),
    ("kv_cache", "rotary_case", (30, torch.float32, True)),
    ("kv_cache", "append_case", (3, 10, 4, torch.float32, False)),
    ("kv_cache", "append_case", (3, 10, 4, torch.bfloat16, True)),
    *(
        ("attention", case, (2, 3, 48, 16, torch.float32, backward))
        for case in ("causal_case", "shared_kv_case")
        for backward in (False, True)
    ),
    ("attention", "paged_case", (3, 2, 64, 4, 2, torch.float32)),
    ("attention", "paged_case", (1, 1, 64, 4, 2, torch.bfloat16)),
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.mark.parametrize(("family", "case", "sizes"), CASES)
def test_peers_agree(
    bench: Callable[[str], ModuleType], family: str, case: str, sizes: tuple[Any, ...], seed: int
) -> None:
    built = getattr(bench(f"bench_{family}"), case)(*sizes)
    assert built.bytes > 0
    for peer in set(OWN_PEERS) & set(built.peers):
        built.check(peer)


def test_check_rejects_another_result(bench: Callable[[str], ModuleType]) -> None:
    case = bench("harness").Case(
        op="add",
        shape="3",
        dtype=torch.float32,
        peers={"mor": lambda: torch.ones(3), "eager": lambda: torch.tensor([1.0, 1.0, 1.01])},
    )
    with pytest.raises(AssertionError, match="eager: result 0 is off"):
        case.check("eager")


def test_models_bench(bench: Callable[[str], ModuleType]) -> None:
    """Small models through all of it: a process each, FLOPs, memory, the table."""
    models = bench("bench_models")
    sizes = models.Sizes(2, 16, 40, 32, 64, 5, 4, 2)
    found = models.measure(sizes, rounds=2, threads=1, keep_freed_memory=True)
    vanilla, routed = found["vanilla"], found["MoR-3 expert choice"]
    weights = 5 * (32 * 64 + 32 * 32 + 3 * 32 * 64) + 32 * 40
    attention = 5 * 2 * (16 * 17 // 2) * 4 * 32  # layers, sequences, pairs
    assert vanilla["forward_flops"] == 2 * 32 * weights + attention
    assert vanilla["step_flops"] == 6 * 32 * weights + 7 * attention // 2
    assert 0.5 < routed["step_flops"] / vanilla["step_flops"] < 1
    assert routed["depth"] == pytest.approx(1 + (10 + 5) / 16)  # of 16, int(2/3) and int(1/3)
    assert 0 < routed["routing_share"] < 1
    rows = models.models_section({"conditions": "here", "models": found}).splitlines()[4:]
    first = [row.split("|")[1].strip() for row in rows]
    assert [name.split(", mean")[0] for name in first] == models.MODELS


def test_models_bench_judges(bench: Callable[[str], ModuleType]) -> None:
    """Made-up times: a round in which the machine was busy changes no ratio."""
    models = bench("bench_models")
    times = {
        "vanilla": [1.0, 5.0, 1.0],
        "transformers Llama, SDPA": [1.1, 5.5, 1.1],
        "MoR-3 expert choice": [0.7, 3.5, 0.7],
        "MoR-3 token choice": [0.8, 4.0, 0.8],
    }
    found = {
        name: {
            "step": [{"seconds": t, "cpu": 2 * t} for t in turns],
            "forward": [{"seconds": t, "cpu": 2 * t} for t in turns],
            "step_flops": 75 if "MoR" in name else 100,
            "forward_flops": 75,
            "memory": 1000 * turns[0],
            "routing_share": 0.02 if "MoR" in name else 0.0,
        }
        for name, turns in times.items()
    }
    vanilla, llama, expert, token = models.judged(found)
    assert vanilla["goals"] == [("step / transformers", 1.0, pytest.approx(1 / 1.1))]
    assert llama["step_ratio"] == pytest.approx(1.1) and not llama["goals"]
    assert expert["step_ratio"] == expert["step_cpu_ratio"] == pytest.approx(0.7)
    measured = {what: (bound, got) for what, bound, got in token["goals"]}
    assert measured["step / FLOP ratio"] == (1.03, pytest.approx(0.8 / 0.75))
    assert measured["memory"] == (0.8, pytest.approx(0.8))
    text = models.models_table([expert | {"depth": 2.0}, token | {"depth": 2.0}])
    assert "step <= 0.72: 0.7, yes" in text and "routing <= 0.01: 0.02, **no**" in text
    assert "step / FLOP ratio <= 1.03: 1.07, **no**" in text


def test_report(tmp_path: Path) -> None:
    """A short run of one bench, through pytest-benchmark's JSON, to the tables."""
    out = tmp_path / "bench.json"
    chosen = "topk and dtype0 and 341 and not compiled"
    run = [sys.executable, "-m", "pytest", "-q", BENCH / "bench_route.py", "-k", chosen]
    subprocess.run([*run, "--benchmark-only", f"--benchmark-json={out}"], check=True)
    subprocess.run([sys.executable, BENCH / "report.py", out], check=True)

    entries = json.loads(out.read_text())["benchmarks"]
    assert {e["extra_info"]["peer"] for e in entries} == {"mor", "eager", "eager mask"}
    report = (tmp_path / "report.md").read_text()
    (row,) = [line for line in report.splitlines() if line.startswith("| route_topk")]
    for entry in entries:
        if entry["extra_info"]["peer"] != "mor":
            assert f"{entry['extra_info']['ratio']:.2f}x" in row


# ---- bench/gpu.py ----


@pytest.mark.parametrize("kernels", ["cpu", "simt"])
def test_gpu_dry_run(kernels: str, pytestconfig: pytest.Config) -> None:
    """Every case at small sizes, ours and PyTorch's: what can be tried of it without a GPU."""
    library = pytestconfig.getoption("simt_library")
    command = [sys.executable, BENCH / "gpu.py", f"--dry-run={kernels}", "--simt-library", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, *lines, last = done.stdout.splitlines()
    assert first == f"dry run on {kernels}: no numbers"
    assert last == "none wrong; no numbers, for no GPU was used"
    missing = {op for line in lines for op in re.findall(r"missing: (.*)", line)}
    sources = "".join(path.read_text() for path in (BENCH.parent / "csrc").glob("*/cuda.cpp"))
    there = set(re.findall(r'm\.impl\("(\w+)"', sources))
    assert not there & {op for ops in missing for op in ops.split(", ")}
    tried = [line for line in lines if ": right: ours, " in line]
    assert len(tried) + sum("missing: " in line for line in lines) == len(lines) > 20


def test_gpu_errors(bench: Callable[[str], ModuleType]) -> None:
    measure = bench("gpu_measure")
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert measure.error_of(exact.float(), exact) == 0
    assert measure.error_of(exact + torch.tensor([0.0, 0.5]), exact) == pytest.approx(0.1)
    assert measure.error_of([exact, exact * float("nan")], [exact, exact]) == float("inf")
    assert measure.error_of(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert measure.error_of(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    with pytest.raises(AssertionError):
        measure.error_of(exact[:1], exact)
    with pytest.raises(ValueError):
        measure.error_of([exact], [exact, exact])
    with measure.poisoned():
        assert exact.new_empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_gpu_results_are_judged(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """Made-up measurements of a made-up device, and what must follow from them."""
    case, report = bench("gpu_case"), bench("gpu_report")
    goals = [
        case.Goal("us", 12, stretch=9),
        case.Goal("share", 0.8),
        case.Goal("tflop_s", 50),
        case.Goal("ratio", 2, "slow"),
        case.Goal("ratio", 2, "broken"),
        case.Goal("rate", 0.9, "other"),
    ]
    described = {
        "family": "f",
        "op": "op",
        "dtype": "bfloat16",
        "shape": "N1",
        "goals": [{"goal": str(goal), **vars(goal)} for goal in goals],
    }
    measured = {
        "bytes": 5_000_000,
        "flops": 400_000_000,
        "fixed_us": 2,
        "ours": {"us": 10.0},
        "peers": {"slow": {"us": 30.0}, "broken": {"failed": "RuntimeError: no"}},
        "yardsticks": {"other": {"us": 5.0, "flops": 160_000_000}},
    }
    ceilings = {
        "copy_gb_s": 1000.0,
        "bfloat16_matmul_tflop_s": 100.0,
        "float32_matmul_tflop_s": 10.0,
        "one_element_us": 2.0,
    }
    entry = report.judged(described, measured, ceilings)
    assert entry["floor_us"] == pytest.approx(7)  # the bytes take 5 us, the FLOPs 4
    assert entry["share_of_ceiling"] == pytest.approx(0.5)
    assert entry["gb_s"] == pytest.approx(500) and entry["tflop_s"] == pytest.approx(40)
    assert [goal["met"] for goal in entry["goals"]] == [True, False, False, True, None, True]
    assert [goal["stretch_met"] for goal in entry["goals"]] == [False, *[None] * 5]
    assert entry["goals"][5]["measured"] == pytest.approx(40 / 32)
    failed = report.judged(described, {"failed": "no time left"}, ceilings)

    assert report.gpu_section(tmp_path) == "no GPU results yet\n"
    found = {
        "date": "2000-01-01",
        "commit": "0" * 40,
        "dirty": True,
        "library": {"sha256": "1" * 64, "prebuilt": True},
        "device": {"name": "none at all"},
        "software": {"torch": "0", "cuda": "0", "cudnn": 0},
        "ceilings": ceilings,
        "tests": {"tests": 9, "skipped": 1, "failures": 2, "errors": 0, "timed_out": False},
        "sanitizer": {"memcheck": {"ok": False, "right": 3, "timed_out": True}},
        "benchmarks": [entry, failed],
    }
    (tmp_path / "gpu.json").write_text(json.dumps(found))
    text = report.gpu_section(tmp_path)
    assert "commit 000000000000 with local changes" in text
    assert "tests on the GPU: 8 run, 2 failed" in text
    assert "memcheck: **not clean**, 3 small cases, stopped at the time limit" in text
    rows = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if "| N1" in line]
    assert rows[0][:4] == ["op", "bf16", "N1", "10.0"]
    assert rows[0][4:7] == ["slow 3.00x, broken failed", "40 TFLOP/s", "50%"]
    assert "<= 12 us: yes; >= 80% of ceiling: **no**" in rows[0][7]
    assert rows[1][3] == "no time left"


ENGINE_BENCH = """
import json, sys
assert sys.argv[1:3] == ["--device", "cuda"]
turn = {"tokens": 30, "seconds": 2.0, "cpu": 1.0, "joules": 60.0}
goal = {"what": "speed", "bound": 1.3, "at_least": True, "measured": 1.2, "met": False}
jobs = {"vanilla": {"facts": None, "turns": [turn]}}
found = {"comparisons": [{"title": "work", "jobs": jobs, "goals": [goal]}]}
with open(sys.argv[sys.argv.index("--json") + 1], "w") as out:
    json.dump({"conditions": ["the engine's machine"], **found}, out)
"""


def test_gpu_bench_times_the_engine(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, report = bench("gpu"), bench("gpu_report")
    (tmp_path / "bench_engine.py").write_text(ENGINE_BENCH)
    monkeypatch.setattr(gpu, "BENCH", tmp_path)
    run = gpu.Run(gpu.argparse.Namespace(minutes=1), tmp_path, {})
    gpu.engine(run)
    assert run.found["engine"]["ok"]
    (tmp_path / "results").mkdir()
    (tmp_path / "engine.json").rename(tmp_path / "results" / "engine-2000-01-01.json")
    text = report.gpu_section(tmp_path / "results")
    assert text.startswith("### engine-2000-01-01\n\n- the engine's machine\n")
    rows = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines()]
    assert ["work", "vanilla", "15.0", "1.000 (1.00 - 1.00)", "1.000", "2"] in [
        [cell for cell in row if cell] for row in rows
    ]
    assert ["speed, work", ">= 1.3", "1.2", "**no**"] in rows
    (tmp_path / "bench_engine.py").write_text("import nothing_like_that")
    late = gpu.Run(gpu.argparse.Namespace(minutes=1), tmp_path, {})
    gpu.engine(late)
    assert not late.found["engine"]["ok"] and "comparisons" not in late.found["engine"]


DYING_WORKER = """
import json, sys
_, mode, out, seconds, *cases = sys.argv
for case in map(int, cases):
    if case == 2:
        sys.exit(11)
    found = {"case": case, "failed": "it was " + str(case)}
    with open(out, "a") as lines:
        print(json.dumps(found), file=lines)
    if case == 4:
        sys.exit(3)
"""


def test_gpu_bench_goes_on_after_a_crash(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = bench("gpu")
    (tmp_path / "worker.py").write_text(DYING_WORKER)
    monkeypatch.setattr(gpu, "WORKER", tmp_path / "worker.py")
    options = gpu.argparse.Namespace(minutes=1)
    run = gpu.Run(options, tmp_path, {"ceilings": {}})
    gpu.benches(run, {number: {"op": number, "goals": []} for number in range(6)})
    failed = [entry["failed"] for entry in run.found["benchmarks"]]
    assert failed == [f"it was {n}" if n != 2 else "its process ended with 11" for n in range(6)]
    late = gpu.Run(gpu.argparse.Namespace(minutes=0), tmp_path, {"ceilings": {}})
    gpu.benches(late, {7: {"op": 7, "goals": []}})
    assert late.found["benchmarks"][0]["failed"] == "no time left"


def test_gpu_programs_end_at_their_limit(bench: Callable[[str], ModuleType]) -> None:
    start = time.monotonic()
    stubborn = "import signal, time; signal.signal(2, signal.SIG_IGN); print('hi'); time.sleep(60)"
    done = bench("gpu").run([sys.executable, "-c", stubborn], limit=1, grace=1)
    assert done.status is None and done.output == "hi\n" and time.monotonic() - start < 30


def test_no_gpu_numbers_without_results() -> None:
    """The page on performance says so as long as no run on a GPU is committed, and no longer."""
    page = (BENCH.parent / "docs" / "performance.md").read_text()
    results = list((BENCH / "results").glob("*.json"))
    assert ("No GPU results yet" in page) == (not results)
