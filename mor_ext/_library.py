"""Loads the compiled op library, so that ``torch.ops.mor`` exists."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).parent / "libmor_ext.so"
MINIMUM_TORCH = (2, 10)


class LibraryLoadError(ImportError):
    """The compiled part of mor_ext is missing or does not fit the installed torch.

    The message says what was built, what was found and what to do.
    """


def build_info() -> dict[str, Any]:
    """What the compiled part was built with: version, compiler, torch."""
    return dict(import_module("mor_ext._engine").build_info)


def load() -> None:
    """Registers ``torch.ops.mor``; raises :class:`LibraryLoadError` when that is impossible."""
    found = f"found: torch {torch.__version__} in {Path(torch.__file__).parent}"
    if not LIBRARY.exists():
        raise LibraryLoadError(
            f"built: nothing, {LIBRARY} does not exist; {found}; to do: install the package "
            "with 'pip install .' (or 'pip install -e .') from its source folder"
        )
    try:
        built = f"built: {build_info()}"
    except ImportError as error:
        built = f"built: unknown, mor_ext._engine does not import ({error})"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        raise LibraryLoadError(f"{built}; {found}; to do: install torch >= 2.10")
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise LibraryLoadError(
            f"{built}; {found}; the loader says: {error}; to do: reinstall mor_ext from source "
            "on this machine"
        ) from error
