"""What bench_engine.py times: models, requests, and the jobs that take turns."""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models_worker import Sizes, llama
from torch import Tensor
from transformers import LlamaForCausalLM

from mor_ext._engine import BLOCK_SIZE
from mor_ext.inference import Engine, Result, SamplingParams
from mor_ext.inference.pool import KVPool
from mor_ext.models import MoRConfig, MoRForCausalLM, from_llama
from mor_ext.nn import ExpertChoiceRouter
from mor_ext.nn.routers.controls import hashed

CAPACITY = (1.0, 2 / 3, 1 / 3)
FREE_FOR_KV = 0.25  # of a GPU's memory: three engines are there at a time, and activations


@dataclass(frozen=True)
class Lengths:
    """Log-normal, as the lengths of prompts and answers roughly are; cut off on both sides."""

    median: int
    sigma: float
    least: int
    most: int

    def draw(self, generator: random.Random) -> int:
        length = generator.lognormvariate(math.log(self.median), self.sigma)
        return max(self.least, min(self.most, round(length)))

    def __str__(self) -> str:
        return f"median {self.median}, sigma {self.sigma:g}, cut at {self.least} and {self.most}"


PROMPT = Lengths(64, 0.7, 8, 256)
NEW = Lengths(48, 1.0, 8, 256)


@dataclass(frozen=True)
class Requests:
    prompts: list[list[int]]
    new: list[int]  # tokens to generate

    @property
    def total_new(self) -> int:
        return sum(self.new)


def requests_of(count: int, tokens: Sequence[int], prompt: Lengths, new: Lengths) -> Requests:
    """Prompts are cut from ``tokens`` at random places; the same in every call."""
    generator = random.Random(0)
    prompts = []
    for _ in range(count):
        length = prompt.draw(generator)
        start = generator.randrange(len(tokens) - length + 1)
        prompts.append(list(tokens[start : start + length]))
    return Requests(prompts, [new.draw(generator) for _ in range(count)])


def random_tokens(sizes: Sizes) -> list[int]:
    generator = random.Random(0)
    return [generator.randrange(sizes.vocab_size) for _ in range(20_000)]


# ---- models ----


