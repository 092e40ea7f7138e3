"""K/V of finished requests serve prompts that begin alike, as long as nobody needs their room."""

import random

import numpy as np
import pytest
import torch
from scheduler_simulation import Simulation, prompt_of
from test_engine import GREEDY, STRATEGIES, assert_like_the_model, prompts_of, run_to_end
from test_models import small

from mor_ext._engine import Scheduler
from mor_ext.inference import Engine, Result, SamplingParams
from mor_ext.nn import linear

pytestmark = pytest.mark.usefixtures("one_thread")
STAGES = [(1, 1), (2, 3), (1, 1)]
MOST_KEPT = 1024


def serve(engine: Engine, prompt: list[int], new: int = 6) -> Result:
    params = SamplingParams(max_new_tokens=new, **GREEDY)
    (result,) = engine.generate([prompt], params, progress=False)
    engine.scheduler.check()
    assert engine.statistics().blocks_used == 0
    return result


# ---- requests of a model ----


def test_a_changed_model_counts_once_the_engine_forgets(seed, monkeypatch):
    """Changed through .data, which no version tells of."""
    monkeypatch.setattr(linear, "LEAST_PACKED", 0)
    model = small("none", "recursion_wise", initializer_range=0.1).float()
    engine = Engine(model, num_blocks=2000)
    prompt = prompts_of(20)[0]
    params = SamplingParams(max_new_tokens=3, **GREEDY)
    for _ in range(2):
        (result,) = engine.generate([prompt], params, progress=False)
        assert_like_the_model(model, result, atol=1e-4, rtol=1e-4)
        for weight in model.parameters():
            weight.data.mul_(1.2)
        engine.forget()


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("kv_strategy", STRATEGIES)
def test_the_turns_of_a_chat_compute_what_is_new(kv_strategy, depthwise, seed):
    model = small("expert_choice", kv_strategy)
    engine = Engine(model, max_batch=1, num_blocks=2000, token_budget=7, depthwise=depthwise)
    prompt, done = prompts_of(18)[0], 0
    for _ in range(4):
        before = engine.statistics()
        result = serve(engine, prompt)
        assert_like_the_model(model, result)
        after = engine.statistics()
        assert after.shared_tokens - before.shared_tokens == done
        assert after.tokens - before.tokens == len(prompt) + 5 - done
        assert after.blocks_kept >= max(before.blocks_kept, 1) and engine.scheduler.num_kept == 1
        done = len(prompt) + 5  # the last token has not been through the model
        prompt = result.prompt + result.tokens + prompts_of(3)[0]


@pytest.mark.parametrize("kv_strategy", STRATEGIES)
def test_the_same_prompt_again_computes_its_last_token(kv_strategy, seed):
    model = small("token_choice", kv_strategy)
    engine = Engine(model, max_batch=4, num_blocks=2000, token_budget=9)
    prompt = prompts_of(37)[0]
    first = serve(engine, prompt)
    before = engine.statistics().tokens
    again = serve(engine, prompt, new=9)
    assert engine.statistics().tokens - before == 1 + 8
    assert again.tokens[:6] == first.tokens and again.depth[:42] == first.depth
    for result in (first, again):
        assert_like_the_model(model, result)


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("kv_strategy", STRATEGIES)
def test_a_cancelled_request_leaves_what_it_has_done(kv_strategy, depthwise, seed):
    """Units in flight have entries in some lanes already; those are not taken over."""
    model = small("expert_choice", kv_strategy)
    rng = random.Random(seed)
    for _ in range(5):
        budget = rng.randint(2, 12)
        engine = Engine(
            model, max_batch=2, num_blocks=2000, token_budget=budget, depthwise=depthwise
        )
        prompt = prompts_of(40)[0]
        number = engine.submit(prompt, SamplingParams(max_new_tokens=20, **GREEDY))
        while len(engine.scheduler.depth(number)) < rng.randint(16, 45):
            engine.step()
        cancelled = engine.cancel(number)
        sequence = prompt + cancelled.tokens
        other = sequence[:30] + prompts_of(8)[0]
        for wanted in (other, sequence):
            before = engine.statistics().shared_tokens
            assert_like_the_model(model, serve(engine, wanted))
            shared = engine.statistics().shared_tokens - before
            assert shared >= min(len(cancelled.depth), 30 if wanted is other else 99)
        run_to_end(engine)


