"""One engine, several threads."""

import random
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
