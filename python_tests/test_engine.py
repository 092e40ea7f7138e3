"""The engine gives what the whole model gives, in whatever company, order and room."""

import ctypes
import gc
import random
import sys
from collections.abc import Callable

import pytest
import torch
from test_models import VARIANTS, small
from torch import Tensor

from mor_ext.inference import Engine, Result, SamplingParams
from mor_ext.inference.request import Request
from mor_ext.models import MoRForCausalLM
from mor_ext.models.config import CHOICES

pytestmark = pytest.mark.usefixtures("one_thread")
STRATEGIES = CHOICES["kv_strategy"]
VOCAB = 50
GREEDY = {"temperature": 0.0, "logprobs": VOCAB}


def prompts_of(*lengths: int) -> list[list[int]]:
    return [torch.randint(VOCAB, (length,)).tolist() for length in lengths]


def run_to_end(engine: Engine) -> dict[int, Result]:
    results = {}
    while engine.busy:
        results |= {result.request: result for result in engine.step()}
    engine.scheduler.check()
    assert engine.statistics().blocks_used == 0
    engine.forget()
    assert engine.statistics().blocks_kept == 0
    return results


def full_logprobs(model: MoRForCausalLM, result: Result) -> tuple[Tensor, Tensor]:
    """``[new tokens, vocab]`` and the depths of all tokens but the last, by one pass."""
    tokens = torch.tensor(result.prompt + result.tokens)
    with torch.no_grad():
        output = model(tokens, lengths=[len(tokens)])
    logits = output.logits[len(result.prompt) - 1 : -1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype).log_softmax(-1), output.depth[:-1]


def assert_like_the_model(model: MoRForCausalLM, result: Result, **tolerance) -> None:
    assert result.error is None
    expected, depth = full_logprobs(model, result)
    assert result.depth == depth.tolist()
    actual = [[top[token] for token in range(VOCAB)] for top in result.top_logprobs]
    torch.testing.assert_close(torch.tensor(actual, dtype=expected.dtype), expected, **tolerance)
    if result.finish_reason == "length" and tolerance == {}:
        assert result.tokens == expected.argmax(-1).tolist()


def serve_at_random_times(make: Callable[..., Engine], model: MoRForCausalLM, seed: int) -> None:
    """In a small pool: chunks of a few tokens, preemptions, prefixes shared while they are run."""
    rng = random.Random(seed)
    lanes = sum(len(s.block.layers) * s.num_recursions for s in model.stages)
    engine = make(
        model,
        max_batch=rng.randint(2, 5),
        num_blocks=5 * lanes,  # the longest takes 4 pages of each
        token_budget=rng.randint(6, 20),
        depthwise=rng.choice([True, False]),
    )
    head = prompts_of(20)[0]
    requests = prompts_of(1, 30, 7) + [head + tail for tail in prompts_of(1, 9, 12)]
    results = {}
    for prompt in requests:
        engine.submit(prompt, SamplingParams(max_new_tokens=rng.randint(1, 20), **GREEDY))
        for _ in range(rng.randint(0, 4)):
            results |= {result.request: result for result in engine.step()}
    results |= run_to_end(engine)
    assert len(results) == len(requests)
    for result in results.values():
        assert_like_the_model(model, result)


@pytest.mark.parametrize("sharing", ["middle_cycle", "sequence"])
@pytest.mark.parametrize(("routing", "kv_strategy"), VARIANTS)
def test_every_variant_at_random_times(routing, kv_strategy, sharing, seed):
    serve_at_random_times(Engine, small(routing, kv_strategy, sharing), seed)


