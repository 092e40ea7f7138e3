"""Continuous depth-wise batching: requests at different depths share each pass of a block."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mor_ext._engine import BLOCK_SIZE, Scheduler
from mor_ext.inference.graphs import CudaGraphs
from mor_ext.inference.lock import FairLock
from mor_ext.inference.pool import KVPool
from mor_ext.inference.progress import progress_bar
from mor_ext.inference.recorded import RecordedWalk
from mor_ext.inference.request import FinishReason, Request, Result, Token
from mor_ext.inference.sampling import SamplingParams, sample
from mor_ext.inference.walk import Walk

if TYPE_CHECKING:  # models make caches
    from mor_ext.models import MoRForCausalLM

DEFAULT_MEMORY = 1 << 30  # bytes
Prompt = str | Sequence[int]


@dataclass(frozen=True)
class Statistics:
    """Of an engine since it was made, and of now."""

    steps: int
    tokens: int  # that went through the model, those of preempted requests again
    shared_tokens: int  # of prompts that were taken over from another request
    preemptions: int
    running: int
    waiting: int
    blocks: int
    blocks_used: int  # by running requests
    blocks_kept: int  # by finished ones alone; they make room when it is needed
    block_bytes: int


class Engine:
    """Generates for any number of requests, each token at the depth that its router chooses.

    A request's result does not depend on what else runs, but for rounding. Requests that cannot be
    served end with an error in their result; the others go on.

    Requests that begin alike share the K/V of what they have in common, so parallel samples are
    requests of the same prompt with different seeds, and the next turn of a chat is a request whose
    prompt begins with the one before and its answer. The K/V of finished requests stay until others
    need the room, those used least recently going first. They are of the model as it was: call
    ``forget`` when its weights or thresholds have changed, while none runs.

    Any thread may call it. One step runs at a time, and who waits comes before the next. ``step``
    hands out whatever has finished, so it is for one loop of a server; ``generate`` and ``stream``
    hand out their own.

    Args:
        model: any with a causal rule; it is put in evaluation mode. On a CPU its linear layers get
            copies of their weights that products of few rows are faster with, see
            :class:`mor_ext.nn.PackedWeight`.
        tokenizer: with ``encode`` and ``decode`` as in transformers; prompts may then be strings.
        max_batch: requests that run at once.
        num_blocks: of the K/V cache, each 16 entries of one layer. None is as many as ``memory``
            bytes hold.
        memory: None is what max_batch sequences of the greatest length take, at most 1 GiB.
        token_budget: tokens in flight at once, and so rows of a pass; long prompts are cut into
            chunks by that. At least max_batch.
        depthwise: a token goes through one depth of a stage in a step, and shares the pass with
            tokens at other depths; False runs every token to its end in each step. None is True
            for models with one stage that recurs, where it keeps the batch full.
        share_prefixes: whether requests take over what they have in common with others.
        cuda_graphs: on CUDA, whether passes are padded to a few sizes, and each recorded when it
            first comes and replayed from then on. False for :func:`mor_ext.set_debug`, whose
            checks wait for the device.

    Raises:
        ValueError: a model without a causal rule, or sizes out of range.
    """

    def __init__(
        self,
        model: MoRForCausalLM,
        tokenizer: Any = None,
        *,
        max_batch: int = 32,
        num_blocks: int | None = None,
        memory: int | None = None,
        token_budget: int | None = None,
        depthwise: bool | None = None,
        share_prefixes: bool = True,
        cuda_graphs: bool = True,
    ) -> None:
        if not model.causal:
            raise ValueError("model must have a causal rule, got causal_rule 'none'")
        self.model = model.eval()
        self.tokenizer = tokenizer
        config, weight = model.config, model.embed_tokens.weight
        stages = [(len(s.block.layers), s.num_recursions) for s in model.recursions()]
        shared = config.kv_strategy == "shared"
        layers = sum(m * (1 if shared else recursions) for m, recursions in stages)
        self.block_bytes = KVPool.block_bytes(config, weight.dtype)
        if num_blocks is None:
            pages = -(-config.max_position_embeddings // BLOCK_SIZE)
            full = max_batch * pages * layers * self.block_bytes
            num_blocks = (min(full, DEFAULT_MEMORY) if memory is None else memory) // (
                self.block_bytes
            )
        if depthwise is None:
            depthwise = sum(recursions > 1 for _, recursions in stages) == 1
        budget = max(256, max_batch) if token_budget is None else token_budget
        assert config.kv_strategy is not None
        self.scheduler = Scheduler(
            stages, config.kv_strategy, num_blocks, max_batch, budget, depthwise, share_prefixes
        )
        self.pool = KVPool(config, num_blocks, weight)
        walk = (model, self.scheduler, self.pool, budget, depthwise)
        if weight.is_cuda and cuda_graphs:
            self.walk: Walk = RecordedWalk(*walk, CudaGraphs(weight.device))
        else:
            self.walk = Walk(*walk)
        eos = config.eos_token_id
        self.eos = frozenset([eos] if isinstance(eos, int) else eos or ())
        self.lock = FairLock()  # of all that follows
        self.requests: dict[int, Request] = {}  # that have not finished
        self.finished: list[Result] = []  # to be handed out
        self.submitted = 0
        self.dropped: list[int] = []  # requests to be cancelled when the lock is free

    # ---- one request ----

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        priority: int = 0,
    ) -> int:
        """Queues a request, and returns its number.

        priority: a request goes before those of one less that came up to 1000 steps earlier.
        """
        return self._queue(prompt, params, priority)

    def _queue(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        priority: int,
        events: deque[Token] | None = None,
    ) -> int:
        params = params or SamplingParams()
        ids: list[int] = []
        error = None
        try:
            ids = self.encoded(prompt)
            params = self.checked(ids, params)
        except ValueError as problem:
            error = str(problem)
        stop = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos)
        with self.lock:
            number, self.submitted = self.submitted, self.submitted + 1
            request = Request(number, ids, params, self.tokenizer, stop, events=events)
            if error is not None:
                self.finished.append(request.result("error", [], error))
            else:
                self.requests[number] = request
                self.scheduler.submit(number, np.array(ids, dtype=np.int32), priority)
        return number

    def fork(self, number: int, params: SamplingParams | None = None, priority: int = 0) -> int:
        """A new request whose prompt is all that a running one has, and whose K/V it shares.

        Raises:
            KeyError: there is no such request, or it has finished.
        """
        with self.lock:
            request = self.requests[number]
            tokens = [*request.prompt, *request.tokens]
        return self.submit(tokens, params, priority)

    def cancel(self, number: int) -> Result | None:
        """Ends a request; its result so far, or None if it has finished."""
        with self.lock:
            request = self.requests.pop(number, None)
            if request is None:
                return None
            depth = self._depth(number)
            self.scheduler.cancel(number)
        return request.result("cancelled", depth)

    def forget(self) -> None:
        """Drops K/V of finished requests, packed weights and graphs; K/V of running ones stay."""
        with self.lock:
            self.scheduler.drop_kept()
            self.walk.forget()

    def encoded(self, prompt: Prompt) -> list[int]:
        """Its tokens; raises ValueError for a string if there is no tokenizer."""
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ValueError(
                "prompt must be tokens for an engine without a tokenizer, got a string"
            )
        return list(self.tokenizer.encode(prompt))

    def checked(self, ids: list[int], params: SamplingParams) -> SamplingParams:
        """With max_new_tokens settled; raises ValueError if the request cannot be served."""
        vocab, limit = self.model.config.vocab_size, self.model.config.max_position_embeddings
        if not ids:
            raise ValueError("prompt must have at least one token, got none")
        for token in ids:
            if not 0 <= token < vocab:
                raise ValueError(f"prompt must have tokens in [0, {vocab}), got {token}")
        if params.stop and self.tokenizer is None:
            raise ValueError("stop must be empty for an engine without a tokenizer, got strings")
        new = params.max_new_tokens or limit - len(ids)
        if len(ids) + new > limit or new < 1:
            room = limit - max(new, 1)
            raise ValueError(
                f"prompt must have at most {room} tokens to be continued by {max(new, 1)}, "
                f"got {len(ids)}"
            )
        if not self.scheduler.fits(len(ids) + new - 1):
            raise ValueError(
                f"prompt and continuation must fit into a cache of {self.scheduler.num_blocks} "
                f"blocks, got {len(ids)} and {new} tokens"
            )
        return replace(params, max_new_tokens=new)

    # ---- steps ----

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do or to hand out."""
        return bool(self.requests or self.finished)

    def step(self) -> list[Result]:
        """One pass over the model's stages; the results of what has finished since the last."""
        self._advance()
        with self.lock:
            results, self.finished = self.finished, []
        return results

    @torch.inference_mode()
    def _advance(self) -> None:
        with self.lock:
            if self.scheduler.plan():
                ids, logits = self.walk.step()
                if ids:
                    self._take([self.requests[number] for number in ids], logits)
            dropped, self.dropped = self.dropped, []
        if dropped:
            self._drop(dropped)

    def _take(self, requests: list[Request], logits: torch.Tensor) -> None:
        """Gives every request its next token."""
        params = [request.params for request in requests]
        uniform = [request.random.random() for request in requests]
        seen = [
            request.prompt + request.tokens if request.params.repetition_penalty != 1 else ()
            for request in requests
        ]
        sampled = sample(logits, params, uniform, seen)
        going_on = []
        for i, request in enumerate(requests):
            reason: FinishReason | None = "error"
            error = None
            if sampled.valid[i]:
                if request.params.logprobs is not None:
                    assert sampled.logprobs is not None and sampled.top is not None
                    request.logprobs.append(sampled.logprobs[i])
                    top = list(sampled.top[i].items())[: request.params.logprobs]
                    request.top_logprobs.append(dict(top))
                reason = request.add(sampled.tokens[i])
                request.emit(reason is not None)
            else:
                error = "logits must be numbers, got NaN"
            if reason is None:
                going_on.append(request)
            else:
                self._finish(request, reason, error)
        self.scheduler.append(
            np.array([request.number for request in going_on], dtype=np.int64),
            np.array([request.tokens[-1] for request in going_on], dtype=np.int32),
        )

    def _finish(self, request: Request, reason: FinishReason, error: str | None) -> None:
        self.finished.append(request.result(reason, self._depth(request.number), error))
        self.scheduler.finish(request.number, error is None)  # NaN is not for others
        del self.requests[request.number]

    def _depth(self, number: int) -> list[int]:
        stages = self.scheduler.depth(number)  # [done, stages]
        depth = stages.sum(axis=1, dtype=np.int64) - self.model.config.unshared_layers
        return depth.tolist()

    # ---- many requests ----

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
    ) -> list[Result]:
        """Continues every prompt; results in their order. Shows how far it is on stderr."""
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        numbers = [self.submit(p, own) for p, own in zip(prompts, params, strict=True)]
        results: dict[int, Result] = {}
        try:
            with progress_bar(len(numbers), progress) as show:
                while True:
                    for result in self._collect(set(numbers)):
                        results[result.request] = result
                        show(result)
                    if len(results) == len(numbers):
                        return [results[number] for number in numbers]
                    self._advance()
        finally:  # if it is interrupted
            self._drop(numbers)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0
    ) -> Generator[Token, None, Result]:
        """The tokens of a request as they come, and its result as the generator's value.

        Other requests go on meanwhile. Closing the generator cancels the request.
        """
        events: deque[Token] = deque()
        number = self._queue(prompt, params, priority, events)
        try:
            while True:
                results = self._collect({number})
                while events:
                    yield events.popleft()
                if results:
                    return results[0]
                self._advance()
        finally:
            self._drop([number])

    def _drop(self, numbers: Sequence[int]) -> None:
        """Whatever there is of requests that nobody waits for any more."""
        if self.lock.own:  # a stream that the garbage collector closes in the middle of a step
            self.dropped.extend(numbers)
            return
        for number in numbers:
            self.cancel(number)
        self._collect(set(numbers))

    def _collect(self, numbers: set[int]) -> list[Result]:
        """Results of those of the requests that have finished, once."""
        with self.lock:
            own = [result for result in self.finished if result.request in numbers]
            if own:
                self.finished = [r for r in self.finished if r.request not in numbers]
        return own

    def statistics(self) -> Statistics:
        with self.lock:
            scheduler, counters = self.scheduler, self.scheduler.counters
            blocks, kept = scheduler.num_blocks, scheduler.num_blocks_kept
            return Statistics(
                steps=counters.steps,
                tokens=counters.tokens,
                shared_tokens=counters.shared_tokens,
                preemptions=counters.preemptions,
                running=scheduler.num_running,
                waiting=scheduler.num_waiting,
                blocks=blocks,
                blocks_used=blocks - scheduler.num_blocks_free - kept,
                blocks_kept=kept,
                block_bytes=self.block_bytes,
            )
