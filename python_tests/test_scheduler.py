"""The scheduler as Python sees it: the arrays it hands out, and scenes with names.

csrc/engine/simulation has the random ones, which test_engine_simulation.py runs.
"""

import random

import numpy as np
import pytest
from scheduler_simulation import Simulation, prompt_of

from mor_ext._engine import Scheduler

STRATEGIES = ("recursion_wise", "shared", "hybrid", "frozen")
MIDDLE = [(1, 1), (2, 3), (1, 1)]
HEAD_START = 1000  # steps, of a priority
PREFIXES = 1_000_000  # owners from here on are prefixes


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed = {seed}")
    return random.Random(seed)


def assert_empty(scheduler: Scheduler) -> None:
    scheduler.check()
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.num_blocks_free + scheduler.num_blocks_kept == scheduler.num_blocks
    scheduler.drop_kept()
    assert scheduler.num_kept == scheduler.num_blocks_kept == 0
    assert scheduler.num_blocks_free == scheduler.num_blocks


@pytest.mark.parametrize("depthwise", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_arrays_say_what_each_row_sees(strategy, depthwise, rng):
    """Of prompts in chunks, beside single tokens, with shared prefixes and copied pages."""
    budget = rng.randint(9, 70)
    simulation = Simulation(
        MIDDLE, strategy, 300, max_batch=rng.randint(3, 9), token_budget=budget, depthwise=depthwise
    )
    prefixes = [simulation.prefix(PREFIXES + i, 16 * i + 9) for i in range(1, 4)]
    for number in range(20):
        head = rng.choice(prefixes) if rng.random() < 0.5 else []
        prompt = head + prompt_of(number, rng.randint(1, 60))
        simulation.submit(number, prompt, rng.randint(1, 20))
        for _ in range(rng.randint(0, 9)):
            simulation.step()
    simulation.finish()
    assert len(simulation.outputs) == 20
    assert_empty(simulation.scheduler)


def test_tokens_that_skip_a_stage_do_not_overtake_the_one_in_it():
    """The first takes four steps for the first stage; those behind it skip the stage."""
    scheduler = Scheduler([(1, 4), (1, 1)], "recursion_wise", 9, 1, 8)
    scheduler.submit(0, np.array([7], dtype=np.int32))
    entered = []
    for step in range(4):
        scheduler.plan()
        assert scheduler.enter(0).positions.tolist() == [step]
        scheduler.choose(np.array([step == 0]))
        assert scheduler.run(0).positions.tolist() == [0]
        scheduler.advance()
        entered.append(scheduler.enter(1).positions.tolist())
        scheduler.choose()
        if scheduler.run(1) is not None:
            scheduler.advance()
        scheduler.finish_step()
        scheduler.append(np.array([0]), np.array([8 + step], dtype=np.int32))
    assert entered == [[], [], [], [0, 1, 2, 3]]


def test_first_come_first_served_but_for_priority():
    simulation = Simulation(MIDDLE, "recursion_wise", 1000, max_batch=2, token_budget=64)
    for n in range(6):
        simulation.submit(n, prompt_of(n, 10), 12)
    for _ in range(4):
        simulation.step()
    simulation.submit(6, prompt_of(6, 10), 12, priority=1)
    simulation.finish()
    assert simulation.started == [0, 1, 6, 2, 3, 4, 5]
    assert simulation.scheduler.counters.preemptions == 1  # the last of those that ran made room


def test_a_low_priority_is_not_starved():
    simulation = Simulation([(1, 1)], "recursion_wise", 10, max_batch=1, token_budget=16)
    simulation.submit(0, prompt_of(0, 4), 2)
    number = 0
    while 0 not in simulation.outputs:
        if simulation.scheduler.num_waiting < 3:
            number += 1
            simulation.submit(number, prompt_of(number, 4), 2, priority=1)
        simulation.step()
        assert number < HEAD_START
    assert number > 100


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_common_prefix_is_computed_once(strategy):
    """Also by requests that come at once: the others wait for the first."""
    for steps_between in (0, 6):
        simulation = Simulation(MIDDLE, strategy, 1000, max_batch=8, token_budget=32)
        prefix = simulation.prefix(PREFIXES, 101)
        for n in range(4):
            simulation.submit(n, prefix, 20)
            for _ in range(steps_between):
                simulation.step()
        simulation.finish()
        counters = simulation.scheduler.counters
        assert counters.tokens + counters.shared_tokens == 4 * (101 + 19)
        assert counters.shared_tokens > 3 * (100 - 16)
        assert_empty(simulation.scheduler)


def test_sharing_can_be_switched_off():
    simulation = Simulation(
        MIDDLE, "shared", 1000, max_batch=8, token_budget=64, share_prefixes=False
    )
    prefix = simulation.prefix(PREFIXES, 50)
    for n in range(3):
        simulation.submit(n, prefix, 3)
    simulation.finish()
    assert simulation.scheduler.counters.shared_tokens == 0


def test_a_shallow_token_costs_its_own_depths_alone(rng):
    """Blocks in use, while the sequence still runs, are those of the depths of its tokens."""
    simulation = Simulation(MIDDLE, "recursion_wise", 1000, max_batch=1, token_budget=64)
    simulation.submit(0, prompt_of(0, 200), 5)
    while len(simulation.tokens.get(0, [])) < 204:
        simulation.step()
    scheduler = simulation.scheduler
    depth = scheduler.depth(0)
    blocks = 0
    for stage, (layers, recursions) in enumerate(MIDDLE):
        for d in range(recursions):
            blocks += layers * -(-int((depth[:, stage] > d).sum()) // 16)
    assert scheduler.num_blocks - scheduler.num_blocks_free == blocks


def test_a_left_slot_is_refilled_at_once():
    """Depth-wise, the shared block is always full, whatever the depths of its tokens."""
    simulation = Simulation(MIDDLE, "recursion_wise", 4000, max_batch=8, token_budget=8)
    for n in range(8):
        simulation.submit(n, prompt_of(n, 1), 40)
    in_flight = []
    for _ in range(60):
        simulation.step()
        in_flight.append(8 - simulation.scheduler.num_slots_free)
    simulation.scheduler.check()
    before = simulation.block_rows
    simulation.step()
    rows = simulation.block_rows - before
    assert rows >= 2 * 8 * 0.6  # two layers; a token that skips them all leaves a hole in a step


def test_cancelling_twice_or_too_late_is_no_error():
    simulation = Simulation(MIDDLE, "hybrid", 100, max_batch=4, token_budget=16)
    for n in range(3):
        simulation.submit(n, prompt_of(n, 5), 4)
    simulation.step()
    for number in (0, 0, 77):
        simulation.scheduler.cancel(number)
    del simulation.tokens[0]
    simulation.finish()
    assert sorted(simulation.outputs) == [1, 2]
    assert_empty(simulation.scheduler)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"token_budget": 3}, "token_budget must be at least max_batch, got 3"),
        ({"num_blocks": -1}, "num_blocks must be in .* got -1"),
        ({"stages": []}, "stages must be at least one, got none"),
        ({"stages": [(0, 1)]}, "a stage must have at least 1 layer .* got 0 and 1"),
        ({"stages": [(1, 256)]}, "1 to 255 recursions, got 1 and 256"),
        ({"kv_strategy": "none"}, "kv_strategy must be .* got 'none'"),
    ],
)
def test_bad_limits_are_refused(change, message):
    arguments = {
        "stages": MIDDLE, "kv_strategy": "shared", "num_blocks": 9, "max_batch": 4,
        "token_budget": 8,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Scheduler(**(arguments | change))


def test_wrong_numbers_of_flags_and_empty_prompts_are_refused():
    scheduler = Scheduler(MIDDLE, "shared", 9, 4, 8)
    with pytest.raises(ValueError, match="at least one token, got none"):
        scheduler.submit(0, np.array([], dtype=np.int32))
    scheduler.submit(0, np.arange(3, dtype=np.int32))
    scheduler.plan()
    scheduler.enter(0)
    with pytest.raises(ValueError, match="keep must be a flag for each of 3 rows, got 2"):
        scheduler.choose(np.ones(2, dtype=bool))