@pytest.mark.parametrize("budget", [1, 2, 5, 16, 33, 200])
@pytest.mark.parametrize("kv_strategy", STRATEGIES)
def test_prompts_in_any_cut(kv_strategy, budget, seed):
    model = small("expert_choice", kv_strategy)
    engine = Engine(model, max_batch=1, token_budget=budget, num_blocks=2000)
    (result,) = engine.generate(
        prompts_of(33), SamplingParams(max_new_tokens=3, **GREEDY), progress=False
    )
    assert_like_the_model(model, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_strategy", STRATEGIES)
@pytest.mark.parametrize("routing", ["none", "random"])
def test_narrow_dtypes_are_as_accurate_as_one_pass(routing, kv_strategy, dtype, seed):
    """Depths by position alone, so that rounding changes none."""
    exact = small(routing, kv_strategy, initializer_range=0.1)
    model = small(routing, kv_strategy, initializer_range=0.1).to(dtype)
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())  # the rounded weights
    engine = Engine(model, max_batch=3, token_budget=9, num_blocks=2000)
    params = SamplingParams(max_new_tokens=8, **GREEDY)
    for result in engine.generate(prompts_of(5, 17, 24), params, progress=False):
        expected, _ = full_logprobs(exact, result)
        eager, _ = full_logprobs(model, result)
        error = (eager.double() - expected).abs().max().item()
        atol = 2 * error + torch.finfo(dtype).eps
        assert_like_the_model(exact, result, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("routing", "kv_strategy"),
    [("none", "recursion_wise"), ("token_choice", "shared"), ("action", "frozen")],
)
def test_greedy_text_is_that_of_hugging_face(routing, kv_strategy, seed):
    model = small(routing, kv_strategy, eos_token_id=3)
    prompts = prompts_of(4, 4, 4)
    ids = torch.tensor(prompts)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, pad_token_id=0
    )
    params = SamplingParams(max_new_tokens=12, temperature=0)
    results = Engine(model, num_blocks=2000).generate(prompts, params, progress=False)
    for row, result in zip(expected.tolist(), results, strict=True):
        assert row[4:][: len(result.tokens)] == result.tokens
        assert result.finish_reason == ("stop" if 3 in row[4:] else "length")


@pytest.mark.parametrize("kv_strategy", STRATEGIES)
def test_a_fork_goes_on_from_a_running_request(kv_strategy, seed):
    model = small("expert_choice", kv_strategy)
    engine = Engine(model, max_batch=4, num_blocks=2000, token_budget=64)
    parent = engine.submit(prompts_of(25)[0], SamplingParams(max_new_tokens=20, **GREEDY))
    while len(engine.requests[parent].tokens) < 6:
        engine.step()
    params = SamplingParams(max_new_tokens=12, temperature=2.0, logprobs=VOCAB, seed=seed)
    fork = engine.fork(parent, params)
    results = run_to_end(engine)
    assert engine.statistics().shared_tokens == 25 + 5
    assert results[fork].prompt == results[parent].prompt + results[parent].tokens[:6]
    for number in (parent, fork):
        expected, depth = full_logprobs(model, results[number])
        assert results[number].depth == depth.tolist()
        actual = torch.tensor(results[number].logprobs).double()
        picked = expected[range(len(actual)), results[number].tokens]
        torch.testing.assert_close(actual, picked, atol=1e-5, rtol=1e-5)
    with pytest.raises(KeyError):
        engine.fork(parent)


def test_parallel_samples_share_their_prompt(seed):
    model = small("token_choice", "recursion_wise")
    engine = Engine(model, max_batch=8, num_blocks=2000)
    prompt = prompts_of(40)[0]
    params = [SamplingParams(max_new_tokens=10, seed=s, logprobs=VOCAB) for s in range(5)]
    results = engine.generate([prompt] * 5, params, progress=False)
    assert engine.statistics().shared_tokens >= 4 * (39 - 16)
    assert len({tuple(result.tokens) for result in results}) > 1
    for result in results:
        assert_like_the_model(model, result, atol=1e-5, rtol=1e-5)


def test_a_seed_gives_the_same_sample_in_any_company(seed):
    model = small("expert_choice", "recursion_wise")
    params = SamplingParams(max_new_tokens=15, seed=5, top_p=0.9, repetition_penalty=1.3)
    other = SamplingParams(max_new_tokens=25, top_k=3)
    prompt, *others = prompts_of(6, 30, 2, 20)
    (alone,) = Engine(model, num_blocks=2000).generate([prompt], params, progress=False)
    engine = Engine(model, max_batch=3, token_budget=4, num_blocks=100)  # with preemptions
    for p in others:
        engine.submit(p, other)
    number = engine.submit(prompt, params)
    assert run_to_end(engine)[number].tokens == alone.tokens


# ---- work ----


