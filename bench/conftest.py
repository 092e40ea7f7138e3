"""Fixtures of the benches, and what the JSON says about the machine."""

import os
import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import harness
import pytest
import torch

import mor_ext

LOAD = os.getloadavg()[0]  # before the benches add theirs


@pytest.fixture
def measure(benchmark: Any) -> Callable[[harness.Case, str], None]:
    torch.manual_seed(0)
    return partial(harness.measure, benchmark)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.update(
        torch=torch.__version__,
        mor_ext=mor_ext.build_info(),
        threads=torch.get_num_threads(),
        load_average=LOAD,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        allocator={
            "libc": " ".join(platform.libc_ver()),
            **{k: v for k, v in os.environ.items() if k.startswith(("MALLOC_", "LD_PRELOAD"))},
        },
        ceilings=harness.ceilings(),
    )
