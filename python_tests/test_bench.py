"""The benches compare equals, and the report reads what they write."""

import importlib
import json
import subprocess
import sys
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


def test_routing_shares_find_both_passes(bench: Callable[[str], ModuleType]) -> None:
    models = bench("bench_models")
    case = models.training_case(2, 32, 64, 5, 3, "recursion_wise")
    shares = models.routing_shares(case.peers["mor"])
    assert all(share > 0 for share in shares.values()) and sum(shares.values()) < 1, shares


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
