"""Fixtures that every test file shares."""

import os
import random
from collections.abc import Iterator

# The tests' many small ops would otherwise spin on cores that another process could use.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


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
