"""Fixtures that every test file shares, and the backends that op tests run over."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

# The tests' many small ops would otherwise spin on cores that another process could use.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from helpers import Backend, use_backend

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--simt-library",
        type=Path,
        default=ROOT / "build" / "simt" / "libmor_simt.so",
        help="what `make simt` built",
    )


@pytest.fixture(scope="module", params=Backend, ids=lambda backend: backend.value)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Runs a module's tests on the CPU kernels, on the CUDA kernels by csrc/simt, and on a GPU.

    A module asks for it with ``pytestmark = pytest.mark.usefixtures("backend")``; a test that makes
    sense on some only has the mark ``backends``. Under simt, torch.ops.mor takes CPU tensors to the
    CUDA kernels; under cuda, tensors are made on the GPU unless a test says where. Both check the
    contents of index tensors, as the CPU does.
    """
    with use_backend(request.param, request.config.getoption("simt_library")):
        yield request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what a backend does not have: fp64 on CUDA, and tests that are for others."""
    kept, left_out = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = params.get("backend", Backend.CPU)
        mark = item.get_closest_marker("backends")
        foreign = mark is not None and backend not in mark.args
        fp64 = backend != Backend.CPU and torch.float64 in params.values()
        (left_out if foreign or fp64 else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def seed() -> int:
    """A new random seed every run, set for torch and printed with a failing test."""
    value = random.SystemRandom().randrange(2**31)
    print(f"seed = {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny tensors, where threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
