"""Fixtures that every test file shares."""

import random

import pytest
import torch


@pytest.fixture
def seed() -> int:
    """A new random seed every run, set for torch and printed with a failing test."""
    value = random.SystemRandom().randrange(2**31)
    print(f"seed = {value}")
    torch.manual_seed(value)
    return value
