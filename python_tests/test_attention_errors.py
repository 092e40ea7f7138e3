"""Bad input of the attention family: one test per message, and nothing changed by it."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_bitwise, cu_seqlens_of, map_tensors
from torch import Tensor

from mor_ext.ops import attention, paged_attention

pytestmark = pytest.mark.usefixtures("backend")

Args = dict[str, Any]
Change = Callable[[Any], Any]
FLOATING = "float32, bfloat16 or float16 (float64 too on CPU)"


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention_args() -> Args:
    return {
        "query": torch.randn(5, 4, 16),
        "key": torch.randn(8, 2, 16),
        "value": torch.randn(8, 2, 16),
        "cu_seqlens_q": cu_seqlens_of([3, 2]),
        "cu_seqlens_k": cu_seqlens_of([5, 3]),
        "key_limit": int32(3, 4, 5, 2, 3),
        "max_seqlen_q": 3,
        "max_seqlen_k": 5,
        "softmax_scale": 0.25,
    }


def bwd_args() -> Args:
    args = attention_args()
    out, lse = attention(**args)
    grads = {"grad_out": torch.randn(out.shape), "grad_lse": torch.randn(lse.shape)}
    data = {name: args.pop(name) for name in ("query", "key", "value")}
    return {**grads, **data, "out": out, "lse": lse, **args}


def paged_args() -> Args:
    return {
        "query": torch.randn(5, 4, 16),
        "key_cache": torch.randn(6, 3, 2, 16),
        "value_cache": torch.randn(6, 3, 2, 16),
        "block_table": torch.tensor([[0, 5, -7], [3, 99, 99]], dtype=torch.int32),
        "cache_seqlens": int32(5, 3),
        "cu_seqlens_q": cu_seqlens_of([3, 2]),
        "key_limit": int32(3, 4, 5, 2, 3),
        "max_seqlen_q": 3,
        "softmax_scale": 0.25,
    }


def to(value: Any) -> Change:
    return lambda old: value.to(old.device) if isinstance(value, Tensor) else value


def at(position: int | tuple[int, ...], value: int) -> Change:
    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[position] = value
        return t

    return change


# What attention_bwd and, where the argument has that name, paged_attention check too.
QUERY = [
    ("query", Tensor.int, f"{FLOATING}, got int32"),
    ("query", lambda t: t[0], "of shape [total_q, heads, head_dim], got shape [4, 16]"),
    ("query", lambda t: t[..., :12], "of head_dim a multiple of 8 in [8, 256], got 12"),
    ("query", lambda t: t[..., :0], "of head_dim a multiple of 8 in [8, 256], got 0"),
    ("query", lambda t: t.repeat(1, 1, 17), "of head_dim a multiple of 8 in [8, 256], got 272"),
    ("query", lambda t: t[:, :3], "of heads a multiple of kv_heads = 2, got 3"),
    ("query", lambda t: t[:, :0], "of heads a multiple of kv_heads = 2, got 0"),
    ("softmax_scale", to(math.nan), "finite, got nan"),
    ("softmax_scale", to(-math.inf), "finite, got -inf"),
    ("cu_seqlens_q", Tensor.long, "int32, got int64"),
    ("cu_seqlens_q", lambda t: t + 1, "0 in its first element, got 1"),
    ("cu_seqlens_q", to(int32(0, 6, 5)), "non-decreasing, got 6 then 5 at element 2"),
    ("cu_seqlens_q", to(int32(0, -2, 5)), "non-decreasing, got 0 then -2 at element 1"),
    ("cu_seqlens_q", to(int32(0, 3, 6)), "5 in its last element, got 6"),
    ("key_limit", Tensor.long, "int32, got int64"),
    ("key_limit", lambda t: t[1:], "of shape [total_q], got shape [4]"),
    ("key_limit", at(0, -1), "in [0, 5] in sequence 0, got -1 at element 0"),
    ("key_limit", at(4, 4), "in [0, 3] in sequence 1, got 4 at element 4"),
    ("key_limit", at(0, 5), "non-decreasing in sequence 0, got 5 then 4 at element 1"),
    ("max_seqlen_q", to(-1), "non-negative, got -1"),
    ("max_seqlen_q", to(2), "at least 3, the length of sequence 0, got 2"),
]
KEY = "[total_k, kv_heads, head_dim]"
PACKED = [
    *QUERY,
    ("key", Tensor.bfloat16, "float32, got bfloat16"),
    ("key", lambda t: t[..., :8], f"of shape {KEY}, got shape [8, 2, 8]"),
    ("key", lambda t: t[0], f"of shape {KEY}, got shape [2, 16]"),
    ("value", Tensor.double, "float32, got float64"),
    ("value", lambda t: t[:, :1], f"of shape {KEY}, got shape [8, 1, 16]"),
    ("value", lambda t: t[1:], f"of shape {KEY}, got shape [7, 2, 16]"),
    ("cu_seqlens_q", lambda t: t[None], "of shape [batch + 1], got shape [1, 3]"),
    ("cu_seqlens_q", lambda t: t[:0], "of at least one element, got 0"),
    ("cu_seqlens_k", Tensor.long, "int32, got int64"),
    ("cu_seqlens_k", lambda t: t[:2], "of shape [batch + 1] like cu_seqlens_q, got shape [2]"),
    ("cu_seqlens_k", to(int32(0, 9, 8)), "non-decreasing, got 9 then 8 at element 2"),
    ("cu_seqlens_k", to(int32(0, 5, 7)), "8 in its last element, got 7"),
    ("max_seqlen_k", to(-(2**40)), f"non-negative, got -{2**40}"),
    ("max_seqlen_k", to(4), "at least 5, the length of sequence 0, got 4"),
]
ROWS = "[total_q, heads, head_dim] like query"
BWD = [
    *PACKED,
    ("grad_out", Tensor.half, "float32, got float16"),
    ("grad_out", lambda t: t[1:], f"of shape {ROWS}, got shape [4, 4, 16]"),
    ("out", Tensor.half, "float32, got float16"),
    ("out", lambda t: t[:, 1:], f"of shape {ROWS}, got shape [5, 3, 16]"),
    ("lse", Tensor.double, "float32, got float64"),
    ("lse", lambda t: t.T, "of shape [heads, total_q], got shape [5, 4]"),
    ("grad_lse", Tensor.bfloat16, "float32, got bfloat16"),
    ("grad_lse", lambda t: t[:, 1:], "of shape [heads, total_q], got shape [4, 4]"),
]
BLOCKS = "in [0, 6) where a lane has entries"
CACHE = "[num_blocks, block_size, kv_heads, head_dim]"
PAGED = [
    *QUERY,
    ("key_cache", Tensor.bfloat16, "float32, got bfloat16"),
    ("key_cache", lambda t: t[0], f"of shape {CACHE}, got shape [3, 2, 16]"),
    ("key_cache", lambda t: t[..., :8], f"of shape {CACHE}, got shape [6, 3, 2, 8]"),
    ("value_cache", Tensor.bfloat16, "float32, got bfloat16"),
    ("value_cache", lambda t: t[:5], f"of shape {CACHE}, got shape [5, 3, 2, 16]"),
    ("block_table", Tensor.long, "int32, got int64"),
    ("block_table", lambda t: t[0], "of shape [lanes, max_blocks], got shape [3]"),
    ("block_table", at((0, 1), 6), f"{BLOCKS}, got 6 at lane 0, block 1"),
    (
        "block_table",
        at((1, 0), -1),
        f"{BLOCKS}, got -1 at lane 1, block 0",
    ),
    ("cache_seqlens", Tensor.long, "int32, got int64"),
    ("cache_seqlens", lambda t: t[1:], "of shape [lanes], got shape [1]"),
    ("cache_seqlens", at(0, 10), "in [0, 10) in every element, got 10 at element 0"),
    ("cache_seqlens", at(1, -1), "in [0, 10) in every element, got -1 at element 1"),
    ("cu_seqlens_q", lambda t: t[:2], "of shape [lanes + 1], got shape [2]"),
]
# By the name of the op: how to call it, good arguments, and what is wrong with them when changed.
OPS: dict[str, tuple[Callable[..., Any], Callable[[], Args], list[tuple[str, Change, str]]]] = {
    "attention": (attention, attention_args, PACKED),
    "attention_bwd": (lambda **args: torch.ops.mor.attention_bwd(*args.values()), bwd_args, BWD),
    "paged_attention": (paged_attention, paged_args, PAGED),
}
CASES = [(op, *case) for op, (_, _, table) in OPS.items() for case in table]


def assert_refused(op: str, args: Args, message: str) -> None:
    before = map_tensors(args, Tensor.clone)
    with pytest.raises(RuntimeError, match="^" + re.escape(f"mor::{op}: {message}") + "(\n|$)"):
        OPS[op][0](**args)
    for name, value in before.items():
        if isinstance(value, Tensor):
            assert_bitwise(args[name], value, name)


@pytest.mark.parametrize(("op", "argument", "change", "rule"), CASES)
def test_message(op: str, argument: str, change: Change, rule: str) -> None:
    args = OPS[op][1]()
    args[argument] = change(args[argument])
    assert_refused(op, args, f"{argument} must be {rule}")


@pytest.mark.parametrize(
    ("op", "names"),
    [("attention", ("key", "value")), ("paged_attention", ("key_cache", "value_cache"))],
)
def test_no_kv_heads(op: str, names: tuple[str, str]) -> None:
    args = OPS[op][1]()
    args.update({name: args[name][..., :0, :] for name in names})
    assert_refused(op, args, f"{names[0]} must be of at least one KV head, got 0")


def test_no_block_size() -> None:
    args = paged_args()
    args.update({name: args[name][:, :0] for name in ("key_cache", "value_cache")})
    assert_refused("paged_attention", args, "key_cache must be of block_size at least 1, got 0")


@pytest.mark.parametrize("op", OPS)
def test_the_unchanged_arguments_are_accepted(op: str) -> None:
    """Without this, the tests above would pass on arguments that are wrong to begin with."""
    call, make, _ = OPS[op]
    call(**make())
