"""rotary, kv_append and rotary_kv_append against the reference, and what they must not touch."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import DTYPES, LENGTHS, assert_accurate, cu_seqlens_of
from torch import Tensor

from mor_ext import ops
from mor_ext.reference import kv_cache as reference_ops

HEAD_DIMS = [8, 64, 80, 128, 256]
MAX_POSITIONS = 1200


def table_of(head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin ``[MAX_POSITIONS, head_dim / 2]`` as Llama has them."""
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(MAX_POSITIONS, dtype=torch.float64), frequency)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary_inputs(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    return (
        torch.randn(tokens, heads, head_dim, dtype=dtype),
        torch.randn(tokens, kv_heads, head_dim, dtype=dtype),
        *table_of(head_dim),
        torch.randint(0, MAX_POSITIONS, (tokens,), dtype=torch.int32),
    )


class Cache:
    """Caches full of noise, and lanes of the given lengths that own random blocks of them."""

    def __init__(
        self,
        held: list[int],
        new: list[int],
        dtype: torch.dtype = torch.float32,
        kv_heads: int = 2,
        head_dim: int = 8,
        block_size: int = 4,
    ) -> None:
        need = [-(-(h + n) // block_size) for h, n in zip(held, new, strict=True)]
        num_blocks = sum(need) + 3
        free = torch.randperm(num_blocks).int()
        self.block_table = torch.full((len(held), max(need, default=0) + 1), -7).int()
        for lane, blocks in enumerate(need):
            self.block_table[lane, :blocks], free = free[:blocks], free[blocks:]
        shape = (num_blocks, block_size, kv_heads, head_dim)
        self.key_cache = torch.randn(shape).to(dtype)
        self.value_cache = torch.randn(shape).to(dtype)
        self.cache_seqlens = torch.tensor(held).int()
        self.cu_seqlens = cu_seqlens_of(new)

    def arguments(self) -> tuple[Tensor, ...]:
        lanes = (self.block_table, self.cache_seqlens, self.cu_seqlens)
        return (self.key_cache, self.value_cache, *lanes)

    def cloned(self) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in self.arguments())


def append_inputs(
    held: list[int], new: list[int], dtype: torch.dtype = torch.float32, **sizes: int
) -> tuple[Tensor, Tensor, Cache]:
    cache = Cache(held, new, dtype, **sizes)
    shape = (sum(new), *cache.key_cache.shape[2:])
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), cache


def assert_all_equal(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, e), f"tensor {i}"


# ---- rotary ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 2), (8, 1)])
def test_rotary_is_accurate(
    dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int, seed: int
) -> None:
    query, key, *rest = rotary_inputs(37, heads, kv_heads, head_dim, dtype)
    actual = ops.rotary(query, key, *rest)
    eager = reference_ops.rotary(query, key, *rest)
    exact = reference_ops.rotary(query.double(), key.double(), *rest)
    for a, e, x in zip(actual, eager, exact, strict=True):
        assert_accurate(a, e, x)


@pytest.mark.parametrize("length", LENGTHS)
def test_rotary_of_every_length(length: int, seed: int) -> None:
    inputs = rotary_inputs(length, 3, 1, 24, torch.float32)
    for actual, expected in zip(ops.rotary(*inputs), reference_ops.rotary(*inputs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_rotary_is_the_rotation_of_complex_numbers(seed: int) -> None:
    """An oracle apart from the reference: halves as real and imaginary parts."""
    query, key, cos, sin, positions = rotary_inputs(9, 2, 1, 16, torch.float64)
    cos, sin = table_of(16, torch.float64)
    turn = torch.complex(cos, sin)[positions.long()].unsqueeze(1)
    for x, rotated in zip((query, key), ops.rotary(query, key, cos, sin, positions), strict=True):
        expected = torch.complex(x[..., :8].contiguous(), x[..., 8:].contiguous()) * turn
        torch.testing.assert_close(rotated, torch.cat([expected.real, expected.imag], -1))


def test_rotary_of_strided_inputs(seed: int) -> None:
    fused = torch.randn(21, 4 + 2 + 2, 64)  # query, key and value heads of one projection
    query, key = fused[:, :4], fused[:, 4:6]
    cos, sin = (torch.cat([t, t], dim=1) for t in table_of(64))  # the layout of Hugging Face
    positions = torch.arange(42).int()
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key)]
    expanded = [query[:1].expand(21, -1, -1), key[:, :1].expand(-1, 2, -1)]
    sparse = [query[..., ::2], key[..., ::2], cos[:, :32:2], sin[:, :32:2]]
    layouts = {
        "slices of a projection": (query, key, cos[:, :32], sin[:, :32], positions[::2]),
        "heads first": (*heads_first, cos[:, 32:], sin[:, 32:], positions[1::2]),
        "expanded": (*expanded, cos[:1, :32].expand(42, -1), sin[:42, :32], positions[:21]),
        "strided head_dim": (*sparse, positions[:1].expand(21)),
    }
    for name, inputs in layouts.items():
        expected = ops.rotary(*(t.contiguous() for t in inputs))
        for actual, wanted in zip(ops.rotary(*inputs), expected, strict=True):
            assert actual.is_contiguous() and torch.equal(actual, wanted), name


def test_rotary_gradients(seed: int) -> None:
    query, key, *rest = rotary_inputs(5, 2, 1, 8, torch.float64)
    query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(ops.rotary, (query, key, *rest))
    assert torch.autograd.gradgradcheck(ops.rotary, (query, key, *rest))


def test_rotary_gradient_of_one_output(seed: int) -> None:
    query, key, *rest = rotary_inputs(5, 2, 1, 8, torch.float32)
    query.requires_grad_(), key.requires_grad_()
    rotated, _ = ops.rotary(query, key, *rest)
    rotated.square().sum().backward()
    torch.testing.assert_close(query.grad, 2 * query.detach())  # a rotation keeps the length
    assert key.grad is None or not key.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_under_autocast(dtype: torch.dtype, seed: int) -> None:
    query, key, *rest = rotary_inputs(5, 2, 1, 8, torch.float32)
    expected = ops.rotary(query.to(dtype), key.to(dtype), *rest)
    compiled = torch.compile(torch.ops.mor.rotary, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=dtype):
        for rotary in (ops.rotary, torch.ops.mor.rotary, compiled):
            for actual, wanted in zip(rotary(query, key, *rest), expected, strict=True):
                assert actual.dtype == dtype and torch.equal(actual, wanted)
        exact = ops.rotary(query.double(), key.double(), *rest)
    assert exact[0].dtype == torch.float64


def test_rotary_gradient_under_autocast(seed: int) -> None:
    query, key, *rest = rotary_inputs(5, 2, 1, 8, torch.float32)
    query.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotated, _ = ops.rotary(query, key, *rest)
    rotated.float().sum().backward()
    assert query.grad is not None and query.grad.dtype == torch.float32
    ones = torch.ones_like(query, dtype=torch.bfloat16)
    cos, sin, positions = rest
    expected, _ = ops.rotary(ones, ones, cos, -sin, positions)
    assert torch.equal(query.grad, expected.float())


# ---- kv_append ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_kv_append_equals_the_reference(
    dtype: torch.dtype, head_dim: int, kv_heads: int, seed: int
) -> None:
    held, new = [0, 5, 3, 8, 7, 0], [9, 0, 1, 4, 30, 0]
    key, value, cache = append_inputs(held, new, dtype, kv_heads=kv_heads, head_dim=head_dim)
    expected = cache.cloned()
    reference_ops.kv_append(key, value, *expected)
    ops.kv_append(key, value, *cache.arguments())
    assert_all_equal(cache.arguments(), expected)  # neighbours included


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_what_was_appended_is_read_back(length: int, block_size: int, seed: int) -> None:
    """In two calls, through the block table; what no lane owns stays as it was."""
    first = length // 3
    cache = Cache([0, 0], [length, 2], block_size=block_size)
    keys, values = (torch.randn(length + 2, 2, 8) for _ in range(2))
    before = cache.cloned()
    for held, rows in ((0, slice(0, first)), (first, slice(first, length))):
        own = torch.tensor([held, 0]).int()
        cu_seqlens = cu_seqlens_of([rows.stop - rows.start, 0])
        ops.kv_append(
            keys[rows], values[rows], cache.key_cache, cache.value_cache, cache.block_table, own,
            cu_seqlens,
        )  # fmt: skip
    entry = torch.arange(length)
    slots = (cache.block_table[0, entry // block_size].long(), entry % block_size)
    for after, old, appended in zip(
        (cache.key_cache, cache.value_cache), before[:2], (keys, values), strict=True
    ):
        assert torch.equal(after[slots], appended[:length])
        untouched = torch.ones(after.shape[:2], dtype=torch.bool)
        untouched[slots] = False
        assert torch.equal(after[untouched], old[untouched])


def test_kv_append_of_strided_inputs(seed: int) -> None:
    key, value, cache = append_inputs([2, 0, 5], [6, 0, 7], head_dim=16)
    expected = cache.cloned()
    reference_ops.kv_append(key, value, *expected)
    fused = torch.cat([key, value], dim=1)  # [N, 2 * kv_heads, head_dim]
    pool = torch.zeros(cache.key_cache.shape[0], 2, *cache.key_cache.shape[1:])
    pool[:, 0], pool[:, 1] = cache.key_cache, cache.value_cache
    table = torch.stack([cache.block_table, cache.block_table], dim=2)[..., 0]
    lengths = torch.stack([cache.cache_seqlens, cache.cache_seqlens], dim=1)[:, 0]
    heads_first = value.transpose(0, 1).contiguous().transpose(0, 1)
    for strided_value in (fused[:, 2:], heads_first):
        caches = pool.clone()
        ops.kv_append(
            fused[:, :2], strided_value, caches[:, 0], caches[:, 1], table, lengths,
            cache.cu_seqlens,
        )  # fmt: skip
        assert torch.equal(caches[:, 0], expected[0])
        assert torch.equal(caches[:, 1], expected[1])


def test_kv_append_of_expanded_inputs(seed: int) -> None:
    key, value, cache = append_inputs([1], [5])
    key, value = key[:1].expand(5, -1, -1), value[..., :1].expand(-1, -1, 8)
    expected = cache.cloned()
    reference_ops.kv_append(key, value, *expected)
    ops.kv_append(key, value, *cache.arguments())
    assert_all_equal(cache.arguments(), expected)


def test_kv_append_without_lanes() -> None:
    key, value, cache = append_inputs([], [])
    before = cache.cloned()
    ops.kv_append(key, value, *cache.arguments())
    assert_all_equal(cache.arguments(), before)


# ---- rotary_kv_append ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotary_kv_append_is_rotary_then_kv_append(
    dtype: torch.dtype, head_dim: int, seed: int
) -> None:
    key, value, cache = append_inputs([3, 0, 6], [7, 0, 20], dtype, head_dim=head_dim)
    query, _, *rest = rotary_inputs(27, 6, 2, head_dim, dtype)
    expected = cache.cloned()
    rotated, rotated_key = ops.rotary(query, key, *rest)
    ops.kv_append(rotated_key, value, *expected)
    actual = ops.rotary_kv_append(query, key, value, *rest, *cache.arguments())
    assert torch.equal(actual, rotated)
    assert_all_equal(cache.arguments(), expected)


def test_rotary_kv_append_under_autocast(seed: int) -> None:
    key, value, cache = append_inputs([3], [7], torch.bfloat16)
    query, _, *rest = rotary_inputs(7, 2, 2, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.ops.mor.rotary_kv_append(
            query, key.float(), value.float(), *rest, *cache.arguments()
        )
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, ops.rotary(query.bfloat16(), key, *rest)[0])


# ---- all three ----


def all_calls(
    dtype: torch.dtype = torch.float32, length: int = 33
) -> dict[str, tuple[Any, tuple[Tensor, ...]]]:
    key, value, cache = append_inputs([3, 0, 6], [length, 0, 2], dtype)
    rotary = rotary_inputs(length + 2, 4, 2, 8, dtype)
    return {
        "rotary": (torch.ops.mor.rotary.default, rotary),
        "kv_append": (torch.ops.mor.kv_append.default, (key, value, *cache.arguments())),
        "rotary_kv_append": (
            torch.ops.mor.rotary_kv_append.default,
            (rotary[0], key, value, *rotary[2:], *cache.arguments()),
        ),
    }


@pytest.mark.parametrize("name", ["rotary", "kv_append", "rotary_kv_append"])
def test_opcheck(name: str, seed: int) -> None:
    op, arguments = all_calls()[name]
    torch.library.opcheck(op, arguments)
    if name == "rotary":
        for x in arguments[:2]:
            x.requires_grad_()
        torch.library.opcheck(op, arguments)


def test_compiles_once_for_all_lengths(seed: int) -> None:
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def step(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
        table, cache = rest[:3], rest[3:]
        rotated, rotated_key = torch.ops.mor.rotary(query, key, *table)
        torch.ops.mor.kv_append(rotated_key, value, *cache)
        return rotated + torch.ops.mor.rotary_kv_append(query, key, value, *table, *cache)

    for length in (18, 17, 129):
        step(*all_calls(length=length)["rotary_kv_append"][1])
    assert counter.frame_count == 1


def test_compiled_append_mutates_its_caches(seed: int) -> None:
    op, arguments = all_calls()["rotary_kv_append"]
    expected_arguments = tuple(t.clone() for t in arguments)
    expected = op(*expected_arguments)
    actual = torch.compile(op, fullgraph=True)(*arguments)
    assert torch.equal(actual, expected)
    assert_all_equal(arguments, expected_arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_for_every_number_of_threads(dtype: torch.dtype, seed: int) -> None:
    def run() -> list[Tensor]:
        arguments = tuple(t.clone() for t in inputs)
        return [op(*arguments), *arguments]

    op, inputs = all_calls(dtype, length=1134)["rotary_kv_append"]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_all_equal(result, results[0])


def test_concurrent_calls(seed: int) -> None:
    """Lanes of one cache filled from several threads at once."""
    new = [40] * 8
    key, value, cache = append_inputs([0] * 8, new, head_dim=64)
    expected = cache.cloned()
    reference_ops.kv_append(key, value, *expected)

    def append(lane: int) -> None:
        rows = slice(40 * lane, 40 * lane + 40)
        ops.kv_append(
            key[rows], value[rows], cache.key_cache, cache.value_cache,
            cache.block_table[lane : lane + 1], cache.cache_seqlens[lane : lane + 1],
            cu_seqlens_of([40]),
        )  # fmt: skip

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, range(8)))
    assert_all_equal(cache.arguments(), expected)


def test_inputs_are_not_changed(seed: int) -> None:
    for op, arguments in all_calls().values():
        before = [t.clone() for t in arguments]
        op(*arguments)
        for argument, tensor, old in zip(op._schema.arguments, arguments, before, strict=True):
            if not (argument.alias_info and argument.alias_info.is_write):
                assert torch.equal(tensor, old), argument.name


# ---- errors: argument, bad value, rule, got ----

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


ROTARY_ERRORS = [
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
APPEND_ERRORS = [
    ("value", torch.zeros(3, 2, 8).half(), "float32", "float16"),
    ("value", torch.zeros(3, 1, 8), KEY, "shape [3, 1, 8]"),
    ("key_cache", torch.zeros(4, 2, 2, 8).half(), "float32", "float16"),
    ("key_cache", torch.zeros(4, 2, 1, 8), CACHE, "shape [4, 2, 1, 8]"),
    ("key_cache", torch.zeros(4, 0, 2, 8), "of block_size >= 1", "shape [4, 0, 2, 8]"),
    ("key_cache", torch.zeros(4, 2, 2, 16)[..., ::2], DENSE, "strides 16 and 2"),
    ("key_cache", torch.zeros(4, 2, 8, 2).mT, DENSE, "strides 1 and 2"),
    ("key_cache", torch.zeros(1, 2, 2, 8).expand(4, -1, -1, -1), DISTINCT, "an expanded tensor"),
    ("value_cache", torch.zeros(3, 2, 2, 8), CACHE, "shape [3, 2, 2, 8]"),
    ("value_cache", torch.zeros(4, 1, 2, 8).expand(-1, 2, -1, -1), DISTINCT, "an expanded tensor"),
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
    ("cache_seqlens", ints(2, LARGEST), f"in [0, 6 - 1 new] at lane 1, {CAPACITY}", str(LARGEST)),
    ("cu_seqlens", torch.zeros(0).int(), "of at least one element", "0"),
    ("cu_seqlens", torch.tensor([0, 2, 3]), "int32", "int64"),
    ("cu_seqlens", ints([0, 2, 3]), "of shape [lanes + 1]", "shape [1, 3]"),
    ("cu_seqlens", ints(1, 2, 3), "0 in its first element", "1"),
    ("cu_seqlens", ints(0, 4, 3), "non-decreasing", "4 then 3 at element 2"),
    ("cu_seqlens", ints(0, 2, 9), "3 in its last element", "9"),
]
KEY_ERRORS = [
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


@pytest.mark.parametrize(
    "op, argument, value, rule, got",
    [("rotary", *error) for error in ROTARY_ERRORS]
    + [("kv_append", *error) for error in APPEND_ERRORS + KEY_ERRORS]
    + [("rotary_kv_append", *error) for error in ROTARY_ERRORS + APPEND_ERRORS],
)
def test_bad_input(op: str, argument: str, value: Tensor, rule: str, got: str) -> None:
    schema = getattr(torch.ops.mor, op).default._schema
    arguments = {a.name: valid_arguments()[a.name] for a in schema.arguments}
    getattr(ops, op)(**arguments)  # the others are right, so the message is about this one
    arguments[argument] = value
    before = [t.clone() for t in arguments.values()]
    message = f"mor::{op}: {argument} must be {rule}, got {got}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(ops, op)(**arguments)
    assert_all_equal(arguments.values(), before)
