"""rotary, kv_append and rotary_kv_append against the reference, and what they must not touch."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import (
    DTYPES,
    LENGTHS,
    Backend,
    assert_accurate,
    autocast,
    cu_seqlens_of,
)
from torch import Tensor

from mor_ext import ops
from mor_ext.reference import kv_cache as reference_ops

pytestmark = pytest.mark.usefixtures("backend")
on_cpu_only = pytest.mark.backends(Backend.CPU)

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
    query, key, cos, sin, positions = rotary_inputs(9, 2, 1, 16, torch.float32)
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


@on_cpu_only
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
    with autocast(dtype):
        for rotary in (ops.rotary, torch.ops.mor.rotary, compiled):
            for actual, wanted in zip(rotary(query, key, *rest), expected, strict=True):
                assert actual.dtype == dtype and torch.equal(actual, wanted)


@on_cpu_only
def test_fp64_under_autocast(seed: int) -> None:
    with autocast(torch.bfloat16):
        query, key = ops.rotary(*rotary_inputs(5, 2, 1, 8, torch.float64))
    assert query.dtype == torch.float64 and key.dtype == torch.float64


def test_rotary_gradient_under_autocast(seed: int) -> None:
    query, key, *rest = rotary_inputs(5, 2, 1, 8, torch.float32)
    query.requires_grad_()
    with autocast(torch.bfloat16):
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


@pytest.mark.parametrize("lanes", [1, 31, 32, 33, 1024, 1100])
def test_kv_append_to_many_lanes(lanes: int, seed: int) -> None:
    held, new = torch.randint(5, (2, lanes)).tolist()
    key, value, cache = append_inputs(held, new, block_size=3, kv_heads=1)
    expected = cache.cloned()
    reference_ops.kv_append(key, value, *expected)
    ops.kv_append(key, value, *cache.arguments())
    assert_all_equal(cache.arguments(), expected)


@pytest.mark.parametrize("head_dim", [1, 7, 264, 1025])
@pytest.mark.parametrize("kv_heads", [1, 130])
def test_kv_append_of_odd_sizes(head_dim: int, kv_heads: int, seed: int) -> None:
    key, value, cache = append_inputs([2, 0], [3, 6], kv_heads=kv_heads, head_dim=head_dim)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [2, 6, 72, 264, 514])
@pytest.mark.parametrize("heads", [1, 67])
def test_rotary_kv_append_of_odd_sizes(
    dtype: torch.dtype, head_dim: int, heads: int, seed: int
) -> None:
    key, value, cache = append_inputs([2, 0], [3, 6], dtype, head_dim=head_dim)
    query, _, *rest = rotary_inputs(9, heads, 2, head_dim, dtype)
    expected = cache.cloned()
    wanted = reference_ops.rotary_kv_append(query, key, value, *rest, *expected)
    actual = ops.rotary_kv_append(query, key, value, *rest, *cache.arguments())
    torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(cache.key_cache, expected[0])
    assert_all_equal(cache.arguments()[1:], expected[1:])


def test_offsets_past_2_to_the_31(seed: int) -> None:
    """Rows and blocks that lie 2^31 elements apart, in memory that is hardly touched."""
    key, value, cache = append_inputs([3, 0], [1, 1], torch.bfloat16, head_dim=16)
    query, _, *rest = rotary_inputs(2, 4, 2, 16, torch.bfloat16)
    cache.block_table = torch.tensor([[1], [0]]).int()
    expected = cache.cloned()
    wanted = ops.rotary_kv_append(query, key, value, *rest, *expected)
    room = torch.empty(2**31 + 4 * 2 * 16, dtype=torch.bfloat16)
    far_cache = room.as_strided((2, 4, 2, 16), (2**31, 32, 16, 1))
    far_cache.copy_(cache.key_cache[:2])
    lanes = cache.arguments()[2:]
    ops.rotary_kv_append(query, key, value, *rest, far_cache, cache.value_cache[:2].clone(), *lanes)
    assert torch.equal(far_cache, expected[0][:2])
    far_query = room.as_strided(query.shape, (2**31, 16, 1)).copy_(query)
    actual = ops.rotary_kv_append(far_query, key, value, *rest, *cache.arguments())
    assert torch.equal(actual, wanted)
    assert_all_equal(cache.arguments(), expected)


def test_rotary_kv_append_under_autocast(seed: int) -> None:
    key, value, cache = append_inputs([3], [7], torch.bfloat16)
    query, _, *rest = rotary_inputs(7, 2, 2, 8, torch.float32)
    with autocast(torch.bfloat16):
        actual = torch.ops.mor.rotary_kv_append(
            query, key.float(), value.float(), *rest, *cache.arguments()
        )
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, ops.rotary(query.bfloat16(), key, *rest)[0])


# ---- all three ----


def all_calls(
    dtype: torch.dtype = torch.float32, length: int = 33, head_dim: int = 8
) -> dict[str, tuple[Any, tuple[Tensor, ...]]]:
    key, value, cache = append_inputs([3, 0, 6], [length, 0, 2], dtype, head_dim=head_dim)
    rotary = rotary_inputs(length + 2, 4, 2, head_dim, dtype)
    return {
        "rotary": (torch.ops.mor.rotary.default, rotary),
        "kv_append": (torch.ops.mor.kv_append.default, (key, value, *cache.arguments())),
        "rotary_kv_append": (
            torch.ops.mor.rotary_kv_append.default,
            (rotary[0], key, value, *rotary[2:], *cache.arguments()),
        ),
    }


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


@on_cpu_only
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


def shifted(t: Tensor) -> Tensor:
    """t, one element behind the start of its memory."""
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def padded(t: Tensor) -> Tensor:
    """t, its rows (of a cache: its entries) one element apart."""
    rows = t.flatten(2) if t.dim() == 4 else t
    spaced = torch.empty(*rows.shape[:-1], rows.shape[-1] + 1, dtype=t.dtype)
    return spaced[..., :-1].copy_(rows).view(t.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [shifted, padded])
def test_same_bits_of_unaligned_tensors(
    dtype: torch.dtype, layout: Callable[[Tensor], Tensor], seed: int
) -> None:
    for op, aligned in all_calls(dtype, head_dim=80).values():
        for i, tensor in enumerate(aligned):
            if tensor.is_floating_point():
                expected = [t.clone() for t in aligned]
                actual = [layout(t) if i == j else t.clone() for j, t in enumerate(aligned)]
                wanted, returned = op(*expected), op(*actual)
                assert_all_equal(actual, expected)
                if wanted is not None:
                    assert_all_equal(returned, wanted)


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
