"""Passes of fixed shapes, recorded and replayed: the same as passes of just the rows there are."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Backend, use_backend
from test_engine import GREEDY, VOCAB, assert_like_the_model, prompts_of, serve_at_random_times
from test_host_copies import host_copies
from test_models import VARIANTS, small
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mor_ext.inference import Engine, SamplingParams
from mor_ext.inference.graphs import Buffers, CudaGraphs, padded
from mor_ext.inference.recorded import FixedPass, RecordedWalk
from mor_ext.models import MoRForCausalLM
from mor_ext.models.config import CHOICES

pytestmark = pytest.mark.usefixtures("one_thread")


class Tape(TorchDispatchMode):
    """What a CUDA graph is, on the CPU: the same ops on the same tensors with the same numbers, and
    nothing of the Python around them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def on_tape(work: Callable[[], Any]) -> Callable[[], Any]:
    work()
    with Tape() as tape:
        result = work()

    def replay() -> Any:
        tape.replay()
        return result

    return replay


def recorded_engine(model: MoRForCausalLM, **options: Any) -> Engine:
    engine = Engine(model, **options)
    walk = engine.walk
    slots = len(walk.hidden)
    engine.walk = RecordedWalk(model, engine.scheduler, engine.pool, slots, walk.depthwise, on_tape)
    return engine


def test_a_tape_replays_on_new_data():
    x, table = torch.ones(3), torch.zeros(4)

    def work() -> Tensor:
        table[1:].add_(x)
        return (2 * x)[1:] + x.sum()

    replay = on_tape(work)
    assert table.tolist() == [0, 2, 2, 2]
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert replay().tolist() == [10, 12] and table.tolist() == [0, 3, 4, 5]


