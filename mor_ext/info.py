"""``mor info``: what is installed, built and found."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import mor_ext

PACKAGES = ("transformers", "accelerate", "datasets", "tokenizers", "lm_eval")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Takes none."""


def run(options: argparse.Namespace) -> None:
    facts = {
        "mor_ext": mor_ext.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{f"build {name}": value for name, value in mor_ext.build_info().items()},
        **{f"device {i}": name for i, name in enumerate(_devices())},
        **{package: _version(package) for package in PACKAGES},
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return [f"CPU, {torch.get_num_threads()} threads"]
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
