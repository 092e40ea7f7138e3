"""Requests to the engine: how they end, what they are refused for, streams and text."""

import re

import pytest
from test_models import small

from mor_ext.inference import Engine, SamplingParams
from mor_ext.models.config import CHOICES

pytestmark = pytest.mark.usefixtures("one_thread")


class Letters:
    """A tokenizer of 50 letters."""

    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX"

    def encode(self, text: str) -> list[int]:
        return [self.letters.index(letter) for letter in text]

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(self.letters[token] for token in tokens)


@pytest.fixture
def engine(seed: int) -> Engine:
    model = small("expert_choice", "recursion_wise", eos_token_id=4)
    return Engine(model, Letters(), max_batch=4, num_blocks=400, token_budget=16)


def greedy(new: int, **fields) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True, **fields)


def one(engine: Engine, prompt, params: SamplingParams):
    (result,) = engine.generate([prompt], params, progress=False)
    return result


# ---- the end ----


def test_text_goes_in_and_out(engine):
    result = one(engine, "hello", greedy(9))
    assert result.prompt == Letters().encode("hello") and len(result.tokens) == 9
    assert result.text == Letters().decode(result.tokens)
    assert (result.finish_reason, result.error) == ("length", None)
    assert 0 < result.first_token_seconds <= result.seconds


def test_a_stop_token_ends_a_continuation(engine):
    free = one(engine, "hello", greedy(9))
    token = free.tokens[4]
    stopped = one(engine, "hello", greedy(9, stop_token_ids=(token,)))
    end = free.tokens.index(token)
    assert stopped.finish_reason == "stop" and stopped.tokens == free.tokens[: end + 1]
    assert stopped.text == free.text[:end]


def test_the_end_of_sequence_ends_a_continuation(engine):
    free = one(engine, "hello", greedy(20))
    engine.eos = frozenset(free.tokens[3:4])
    params = SamplingParams(max_new_tokens=20, temperature=0)
    result = one(engine, "hello", params)
    assert result.tokens == free.tokens[: free.tokens.index(free.tokens[3]) + 1]
    assert result.finish_reason == "stop"


def test_a_stop_string_over_several_tokens_is_cut(engine):
    free = one(engine, "hello", greedy(12))
    stop = free.text[5:8]
    result = one(engine, "hello", greedy(12, stop=("no such", stop)))
    end = free.text.index(stop)
    assert result.finish_reason == "stop" and result.text == free.text[:end]
    assert result.tokens == free.tokens[: end + 3]


def test_unlimited_requests_end_with_the_positions(engine):
    result = one(engine, "hello", greedy(None))
    assert len(result.tokens) == 64 - 5 and result.finish_reason == "length"


# ---- streams and steps ----


def test_a_stream_gives_the_tokens_and_the_text(engine):
    expected = one(engine, "hello", greedy(12, logprobs=0))
    stream = engine.stream("hello", greedy(12, logprobs=0))
    tokens = []
    while True:
        try:
            tokens.append(next(stream))
        except StopIteration as end:
            result = end.value
            break
    assert [t.token for t in tokens] == expected.tokens == result.tokens
    assert [t.logprob for t in tokens] == expected.logprobs
    assert "".join(t.text for t in tokens) == expected.text


def test_a_stream_never_shows_what_a_stop_string_cuts(engine):
    free = one(engine, "hello", greedy(12))
    stop = free.text[6:9]
    text = "".join(t.text for t in engine.stream("hello", greedy(12, stop=(stop,))))
    assert text == free.text[: free.text.index(stop)]


def test_streams_run_side_by_side_with_other_requests(engine):
    other = engine.submit("world", greedy(30))
    alone = one(engine, "hello", greedy(5))
    first, second = (engine.stream("hello", greedy(5)) for _ in range(2))
    assert [t.token for pair in zip(first, second, strict=True) for t in pair][::2] == alone.tokens
    results = []
    while engine.busy:
        results += engine.step()
    assert [result.request for result in results] == [other]


def test_a_closed_stream_is_cancelled(engine):
    stream = engine.stream("hello", greedy(50))
    next(stream)
    stream.close()
    assert engine.requests == {}
    engine.step()
    assert engine.statistics().blocks_used == 0


