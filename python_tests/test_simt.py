"""The executor that runs CUDA kernels on the host: `scratch_kernels` of csrc/simt/scratch.

Right kernels must give the numbers computed here; wrong ones must be found, with the kernel, the
block, the thread and the line.
"""

import platform
import re
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

SCRATCH = Path(__file__).parents[1] / "csrc" / "simt" / "scratch"
LANES = np.arange(32)
THREADS = np.arange(64)
WORDS = 1 << 16

Random = np.random.Generator


@pytest.fixture(params=["scratch_kernels", "scratch_kernels_portable"])
def program(request: pytest.FixtureRequest) -> Path:
    """With stacks switched by assembly, and by ucontext."""
    path = request.config.getoption("simt_library").parent / request.param
    assert path.exists(), f"no {path}: run `make simt`"
    return path


@pytest.fixture
def random(seed: int) -> Random:
    return np.random.default_rng(seed)


def start(program: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments], input=text, capture_output=True, text=True, timeout=60
    )


def run(program: Path, *arguments: str, data: Iterable[int] = ()) -> list[str]:
    """A line for each kernel."""
    text = " ".join(str(word) for word in np.asarray(data, dtype=np.int32))
    done = start(program, *arguments, text=text)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def words(program: Path, *arguments: str, data: Iterable[int] = ()) -> np.ndarray:
    """int32, what the one kernel gives."""
    (line,) = run(program, *arguments, data=data)
    assert re.fullmatch(r"[-\d ]+", line), line
    return np.array(line.split(), dtype=np.int32)


def int32(values: Iterable[int]) -> np.ndarray:
    return np.asarray(values).astype(np.int64).astype(np.int32)


# ---- what primitives give, and patterns: kernel -> its data and what must come out ----


def copies(random: Random) -> tuple[np.ndarray, np.ndarray]:
    v = random.integers(-1000, 1000, 64)
    return v, np.where(THREADS < 32, v, 0) + 1


def copy_groups(random: Random) -> tuple[np.ndarray, np.ndarray]:
    v = random.integers(-1000, 1000, (3, 4, 4))
    return v.flatten(), np.concatenate([v.flatten(), v[:, :, 0].sum(0)])


def shuffles(random: Random) -> tuple[np.ndarray, np.ndarray]:
    v = random.integers(-(2**24), 2**24, 32)
    rows = [
        np.full(32, v[5]),
        v[(LANES + 33) % 32],
        v[LANES ^ 6],
        np.where(LANES >= 3, v[LANES - 3], v),
        np.where(LANES < 29, v[(LANES + 3) % 32], v),
        v.cumsum(),
        np.full(32, v.sum()),
        np.full(32, (v == 0).any()),
    ]
    return v, np.concatenate(rows)


def half_warps(_: Random) -> tuple[np.ndarray, np.ndarray]:
    low = LANES < 16
    votes = np.where(low, 0x5555, 0x1111)
    return np.zeros(0), np.concatenate([votes, np.where(low, 15 - LANES, 16)])


def matches(random: Random) -> tuple[np.ndarray, np.ndarray]:
    keys = random.integers(-2, 3, 32)
    return keys, ((keys[:, None] == keys) << LANES).sum(1)


def histogram(random: Random) -> tuple[np.ndarray, np.ndarray]:
    keys = random.integers(0, 64, 64)
    return keys, np.bincount(keys, minlength=64)


def matrices(transposed: bool) -> Callable[[Random], tuple[np.ndarray, np.ndarray]]:
    def case(random: Random) -> tuple[np.ndarray, np.ndarray]:
        data = random.integers(-(2**31), 2**31, 128).astype(np.int32)
        m = data.view(np.uint16).reshape(32, 8)[LANES * 5 % 32].reshape(4, 8, 8)
        m = m.transpose(0, 2, 1) if transposed else m
        # Lane 4 g + t has words (g, t) of the four.
        fragments = np.ascontiguousarray(m).view(np.int32).reshape(4, 32).T
        return data, fragments.flatten()

    return case


def pipeline(random: Random) -> tuple[np.ndarray, np.ndarray]:
    tiles = random.integers(-(2**20), 2**20, (8, 64))
    return tiles.flatten(), (np.arange(1, 9)[:, None] * tiles[:, ::-1]).sum(0)


def producer_consumer(random: Random) -> tuple[np.ndarray, np.ndarray]:
    rounds = random.integers(-(2**20), 2**20, (6, 32))
    sums = (np.arange(1, 7)[:, None] * rounds[:, ::-1]).sum(0)
    return np.concatenate([np.zeros(64), rounds.flatten()]), np.tile(sums, 2)


