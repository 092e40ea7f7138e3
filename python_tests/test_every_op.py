"""What holds for every op of torch.ops.mor, by one table of sample arguments."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import Backend, assert_bitwise, autocast, map_tensors, sized, unchecked
from samples import SAMPLES, Args
from torch import Tensor

import mor_ext
from mor_ext import _engine, ops
from mor_ext.reference import attention as reference_attention
from mor_ext.reference import compact as reference_compact
from mor_ext.reference import kv_cache as reference_kv_cache
from mor_ext.reference import route as reference_route

pytestmark = pytest.mark.usefixtures("backend")
on_cpu_only = pytest.mark.backends(Backend.CPU)
on_cuda_only = pytest.mark.backends(Backend.CUDA)
not_on_cpu = pytest.mark.backends(Backend.SIMT, Backend.CUDA)

# Arguments in which an op is differentiable; the ops named *_bwd are what their gradients call.
DIFFERENTIABLE = {
    "gather_tokens": ["x"],
    "scatter_tokens": ["x", "update", "gate"],
    "gather_rms_norm": ["x", "weight"],
    "rotary": ["query", "key"],
    "attention": ["query", "key", "value"],
}
# Arguments that take the autocast dtype.
AUTOCAST = {
    "rotary": ["query", "key"],
    "rotary_kv_append": ["query", "key", "value"],
    "attention": ["query", "key", "value"],
}
REFERENCES = {
    name: getattr(module, name)
    for module in (reference_route, reference_compact, reference_kv_cache, reference_attention)
    for name in SAMPLES
    if hasattr(module, name)
}
WRAPPED = [name for name in SAMPLES if not name.endswith("_bwd")]

every_op = pytest.mark.parametrize("name", SAMPLES)
every_wrapped_op = pytest.mark.parametrize("name", WRAPPED)


def overload(name: str) -> Any:
    return getattr(torch.ops.mor, name).default


def mutated(name: str) -> list[str]:
    arguments = overload(name)._schema.arguments
    return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def results(name: str, args: Args, op: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """What the op returns and what it writes in place, called on copies of args."""
    args = map_tensors(args, Tensor.clone)
    returned = overload(name)(*args.values()) if op is None else op(**args)
    return named_results(name, args, returned)


def named_results(name: str, args: Args, returned: Any) -> dict[str, Tensor]:
    outputs = returned if isinstance(returned, tuple) else (returned,)
    named = {f"output {i}": out for i, out in enumerate(outputs) if out is not None}
    return named | {argument: args[argument] for argument in mutated(name)}


def with_gradients(name: str, args: Args, op: Callable[..., Any]) -> dict[str, Tensor]:
    """Of a sum of squares of the outputs; the third one of gather_rms_norm has no gradient."""
    leaves = {n: args[n].detach().clone().requires_grad_() for n in DIFFERENTIABLE[name]}
    returned = op(**{**args, **leaves})
    outputs = returned[:2] if isinstance(returned, tuple) else (returned,)
    loss = sum(out.masked_fill(~out.isfinite(), 0).square().sum() for out in outputs)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {f"grad of {n}": grad for n, grad in zip(leaves, grads, strict=True)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        assert_bitwise(result, expected[name], name)


# ---- the library ----


@on_cpu_only
def test_the_table_has_every_op() -> None:
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("mor::")]
    assert sorted([*SAMPLES, "set_debug"]) == sorted(n.removeprefix("mor::") for n in names)
    assert sorted(ops.__all__) == sorted(WRAPPED)


@on_cpu_only
@every_op
def test_schema(name: str) -> None:
    """Sizes are symbolic, nothing is a string, and what is written in place is not returned."""
    schema = overload(name)._schema
    types = str(schema).replace("(", " ").split()
    assert "int" not in types and "str" not in types
    assert all(r.alias_info is None for r in schema.returns)
    assert list(SAMPLES[name](8)) == [a.name for a in schema.arguments]


@on_cpu_only
@every_wrapped_op
def test_wrapper_and_reference(name: str) -> None:
    """One signature on every floor, and a docstring that leaves no argument out."""
    signature = inspect.signature(getattr(ops, name))
    assert signature == inspect.signature(REFERENCES[name])
    assert list(signature.parameters) == [a.name for a in overload(name)._schema.arguments]
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    doc = inspect.getdoc(getattr(ops, name)) or ""
    assert f"mor::{name}: <argument> must be <rule>, got <value>" in doc
    if "Arguments as there" not in doc:
        described = doc.split("Args:\n")[1].split("\n\n")[0]
        missing = [p for p in signature.parameters if p not in described]
        assert not missing, f"not in the docstring: {missing}"


@every_op
def test_opcheck(name: str, seed: int) -> None:
    torch.library.opcheck(overload(name), tuple(SAMPLES[name](9).values()))
    if name in DIFFERENTIABLE:
        args = SAMPLES[name](9)
        for argument in DIFFERENTIABLE[name]:
            args[argument].requires_grad_()
        torch.library.opcheck(overload(name), tuple(args.values()))


# ---- results ----


@every_wrapped_op
@pytest.mark.parametrize("n", [2, 37])
def test_agrees_with_the_reference(name: str, n: int, seed: int) -> None:
    args = SAMPLES[name](n)
    op = getattr(ops, name)
    actual, expected = (results(name, args, f) for f in (op, REFERENCES[name]))
    if name in DIFFERENTIABLE:
        actual |= with_gradients(name, args, op)
        expected |= with_gradients(name, args, REFERENCES[name])
    for result, exact in zip(actual.items(), expected.values(), strict=True):
        torch.testing.assert_close(result[1], exact, msg=lambda m, r=result: f"{r[0]}: {m}")


@on_cpu_only
@pytest.mark.parametrize("capability", _engine.available_cpu_isas)
def test_every_instruction_set(capability: str) -> None:
    """Accuracy once more, with the kernels of each instruction set that this machine has."""
    tests = [
        "test_every_op.py::test_agrees_with_the_reference",
        "test_attention.py::test_accuracy_at_tile_edges",
        "test_attention.py::test_every_head_dim",
        "test_paged_attention.py::test_one_long_lane",
    ]
    folder = os.path.dirname(__file__)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += ["-k", "not simt and not cuda"]
    done = subprocess.run(
        [*command, *(os.path.join(folder, test) for test in tests)],
        env={**os.environ, "MOR_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@every_op
@pytest.mark.parametrize("n", [0, 8])
def test_inputs_are_left_alone(name: str, n: int, seed: int) -> None:
    """Nothing is written but what the schema says, and no output shares memory with an input."""
    args = SAMPLES[name](n)
    before = map_tensors(args, Tensor.clone)
    returned = overload(name)(*args.values())
    outputs = returned if isinstance(returned, tuple) else (returned,)
    inputs = {n: a for n, a in args.items() if isinstance(a, Tensor)}
    for argument, tensor in inputs.items():
        if argument not in mutated(name):
            assert_bitwise(tensor, before[argument], argument)
    memory = {t.untyped_storage().data_ptr() for t in inputs.values()} - {0}
    for output in outputs:
        assert output is None or output.untyped_storage().data_ptr() not in memory


@every_op
@pytest.mark.parametrize("n", [0, 2, 37])
def test_outputs_are_written_in_full(name: str, n: int, seed: int) -> None:
    """The same bits where PyTorch fills new memory with NaN or the largest integer before."""
    args = SAMPLES[name](n)
    expected = results(name, args)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(results(name, args), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@on_cpu_only
@every_op
def test_same_bits_on_any_number_of_threads(name: str, seed: int) -> None:
    args = SAMPLES[name](5000 if "attention" not in name else 300)
    threads = torch.get_num_threads()
    expected = results(name, args)
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            assert_same(results(name, args), expected)
    finally:
        torch.set_num_threads(threads)


def test_concurrent_calls(seed: int) -> None:
    """Any op beside any other, from several Python threads."""
    samples = {name: make(sized(64, 16)) for name, make in SAMPLES.items()}
    expected = {name: results(name, args) for name, args in samples.items()}
    with ThreadPoolExecutor(4) as pool:
        names = [name for _ in range(sized(20, 3)) for name in samples]
        found = pool.map(lambda name: results(name, samples[name]), names)
        for name, result in zip(names, found, strict=True):
            assert_same(result, expected[name])


# ---- CUDA ----


@on_cuda_only
@every_op
def test_cuda_graph(name: str, seed: int) -> None:
    """Replayed on other values, which nothing on the host may have looked at."""
    args, others = SAMPLES[name](37), SAMPLES[name](37)
    with unchecked():
        expected = results(name, others)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            returned = overload(name)(*args.values())
        for _ in range(2):
            for argument, other in others.items():
                if isinstance(other, Tensor):
                    args[argument].copy_(other)
            graph.replay()
            assert_same(named_results(name, args, returned), expected)


@on_cuda_only
@every_op
def test_current_stream(name: str, seed: int) -> None:
    """On a stream whose tensors get their values late: a kernel on another would not see them."""
    args = SAMPLES[name](37)
    expected = results(name, args)
    late = map_tensors(args, torch.zeros_like)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), unchecked():
        torch.cuda._sleep(10_000_000)
        for argument, value in args.items():
            if isinstance(value, Tensor):
                late[argument].copy_(value)
        actual = results(name, late)
        torch.cuda.current_stream().synchronize()
    assert_same(actual, expected)


@on_cuda_only
@every_op
def test_another_device_than_the_current_one(name: str, seed: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    args = SAMPLES[name](37)
    expected = results(name, args)
    actual = results(name, map_tensors(args, lambda t: t.to("cuda:1")))
    assert {t.device.index for t in actual.values()} == {1}
    assert torch.cuda.current_device() == 0
    assert_same(map_tensors(actual, Tensor.cpu), map_tensors(expected, Tensor.cpu))


# ---- torch.compile ----


@every_wrapped_op
def test_compile(name: str, seed: int) -> None:
    """One graph for all lengths, after the first that shows that they vary."""
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend=frames)
    for n in (8, 12, 21, 40, 33):
        args = SAMPLES[name](n)
        assert_same(results(name, args, compiled), results(name, args))
    assert frames.frame_count <= 2


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compile_of_the_gradients(name: str, seed: int) -> None:
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend=frames)
    for n in (8, 12, 21, 40):
        args = SAMPLES[name](n)
        assert_same(
            with_gradients(name, args, compiled), with_gradients(name, args, getattr(ops, name))
        )
    assert frames.frame_count <= 2


# ---- autocast ----


@every_wrapped_op
def test_autocast(name: str, seed: int) -> None:
    """Attention and rotary take the autocast dtype; all others keep that of their arguments."""
    args = SAMPLES[name](21)
    for cache in ("key_cache", "value_cache"):
        if name in AUTOCAST and cache in args:
            args[cache] = args[cache].bfloat16()
    by_hand = {n: a.bfloat16() if n in AUTOCAST.get(name, []) else a for n, a in args.items()}
    with autocast(torch.bfloat16):
        actual = results(name, args, getattr(ops, name))
    assert_same(actual, results(name, by_hand))


# ---- bad input ----


def garbage_int32(t: Tensor) -> Tensor:
    choice = torch.tensor([-(2**31), -2, 2**31 - 1, 2**30, 7])
    return choice[torch.randint(len(choice), t.shape)].int()


GARBAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "int32": lambda t: t if t.is_floating_point() else garbage_int32(t),
    "int64": lambda t: t if t.is_floating_point() else t.long(),
    "bool": Tensor.bool,
    "complex": lambda t: t.to(torch.complex64),
    "mixed dtypes": lambda t: t.half() if t.is_floating_point() else t,
    "one more dimension": lambda t: t[None],
    "one dimension less": lambda t: t[0] if t.numel() else t,
    "0 dimensions": lambda t: torch.zeros((), dtype=t.dtype),
    "no elements": lambda t: t[:0],
    "more elements": lambda t: torch.cat([t, t]),
}
# Garbage that no op can make sense of, in any argument.
ALWAYS_WRONG = ["int64", "bool", "complex", "0 dimensions"]


@every_op
@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage(name: str, garbage: str, seed: int) -> None:
    """One bad tensor at a time: an exception that changes nothing, or a result, never a crash."""
    for argument, good in SAMPLES[name](9).items():
        if not isinstance(good, Tensor):
            continue
        args = SAMPLES[name](9)
        args[argument] = GARBAGE[garbage](args[argument])
        before = map_tensors(args, Tensor.clone)
        try:
            overload(name)(*args.values())
        except RuntimeError as error:
            assert f"mor::{name}: " in str(error)
            for n, value in before.items():
                if isinstance(value, Tensor):
                    assert_bitwise(args[n], value, n)
        else:
            same = args[argument].dtype == good.dtype
            assert same or garbage not in ALWAYS_WRONG, f"{argument} was accepted"


UNCHECKED: dict[str, Callable[[Tensor], Tensor]] = {
    "far out of range": garbage_int32,
    "near the range": lambda t: torch.randint(-2, 40, t.shape).int(),
    "out of order": lambda t: t.flatten()[torch.randperm(t.numel())].view(t.shape),
}


def between_guards(t: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A copy of t, and the memory before and behind it."""
    size, guard = t.numel() * t.itemsize, 4096
    before, own, behind = torch.full((2 * guard + size,), 0x55, dtype=torch.uint8).split(
        [guard, size, guard]
    )
    return own.view(t.dtype).view(t.shape).copy_(t), [before, behind]


