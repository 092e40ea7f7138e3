"""Sampling: each row by its own parameters, and as often as its probabilities say."""

import pytest
import torch
from torch import Tensor

from mor_ext.inference.sampling import SamplingParams, sample

VOCAB = 12


def tokens_of(logits: Tensor, params: SamplingParams, count: int, seen=()) -> Tensor:
    """Of one row of logits, at evenly spread numbers: int64 [count]."""
    uniform = [(i + 0.5) / count for i in range(count)]
    rows = logits.expand(count, -1)
    return torch.tensor(sample(rows, [params] * count, uniform, [seen] * count).tokens)


def frequencies(logits: Tensor, params: SamplingParams, seen=()) -> Tensor:
    return tokens_of(logits, params, 4000, seen).bincount(minlength=len(logits)) / 4000


def assert_frequencies(logits: Tensor, params: SamplingParams, expected: Tensor, seen=()) -> None:
    expected = expected / expected.sum()
    actual = frequencies(logits, params, seen).to(expected.dtype)
    torch.testing.assert_close(actual, expected, atol=1 / 2000, rtol=0)
    assert not actual[expected == 0].any()


def test_temperature_zero_takes_the_most_likely(seed):
    logits = torch.randn(5, VOCAB)
    result = sample(logits, [SamplingParams(temperature=0)] * 5, [0.9] * 5, [()] * 5)
    assert result.tokens == logits.argmax(1).tolist() and result.valid == [True] * 5


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_frequencies_are_the_probabilities(temperature, seed):
    logits = torch.randn(VOCAB).double()
    params = SamplingParams(temperature=temperature)
    assert_frequencies(logits, params, (logits / temperature).softmax(0))


def test_top_k_keeps_the_most_likely(seed):
    logits = torch.randn(VOCAB).double()
    kept = logits >= logits.sort(descending=True).values[3]
    assert_frequencies(logits, SamplingParams(top_k=4), logits.softmax(0) * kept)
    assert_frequencies(logits, SamplingParams(top_k=VOCAB + 5), logits.softmax(0))


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9])
def test_top_p_keeps_the_fewest_that_have_it_together(top_p, seed):
    logits = torch.randn(VOCAB).double()
    weights, order = logits.softmax(0).sort(descending=True)
    count = int((weights.cumsum(0) < top_p).sum()) + 1
    kept = torch.zeros(VOCAB).index_fill(0, order[:count], 1)
    assert_frequencies(logits, SamplingParams(top_p=top_p), logits.softmax(0) * kept)


def test_min_p_keeps_those_near_the_most_likely(seed):
    logits = torch.randn(VOCAB).double()
    weights = logits.softmax(0)
    kept = weights >= 0.3 * weights.max()
    assert_frequencies(logits, SamplingParams(min_p=0.3), weights * kept)
    assert_frequencies(logits, SamplingParams(min_p=0.3, top_k=VOCAB), weights * kept)


def test_the_repetition_penalty_is_that_of_its_paper(seed):
    logits = torch.tensor([2.0, -1.0, 0.5, 0.0]).double()
    expected = torch.tensor([2.0 / 1.5, -1.0 * 1.5, 0.5, 0.0]).double().softmax(0)
    assert_frequencies(logits, SamplingParams(repetition_penalty=1.5), expected, seen=[1, 0, 1])
    assert logits[0] == 2.0  # the model's logits are left alone


def test_small_temperatures_and_large_logits_stay_finite():
    logits = torch.tensor([1e4, 1e4 - 1, -1e4])
    assert set(tokens_of(logits, SamplingParams(temperature=1e-3), 50).tolist()) == {0}


def test_impossible_tokens_are_never_sampled(seed):
    logits = torch.randn(VOCAB).masked_fill(torch.arange(VOCAB) >= 9, -torch.inf)
    for params in (SamplingParams(), SamplingParams(top_p=0.999), SamplingParams(top_k=11)):
        rows = logits.expand(2, -1)
        tokens = sample(rows, [params] * 2, [0.0, 1 - 2**-53], [()] * 2).tokens
        assert all(token < 9 for token in tokens)


def test_a_row_does_not_depend_on_its_batch(seed):
    logits = torch.randn(6, VOCAB)
    params = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_k=3, temperature=0.7),
        SamplingParams(top_p=0.6, min_p=0.1),
        SamplingParams(min_p=0.2, repetition_penalty=2.0),
        SamplingParams(temperature=5.0, logprobs=2),
    ]
    uniform, seen = torch.rand(6).tolist(), [[i, 2 * i] for i in range(6)]
    together = sample(logits, params, uniform, seen)
    for i in range(6):
        alone = sample(logits[i : i + 1], params[i : i + 1], uniform[i : i + 1], seen[i : i + 1])
        assert alone.tokens == together.tokens[i : i + 1]


def test_logprobs_are_the_models_own(seed):
    logits = torch.randn(3, VOCAB)
    params = [SamplingParams(temperature=0.1, top_k=2, logprobs=n) for n in (0, 2, 5)]
    result = sample(logits, params, [0.5] * 3, [()] * 3)
    expected = logits.log_softmax(1)
    picked = expected[range(3), result.tokens]
    torch.testing.assert_close(torch.tensor(result.logprobs), picked)
    for row, top in enumerate(result.top):
        values, index = expected[row].topk(5)
        assert list(top) == index.tolist()
        torch.testing.assert_close(torch.tensor(list(top.values())), values)
    assert sample(logits, [SamplingParams()] * 3, [0.5] * 3, [()] * 3).logprobs is None


def test_rows_with_nan_are_told(seed):
    logits = torch.randn(3, VOCAB)
    logits[1, 4] = float("nan")
    params = [SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(temperature=0)]
    result = sample(logits, params, [0.5] * 3, [()] * 3)
    assert result.valid == [True, False, True]


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("max_new_tokens", 0, ">= 1"),
        ("temperature", -0.1, ">= 0"),
        ("temperature", float("nan"), ">= 0"),
        ("top_k", -1, ">= 0"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("min_p", 1.5, r"in \[0, 1\]"),
        ("repetition_penalty", 0.0, "> 0"),
        ("stop", "abc", "non-empty strings"),
        ("stop", ("a", ""), "non-empty strings"),
        ("logprobs", -1, ">= 0"),
    ],
)
def test_bad_parameters_are_refused(field, value, rule):
    with pytest.raises(ValueError, match=f"{field} must be {rule}, got"):
        SamplingParams(**{field: value})
