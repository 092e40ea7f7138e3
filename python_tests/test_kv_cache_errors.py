"""What rotary, kv_append and rotary_kv_append refuse, and what they do with it unchecked."""

import re
from collections.abc import Callable

import pytest
import torch
from helpers import Backend, assert_bitwise, unchecked
from test_kv_cache import MAX_POSITIONS, append_inputs, assert_all_equal, rotary_inputs
from torch import Tensor

from mor_ext import ops

pytestmark = pytest.mark.usefixtures("backend")
not_on_cpu = pytest.mark.backends(Backend.SIMT, Backend.CUDA)

Error = tuple[str, Tensor, str, str]  # argument, bad value, rule, got
FLOATS = "float32, bfloat16 or float16 (float64 too on CPU)"
KEY = "of shape [N, kv_heads, head_dim]"
TABLE = "of shape [max_positions, head_dim / 2]"
CACHE = "of shape [num_blocks, block_size, kv_heads, head_dim], alike for both caches"
DENSE = "contiguous in its last two dimensions"
DISTINCT = "of distinct elements"
CAPACITY = "whose capacity is max_blocks * block_size = 6"
LARGEST = 2**31 - 1


def ints(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rotary_errors() -> list[Error]:
    return [
        ("query", torch.zeros(3, 4, 8).int(), FLOATS, "int32"),
        ("query", torch.zeros(3, 8), "of shape [N, heads, head_dim]", "shape [3, 8]"),
        ("query", torch.zeros(3, 4, 7), "of even head_dim", "7"),
        ("key", torch.zeros(3, 2, 8).half(), "float32", "float16"),
        ("key", torch.zeros(4, 2, 8), KEY, "shape [4, 2, 8]"),
        ("key", torch.zeros(3, 2, 6), KEY, "shape [3, 2, 6]"),
        ("cos", torch.zeros(9, 4).bfloat16(), "float32", "bfloat16"),
        ("cos", torch.zeros(9, 4).double(), "float32", "float64"),
        ("cos", torch.zeros(9, 8), TABLE, "shape [9, 8]"),
        ("sin", torch.zeros(8, 4), TABLE, "shape [8, 4]"),
        ("sin", torch.zeros(9, 4).half(), "float32", "float16"),
        ("positions", torch.zeros(3).long(), "int32", "int64"),
        ("positions", ints(0, 0, 0, 0), "of shape [N]", "shape [4]"),
        ("positions", ints(0, 9, 1), "in [0, 9) in every element", "9 at element 1"),
        ("positions", ints(0, 1, -1), "in [0, 9) in every element", "-1 at element 2"),
    ]


def append_errors() -> list[Error]:
    return [
        ("value", torch.zeros(3, 2, 8).half(), "float32", "float16"),
        ("value", torch.zeros(3, 1, 8), KEY, "shape [3, 1, 8]"),
        ("key_cache", torch.zeros(4, 2, 2, 8).half(), "float32", "float16"),
        ("key_cache", torch.zeros(4, 2, 1, 8), CACHE, "shape [4, 2, 1, 8]"),
        ("key_cache", torch.zeros(4, 0, 2, 8), "of block_size >= 1", "shape [4, 0, 2, 8]"),
        ("key_cache", torch.zeros(4, 2, 2, 16)[..., ::2], DENSE, "strides 16 and 2"),
        ("key_cache", torch.zeros(4, 2, 8, 2).mT, DENSE, "strides 1 and 2"),
        (
            "key_cache",
            torch.zeros(1, 2, 2, 8).expand(4, -1, -1, -1),
            DISTINCT,
            "an expanded tensor",
        ),
        ("value_cache", torch.zeros(3, 2, 2, 8), CACHE, "shape [3, 2, 2, 8]"),
        (
            "value_cache",
            torch.zeros(4, 1, 2, 8).expand(-1, 2, -1, -1),
            DISTINCT,
            "an expanded tensor",
        ),
        ("block_table", torch.zeros(2, 3).long(), "int32", "int64"),
        ("block_table", ints([0, 1, 2]), "of shape [lanes, max_blocks]", "shape [1, 3]"),
        (
            "block_table",
            ints([0, 4, 0], [2, 3, 0]),
            "in [0, 4) where a token is written",
            "4 at lane 0, block 1",
        ),
        (
            "block_table",
            ints([9, 0, 0], [-1, 3, 0]),
            "in [0, 4) where a token is written",
            "-1 at lane 1, block 0",
        ),
        ("cache_seqlens", torch.zeros(2).long(), "int32", "int64"),
        ("cache_seqlens", ints(0), "of shape [lanes]", "shape [1]"),
        ("cache_seqlens", ints(-1, 0), f"in [0, 6 - 2 new] at lane 0, {CAPACITY}", "-1"),
        ("cache_seqlens", ints(2, 6), f"in [0, 6 - 1 new] at lane 1, {CAPACITY}", "6"),
        (
            "cache_seqlens",
            ints(2, LARGEST),
            f"in [0, 6 - 1 new] at lane 1, {CAPACITY}",
            str(LARGEST),
        ),
        ("cu_seqlens", torch.zeros(0).int(), "of at least one element", "0"),
        ("cu_seqlens", torch.tensor([0, 2, 3]), "int32", "int64"),
        ("cu_seqlens", ints([0, 2, 3]), "of shape [lanes + 1]", "shape [1, 3]"),
        ("cu_seqlens", ints(1, 2, 3), "0 in its first element", "1"),
        ("cu_seqlens", ints(0, 4, 3), "non-decreasing", "4 then 3 at element 2"),
        ("cu_seqlens", ints(0, 2, 9), "3 in its last element", "9"),
    ]


def key_errors() -> list[Error]:
    return [
        ("key", torch.zeros(3, 2, 8).long(), FLOATS, "int64"),
        ("key", torch.zeros(3, 16), KEY, "shape [3, 16]"),
    ]


def valid_arguments() -> dict[str, Tensor]:
    return {
        "query": torch.randn(3, 4, 8),
        "key": torch.randn(3, 2, 8),
        "value": torch.randn(3, 2, 8),
        "cos": torch.randn(9, 4),
        "sin": torch.randn(9, 4),
        "positions": ints(0, 8, 3),
        "key_cache": torch.randn(4, 2, 2, 8),
        "value_cache": torch.randn(4, 2, 2, 8),
        "block_table": ints([0, 1, -9], [2, 3, 99]),
        "cache_seqlens": ints(2, 0),
        "cu_seqlens": ints(0, 2, 3),
    }


ERRORS: dict[str, Callable[[], list[Error]]] = {
    "rotary": rotary_errors,
    "kv_append": lambda: append_errors() + key_errors(),
    "rotary_kv_append": lambda: rotary_errors() + append_errors(),
}


@pytest.mark.parametrize(
    "op, case", [(op, case) for op, errors in ERRORS.items() for case in range(len(errors()))]
)
def test_bad_input(op: str, case: int) -> None:
    argument, value, rule, got = ERRORS[op]()[case]
    schema = getattr(torch.ops.mor, op).default._schema
    arguments = {a.name: valid_arguments()[a.name] for a in schema.arguments}
    getattr(ops, op)(**arguments)  # the others are right, so the message is about this one
    arguments[argument] = value
    before = {name: t.clone() for name, t in arguments.items()}
    message = f"mor::{op}: {argument} must be {rule}, got {got}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(ops, op)(**arguments)
    for name, tensor in before.items():
        assert_bitwise(arguments[name], tensor, name)


# ---- bad contents of index tensors, unchecked ----


@not_on_cpu
def test_a_position_out_of_range_gives_nan(seed: int) -> None:
    query, key, cos, sin, positions = rotary_inputs(9, 3, 1, 16, torch.bfloat16)
    expected = ops.rotary(query, key, cos, sin, positions)
    positions[[1, 4, 8]] = ints(-1, MAX_POSITIONS, -(2**31))
    with unchecked():
        actual = ops.rotary(query, key, cos, sin, positions)
        of_no_table = ops.rotary(query, key, cos[:0], sin[:0], positions)
    for x, rotated in zip(expected, actual, strict=True):
        x[[1, 4, 8]] = torch.nan
        torch.testing.assert_close(rotated, x, rtol=0, atol=0, equal_nan=True)
    assert all(x.isnan().all() for x in of_no_table)


@not_on_cpu
@pytest.mark.parametrize("argument", ["block_table", "cache_seqlens"])
@pytest.mark.parametrize("bad", [-(2**31), -1, 2**30, 2**31 - 1])
def test_a_lane_out_of_range_is_skipped(argument: str, bad: int, seed: int) -> None:
    """The other lanes get their tokens, and nothing else changes."""
    held, new = [3, 2, 1, 0], [4, 3, 2, 5]
    for lane in range(4):
        key, value, cache = append_inputs(held, new)
        expected = cache.cloned()
        ops.kv_append(key, value, *expected)
        entry = torch.arange(held[lane], held[lane] + new[lane])
        slots = (cache.block_table[lane, entry // 4].long(), entry % 4)
        for before, after in zip(cache.arguments()[:2], expected[:2], strict=True):
            after[slots] = before[slots]
        getattr(cache, argument)[lane] = bad
        with unchecked():
            ops.kv_append(key, value, *cache.arguments())
        assert_all_equal(cache.arguments()[:2], expected[:2])


@not_on_cpu
def test_tokens_of_no_lane_are_skipped(seed: int) -> None:
    """As those that fill up a batch to the size of a CUDA graph; they are rotated all the same."""
    key, value, cache = append_inputs([3, 0], [4, 3])
    query, _, *rest = rotary_inputs(7, 4, 2, 8, torch.float32)
    expected = cache.cloned()
    wanted = ops.rotary_kv_append(query, key, value, *rest, *expected)
    before, after = (torch.randn(n, 2, 8) for n in (2, 3))
    cache.cu_seqlens += 2
    query = torch.cat([query[:2], query, query[:3]])
    cos, sin, positions = rest
    positions = torch.cat([positions[:2], positions, positions[:3]])
    key, value = (torch.cat([before, x, after]) for x in (key, value))
    with unchecked():
        actual = ops.rotary_kv_append(query, key, value, cos, sin, positions, *cache.arguments())
    assert torch.equal(actual, torch.cat([wanted[:2], wanted, wanted[:3]]))
    assert_all_equal(cache.arguments()[:2], expected[:2])