def sums(random: Random) -> tuple[np.ndarray, np.ndarray]:
    v = random.integers(-1000, 1000, 128)
    return v, np.full(128, (v * v).sum() - v.sum())


def look_back(random: Random) -> tuple[np.ndarray, np.ndarray]:
    parts = random.integers(0, 1000, (9, 32))
    expected = np.concatenate([[9], np.zeros(63), 1 + parts.sum(1).cumsum()])
    return np.concatenate([np.zeros(128), parts.flatten()]), expected


def constant(expected: Iterable[int]) -> Callable[[Random], tuple[np.ndarray, np.ndarray]]:
    return lambda _: (np.zeros(0), np.asarray(expected))


RIGHT = {
    "blocks": constant(
        [33000 + 100 * z + 10 * y + x for z in range(2) for y in range(3) for x in range(4)]
    ),
    "reverse": constant(63 - THREADS),
    "reverse_80": constant(79 - np.arange(80)),
    "not_written": constant(np.full(64, -1)),
    "no_shared_memory": constant(np.ones(64)),
    "small_elements": constant(THREADS << 16 | 7),
    "named_barriers": constant(np.arange(128) ^ 32),
    "warp_barrier": constant(np.concatenate([31 - LANES, 39 - np.arange(8)])),
    "copies": copies,
    "copy_groups": copy_groups,
    "shuffles": shuffles,
    "half_warps": half_warps,
    "after_return": constant(np.where(LANES % 2 == 0, LANES ^ 2, 0)),
    "matches": matches,
    "histogram": histogram,
    "global_atomic": constant([sum(range(1, 97, 2)), sum(range(2, 97, 2))]),
    "load_matrix": matrices(transposed=False),
    "load_matrix_transposed": matrices(transposed=True),
    "pipeline": pipeline,
    "producer_consumer": producer_consumer,
    "sums": sums,
    "relay": constant(np.concatenate([3 * (31 - LANES), np.zeros(32)])),
    "three_readers": constant(np.concatenate([np.tile(LANES, 3), np.zeros(32)])),
    "look_back": look_back,
    "no_blocks": constant(np.zeros(64)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernel(name: str, program: Path, random: Random) -> None:
    data, expected = RIGHT[name](random)
    np.testing.assert_array_equal(words(program, name, data=data), int32(expected))


MMA = {"mma_bfloat16": torch.bfloat16, "mma_float16": torch.float16, "mma_tf32": torch.float32}


@pytest.mark.parametrize("name", MMA)
def test_matrix_product(name: str, program: Path, seed: int) -> None:
    dtype = MMA[name]
    depth = 32 // dtype.itemsize
    a, b = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype)
    c = torch.randn(16, 8)
    data = torch.cat([t.contiguous().view(torch.int32).flatten() for t in (a, b.T, c)])
    actual = words(program, name, data=data.numpy())[-128:].view(np.float32).reshape(16, 8)
    if dtype == torch.float32:  # the hardware reads the upper 19 bits
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    expected = c.double() + a.double() @ b.double()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


# ---- numbers ----


def assert_same_floats(actual: np.ndarray, expected: torch.Tensor) -> None:
    """The same bits, but for the sign and the payload of NaN."""
    nan = expected.isnan().numpy()
    bits = expected.view(torch.int32 if expected.itemsize == 4 else torch.int16).numpy()
    actual = actual.astype(bits.dtype)
    np.testing.assert_array_equal(actual[~nan], bits[~nan])
    assert torch.from_numpy(actual).view(expected.dtype)[nan].isnan().all()


HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("name", HALVES)
def test_every_16_bit_number_as_a_float(name: str, program: Path) -> None:
    values = torch.arange(WORDS).to(torch.int16).view(HALVES[name])
    assert_same_floats(words(program, f"widen_{name}", data=range(WORDS)), values.float())


def floats_to_round(dtype: torch.dtype, random: Random) -> torch.Tensor:
    """fp32 ``[WORDS]``: random bits, numbers of the dtype, middles of two, and next to those."""
    any_bits = torch.from_numpy(random.integers(-(2**31), 2**31, WORDS // 4).astype(np.int32))
    bits = torch.from_numpy(random.integers(-(2**15), 2**15, WORDS // 8).astype(np.int16))
    largest = torch.tensor([torch.finfo(dtype).max]).to(dtype).view(torch.int16)
    bits[:2] = torch.cat([largest, largest ^ -(2**15)])  # the next number is infinity
    lower = bits.view(dtype).float().view(torch.int32)
    middle = lower + (1 << (12 if dtype == torch.float16 else 15))
    units = torch.from_numpy(random.integers(0, 1 << 12, WORDS // 8)).float() + 0.5
    denormal = (units * 2.0**-24).view(torch.int32)
    border = torch.cat([lower, middle, denormal])
    near = torch.from_numpy(random.integers(-1, 2, len(border)).astype(np.int32))
    return torch.cat([any_bits, border, border + near]).view(torch.float32)


@pytest.mark.parametrize("name", HALVES)
def test_float_to_16_bits(name: str, program: Path, random: Random) -> None:
    values = floats_to_round(HALVES[name], random)
    assert len(values) == WORDS
    actual = words(program, f"narrow_{name}", data=values.view(torch.int32).numpy())
    assert_same_floats(actual, values.to(HALVES[name]))


@pytest.mark.parametrize("name", HALVES)
def test_two_floats_in_a_word(name: str, program: Path, random: Random) -> None:
    values = floats_to_round(HALVES[name], random)
    actual = words(program, f"pack_{name}", data=values.view(torch.int32).numpy())
    pair = torch.stack([values, -values], 1).to(HALVES[name])
    assert_same_floats(actual.view(np.int16).reshape(-1, 2), pair)


def test_exp2(program: Path, random: Random) -> None:
    x = random.uniform(-160, 135, WORDS).astype(np.float32)
    x[:4] = [-np.inf, np.inf, 0, -126]
    actual = words(program, "exp2", data=x.view(np.int32)).view(np.float32)
    with np.errstate(over="ignore"):
        expected = np.exp2(x.astype(np.float64)).astype(np.float32)
    expected[expected < np.finfo(np.float32).tiny] = 0
    np.testing.assert_allclose(actual, expected, rtol=2.0**-21, atol=0)


def test_bits_of_a_word(program: Path, random: Random) -> None:
    bits = random.integers(-(2**31), 2**31, WORDS) >> random.integers(0, 32, WORDS)
    bits = np.where(bits == 0, -(2**31), bits)
    text = [f"{word % 2**32:032b}" for word in bits.tolist()]
    expected = [t.count("1") + 100 * t.index("1") + 10000 * (31 - t.rindex("1")) for t in text]
    np.testing.assert_array_equal(words(program, "count_bits", data=bits), expected)


def test_float_to_tf32(program: Path, random: Random) -> None:
    """To nearest, ties away from zero."""
    bits = random.integers(-(2**31), 2**31, WORDS).astype(np.int32)
    bits[: WORDS // 2] = bits[: WORDS // 2] & ~0xFFF  # half of these are ties
    bits[:4] = [0, 1, 0x7F7FFFFF, -0x800001]
    x = torch.from_numpy(bits).view(torch.float32).double().numpy()
    magnitude = np.abs(x)
    finite = np.isfinite(x)
    exponent = np.frexp(np.where(finite, magnitude, 1))[1] - 1
    unit = 2.0 ** (np.maximum(exponent, -126) - 10)
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = np.copysign(np.floor(magnitude / unit + 0.5) * unit, x).astype(np.float32)
    actual = words(program, "round_to_tf32", data=bits)
    assert_same_floats(actual, torch.from_numpy(np.where(finite, rounded, x.astype(np.float32))))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the mode is set on x86-64 only")
@pytest.mark.parametrize("name", ["widen_float16", "widen_bfloat16", "mma_float16", "mma_bfloat16"])
def test_denormals_whatever_the_caller_does(name: str, program: Path, random: Random) -> None:
    data = random.integers(-128, 128, 320)  # denormals, in fp32 too
    actual = words(program, "--flush", name, data=data)
    np.testing.assert_array_equal(actual, words(program, name, data=data))
    assert len(set(actual)) > 1


# ---- what is wrong ----


def at(byte: int) -> str:
    return f"byte {byte} of shared memory, element {byte // 4} of array 0"


def race(what: str, byte: int) -> str:
    return f"{what}, with no barrier between: {at(byte)}"


def in_flight(now: str, thread: int, byte: int) -> str:
    return f"{now} what the copy_async of thread {thread} has yet to write: {at(byte)}"


def index(i: int, count: int, element_bytes: int = 4) -> str:
    return f"index {i} of a shared array of {count} elements of {element_bytes} bytes"


def misaligned(byte: int) -> str:
    return f"an access that must be aligned to 16 bytes: {at(byte)}"


def stuck(*groups: str) -> str:
    return "no thread can go on: " + ", ".join(groups)


# Kernel -> what is wrong and the thread; {}: lines with `// waits: NAME`, else `// fails: NAME`.
FAULTS = {
    "missing_barrier": (race("write over what thread 31 read", 128), 32),
    "missing_warp_barrier": (race("write over what thread 0 read", 4), 1),
    "overwritten_too_soon": (race("read of what thread 63 wrote", 252), 0),
    "shuffle_is_no_barrier": (race("read of what thread 30 wrote", 120), 31),
    "part_of_a_warp": (race("write over what thread 0 read", 64), 16),
    "two_writers": (race("write over what thread 0 wrote", 0), 1),
    "two_writing_warps": (race("write over what thread 0 wrote", 0), 32),
    "half_an_element": (race("read of what thread 32 wrote", 14), 33),
    "atomic_and_read": (race("atomic update of what thread 0 read", 0), 1),
    "atomic_and_write": (race("atomic update of what thread 0 wrote", 0), 1),
    "write_and_atomics": (
        race("write over what several threads of warp 0 atomically updated", 0),
        35,
    ),
    "written_after_arrival": (race("read of what thread 31 wrote", 124), 63),
    "three_readers_two_waited_for": (race("write over what thread 32 read", 0), 96),
    "relay_no_barrier": (race("read of what thread 31 wrote", 124), 64),
    "sums_no_barrier": (race("write over what several threads of warp 3 read", 12), 96),
    "sums_one_past": (index(4, 4), 126),
    "producer_too_soon": (race("read of what thread 0 wrote", 0), 95),
    "consumer_not_waited_for": (
        "warp 0 comes to named barrier 1 a second time, before the others have come",
        31,
    ),
    "pipeline_no_barrier": (race("write over what thread 11 read", 208), 13),
    "pipeline_too_soon": (race("write over what thread 63 read", 0), 0),
    "pipeline_no_wait": (in_flight("read of", 0, 0), 63),
    "pipeline_one_past": (index(128, 128), 15),
    "read_before_wait": (in_flight("read of", 15, 252), 63),
    "read_before_barrier": (race("read of what thread 0 wrote", 4), 1),
    "wait_for_too_few": (in_flight("read of", 15, 252), 63),
    "wait_without_commit": (in_flight("read of", 0, 12), 0),
    "two_copies_to_one_place": (in_flight("write over", 0, 0), 0),
    "misaligned_copy": (misaligned(4), 0),
    "copy_from_misaligned": ("copy_async from an address that is no multiple of 16", 0),
    "one_past_the_end": (index(32, 32), 32),
    "before_the_begin": (index(-1, 64), 0),
    "vector_past_the_end": (index(15, 15, element_bytes=16), 0),
    "misaligned_vector": (misaligned(24), 0),
    "far_out_of_range": (index(-(2**61), 64), 0),
    "more_than_launched": (
        "the kernel takes 260 bytes of shared memory and is launched with 256",
        0,
    ),
    "matrix_out_of_range": (index(64, 64), 16),
    "matrix_race": (race("read of what thread 3 wrote", 152), 9),
    "barrier_in_a_branch": (
        stuck("1 returned (thread 40)", "63 wait at sync_threads, {} (thread 0, ...)"),
        0,
    ),
    "two_barriers": ("other threads wait at another barrier: sync_threads, {}", 32),
    "part_of_a_warp_at_a_named_barrier": (
        stuck(
            "62 wait at sync_named, {} (thread 0, ...)",
            "2 wait at sync_threads, {} (thread 5, ...)",
        ),
        0,
    ),
    "too_few_warps": (
        stuck("32 returned (thread 32, ...)", "32 wait at sync_named, {} (thread 0, ...)"),
        0,
    ),
    "barrier_0": ("named barrier 0, must be in [1, 16)", 31),
    "barrier_16": ("named barrier 16, must be in [1, 16)", 31),
    "barrier_for_a_warp_and_a_half": (
        "named barrier for 48 threads, must be whole warps of the block's 64",
        31,
    ),
    "barrier_for_more_than_the_block": (
        "named barrier for 96 threads, must be whole warps of the block's 64",
        31,
    ),
    "barrier_for_32_and_64": (
        "named barrier 1 for 32 threads, others have come to it for 64",
        63,
    ),
    "lanes_at_two_named_barriers": ("the lanes of a warp come to different named barriers", 31),
    "endless_wait": (stuck("64 wait in a loop (thread 0, ...)"), 0),
    "look_back_by_block_index": (stuck("32 wait in a loop (thread 0, ...)"), 0),
    "shuffle_in_a_branch": ("shuffle waits for lane 7, which has returned", 8),
    "shuffle_without_the_last": (
        stuck("1 returned (thread 31)", "31 wait at shuffle, {} (thread 0, ...)"),
        0,
    ),
    "lanes_that_the_block_lacks": ("ballot waits for lane 8, which the block does not have", 32),
    "different_primitives": ("not all lanes reach this ballot: thread 0 waits at shuffle, {}", 31),
    "different_masks": ("not all lanes reach this shuffle: thread 0 waits at shuffle, {}", 31),
    "not_in_its_mask": ("ballot by a lane that its mask leaves out", 16),
    "from_a_lane_that_takes_no_part": ("a lane reads from lane 16, which takes no part", 12),
    "half_a_warp_multiplies": (
        stuck("16 returned (thread 16, ...)", "16 wait at mma_16x8x16, {} (thread 0, ...)"),
        0,
    ),
    "launch_in_a_kernel": ("exception: kernel nothing: launched by a kernel", 0),
}

# Launches that CUDA refuses.
REFUSED = {
    "too_many_threads": "launched with 1025 threads a block, CUDA has up to 1024",
    "too_many_blocks": (
        "launched with a grid of (1, 65536, 1), CUDA has up to (2147483647, 65535, 65535)"
    ),
    "too_much_shared_memory": (
        "launched with 200000 bytes of shared memory a block, sm_80 has 166912"
    ),
}

# What is there only where the sanitizers are, and what they say.
SANITIZED = {
    "past_global_memory": "heap-buffer-overflow",
    "copy_past_global_memory": "heap-buffer-overflow",
    "misaligned_global_vector": "misaligned address",
    "signed_overflow": "signed integer overflow",
}


@cache
def places(what: str, name: str) -> list[str]:
    """Where the sources have the comment `// what: name, ...`."""
    return [
        f"{path.name}:{number}"
        for path in sorted(SCRATCH.glob("*.cu"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if name in re.split(", ", line.partition(f"// {what}: ")[2])
    ]


def fault(name: str) -> str:
    """What stands before the block's number."""
    what = FAULTS[name][0].format(*(places("waits", name) or places("fails", name)))
    return f"{what}; kernel {name}, block ("


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_kernel(name: str, program: Path) -> None:
    (line,) = run(program, name)
    _, thread = FAULTS[name]
    place = "".join(f", {place}" for place in places("fails", name))
    expected = re.escape(fault(name)) + r"\d, \d, 0\)" + re.escape(f", thread {thread}{place}")
    assert re.fullmatch(expected, line), line


@pytest.mark.parametrize("name", REFUSED)
def test_refused_launch(name: str, program: Path) -> None:
    assert run(program, name) == [f"kernel {name}: {REFUSED[name]}"]


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizers_end_the_process(name: str, program: Path) -> None:
    if name not in run(program):
        pytest.skip("built without sanitizers: see `make sanitize`")
    done = start(program, name)
    assert done.returncode != 0
    assert SANITIZED[name] in done.stderr


def test_a_fault_leaves_nothing_behind(program: Path) -> None:
    """Blocks that stop in the middle, on stacks that the next kernel uses."""
    lines = run(program, *(name for fault in FAULTS for name in (fault, "reverse_80")))
    right = run(program, "reverse_80") * len(FAULTS)
    assert lines[1::2] == right
    for name, line in zip(FAULTS, lines[0::2], strict=True):
        assert line.startswith(fault(name))


def test_grids_of_several_os_threads(program: Path) -> None:
    names = ["reverse_80", "missing_barrier", "look_back", "blocks", "pipeline_no_wait"] * 4
    alone = {name: run(program, name)[0] for name in set(names)}
    assert run(program, "--at-once", *names) == [alone[name] for name in names]


def test_every_scratch_kernel_is_tested(program: Path) -> None:
    numbers = {f"{how}_{name}" for how in ("widen", "narrow", "pack") for name in HALVES}
    numbers |= {"round_to_tf32", "exp2", "count_bits"}
    tested = {*RIGHT, *MMA, *FAULTS, *REFUSED, *numbers}
    assert set(run(program)) - set(SANITIZED) == tested