def test_padded_sizes():
    sizes = [padded(n) for n in range(1, 1025)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert sorted(set(sizes)) == [
        *(1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    ]


@pytest.mark.parametrize("sharing", ["middle_cycle", "sequence"])
@pytest.mark.parametrize(("routing", "kv_strategy"), VARIANTS)
def test_every_variant_at_random_times(routing, kv_strategy, sharing, seed):
    serve_at_random_times(recorded_engine, small(routing, kv_strategy, sharing), seed)


@pytest.mark.parametrize("kv_strategy", CHOICES["kv_strategy"])
def test_recording_touches_nothing_that_is_in_use(kv_strategy, seed):
    """Neither rows of tokens in flight nor blocks that the scheduler has."""
    model = small("token_choice", kv_strategy)
    engine = recorded_engine(model, max_batch=3, num_blocks=500, token_budget=40)
    for prompt in prompts_of(5, 20, 30):
        engine.submit(prompt, SamplingParams(max_new_tokens=4))
    engine.step()
    engine.step()
    walk, pool = engine.walk, engine.pool
    stage = walk.stages[1]
    used = [walk.hidden[:40], *(table[:40] for table in stage.entered), stage.gate[:40]]
    used += [pool.key[:-1], pool.value[:-1]]
    before = [tensor.clone() for tensor in used]
    assert any(tensor.any() for tensor in before)
    with torch.inference_mode():
        FixedPass(walk, stage, 24, 8, 24)
    assert all(map(torch.equal, used, before))
    assert walk.hidden[40:].any() and pool.key[-1].any()  # the spare ones


@pytest.mark.parametrize("kv_strategy", CHOICES["kv_strategy"])
def test_few_sizes_are_recorded_and_then_no_more(kv_strategy, seed):
    model = small("expert_choice", kv_strategy)
    engine = recorded_engine(model, max_batch=4, num_blocks=2000, token_budget=32)
    prompts = prompts_of(*range(1, 30))
    params = SamplingParams(max_new_tokens=20, temperature=0)
    first = engine.generate(prompts, params, progress=False)
    assert 0 < len(engine.walk.works) <= 3 * (8 + 2 * 8) + 3
    recorded = dict(engine.walk.works)
    second = engine.generate(prompts, params, progress=False)
    assert [r.tokens for r in first] == [r.tokens for r in second]
    assert all(engine.walk.works[key] is work for key, work in recorded.items())


def test_thresholds_count_once_the_engine_forgets(seed):
    model = small("expert_choice", "recursion_wise")
    engine = recorded_engine(model, num_blocks=2000)
    prompts = prompts_of(9, 20)
    params = SamplingParams(max_new_tokens=6, **GREEDY)
    engine.generate(prompts, params, progress=False)
    for stage in model.recursions():
        if hasattr(stage.router, "thresholds"):
            stage.router.thresholds = (None, -1e9, -1e9)
    engine.forget()
    for result in engine.generate(prompts, params, progress=False):
        assert set(result.depth) == {3}
        assert_like_the_model(model, result)


class BlockingCopies(torch.overrides.TorchFunctionMode):
    """Copies to a device that the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moves = func is Tensor.to and any(isinstance(x, torch.device) for x in args)
        if (moves and not kwargs.get("non_blocking")) or (
            func in (torch.tensor, torch.as_tensor) and kwargs.get("device") not in (None, "cpu")
        ):
            self.seen.append(func.__name__)
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    ("routing", "flags"), [("none", 0), ("expert_choice", 1), ("token_choice", 2)]
)
def test_a_step_waits_for_flags_and_tokens_only(routing, flags, recorded, params, seed):
    model = small(routing, "recursion_wise")
    make = recorded_engine if recorded else Engine
    engine = make(model, max_batch=3, num_blocks=2000)
    for prompt in prompts_of(3, 9, 20):
        engine.submit(prompt, SamplingParams(max_new_tokens=40, **params))
    for _ in range(20):
        engine.step()
    measured = 0
    for _ in range(10):
        sizes = len(engine.walk.works) if recorded else 0
        with host_copies() as seen, BlockingCopies() as blocking:
            engine.step()
        if recorded and len(engine.walk.works) > sizes:
            continue
        measured += 1
        assert blocking.seen == []
        assert set(seen) <= {"cpu", "numpy", "tolist"}  # what is on the host is an array for free
        assert seen.count("numpy") <= seen.count("cpu") <= flags
        assert seen.count("tolist") <= 1
    assert measured >= 5


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("routing", ["expert_choice", "token_choice", "action", "random"])
def test_the_default_device_is_nobody_s_business(routing, recorded, seed):
    model = small(routing, "frozen")
    engine = (recorded_engine if recorded else Engine)(model, num_blocks=2000)
    prompts = prompts_of(5, 20)
    params = SamplingParams(max_new_tokens=5, seed=1, top_k=9, repetition_penalty=1.1, logprobs=2)
    expected = engine.generate(prompts, params, progress=False)
    engine.forget()
    with torch.device("meta"):
        actual = engine.generate(prompts, params, progress=False)
    assert [r.tokens for r in actual] == [r.tokens for r in expected]


# ---- the CUDA kernels ----


def results_of(engine: Engine, prompts: list[list[int]]) -> list[Any]:
    params = SamplingParams(max_new_tokens=6, temperature=0, logprobs=1)
    results = engine.generate(prompts, params, progress=False)
    return [(r.tokens, r.depth, r.logprobs) for r in results]


@pytest.mark.parametrize("backend", [Backend.SIMT, Backend.CUDA], ids=lambda b: b.value)
@pytest.mark.parametrize("kv_strategy", CHOICES["kv_strategy"])
@pytest.mark.parametrize("routing", ["none", "expert_choice", "token_choice"])
def test_results_are_those_of_plain_passes_on_the_cpu(routing, kv_strategy, backend, seed, request):
    model = small(routing, kv_strategy, initializer_range=0.15).float()
    prompts = [torch.randperm(VOCAB)[:n].tolist() for n in (3, 11, 40)]  # equal tokens could tie
    sizes = {"max_batch": 3, "num_blocks": 400, "token_budget": 24}
    expected = results_of(Engine(model, **sizes), prompts)
    with use_backend(backend, request.config.getoption("simt_library")):
        if backend == Backend.CUDA:
            model = model.to("cuda")
            engines = [Engine(model, **sizes), Engine(model, **sizes, cuda_graphs=False)]
            assert [isinstance(engine.walk, RecordedWalk) for engine in engines] == [True, False]
        else:
            engines = [recorded_engine(model, **sizes)]
        for engine in engines:
            actual = results_of(engine, prompts)
            for (tokens, depth, logprobs), wanted in zip(actual, expected, strict=True):
                assert tokens == wanted[0] and depth == wanted[1]
                torch.testing.assert_close(logprobs, wanted[2], atol=1e-3, rtol=1e-3)


def test_cuda_buffers_are_not_written_before_they_have_been_sent(request):
    with use_backend(Backend.CUDA, request.config.getoption("simt_library")):
        device = torch.device("cuda")
        buffers = Buffers({"x": (1 << 20,)}, device)
        replay = CudaGraphs(device)(lambda: buffers.device["x"].sum())
        sums = []
        for turn in range(20):
            buffers.wait()
            buffers.host["x"][:] = turn
            buffers.send()
            sums.append(replay().clone())
        assert [int(total) for total in sums] == [turn << 20 for turn in range(20)]


def test_cuda_steps_wait_for_tokens_and_flags_only(seed, request):
    with use_backend(Backend.CUDA, request.config.getoption("simt_library")):
        model = small("expert_choice", "recursion_wise").float().to("cuda")
        engine = Engine(model, max_batch=3, num_blocks=2000)
        prompts = prompts_of(3, 9, 20)
        params = SamplingParams(max_new_tokens=30, temperature=0)
        engine.generate(prompts, params, progress=False)  # records every size
        for prompt in prompts:
            engine.submit(prompt, params)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(20):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    engine.step()
                assert len([w for w in caught if "synchronizing" in str(w.message)]) <= 2
        finally:
            torch.cuda.set_sync_debug_mode("default")
