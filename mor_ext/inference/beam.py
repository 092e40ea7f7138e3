"""Beam search: the continuations of a prompt that are likely as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mor_ext.inference.engine import Engine, Prompt
from mor_ext.inference.request import Result
from mor_ext.inference.sampling import SamplingParams


@dataclass(frozen=True)
class Beam:
    """A continuation.

    Attributes:
        logprob: of all its tokens together.
        depth: as a request's result has it, of the prompt and of the tokens but the last.
    """

    tokens: list[int] = field(default_factory=list)
    logprob: float = 0.0
    depth: list[int] = field(default_factory=list)
    stopped: bool = False  # by an end of sequence

    def score(self, length_penalty: float) -> float:
        return self.logprob / len(self.tokens) ** length_penalty


def beam_search(
    engine: Engine,
    prompts: Sequence[Prompt],
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
) -> list[list[Beam]]:
    """The best continuations found of each prompt, the best by ``logprob / tokens **
    length_penalty`` first.

    The rules are those of ``generate(num_beams=beams)`` of transformers. In each step every beam is
    a request of the engine for one token; it takes over the K/V of the beam that it continues, so
    that what beams have in common is there once, and nothing is computed twice but prompts of
    fewer than 16 tokens. Other requests go on meanwhile; where requests wait for their turn, so
    does each step of a beam.

    Args:
        early_stopping: True ends as soon as there are as many complete continuations as beams.
            False does if, in addition, none that runs is better by its present length, and "never"
            if none can become better.

    Raises:
        ValueError: an argument is out of range, or a prompt cannot be served.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping must be True, False or 'never', got {early_stopping!r}")
    searches = []
    for prompt in prompts:
        ids = engine.encoded(prompt)
        engine.checked(ids, SamplingParams(max_new_tokens=max_new_tokens))
        searches.append(
            Search(ids, beams, max_new_tokens, length_penalty, early_stopping, engine.eos)
        )
    while running := [search for search in searches if search.running]:
        ahead = [search.prompt + beam.tokens for search in running for beam in search.running]
        params = [search.params for search in running for _ in search.running]
        results = iter(engine.generate(ahead, params, progress=False))
        for search in running:
            search.step([next(results) for _ in search.running])
    return [search.complete for search in searches]


@dataclass
class Search:
    """Of the continuations of one prompt.

    Attributes:
        complete: the best that have ended, the best first.
        running: the likeliest that go on, the likeliest first; all of one length.
    """

    prompt: list[int]
    beams: int
    max_new_tokens: int
    length_penalty: float
    early_stopping: bool | str
    eos: frozenset[int]
    complete: list[Beam] = field(default_factory=list)
    running: list[Beam] = field(default_factory=lambda: [Beam()])

    def __post_init__(self) -> None:
        # As many candidates as leave enough that go on, whichever end.
        self.width = max(2, 1 + len(self.eos)) * self.beams
        self.params = SamplingParams(1, temperature=0, logprobs=self.width, ignore_eos=True)

    def step(self, results: Iterable[Result]) -> None:
        """results: of a request for the next token of each running beam."""
        best = self._candidates(results)
        length = len(best[0].tokens)
        last = length == self.max_new_tokens
        ended = [beam for beam in best[: self.beams] if beam.stopped or last]
        by_score = sorted(self.complete + ended, key=lambda b: -b.score(self.length_penalty))
        self.complete = by_score[: self.beams]
        self.running = [beam for beam in best if not (beam.stopped or last)][: self.beams]
        if self._is_over(length):
            self.running = []

    def _candidates(self, results: Iterable[Result]) -> list[Beam]:
        """Running beams with one token more."""
        found = []
        for beam, result in zip(self.running, results, strict=True):
            if result.error is not None:
                raise ValueError(result.error)
            assert result.top_logprobs is not None
            for token, logprob in result.top_logprobs[0].items():
                tokens = [*beam.tokens, token]
                found.append(Beam(tokens, beam.logprob + logprob, result.depth, token in self.eos))
        return sorted(found, key=lambda beam: -beam.logprob)[: self.width]

    def _is_over(self, length: int) -> bool:
        if len(self.complete) < self.beams or not self.running:
            return not self.running
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_new_tokens
        possible = self.running[0].logprob / length**self.length_penalty
        worst = self.complete[-1].score(self.length_penalty)
        return self.early_stopping is True or possible <= worst
