"""Beam search: the continuations of a prompt that are likely as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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

    tokens: list[int]
    logprob: float
    depth: list[int]
    stopped: bool = False  # by an end of sequence

    def score(self, length_penalty: float) -> float:
        return self.logprob / max(1, len(self.tokens)) ** length_penalty


def beam_search(
    engine: Engine,
    prompt: Prompt,
    beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
) -> list[Beam]:
    """The best continuations found, best first, by ``logprob / tokens ** length_penalty``.

    The rules are those of ``generate(num_beams=beams)`` of transformers. In each step every beam is
    a request of the engine for one token; it takes over the K/V of the beam that it continues, so
    that what beams have in common is there once, and nothing is computed twice but prompts of
    fewer than 16 tokens. Other requests go on meanwhile.

    Args:
        early_stopping: True ends as soon as there are as many complete continuations as beams.
            False does if, in addition, none that runs is better by its present length, and "never"
            if none can become better.

    Raises:
        ValueError: beams is less than 1, or the prompt cannot be served.
    """
    if beams < 1:
        raise ValueError(f"beams must be at least 1, got {beams}")
    ids = engine.encoded(prompt)
    engine.checked(ids, SamplingParams(max_new_tokens=max_new_tokens))
    # As many candidates as leave enough that go on, whichever end.
    width = max(2, 1 + len(engine.eos)) * beams
    params = SamplingParams(1, temperature=0, logprobs=width, ignore_eos=True)
    running, complete = [Beam([], 0.0, [])], list[Beam]()
    for length in range(1, max_new_tokens + 1):
        results = engine.generate([ids + beam.tokens for beam in running], params, progress=False)
        best = candidates(running, results, engine.eos)[:width]
        ends = [beam.stopped or length == max_new_tokens for beam in best]
        complete += [beam for beam, end in zip(best[:beams], ends, strict=False) if end]
        complete = sorted(complete, key=lambda beam: -beam.score(length_penalty))[:beams]
        running = [beam for beam, end in zip(best, ends, strict=True) if not end][:beams]
        if not running or (len(complete) == beams and early_stopping is True):
            break
        longest = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
        possible = running[0].logprob / longest**length_penalty
        if len(complete) == beams and possible <= complete[-1].score(length_penalty):
            break
    return complete


def candidates(
    running: Iterable[Beam], results: Iterable[Result], eos: frozenset[int]
) -> list[Beam]:
    """Beams with one token more, best first."""
    found = []
    for beam, result in zip(running, results, strict=True):
        if result.top_logprobs is None or result.error is not None:
            raise ValueError(result.error)
        for token, logprob in result.top_logprobs[0].items():
            tokens = [*beam.tokens, token]
            found.append(Beam(tokens, beam.logprob + logprob, result.depth, token in eos))
    return sorted(found, key=lambda beam: -beam.logprob)