class Forced(ExpertChoiceRouter):
    """Does all that an expert-choice router does, and then lets tokens on by a hash of position and
    hidden state, so that the shares of tokens at each depth are the capacities."""

    def enter(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return (hashed(positions + (1e4 * hidden[:, 0]).round().int().abs() * 1024),)

    def goes_on(
        self, depth: int, hidden: Tensor, rows: Tensor, entered: tuple[Tensor, ...]
    ) -> tuple[Tensor | bool, Tensor]:
        keep, gate = super().goes_on(depth, hidden, rows, entered)
        return keep is True or entered[0][rows] < self.capacity[depth], gate


def forced_mor(sizes: Sizes) -> MoRForCausalLM:
    config = MoRConfig(
        **sizes.config(), num_recursions=len(CAPACITY), routing="expert_choice", capacity=CAPACITY
    )
    model = MoRForCausalLM(config)
    for stage in model.recursions():
        if isinstance(stage.router, ExpertChoiceRouter):
            router = Forced(sizes.hidden_size, CAPACITY)
            router.load_state_dict(stage.router.state_dict())
            stage.router = router
    return model.eval()


def vanilla_and_llama(sizes: Sizes) -> tuple[MoRForCausalLM, LlamaForCausalLM]:
    """The same function, of the same weights."""
    theirs = llama(sizes).eval()
    assert isinstance(theirs, LlamaForCausalLM)
    return from_llama(theirs), theirs


def vanilla_like(config: MoRConfig) -> MoRForCausalLM:
    """Of the sizes of a routed model, with weights of no meaning: its speed has none to lose."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")
    return MoRForCausalLM(MoRConfig(**{name: getattr(config, name) for name in names})).eval()


def trained(folder: Path, text: Path) -> tuple[MoRForCausalLM, list[int]]:
    """A model that `mor train` wrote, and the tokens of the last quarter of a text."""
    from mor_ext.evaluation.checkpoint import load

    model, tokenizer = load(folder, "cpu")
    characters = text.read_text(encoding="utf-8")
    return model, tokenizer.encode(characters[-len(characters) // 4 :])


def largest_batch(vanilla: MoRForCausalLM, prompt: Lengths, new: Lengths) -> int:
    """Requests of the greatest length whose K/V fit into what a GPU has left."""
    free, _ = torch.cuda.mem_get_info(vanilla.device)
    config = vanilla.config
    block_bytes = KVPool.block_bytes(config, vanilla.dtype)
    request = pages_of(prompt.most + new.most) * config.num_hidden_layers * block_bytes
    return power_of_two(int(FREE_FOR_KV * free) // request)


def power_of_two(count: int) -> int:
    """The greatest that is no more than count, which is at least 1."""
    return 1 << (count.bit_length() - 1)


def pages_of(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


# ---- jobs ----

Job = Callable[[], int]  # gives the tokens generated


class EngineJob:
    """Requests through an engine, which are all there from the start.

    Args:
        batch: requests that run at once.
        steady: ends as soon as no request waits, so that the batch is full all the time; what is
            unfinished then is cancelled, its tokens count. Else it ends with the last request.
        options: of the engine.
    """

    def __init__(
        self,
        model: MoRForCausalLM,
        requests: Requests,
        batch: int,
        temperature: float,
        steady: bool = False,
        **options: Any,
    ) -> None:
        self.model, self.requests, self.steady = model, requests, steady
        lengths = map(len, requests.prompts)
        pages = sorted(pages_of(p + n) for p, n in zip(lengths, requests.new, strict=True))
        blocks = sum(pages[-batch:]) * model.config.num_hidden_layers  # what is needed at most
        # Every run computes its prompts anew.
        self.engine = Engine(
            model, max_batch=batch, num_blocks=blocks, share_prefixes=False, **options
        )
        self.params = [
            SamplingParams(max_new_tokens=n, temperature=temperature, ignore_eos=True, seed=i)
            for i, n in enumerate(requests.new)
        ]

    def __call__(self) -> int:
        return sum(len(result.tokens) for result in self.run(self.engine.step))

    def run(self, step: Callable[[], list[Result]]) -> list[Result]:
        engine = self.engine
        for prompt, params in zip(self.requests.prompts, self.params, strict=True):
            engine.submit(prompt, params)
        results = step()  # the scheduler counts from then on who waits
        while engine.scheduler.num_waiting > 0 if self.steady else engine.busy:
            results += step()
        for number in list(engine.requests):
            cancelled = engine.cancel(number)
            assert cancelled is not None
            results.append(cancelled)
        errors = [result.error for result in results if result.error]
        if errors:
            raise RuntimeError(errors[0])
        return results

    def facts(self) -> dict[str, float]:
        """Depths, memory and scheduling, in a run of its own that is not among the timed ones."""
        engine, scheduler = self.engine, self.engine.scheduler
        clocked: Any = Clocked(scheduler)
        engine.scheduler = engine.walk.scheduler = clocked
        blocks = tokens = 0  # in the cache, summed over steps
        seconds = 0.0

        def step() -> list[Result]:
            nonlocal blocks, tokens, seconds
            start = time.perf_counter()
            results = engine.step()
            seconds += time.perf_counter() - start
            blocks += engine.statistics().blocks_used
            tokens += sum(len(scheduler.depth(number)) for number in engine.requests)
            return results

        results = self.run(step)
        engine.scheduler = engine.walk.scheduler = scheduler
        config = self.model.config
        depth = statistics.fmean(depth for result in results for depth in result.depth)
        block_layers = max(len(stage.block.layers) for stage in self.model.recursions())
        layers = config.unshared_layers + block_layers * depth
        return {
            "depth": depth,
            "layers": layers,
            "kv_bytes": layers * engine.block_bytes / BLOCK_SIZE,
            "kv_bytes_held": blocks * engine.block_bytes / tokens,
            "scheduler_share": clocked.seconds / seconds,
        }


class Clocked:
    """An object whose methods are timed."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if not callable(value):
            return value

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return value(*args)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(self, name, timed)
        return timed


def transformers_job(model: LlamaForCausalLM, requests: Requests) -> Job:
    """``generate()`` of one batch: prompts are padded on the left, and it ends with the longest."""
    longest = max(map(len, requests.prompts))
    ids = torch.zeros(len(requests.prompts), longest, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(requests.prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1

    def job() -> int:
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(requests.new),
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return requests.total_new

    return job
