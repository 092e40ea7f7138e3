"""What is shipped: the contents of wheel and sdist, and a wheel at work outside its source tree."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import mor_ext

ROOT = Path(__file__).parents[1]
MODULES = {
    str(path.relative_to(ROOT))
    for pattern in ("*.py", "analysis/*.css", "configs/*.yaml")
    for path in (ROOT / "mor_ext").rglob(pattern)
}


def run(*command: object, cwd: Path = ROOT) -> str:
    """Standard output; a failure shows both outputs."""
    result = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without isolation: from the objects of the last build, so in seconds."""
    folder = tmp_path_factory.mktemp("wheel")
    if mor_ext.build_info()["cuda"] == "none":
        os.environ.setdefault("MOR_CUDA_ARCHS", "none")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    types = {"mor_ext/_engine.pyi", "mor_ext/py.typed"}
    engine = {name for name in package if name.startswith("mor_ext/_engine.")} - types
    assert len(engine) == 1
    assert package == MODULES | engine | types | {"mor_ext/libmor_ext.so"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not wheel.stem.endswith("-any")


def test_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    """All is fresh but torch, which is this environment's by a .pth file: it is 700 MB."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    options = ("--quiet", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(python, "-I", "-c", show).strip())
    (packages / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    program = (
        "import mor_ext, torch\n"
        "x = torch.arange(6.0).view(3, 2).requires_grad_()\n"
        "rows = mor_ext.ops.gather_tokens(x, torch.tensor([2, -1], dtype=torch.int32))\n"
        "rows.sum().backward()\n"
        "print(mor_ext.__file__, rows.tolist(), x.grad.tolist())\n"
    )
    gradient = [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    expected = f"{packages}/mor_ext/__init__.py {[[4.0, 5.0], [0.0, 0.0]]} {gradient}\n"
    assert run(python, "-I", "-c", program, cwd=tmp_path) == expected


def test_sdist_holds_all_that_a_build_needs(tmp_path: Path) -> None:
    build = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.split("/", 1)[-1] for member in archive if member.isfile()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    top = {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"}
    tools = {str(path.relative_to(ROOT)) for path in (ROOT / "tools").glob("*.*")}
    assert names >= MODULES | sources | top | tools | {"mor_ext/py.typed"}
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
