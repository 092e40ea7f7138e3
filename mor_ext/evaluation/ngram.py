"""What counting makes of a text: n-gram tables, the least that a language model should beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
UNSEEN = -1


@dataclass
class Score:
    """What a table makes of a text; the NLL is in nats a token."""

    order: int
    accuracy: float
    nll: float


@dataclass
class _Level:
    """The contexts of one length that occur in the training text, and what followed them.

    A context is a number: its place in ``contexts``, which holds ``parent * vocab_size + token``:
    the context without its oldest token, and that token. So no number is larger than
    ``tokens * vocab_size``, whatever the order.
    """

    contexts: Ints  # [contexts], ascending
    pairs: Ints  # [pairs], ascending: context * vocab_size + next token
    pair_counts: Ints  # [pairs]
    counts: Ints  # [contexts]: how often
    kinds: Ints  # [contexts]: how many different tokens followed
    favourites: Ints  # [contexts]: the token that followed most often, of equals the lowest


class NGramTable:
    """Counts of all n-grams up to an order; a shorter one serves where a longer is unseen.

    The prediction is the most frequent token after the longest context that was seen in training.
    The probability is interpolated as by Witten and Bell (1991): with a context h seen c(h) times
    and followed by t(h) different tokens, p(w | h) = (c(h, w) + t(h) p(w | h')) / (c(h) + t(h)),
    where h' is h without its oldest token; an unseen h gives p(w | h'), and below all is
    1 / vocab_size.
    Nothing is tuned, and every token has a probability above 0.

    Args:
        tokens: ids to count, any integers ``[total]`` that numpy reads (a tensor too).
        order: 1 counts tokens, 2 is a bigram table, and so on.
        vocab_size: ids are below it.

    Raises:
        ValueError: no tokens, ids out of range, an order below 1.
    """

    def __init__(self, tokens: Any, order: int, vocab_size: int) -> None:
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        self.order, self.vocab_size = order, vocab_size
        ids = self._checked(tokens)
        self.levels: list[_Level] = []
        context = np.zeros_like(ids)
        for length in range(order):
            if length:
                context = self._longer(ids, context, length)
            known = context != UNSEEN
            contexts, context[known] = np.unique(context[known], return_inverse=True)
            self.levels.append(self._count(contexts, context[known], ids[known]))

    def score(self, tokens: Any) -> list[Score]:
        """Every order's score on a text, whose first tokens have shorter contexts."""
        ids = self._checked(tokens)
        context = np.zeros_like(ids)
        guess = np.zeros_like(ids)
        probability = np.full(len(ids), 1 / self.vocab_size)
        scores = []
        for length, level in enumerate(self.levels):
            if length:
                context = self._longer(ids, context, length)
            context = _places(level.contexts, context)
            known = context != UNSEEN
            own, token = context[known], ids[known]
            guess[known] = level.favourites[own]
            pair = _places(level.pairs, own * self.vocab_size + token)
            seen = np.where(pair == UNSEEN, 0, level.pair_counts[pair])
            kinds, count = level.kinds[own], level.counts[own]
            probability[known] = (seen + kinds * probability[known]) / (count + kinds)
            accuracy, nll = np.mean(guess == ids), -np.mean(np.log(probability))
            scores.append(Score(length + 1, float(accuracy), float(nll)))
        return scores

    def _checked(self, tokens: Any) -> Ints:
        ids = np.asarray(tokens).astype(np.int64)
        if ids.ndim != 1 or not len(ids):
            raise ValueError(f"tokens must be [total] and not empty, got shape {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(
                f"tokens must be from 0 to {self.vocab_size - 1}, got {ids.min()} to {ids.max()}"
            )
        return ids

    def _longer(self, ids: Ints, context: Ints, length: int) -> Ints:
        """Contexts of ``length`` tokens, not numbered yet, from those of one less."""
        longer = np.full_like(context, UNSEEN)
        longer[length:] = context[length:] * self.vocab_size + ids[: max(0, len(ids) - length)]
        longer[context == UNSEEN] = UNSEEN
        return longer

    def _count(self, contexts: Ints, context: Ints, token: Ints) -> _Level:
        pairs, pair_counts = np.unique(context * self.vocab_size + token, return_counts=True)
        owner = pairs // self.vocab_size
        favourites = np.zeros_like(contexts)
        ascending = np.lexsort((-pairs, pair_counts))  # the last to be written stays
        favourites[owner[ascending]] = pairs[ascending] % self.vocab_size
        counts = np.bincount(context, minlength=len(contexts))
        kinds = np.bincount(owner, minlength=len(contexts))
        return _Level(contexts, pairs, pair_counts, counts, kinds, favourites)


def _places(table: Ints, values: Ints) -> Ints:
    """Where each value is in an ascending table, or UNSEEN."""
    if not len(table):
        return np.full_like(values, UNSEEN)
    places = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return np.where(table[places] == values, places, UNSEEN)


def ngram_scores(train: Any, held_out: Any, vocab_size: int, order: int = 5) -> list[Score]:
    """The scores on ``held_out`` of the tables of order 1 to ``order`` that count ``train``."""
    return NGramTable(train, order, vocab_size).score(held_out)
