"""What the build gives: kernels that stay in their registers, a library that needs no CUDA."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mor_ext
from mor_ext import _library

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
CUDA = mor_ext.build_info()["cuda"]

# kernel, as a regular expression: why its spills are accepted. For shapes out of the ordinary only.
SPILLS_ACCEPTED: dict[str, str] = {}

Kernels = list[dict[str, Any]]


def output(*command: object, **options: Any) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- the kernels ----


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """What the CUDA compiler said about each, for each architecture."""
    if CUDA in ("none", "prebuilt"):
        pytest.skip(f"CUDA kernels of this build: {CUDA}")
    if Path(mor_ext.__file__).parents[1] != ROOT:
        pytest.skip("mor_ext was not built in this folder")
    report = BUILD / "kernels.json"
    if not report.exists():
        pytest.skip("no CUDA kernels in csrc")
    return json.loads(report.read_text())


def test_no_kernel_spills(kernels: Kernels) -> None:
    spilling = {
        k["kernel"]: f"{k['kernel']} ({k['source']}) on {k['arch']}: {k['registers']} registers, "
        f"spills {k['spill_store_bytes']} + {k['spill_load_bytes']} bytes"
        for k in kernels
        if k["spill_store_bytes"] or k["spill_load_bytes"]
    }
    accepted = {n for n in spilling for pattern in SPILLS_ACCEPTED if re.search(pattern, n)}
    assert not spilling.keys() - accepted, "\n".join(spilling.values())
    outdated = [p for p in SPILLS_ACCEPTED if not any(re.search(p, n) for n in spilling)]
    assert not outdated, f"these no longer spill: {outdated}"


def test_every_kernel_is_built_for_every_architecture(kernels: Kernels) -> None:
    archs = {f"sm_{arch}" for arch in re.findall(r"(\w+)-real", CUDA)}
    if not os.environ.get("MOR_CUDA_ARCHS"):
        assert archs == {"sm_80", "sm_90a"}
    built: dict[tuple[str, str], set[str]] = {}
    for kernel in kernels:
        built.setdefault((kernel["source"], kernel["symbol"]), set()).add(kernel["arch"])
    missing = {name: archs - found for name, found in built.items() if found != archs}
    assert not missing


FAKE_NVCC = """
import sys
for arch in "sm_80", "sm_90a":
    for symbol, registers, spills in ("_ZN3mor4cuda4easyIfEEvPT_i", 40, 0), ("hard", 255, 16):
        said = f'''\\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{symbol}' for '{arch}'
ptxas info    : Function properties for {symbol}
    8 bytes stack frame, {spills} bytes spill stores, {2 * spills} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 128 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 1.5 ms'''
        print(said, file=sys.stderr)
