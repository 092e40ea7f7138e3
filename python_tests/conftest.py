"""Fixtures that every test file shares."""

import os
import random

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