@not_on_cpu
@every_op
@pytest.mark.parametrize("garbage", UNCHECKED)
def test_unchecked_garbage(name: str, garbage: str, seed: int) -> None:
    """Bad contents of any index tensor, or of all: a result, and nothing else is written."""
    sample = SAMPLES[name](9)
    indices = [n for n, a in sample.items() if isinstance(a, Tensor) and not a.is_floating_point()]
    for bad in [[n] for n in indices] + [indices]:
        guarded = {n: between_guards(a) for n, a in sample.items() if isinstance(a, Tensor)}
        args = sample | {n: own for n, (own, _) in guarded.items()}
        for n in bad:
            args[n].copy_(UNCHECKED[garbage](args[n]))
        before = map_tensors(args, Tensor.clone)
        with unchecked():
            overload(name)(*args.values())
        for n, (own, guards) in guarded.items():
            assert all((guard == 0x55).all() for guard in guards), f"written outside {n}"
            assert n in mutated(name) or torch.equal(own, before[n]), f"{n} has changed"
    assert_same(results(name, sample), results(name, sample))  # the device is as it was


@every_op
@pytest.mark.parametrize("value", [-1, -(2**63), 2**40, 2**62])
def test_absurd_sizes(name: str, value: int, seed: int) -> None:
    sizes = [n for n, a in SAMPLES[name](9).items() if isinstance(a, int)]
    for argument in sizes:
        args = {**SAMPLES[name](9), argument: value}
        expected = results(name, SAMPLES[name](9)) if argument.startswith("max") else None
        try:
            overload(name)(*args.values())
        except RuntimeError as error:
            # What is too large to allocate is PyTorch's to refuse.
            assert f"mor::{name}: " in str(error) or "new_empty" in str(error)
            continue
        assert expected is not None and value > 0, f"{argument} = {value} was accepted"


@every_op
def test_wrong_device(name: str, seed: int) -> None:
    """A tensor without memory among the others must not give a result without values."""
    others = ["meta", "cpu"] if torch.get_default_device().type == "cuda" else ["meta"]
    for argument, good in SAMPLES[name](9).items():
        for other in others if isinstance(good, Tensor) else []:
            args = {**SAMPLES[name](9), argument: good.to(other)}
            with pytest.raises(RuntimeError, match=f"mor::{name}: .* must be on "):
                overload(name)(*args.values())


@on_cpu_only
def test_build_info() -> None:
    assert mor_ext.build_info()["version"] == mor_ext.__version__
