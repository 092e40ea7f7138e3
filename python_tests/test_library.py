"""What the loader says when the compiled part is missing or does not fit, and what it tells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mor_ext
from mor_ext import LibraryLoadError, _library


def test_build_info() -> None:
    info = mor_ext.build_info()
    assert info["version"] == mor_ext.__version__
    assert set(info) == {"version", "compiler", "torch", "cuda", "cpu_isa"}
    assert info["cpu_isa"] in ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


def assert_says(error: LibraryLoadError, built: str, found: str, remedy: str) -> None:
    assert built in error.built and found in error.found and remedy in error.remedy
    for part in (error.built, error.found, error.remedy):
        assert part in str(error)


def test_library_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_library, "LIBRARY", tmp_path / "libmor_ext.so")
    with pytest.raises(LibraryLoadError) as error:
        _library.load()
    assert_says(error.value, "nothing", str(tmp_path), "pip install")


def test_library_is_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = tmp_path / "libmor_ext.so"
    damaged.write_bytes(b"not a shared object")
    monkeypatch.setattr(_library, "LIBRARY", damaged)
    with pytest.raises(LibraryLoadError) as error:
        _library.load()
    assert_says(error.value, mor_ext.build_info()["compiler"], str(damaged), "pip install")


def test_torch_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(LibraryLoadError) as error:
        _library.load()
    assert_says(error.value, mor_ext.build_info()["torch"], "torch 2.9.1+cpu", "torch >= 2.10")


def test_engine_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mor_ext._engine", None)  # its import then fails
    with pytest.raises(LibraryLoadError) as error:
        _library.load()
    assert_says(error.value, "another Python", "mor_ext._engine", "pip install")


def import_with(capability: str) -> "subprocess.CompletedProcess[str]":
    """Imports mor_ext in a new process and prints the instruction set in use."""
    return subprocess.run(
        [sys.executable, "-c", "import mor_ext; print(mor_ext.build_info()['cpu_isa'])"],
        env={**os.environ, "MOR_CPU_CAPABILITY": capability},
        cwd=Path(mor_ext.__file__).parents[1],
        capture_output=True,
        text=True,
    )


def test_lower_instruction_set() -> None:
    assert import_with("baseline").stdout == "baseline\n"


def test_unknown_instruction_set() -> None:
    result = import_with("avx1024")
    assert result.returncode != 0
    assert "MOR_CPU_CAPABILITY=avx1024 on a machine that has baseline" in result.stderr
