"""Weights that are packed for products of few rows."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from mor_ext.nn import Linear, PackedWeight
from mor_ext.nn import linear as module
from mor_ext.nn.linear import packable

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float64) if packable(dtype)]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def every_size_and_no_gradients(monkeypatch):
    monkeypatch.setattr(module, "LEAST_PACKED", 0)
    with torch.no_grad():
        yield


def packed(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> Linear:
    linear = Linear(inputs, outputs).to(dtype)
    linear.packed = PackedWeight()
    return linear


def assert_right(linear: Linear, x: Tensor, part=None) -> None:
    weight = linear.weight.double()
    expected = x.double() @ (weight if part is None else weight[slice(*part)]).T
    actual = linear(x, part)
    assert actual.dtype == x.dtype and actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-9)
    assert error <= ROUNDING.get(x.dtype, 1e-12)


def test_there_is_something_to_test():
    assert torch.float64 not in DTYPES
    assert torch.float32 in DTYPES or not torch.backends.mkldnn.is_available()


@pytest.mark.skipif(torch.float32 not in DTYPES, reason="no oneDNN")
def test_small_weights_are_left_as_they_are(monkeypatch, seed):
    monkeypatch.setattr(module, "LEAST_PACKED", 30 * 20)
    for outputs, is_packed in ((30, True), (29, False)):
        linear = packed(20, outputs)
        assert_right(linear, torch.randn(4, 20))
        assert bool(linear.packed.parts) == is_packed


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])  # the last is never packed
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 33, 300])
def test_products_are_as_accurate_as_their_dtype(rows, dtype, seed):
    inputs, outputs = torch.randint(1, 200, (2,)).tolist()
    linear = packed(inputs, outputs, dtype)
    assert_right(linear, torch.randn(rows, inputs, dtype=dtype))
    wide = torch.randn(rows, 2 * inputs, dtype=dtype)
    assert_right(linear, wide[:, inputs:])  # rows that do not touch


def test_parts_are_those_of_the_outputs(seed):
    linear = packed(31, 50)
    for part in [(0, 20), (20, 50), None, (7, 8)]:
        for rows in (1, 9):
            assert_right(linear, torch.randn(rows, 31), part)
    assert set(linear.packed.parts) == {(0, 20), (20, 50), None, (7, 8)}


def test_a_change_of_the_weight_is_seen(seed):
    """In place, by an optimizer, a checkpoint, a move, and by another weight."""
    linear, x = packed(20, 30), torch.randn(4, 20)
    other = nn.Linear(20, 30, bias=False)
    assert_right(linear, x, (0, 9))

    def optimize() -> None:
        with torch.enable_grad():
            linear(x).sum().backward()
        torch.optim.SGD(linear.parameters(), 0.1).step()

    for change in (
        lambda: linear.weight.mul_(2),
        optimize,
        lambda: linear.load_state_dict(other.state_dict()),
        lambda: linear.double().float(),
        lambda: setattr(linear, "weight", nn.Parameter(torch.randn(30, 20))),
    ):
        before = linear(x, (0, 9))
        change()
        assert_right(linear, x)
        assert_right(linear, x, (0, 9))
        assert linear.weight.equal(other.weight) or not linear(x, (0, 9)).equal(before)


def test_another_weight_at_the_same_address_is_seen(seed):
    """As a weight's is when its dtype changes to and fro; rounding to bf16 tells the two apart."""
    linear, x = packed(100, 300), torch.randn(4, 100)
    for _ in range(20):
        linear.weight.data = torch.randn(300, 100)
        assert_right(linear, x)
        linear.bfloat16().float()
        assert_right(linear, x)


def test_gradients_come_from_the_weight_itself(seed):
    linear, x = packed(20, 30), torch.randn(4, 20)
    linear(x)
    with torch.enable_grad():
        linear(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(30, 20))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_on_their_own(copied, seed):
    linear, x = packed(20, 30), torch.randn(4, 20)
    linear(x)
    twin = copied(linear)
    linear.weight.zero_()
    assert twin.packed.parts == {}
    assert_right(twin, x)
    assert list(linear.state_dict()) == ["weight"]
