"""N-gram tables: against counting by hand and by dictionaries, and the known figures of a text."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from mor_ext.evaluation.ngram import NGramTable, ngram_scores

SHAKESPEARE = Path(__file__).parents[2] / "shared/data/tinyshakespeare/input.txt"


def by_dictionaries(
    train: list[int], held_out: list[int], vocab_size: int, order: int
) -> tuple[float, float]:
    """Accuracy and NLL by the definitions, one token after the other."""
    tables: list[dict[tuple, Counter]] = [defaultdict(Counter) for _ in range(order)]
    for length, table in enumerate(tables):
        for i in range(length, len(train)):
            table[tuple(train[i - length : i])][train[i]] += 1
    right, nll = 0, 0.0
    for i, token in enumerate(held_out):
        probability, guess = 1 / vocab_size, 0
        for length in range(min(order - 1, i) + 1):
            found = tables[length].get(tuple(held_out[i - length : i]))
            if found:
                kinds = len(found)
                probability = (found[token] + kinds * probability) / (found.total() + kinds)
                guess = min(found, key=lambda t: (-found[t], t))
        right += guess == token
        nll -= math.log(probability)
    return right / len(held_out), nll / len(held_out)


@pytest.mark.parametrize("vocab_size", [2, 7, 50_000])
def test_scores_are_those_of_dictionaries(seed, vocab_size):
    train = torch.randint(vocab_size, (500,)) % 11
    held_out = torch.randint(vocab_size, (200,)) % 12
    held_out = held_out.clamp(max=vocab_size - 1)
    scores = ngram_scores(train, held_out, vocab_size, order=5)
    assert [score.order for score in scores] == [1, 2, 3, 4, 5]
    for score in scores:
        accuracy, nll = by_dictionaries(train.tolist(), held_out.tolist(), vocab_size, score.order)
        assert score.accuracy == pytest.approx(accuracy)
        assert score.nll == pytest.approx(nll)


def test_bigram_by_hand():
    """Of 0 1 0 1 1: after 0 always 1; after 1 once 0, once 1, and of equals the lower wins."""
    unigram, bigram = ngram_scores([0, 1, 0, 1, 1], [0, 1, 0], vocab_size=2, order=2)
    one = (3 + 2 * 0.5) / (5 + 2)
    zero = 1 - one
    assert unigram.nll == pytest.approx(-math.log(zero * one * zero) / 3)
    assert unigram.accuracy == pytest.approx(1 / 3)
    after_0, after_1 = (2 + 1 * one) / (2 + 1), (1 + 2 * zero) / (2 + 2)
    assert bigram.nll == pytest.approx(-math.log(zero * after_0 * after_1) / 3)
    assert bigram.accuracy == pytest.approx(2 / 3)


def test_probabilities_sum_to_one(seed):
    """The last token of a text, as every token that there is."""
    train, start = torch.randint(9, (300,)), torch.randint(9, (4,))
    table = NGramTable(train, 4, vocab_size=9)
    nll = [
        [score.nll * 5 for score in table.score(torch.cat([start, torch.tensor([token])]))]
        for token in range(9)
    ]
    before = [score.nll * 4 for score in table.score(start)]
    np.testing.assert_allclose(np.exp(-(np.array(nll) - before)).sum(axis=0), 1, rtol=1e-9)


def test_texts_shorter_than_the_order():
    scores = ngram_scores([3], [3, 3, 1], vocab_size=4, order=6)
    assert [score.accuracy for score in scores] == pytest.approx([2 / 3] * 6)
    assert scores[5].nll == scores[1].nll


@pytest.mark.parametrize(
    "tokens, order, message",
    [
        ([], 2, r"tokens must be \[total\] and not empty, got shape \[0\]"),
        ([[1, 2]], 2, r"got shape \[1, 2\]"),
        ([0, 4], 2, "tokens must be from 0 to 3, got 0 to 4"),
        ([-1, 2], 2, "tokens must be from 0 to 3, got -1 to 2"),
        ([1, 2], 0, "order must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(tokens, order, message):
    with pytest.raises(ValueError, match=message):
        NGramTable(tokens, order, vocab_size=4)


@pytest.fixture(scope="module")
def shakespeare() -> np.ndarray:
    if not SHAKESPEARE.exists():
        pytest.skip("no Tiny Shakespeare beside the repository")
    return np.frombuffer(SHAKESPEARE.read_bytes(), np.uint8)


def test_known_figures_of_tiny_shakespeare(shakespeare):
    train, held_out = np.array_split(shakespeare, 2)
    accuracy = [100 * score.accuracy for score in ngram_scores(train, held_out, 256, order=6)]
    assert accuracy == pytest.approx([15.25, 26.63, 38.41, 46.72, 50.68, 51.45], abs=0.01)
    bigram = ngram_scores(shakespeare, shakespeare, 256, order=2)[1]
    assert 100 * bigram.accuracy == pytest.approx(27.1, abs=0.05)


def test_the_four_character_table_without_back_off(shakespeare):
    """What is cited as 48.8 %: four characters of context, a space where they are unseen."""
    text = shakespeare.tobytes().decode()
    half = len(text) // 2
    table: dict[str, Counter] = defaultdict(Counter)
    for i in range(4, half):
        table[text[i - 4 : i]][text[i]] += 1
    best = {context: found.most_common(1)[0][0] for context, found in table.items()}
    right = sum(best.get(text[i - 4 : i], " ") == text[i] for i in range(half + 4, len(text)))
    assert 100 * right / (len(text) - half - 4) == pytest.approx(48.8, abs=0.05)
