"""Millions of random steps of the scheduler, by csrc/engine/simulation, which checks every row."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "csrc" / "engine" / "simulation"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def program(name: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        pytest.skip(f"no {name}")
    return found


def output(*command: object, timeout: float = 600) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def simulation(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Built with the sanitizers that the parameter names."""
    sanitizers: str = request.param
    compiler = program(os.environ.get("CXX", "c++"))
    if sanitizers:
        skip_without(compiler, sanitizers, tmp_path)
    options = (f"-DCMAKE_CXX_COMPILER={compiler}", f"-DMOR_SANITIZE={sanitizers}")
    ninja = f"-DCMAKE_MAKE_PROGRAM={program('ninja')}"
    output(program("cmake"), "-S", SOURCE, "-B", tmp_path / "build", "-G", "Ninja", ninja, *options)
    jobs = os.environ.get("MAX_JOBS")
    output(program("cmake"), "--build", tmp_path / "build", *(["-j", jobs] if jobs else []))
    return tmp_path / "build" / "simulation"


def skip_without(compiler: str, sanitizers: str, folder: Path) -> None:
    """Not every system has the sanitizers' libraries, or lays out memory as they need it."""
    (folder / "empty.cpp").write_text("int main() {}")
    empty = str(folder / "empty")
    for command in ([compiler, f"-fsanitize={sanitizers}", f"{empty}.cpp", "-o", empty], [empty]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no -fsanitize={sanitizers}: {done.stderr.strip()}")


def figures(*command: object) -> dict[str, int]:
    said = output(*command, timeout=300)
    return {name: int(value) for name, value in re.findall(r"([a-z][a-z ]*) (\d+)", said)}


@pytest.mark.parametrize("simulation", [""], indirect=True)
def test_millions_of_steps(simulation, seed):
    """All strategies by turns; nothing depends on order, room or company."""
    done = figures(simulation, seed, 5_000_000)
    assert done["steps"] >= 5_000_000 and done["requests"] > 100_000
    rare = {name: done[name] for name in ("cancelled", "preemptions", "evictions")}
    assert min(rare.values()) > 5_000, rare
    assert done["shared tokens"] > 500_000


@pytest.mark.parametrize("simulation", ["address,undefined"], indirect=True)
def test_under_sanitizers(simulation, seed):
    assert figures(simulation, seed, 400_000)["evictions"] > 1_000


@pytest.mark.parametrize("simulation", ["thread"], indirect=True)
def test_submitting_and_cancelling_from_another_thread(simulation, seed):
    done = figures(simulation, seed, 100_000, "threaded")
    assert done["cancelled"] > 100 and done["shared tokens"] > 1_000