@pytest.mark.parametrize("kv_strategy", STRATEGIES)
def test_a_shallow_token_does_no_work(kv_strategy, seed):
    """FLOPs of all matrix products, and blocks of K/V, are those of the depths of the tokens."""
    from torch.utils.flop_counter import FlopCounterMode

    model = small("expert_choice", kv_strategy)
    config = model.config
    engine = Engine(model, max_batch=4, num_blocks=2000, token_budget=16, share_prefixes=False)
    numbers = [
        engine.submit(p, SamplingParams(max_new_tokens=6, temperature=0))
        for p in prompts_of(5, 21, 30)
    ]
    blocks, results = [], {}
    with FlopCounterMode(display=False) as counter:
        while engine.busy:
            results |= {result.request: result for result in engine.step()}
            stages = [engine.scheduler.depth(number) for number in numbers]
            blocks.append((engine.statistics().blocks_used, kv_blocks(model, stages)))
    depths = [depth for result in results.values() for depth in result.depth]
    assert 0 < sum(depths) < 3 * len(depths)

    d, kv = config.hidden_size, 2 * config.num_key_value_heads * config.head_dim
    row = 2 * (2 * d * d + 3 * d * config.intermediate_size)  # q, o, gate, up, down
    entries = {  # that are computed, of a token
        "recursion_wise": sum,
        "hybrid": sum,
        "shared": lambda x: sum(min(depth, 1) for depth in x),
        "frozen": lambda x: sum(min(depth + 1, 3) for depth in x),  # the exit's too
    }[kv_strategy](depths)
    flops = 2 * (row + 2 * d * kv) * len(depths)  # the first and the last layer
    flops += config.shared_layers * (row * sum(depths) + 2 * d * kv * entries)
    flops += 2 * d * VOCAB * sum(len(result.tokens) for result in results.values())
    routers = 2 * d * sum(min(depth + 1, 3) for depth in depths)
    assert counter.get_total_flops() in (flops, flops + routers)  # not every torch counts those
    # Tokens in flight have blocks too, at most a page of each lane; there is a step without.
    assert all(used >= wanted for used, wanted in blocks)
    assert blocks[-1] == (0, 0) and any(used == wanted > 0 for used, wanted in blocks)


def kv_blocks(model: MoRForCausalLM, sequences: list) -> int:
    strategy = model.config.kv_strategy
    blocks = 0
    for depth in sequences:  # [tokens, stages]
        for number, stage in enumerate(model.stages):
            for r in range(1 if strategy == "shared" else stage.num_recursions):
                reached = {
                    "recursion_wise": depth[:, number] > r,
                    "shared": depth[:, number] > 0,
                    "hybrid": depth[:, number] > 0,
                    "frozen": depth[:, number] >= 0,
                }[strategy]
                blocks += len(stage.block.layers) * -(-int(reached.sum()) // 16)
    return blocks


def test_ten_thousand_requests_leave_every_block_free_and_memory_flat(seed):
    """A tenth of them cancelled at random moments."""
    model = small("expert_choice", "recursion_wise", "cycle", num_hidden_layers=3)
    rng = random.Random(seed)
    engine = Engine(model, max_batch=64, num_blocks=90, token_budget=128)
    finished, cancelled, submitted = 0, 0, 0
    early = None
    while engine.busy or submitted < 10_000:
        for _ in range(min(200 - len(engine.requests), 10_000 - submitted)):
            prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 3, 6, 20]))]
            params = SamplingParams(max_new_tokens=rng.randint(1, 3), temperature=0)
            number = engine.submit(prompt, params)
            submitted += 1
            if rng.random() < 0.1:
                victim = rng.choice([number, *list(engine.requests)[:20]])
                result = engine.cancel(victim)
                assert result.finish_reason == "cancelled"
                cancelled += 1
        results = engine.step()
        assert all(result.error is None for result in results)
        finished += len(results)
        if early is None and finished > 3000:  # what grows to a size has done so
            early = memory_in_use()
    del result, results
    run_to_end(engine)
    allocated, objects = (
        late - before for late, before in zip(memory_in_use(), early, strict=True)
    )
    assert allocated < 1e6 and objects < 5_000
    assert finished + cancelled == 10_000 and cancelled > 500
    assert engine.scheduler.counters.evictions > 0
    assert engine.requests == {} and engine.finished == []
    assert engine.scheduler.num_slots_free == 128
    assert not [x for x in gc.get_objects() if type(x) in (Request, Result)]


class Mallinfo(ctypes.Structure):
    """mallinfo2 of glibc 2.33 and later."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = tuple((name, ctypes.c_size_t) for name in names.split())


def memory_in_use() -> tuple[int, int]:
    """Bytes that malloc has given out, and small objects of Python, which come from elsewhere. What
    the system counts as the process's own includes what was freed."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo
    info = libc.mallinfo2()
    return info.hblkhd + info.uordblks, sys.getallocatedblocks()
