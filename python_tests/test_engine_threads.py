"""One engine, several threads."""

import gc
import random
import sys
import threading
import time
from collections.abc import Callable

import pytest
from test_engine import VOCAB, prompts_of, run_to_end
from test_models import small

from mor_ext.inference import Engine, SamplingParams
from mor_ext.inference.lock import FairLock

pytestmark = pytest.mark.usefixtures("one_thread")


def in_threads(works: list[Callable[[], None]]) -> None:
    """All at once; what one raises is raised here."""
    problems = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if problems:
        raise problems[0]


def test_threads_get_what_each_would_get_alone(seed):
    model = small("expert_choice", "recursion_wise")
    params = [SamplingParams(max_new_tokens=12, seed=i) for i in range(6)]
    prompts = [prompts_of(*range(1, 7)) for _ in range(6)]
    alone = [
        Engine(model, num_blocks=2000).generate(own, params, progress=False) for own in prompts
    ]
    engine = Engine(model, max_batch=5, num_blocks=300, token_budget=16)
    found: dict[int, list[list[int]]] = {}

    def generate(i: int) -> None:
        results = engine.generate(prompts[i], params, progress=False)
        found[i] = [result.tokens for result in results]

    def stream(i: int) -> None:
        streams = [
            engine.stream(prompt, own) for prompt, own in zip(prompts[i], params, strict=True)
        ]
        found[i] = [[token.token for token in tokens] for tokens in streams]

    def disturb() -> None:
        rng = random.Random(seed)
        for _ in range(60):
            number = engine.submit([rng.randrange(VOCAB)] * 3, SamplingParams(max_new_tokens=9))
            time.sleep(rng.random() / 1000)
            engine.cancel(number)
            assert engine.statistics().blocks == 300

    works = [lambda i=i: (generate, stream)[i % 2](i) for i in range(6)]
    in_threads([*works, disturb])
    for i, results in enumerate(alone):
        assert found[i] == [result.tokens for result in results]
    engine.step()  # takes note of who was cancelled
    run_to_end(engine)


def test_a_stream_that_is_garbage_is_closed_in_the_middle_of_a_step(seed, monkeypatch):
    """Which holds the lock, as the collector may run at any line."""
    engine = Engine(small("none", "shared"), num_blocks=400)
    params = SamplingParams(max_new_tokens=20, temperature=0)
    prompt, other = prompts_of(3, 4)
    (alone,) = engine.generate([prompt], params, progress=False)
    stream = engine.stream(other, params)
    next(stream)
    cycle = [stream]
    cycle.append(cycle)
    del stream, cycle
    walk = engine.walk.step

    def step():
        gc.collect()
        return walk()

    monkeypatch.setattr(engine.walk, "step", step)
    found = []
    in_threads([lambda: found.extend(engine.generate([prompt], params, progress=False))])
    assert [result.tokens for result in found] == [alone.tokens]
    assert not engine.busy
    run_to_end(engine)


def test_an_interrupt_at_any_line_leaves_the_lock_to_its_thread():
    lock = FairLock()

    def interrupt(frame, event, argument):
        nonlocal lines
        if frame.f_code.co_filename != lock_file:
            return None
        if event == "line":
            lines -= 1
            if lines == 0:
                raise KeyboardInterrupt
        return interrupt

    lock_file = FairLock.__enter__.__code__.co_filename

    def take_and_give_back() -> None:
        with lock:
            pass

    def interrupted() -> None:
        nonlocal lines
        for line in range(1, 6):
            lines = line
            sys.settrace(interrupt)
            try:
                with pytest.raises(KeyboardInterrupt):
                    take_and_give_back()
            finally:
                sys.settrace(None)
            take_and_give_back()
            assert not lock.own

    lines = 0
    in_threads([interrupted])


def test_who_waits_comes_before_the_next_step():
    lock, steps, waited = FairLock(), 0, []
    done = threading.Event()

    def step_after_step() -> None:
        nonlocal steps
        while not done.is_set():
            with lock:
                time.sleep(0.001)
                steps += 1

    def ask() -> None:
        for _ in range(20):
            time.sleep(0.0015)
            before = steps
            with lock:
                waited.append(steps - before)
        done.set()

    in_threads([step_after_step, ask])
    assert len(waited) == 20 and max(waited) <= 2