def test_an_interrupted_batch_leaves_nothing_behind(engine, monkeypatch):
    advance, steps = engine._advance, iter(range(3))

    def interrupted() -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        advance()

    monkeypatch.setattr(engine, "_advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(["hello", "world"], greedy(9), progress=False)
    monkeypatch.undo()
    assert not engine.busy
    engine.step()
    assert engine.statistics().blocks_used == 0


def test_a_cancelled_request_keeps_what_it_has(engine):
    free = one(engine, "hello", greedy(12))
    number = engine.submit("hello", greedy(12))
    while len(engine.requests[number].tokens) < 3:
        engine.step()
    result = engine.cancel(number)
    assert result.finish_reason == "cancelled"
    assert result.tokens == free.tokens[:3] and result.depth == free.depth[: len(result.depth)]
    assert len(result.depth) >= 7
    assert engine.cancel(number) is None and not engine.busy
    waiting = engine.cancel(engine.submit("hello", greedy(3)))
    assert waiting.tokens == [] and waiting.depth == []
    engine.step()
    assert engine.statistics().blocks_used == 0


def test_an_interrupted_call_leaves_nothing_behind(engine, monkeypatch):
    """Not even the result of a request that has just ended."""
    advance = engine._advance

    def advance_and_interrupt() -> None:
        advance()
        if engine.finished:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_advance", advance_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(["hello", "there"], [greedy(2), greedy(9)], progress=False)
    with pytest.raises(KeyboardInterrupt):
        list(engine.stream("hello", greedy(2)))
    assert engine.finished == [] and engine.requests == {} and not engine.busy


def test_a_request_cancelled_while_it_waits_again_has_its_tokens_and_no_depths(seed):
    model = small("none", "recursion_wise")
    lanes = sum(len(s.block.layers) * s.num_recursions for s in model.stages)
    engine = Engine(model, max_batch=2, num_blocks=3 * lanes)
    first, second = (engine.submit([i], greedy(32)) for i in (1, 2))
    while engine.statistics().preemptions == 0:
        engine.step()
    tokens = list(engine.requests[second].tokens)
    result = engine.cancel(second)
    assert result.tokens == tokens != [] and result.depth == []
    while engine.busy:
        results = engine.step()
    assert results[0].request == first and len(results[0].tokens) == 32


def test_priorities_go_first(seed):
    model = small("none", "shared")
    engine = Engine(model, max_batch=1, num_blocks=400, token_budget=8)
    order = [engine.submit([1, 2], greedy(3), priority=p) for p in (0, 0, 2, 1)]
    finished = []
    while engine.busy:
        finished += [result.request for result in engine.step()]
    assert finished == [order[i] for i in (2, 3, 0, 1)]


# ---- errors ----


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        ("", {}, "prompt must have at least one token, got none"),
        ([1, 50], {}, r"prompt must have tokens in \[0, 50\), got 50"),
        ([-1], {}, r"prompt must have tokens in \[0, 50\), got -1"),
        ([1] * 60, {}, "prompt must have at most 54 tokens to be continued by 10, got 60"),
        ([1] * 64, {"max_new_tokens": None}, "at most 63 tokens to be continued by 1, got 64"),
    ],
)
def test_bad_requests_end_with_an_error_and_the_others_go_on(engine, prompt, fields, message):
    bad = SamplingParams(**({"max_new_tokens": 10} | fields))
    good, refused = engine.generate(["hello", prompt], [greedy(10), bad], progress=False)
    assert good.error is None and len(good.tokens) == 10
    assert refused.finish_reason == "error" and refused.tokens == []
    assert re.search(message, refused.error)


def test_a_cache_too_small_for_one_request_refuses_that_one(seed):
    model = small("none", "recursion_wise")  # 8 unrolled layers
    engine = Engine(model, max_batch=2, num_blocks=16, token_budget=8)
    small_one, large = engine.generate([[1] * 20, [1] * 20], [greedy(13), greedy(14)], False)
    assert len(small_one.tokens) == 13
    assert re.search("into a cache of 16 blocks, got 20 and 14 tokens", large.error)


@pytest.mark.parametrize("kv_strategy", CHOICES["kv_strategy"])
def test_nan_ends_its_own_request_alone(kv_strategy, seed):
    """Also of those that get its blocks later, or its slots."""
    model = small("expert_choice", kv_strategy, tie_word_embeddings=False)
    clean = Engine(model, max_batch=2, num_blocks=40, token_budget=8)
    prompts = [[1, 2, 3], [4] * 20, [5, 6]]
    expected = clean.generate(prompts, greedy(6), progress=False)
    used = {token for result in expected for token in result.prompt + result.tokens}
    bad = min(set(range(50)) - used)
    model.embed_tokens.weight.data[bad] = float("nan")
    engine = Engine(model, max_batch=2, num_blocks=40, token_budget=8)
    poisoned = [prompts[0], [3, bad], [bad] * 20, prompts[1], [3, 3, bad], prompts[2]]
    results = engine.generate(poisoned, greedy(6), progress=False)
    for result in (results[1], results[2], results[4]):
        assert (result.finish_reason, result.tokens) == ("error", [])
        assert result.error == "logits must be numbers, got NaN"
    assert [results[i].tokens for i in (0, 3, 5)] == [result.tokens for result in expected]
    assert engine.statistics().blocks_used == 0


def test_strings_need_a_tokenizer(seed):
    engine = Engine(small("none", "shared"), num_blocks=400)
    prompts = ["hello", [1, 2]]
    params = [greedy(3), greedy(3, stop=("x",))]
    first, second = engine.generate(prompts, params, progress=False)
    assert "prompt must be tokens for an engine without a tokenizer" in first.error
    assert "stop must be empty for an engine without a tokenizer" in second.error


def test_a_model_without_a_causal_rule_is_refused():
    with pytest.warns(UserWarning, match="no causal rule"):
        model = small("expert_choice", "shared", causal_rule="none")
    with pytest.raises(ValueError, match="model must have a causal rule, got causal_rule 'none'"):
        Engine(model)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"token_budget": 2}, "token_budget must be at least max_batch, got 2"),
        ({"num_blocks": -1}, r"num_blocks must be in \[0, .*\], got -1"),
    ],
)
def test_bad_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Engine(small("none", "shared"), **sizes)


def test_memory_is_divided_into_blocks(seed):
    model = small("none", "recursion_wise")
    block = 2 * 16 * 2 * 8 * 8  # key and value, entries, heads, head_dim, bytes
    engine = Engine(model, memory=10 * block + 5)
    assert (engine.statistics().blocks, engine.statistics().block_bytes) == (10, block)
    assert Engine(model, max_batch=2).statistics().blocks == 2 * 4 * 8  # 64 positions, 8 layers


def test_progress_is_shown(engine, capsys):
    engine.generate(["hello", "world"], greedy(3))
    assert "2/2" in capsys.readouterr().err