print("ptxas info    : (C7510) Potential Performance Loss: wgmma", file=sys.stderr)
print("x.cu(1): warning: odd", file=sys.stderr)
print("hello")
sys.exit(int(sys.argv[1]))
"""


def test_report(tmp_path: Path) -> None:
    """The launcher takes the numbers out of nvcc's output, and nothing else; then the table."""
    fake = tmp_path / "nvcc.py"
    fake.write_text(FAKE_NVCC)
    launcher = ["sh", ROOT / "tools" / "nvcc_with_report.sh", sys.executable, fake]
    path = tmp_path / "x.cu.o"
    for status in (0, 3):
        command = [*map(str, launcher), str(status), "-c", "x.cu", "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == status
        assert done.stdout == "hello\n"
        said = done.stderr.splitlines()
        assert [line.split(": ")[-1] for line in said] == ["wgmma", "odd"]
    table = output(sys.executable, ROOT / "tools" / "kernel_report.py", "--output", tmp_path, path)
    assert table == (tmp_path / "kernels.txt").read_text()
    lines = [line.split() for line in table.splitlines()]
    assert lines[1] == ["kernel", "sm_80", "sm_90a"]
    easy, hard = "40, shared 128, stack 8", "255, shared 128, stack 8, spills 16+32"
    assert lines[2] == f"easy<float> {easy} {easy}".split()
    assert lines[3] == f"hard {hard} {hard}".split()
    assert table.endswith("2 kernels, 1 with spills\n")
    kernels = json.loads((tmp_path / "kernels.json").read_text())
    assert [(k["kernel"], k["arch"]) for k in kernels[:2]] == [
        ("easy<float>", "sm_80"),
        ("easy<float>", "sm_90a"),
    ]


def test_report_sees_a_spill(tmp_path: Path) -> None:
    """Sixty-four values in twenty-four registers, with the compiler itself."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    values = "\n".join(f"float s{i} = x[{i} * n];" for i in range(64))
    uses = "\n".join(f"x[{i} * n] = s{i} * s{(i + 7) % 64};" for i in range(64))
    source, path = tmp_path / "spill.cu", tmp_path / "spill.cu.o"
    source.write_text(f"__global__ void spill(volatile float* x, int n) {{ {values}\n{uses} }}")
    launcher = ["sh", ROOT / "tools" / "nvcc_with_report.sh", "nvcc"]
    output(*launcher, "-maxrregcount=24", "-arch=sm_80", "-Xptxas=-v", "-c", source, "-o", path)
    output(sys.executable, ROOT / "tools" / "kernel_report.py", "--output", tmp_path, path)
    (kernel,) = json.loads((tmp_path / "kernels.json").read_text())
    assert kernel["kernel"] == "spill" and kernel["arch"] == "sm_80"
    assert kernel["registers"] <= 24 and kernel["spill_store_bytes"] > 0


# ---- the library ----


def test_size() -> None:
    assert _library.LIBRARY.stat().st_size < 40e6


def test_library_needs_no_cuda() -> None:
    """It must load with a CPU-only torch: no symbol and no library of CUDA, cudart is inside."""
    needed = re.findall(r"\(NEEDED\).*\[(\S+)\]", output("readelf", "-d", _library.LIBRARY))
    system = r"lib(stdc\+\+|m|gcc_s|c|dl|pthread|rt)\.so\.\d+|ld-linux\S*"
    own = {name for name in needed if not re.fullmatch(system, name)}
    assert own <= {"libtorch_cpu.so", "libc10.so"}

    lines = output("nm", "-D", "--undefined-only", _library.LIBRARY).splitlines()
    kinds = {fields[1].split("@")[0]: fields[0] for fields in map(str.split, lines)}
    assert not [name for name in kinds if re.match(r"cu[A-Z]|cuda|__cuda", name)]
    assert "aoti_torch_get_current_cuda_stream" not in kinds  # of libtorch_cuda
    # Not in torch before 2.13.
    assert kinds.get("torch_stream_native_handle", "w") == "w"


def test_build_without_nvcc(tmp_path: Path) -> None:
    """One line says that there will be no CUDA kernels, and why."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    pybind11 = pytest.importorskip("pybind11")
    if cmake is None:
        pytest.skip("no cmake")
    folders = [f for f in os.environ["PATH"].split(":") if not (Path(f) / "nvcc").exists()]
    path = tmp_path / "bin"  # programs beside an nvcc that is now out of sight
    path.mkdir()
    for name in ("c++", "g++", "gcc", "cc", "make", "as", "ld"):
        program = shutil.which(name)
        if program:
            (path / name).symlink_to(program)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "CMAKE"))}
    said = output(
        cmake,
        *("-S", ROOT, "-B", tmp_path / "build"),
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DMOR_OUTPUT_DIR={tmp_path}",
        "-DMOR_TORCH_INCLUDE=unused",
        "-DMOR_TORCH_LIBRARY=unused",
        "-DMOR_CUDA_ARCHS=80-real",
        env={**environment, "PATH": ":".join([str(path), *folders])},
    )
    (line,) = [line for line in said.splitlines() if "CUDA kernels" in line]
    assert line == (
        "-- CUDA kernels: none (no CUDA compiler; nvcc is looked for in PATH and CUDACXX)"
    )
    assert (tmp_path / "build" / "kernels.txt").read_text() == line.removeprefix("-- ") + "\n"
