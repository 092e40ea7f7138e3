"""Loads the compiled op library, so that ``torch.ops.mor`` exists."""

import os
import platform
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parent / "libmor_ext.so"
MINIMUM_TORCH = (2, 10)
REBUILD = "install the package from its source folder with 'pip install .' (or 'pip install -e .')"


class LibraryLoadError(ImportError):
    """The compiled part of mor_ext is missing or does not fit this environment.

    Attributes, all of them in the message too:
        built: what was built, as far as it can be told.
        found: what was found instead of what is needed.
        remedy: what to do.
    """

    def __init__(self, built: str, found: str, remedy: str) -> None:
        super().__init__(
            f"mor_ext cannot load.\n  built: {built}\n  found: {found}\n  do: {remedy}"
        )
        self.built, self.found, self.remedy = built, found, remedy


def build_info() -> dict[str, Any]:
    """What the compiled part was built with, and the instruction set it uses on this machine.

    Keys: version, compiler, torch (the one it was built against), cuda (compiler and architectures,
    or "none"), cpu_isa.
    """
    engine = import_module("mor_ext._engine")
    return {**engine.build_info, "cpu_isa": engine.cpu_isa}


def load() -> None:
    """Registers ``torch.ops.mor``; raises :class:`LibraryLoadError` when that is impossible."""
    environment = (
        f"torch {torch.__version__} in {Path(torch.__file__).parent}, "
        f"Python {platform.python_version()}"
    )
    if not LIBRARY.exists():
        raise LibraryLoadError("nothing", f"no {LIBRARY}; {environment}", REBUILD)
    try:
        engine = import_module("mor_ext._engine")
    except ImportError as error:
        raise LibraryLoadError("for another Python", f"{error}; {environment}", REBUILD) from error

    built = ", ".join(f"{name} {value}" for name, value in build_info().items())
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < MINIMUM_TORCH:
        raise LibraryLoadError(built, environment, "install torch >= 2.10")
    wanted = os.environ.get("MOR_CPU_CAPABILITY") or engine.cpu_isa
    if wanted not in engine.available_cpu_isas:
        available = ", ".join(engine.available_cpu_isas)
        raise LibraryLoadError(
            built,
            f"MOR_CPU_CAPABILITY={wanted} on a machine that has {available}",
            "unset MOR_CPU_CAPABILITY or set it to one of these",
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise LibraryLoadError(built, f"{error}; {environment}", REBUILD) from error


def set_debug(enabled: bool) -> None:
    """Whether ops check the contents of CUDA index tensors too, as they always do on the CPU.

    Off, an index out of range is clamped or skipped: never an access outside a tensor, but a result
    without meaning. On, it raises, and every call waits for the device. For all threads.
    """
    torch.ops.mor.set_debug(enabled)