def test_nan_is_not_taken_over(seed):
    """Neither by the same prompt nor by one that has the good tokens in common."""
    model = small("expert_choice", "recursion_wise", tie_word_embeddings=False)
    model.embed_tokens.weight.data[49] = float("nan")
    engine = Engine(model, max_batch=2, num_blocks=2000, token_budget=8)
    start = [token % 49 for token in prompts_of(20)[0]]
    for prompt in ([*start, 49], [*start, 49, 3]):
        assert "got NaN" in serve(engine, prompt).error
    assert engine.statistics().blocks_kept == engine.scheduler.num_kept == 0
    assert serve(engine, [*start, 5], new=1).error is None
    assert engine.statistics().shared_tokens == 0


def test_after_a_change_of_weights_nothing_is_taken_over(seed):
    """Nor from a request that has been cancelled since the last step."""
    model = small("expert_choice", "recursion_wise")
    engine = Engine(model, max_batch=2, num_blocks=2000)
    prompt, other = prompts_of(30, 25)
    serve(engine, prompt)
    number = engine.submit(other, SamplingParams(max_new_tokens=20, **GREEDY))
    while len(engine.requests[number].tokens) < 2:
        engine.step()
    engine.cancel(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    engine.forget()
    assert engine.statistics().blocks_kept == engine.statistics().blocks_used == 0
    for changed in (prompt, other):
        assert_like_the_model(model, serve(engine, changed))
    assert engine.statistics().shared_tokens == 0


def test_without_sharing_nothing_is_kept(seed):
    engine = Engine(small("none", "shared"), num_blocks=2000, share_prefixes=False)
    serve(engine, prompts_of(30)[0])
    assert engine.statistics().blocks_kept == engine.scheduler.num_kept == 0


# ---- room ----


def simulation(num_blocks: int, max_batch: int = 1, stages=None) -> Simulation:
    limits = {"max_batch": max_batch, "token_budget": 16}
    return Simulation(stages or [(1, 1)], "recursion_wise", num_blocks, **limits)


def shares(simulation: Simulation, number: int, prefix: list[int]) -> int:
    """Runs a request of a prefix and no more to its end; the tokens that it takes over."""
    before = simulation.scheduler.counters.shared_tokens
    simulation.submit(number, prefix, 1)
    simulation.finish()
    simulation.scheduler.check()
    return simulation.scheduler.counters.shared_tokens - before


def test_the_least_recently_used_makes_room_first():
    sim = simulation(num_blocks=9)  # three prefixes of 48 tokens and no more
    prefixes = [sim.prefix(1000 + i, 48) for i in range(4)]
    number = iter(range(100))
    assert [shares(sim, next(number), prefixes[i]) for i in (0, 1, 2)] == [0, 0, 0]
    assert (sim.scheduler.num_kept, sim.scheduler.num_blocks_kept) == (3, 9)
    assert shares(sim, next(number), prefixes[0]) == 47  # 1 is now the oldest
    assert sim.scheduler.counters.evictions == 1  # the last page is copied: 1 makes room for that
    assert shares(sim, next(number), prefixes[3]) == 0
    assert [shares(sim, next(number), prefixes[i]) for i in (0, 3)] == [47, 47]
    assert [shares(sim, next(number), prefixes[i]) for i in (1, 2)] == [0, 0]
    assert sim.scheduler.counters.preemptions == 0


def test_kept_blocks_count_as_free_for_who_comes():
    """Four run at once in a pool that is full of what others have left."""
    sim = simulation(num_blocks=16, max_batch=4)
    for number in range(4):
        shares(sim, number, sim.prefix(1000 + number, 64))
    assert sim.scheduler.num_blocks_free == 0 and sim.scheduler.num_blocks_kept == 16
    for number in range(4, 8):
        sim.submit(number, prompt_of(number, 4), 28)
    for _ in range(2):
        sim.step()
    assert sim.scheduler.num_running == 4
    sim.finish()
    counters = sim.scheduler.counters
    assert (counters.preemptions, counters.evictions) == (0, 2)  # eight blocks are wanted
    assert len(sim.outputs) == 8


def test_what_a_request_takes_over_is_not_given_up_for_it(seed):
    """The only prefix fills the pool but for a block, which the request's last page goes to."""
    sim = simulation(num_blocks=4)
    prefix = sim.prefix(1000, 47)
    shares(sim, 0, prefix)
    sim.submit(1, [*prefix, *prompt_of(1, 9)], 8)
    sim.finish()
    assert sim.scheduler.counters.shared_tokens == 47 and 1 in sim.outputs


def test_who_is_alone_gets_every_block():
    """Also those of a page that it shares with a kept sequence alone."""
    sim = simulation(num_blocks=3)
    prefix = sim.prefix(1000, 40)
    shares(sim, 0, prefix)
    sim.submit(1, [*prefix[:39], *prompt_of(1, 1)], 8)
    sim.finish()
    counters = sim.scheduler.counters
    assert 1 in sim.outputs and counters.shared_tokens == 39
    assert (counters.evictions, counters.preemptions) == (1, 0)


def test_of_two_that_begin_alike_the_longer_is_kept():
    sim = simulation(num_blocks=100, stages=STAGES)
    prefix = sim.prefix(1000, 60)
    for number, (length, kept) in enumerate([(30, 1), (50, 1), (40, 1), (50, 1), (60, 1)]):
        shares(sim, number, prefix[:length])
        assert sim.scheduler.num_kept == kept
    assert shares(sim, 10, sim.prefix(1001, 60)) == 0 and sim.scheduler.num_kept == 2
    assert shares(sim, 11, prefix) == 59


def test_fifteen_tokens_are_not_kept():
    sim = simulation(num_blocks=100)
    shares(sim, 0, sim.prefix(1000, 15))
    assert sim.scheduler.num_kept == 0
    shares(sim, 1, sim.prefix(1001, 16))
    assert sim.scheduler.num_kept == 1


def test_so_many_are_kept_and_no_more():
    sim = simulation(num_blocks=2 * MOST_KEPT)
    prefixes = [sim.prefix(10_000 + i, 20) for i in range(MOST_KEPT + 1)]
    for number, prefix in enumerate(prefixes):
        shares(sim, number, prefix)
    assert sim.scheduler.num_kept == MOST_KEPT
    assert [shares(sim, 2000 + i, prefixes[i]) for i in (1, 0)] == [19, 0]


def once(scheduler: Scheduler, number: int, prompt: list[int], keep: bool = True) -> None:
    """Through a model of one layer, until a token of it would be sampled."""
    scheduler.submit(number, np.array(prompt, dtype=np.int32))
    scheduler.plan()
    scheduler.enter(0)
    scheduler.choose()
    assert scheduler.run(0) is not None
    scheduler.advance()
    assert scheduler.finish_step().ids.tolist() == [number]
    scheduler.finish(number, keep)


def test_a_sequence_may_end_without_being_kept():
    scheduler = Scheduler([(1, 1)], "shared", 9, 1, 32)
    for number, keep in ((0, False), (1, True)):
        once(scheduler, number, list(range(20)), keep)
        assert scheduler.num_kept == keep
    assert scheduler.counters.shared_tokens == 0


def test_sequences_that_end_alike_are_both_kept():
    scheduler = Scheduler([(1, 1)], "shared", 30, 1, 64)
    end = list(range(100, 120))
    for number, start in enumerate(([1], [2], [1, 1], [1, 2])):
        once(scheduler, number, start + end)
        assert scheduler.num_kept == number + 1
    once(scheduler, 9, [2, *end])
    assert scheduler.num_kept == 4 and scheduler.counters.shared_tokens == 20
