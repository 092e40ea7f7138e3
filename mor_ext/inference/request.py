"""A request to the engine: from its submission to its result."""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

from mor_ext.inference.sampling import SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]
INCOMPLETE = "\ufffd"  # what a character decodes to of which bytes are still to come


@dataclass(frozen=True)
class Token:
    """A token as it comes."""

    request: int
    token: int
    text: str  # that it completes; empty without a tokenizer
    logprob: float | None


@dataclass
class Result:
    """What became of a request.

    Attributes:
        tokens: the continuation, a stop token included, what a stop string has ended not cut.
        text: the continuation without the stop token or string; None without a tokenizer.
        depth: how many passes through shared blocks each token took, of the prompt and of the
            continuation but its last token, which the model has not seen. Of a cancelled request
            only what the model had done by then: nothing if it waited, or waited again.
        logprobs, top_logprobs: if asked for, of the tokens, and of the most likely ones.
        seconds, first_token_seconds: since the submission.
    """

    request: int
    prompt: list[int]
    tokens: list[int]
    text: str | None
    finish_reason: FinishReason
    error: str | None
    depth: list[int]
    logprobs: list[float] | None
    top_logprobs: list[dict[int, float]] | None
    seconds: float
    first_token_seconds: float | None


@dataclass
class Request:
    number: int
    prompt: list[int]
    params: SamplingParams
    tokenizer: Any = None
    stop_tokens: frozenset[int] = frozenset()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    events: deque[Token] | None = None  # if it is streamed
    submitted: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    text: str = ""
    streamed: int = 0  # characters of the text
    ended_by: str | None = None  # the stop string

    def __post_init__(self) -> None:
        self.random = random.Random(self.params.seed)

    @property
    def wants_text(self) -> bool:
        return self.tokenizer is not None and bool(self.params.stop or self.events is not None)

    def add(self, token: int) -> FinishReason | None:
        """Takes in the next token; a reason if it is the last."""
        if self.first_token is None:
            self.first_token = time.perf_counter()
        self.tokens.append(token)
        if self.wants_text:
            self._decode()
        if token in self.stop_tokens or self.ended_by is not None:
            return "stop"
        return "length" if len(self.tokens) == self.params.max_new_tokens else None

    def _decode(self) -> None:
        self.text = self.tokenizer.decode(self._spoken(), skip_special_tokens=True)
        found = [(self.text.find(stop), stop) for stop in self.params.stop if stop in self.text]
        if found:
            end, self.ended_by = min(found)
            self.text = self.text[:end]

    def _spoken(self) -> list[int]:
        last = len(self.tokens) - 1 if self.tokens and self.tokens[-1] in self.stop_tokens else None
        return self.tokens[:last]

    def emit(self, finished: bool) -> None:
        """The newest token to whoever streams, with the text that is sure to stay."""
        if self.events is None:
            return
        end = len(self.text) if finished else self._settled()
        piece = self.text[self.streamed : end]
        self.streamed = max(self.streamed, end)
        logprob = self.logprobs[-1] if self.logprobs else None
        self.events.append(Token(self.number, self.tokens[-1], piece, logprob))

    def _settled(self) -> int:
        """The length of the text but for what may be the start of a stop string or of a character
        that is not complete."""
        text = self.text.rstrip(INCOMPLETE)
        starts = [stop[:n] for stop in self.params.stop for n in range(1, len(stop))]
        return len(text) - max((len(s) for s in starts if text.endswith(s)), default=0)

    def result(self, reason: FinishReason, depth: list[int], error: str | None = None) -> Result:
        text = None
        if self.tokenizer is not None:
            if not self.wants_text:
                self._decode()
            text = self.text
        started = self.first_token
        wants = self.params.logprobs is not None
        return Result(
            request=self.number,
            prompt=self.prompt,
            tokens=self.tokens,
            text=text,
            finish_reason=reason,
            error=error,
            depth=depth,
            logprobs=self.logprobs if wants else None,
            top_logprobs=self.top_logprobs if wants else None,
            seconds=time.perf_counter() - self.submitted,
            first_token_seconds=None if started is None else started - self.submitted,
        )
