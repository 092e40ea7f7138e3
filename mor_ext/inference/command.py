"""``mor generate``: a saved model continues prompts, and shows how deep each token went."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from mor_ext.analysis.text import coloured, legend, pieces_of, segments, texts
from mor_ext.evaluation.checkpoint import load
from mor_ext.inference.engine import Engine
from mor_ext.inference.progress import progress_bar
from mor_ext.inference.prompts import read_prompts
from mor_ext.inference.request import Result
from mor_ext.inference.sampling import SamplingParams
from mor_ext.models import MoRForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="folder of a saved model and its tokenizer")
    source = parser.add_argument_group("prompts").add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="one or several")
    source.add_argument(
        "--file",
        default="-",
        metavar="FILE",
        help='a prompt a line, or JSON Lines with "prompt" (stdin)',
    )
    add = parser.add_argument_group("sampling").add_argument
    default = SamplingParams()
    add("--max-new-tokens", type=int, default=default.max_new_tokens, metavar="N", help="(64)")
    add("--temperature", type=float, default=default.temperature, metavar="T", help="0: greedy (1)")
    add("--top-k", type=int, default=default.top_k, metavar="K", help="of the K most likely")
    add("--top-p", type=float, default=default.top_p, metavar="P", help="of those with P together")
    add(
        "--min-p", type=float, default=default.min_p, metavar="P", help="of those P times as likely"
    )
    add("--repetition-penalty", type=float, default=default.repetition_penalty, metavar="X")
    add(
        "--stop", nargs="+", default=[], metavar="TEXT", help="ends a continuation, itself left out"
    )
    add("--seed", type=int, metavar="N", help="for repeatable samples")
    add("--samples", type=int, default=1, metavar="N", help="of each prompt (1)")
    add = parser.add_argument_group("running").add_argument
    add("--thresholds", type=_threshold, nargs="+", metavar="T", help="instead of the saved ones")
    add("--max-batch", type=int, default=32, metavar="N", help="requests that run at once (32)")
    add("--bf16", action="store_true", help="weights and cache in bfloat16")
    add("--device", help="cpu, cuda, ... (a GPU if there is one)")
    add = parser.add_argument
    add("--jsonl", action="store_true", help="writes tokens, depths and log-probabilities too")


def _threshold(text: str) -> float | None:
    return None if text == "none" else float(text)


def run(arguments: argparse.Namespace) -> None:
    """Writes continuations to stdout, errors and statistics to stderr.

    Raises:
        ValueError: arguments that make no sense, a model or prompts that cannot be read, or no
            request that could be served.
    """
    a = arguments
    params = _params(a)
    for name in ("samples", "max_batch"):
        if getattr(a, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1, got {getattr(a, name)}"
            )
    prompts = a.prompt or read_prompts(a.file)
    model, tokenizer = _load(a)
    engine = Engine(model, tokenizer, max_batch=a.max_batch)
    requests = [(prompt, sample) for prompt in prompts for sample in range(a.samples)]
    seeded = [
        params if a.seed is None else replace(params, seed=a.seed + sample)
        for _, sample in requests
    ]
    run = Run(engine, [prompt for prompt, _ in requests], seeded)
    writer = _write_json if a.jsonl else _write_text
    writer(requests, run.results, model, tokenizer)
    for (prompt, _), result in zip(requests, run.results, strict=True):
        if result.error is not None:
            print(f"mor generate: prompt {prompt[:40]!r}: {result.error}", file=sys.stderr)
    if all(result.finish_reason == "error" for result in run.results):
        raise ValueError(f"prompts must be such that one can be continued, got {len(prompts)}")
    print(run.summary(), file=sys.stderr)


def _params(a: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=a.max_new_tokens,
        temperature=a.temperature,
        top_k=a.top_k,
        top_p=a.top_p,
        min_p=a.min_p,
        repetition_penalty=a.repetition_penalty,
        stop=tuple(a.stop),
        seed=a.seed,
        logprobs=0 if a.jsonl else None,
    )


def _load(a: argparse.Namespace) -> tuple[MoRForCausalLM, PreTrainedTokenizerFast]:
    model, tokenizer = load(a.model, a.device)
    if not isinstance(model, MoRForCausalLM):
        raise ValueError(
            f"model must be one of mor_ext (see mor_ext.models.from_llama), "
            f"got {type(model).__name__}"
        )
    if a.thresholds is not None:
        model.set_thresholds(a.thresholds)
    return model.bfloat16() if a.bf16 else model, tokenizer


class Run:
    """All requests through an engine, with a progress bar on a terminal if there are several."""

    def __init__(
        self, engine: Engine, prompts: Sequence[str], params: Sequence[SamplingParams]
    ) -> None:
        self.engine = engine
        self.peak = 0  # blocks of the cache in use at once
        results: dict[int, Result] = {}
        start = time.perf_counter()
        numbers = [engine.submit(p, own) for p, own in zip(prompts, params, strict=True)]
        shown = len(numbers) > 1 and sys.stderr.isatty()
        with progress_bar(len(numbers), shown) as show:
            while engine.busy:
                for result in engine.step():
                    results[result.request] = result
                    show(result)
                self.peak = max(self.peak, engine.statistics().blocks_used)
        self.seconds = time.perf_counter() - start
        self.results = [results[number] for number in numbers]

    def summary(self) -> str:
        """In three lines: speed, depth, memory."""
        engine = self.engine
        now, config = engine.statistics(), engine.model.config
        new = sum(len(result.tokens) for result in self.results)
        waits = [r.first_token_seconds for r in self.results if r.first_token_seconds is not None]
        depths = [depth for result in self.results for depth in result.depth]
        depth = statistics.fmean(depths) if depths else 0.0
        passes = max(len(stage.block.layers) for stage in engine.model.recursions())
        layers = config.unshared_layers + passes * depth
        first = f"{statistics.median(waits):.3f} s" if waits else "-"
        megabytes = self.peak * now.block_bytes / 1e6
        return "\n".join(
            (
                f"{new:,} tokens in {self.seconds:.2f} s: {new / self.seconds:,.1f} tokens/s; "
                f"first token after {first} (median), {max(waits, default=0):.3f} s (longest)",
                f"mean depth {depth:.2f}: {layers:.2f} of {config.num_hidden_layers} layers a "
                f"token, those of prompts included",
                f"cache: at most {self.peak:,} of {now.blocks:,} blocks ({megabytes:.1f} MB), "
                f"{now.shared_tokens:,} tokens shared, {now.preemptions:,} preemptions",
            )
        )


def _write_json(
    requests: Sequence[tuple[str, int]],
    results: Sequence[Result],
    model: MoRForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for (prompt, sample), result in zip(requests, results, strict=True):
        line: dict[str, Any] = {
            "prompt": prompt,
            "sample": sample,
            "text": result.text,
            "finish_reason": result.finish_reason,
            "error": result.error,
            "prompt_tokens": result.prompt,
            "tokens": result.tokens,
            "logprobs": result.logprobs,
            "depth": result.depth,
        }
        print(json.dumps(line, ensure_ascii=False))


def _write_text(
    requests: Sequence[tuple[str, int]],
    results: Sequence[Result],
    model: MoRForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Prompt and continuation; on a terminal on the colours of their depths."""
    console = Console(highlight=False, soft_wrap=True)
    passes = sum(stage.num_recursions for stage in model.recursions())
    depths = passes - model.config.unshared_layers
    if console.is_terminal:
        console.print("depth:", legend(depths))
    several = len(results) > 1
    for number, ((prompt, _), result) in enumerate(zip(requests, results, strict=True)):
        if several:
            console.print(f"[{number + 1}]", style="bold", markup=False)
        if console.is_terminal and result.error is None:
            console.print(_in_colour(result, tokenizer, depths))
        else:
            print(prompt + (result.text or ""))


def _in_colour(result: Result, tokenizer: PreTrainedTokenizerFast, depths: int) -> Text:
    """What has no depth has no colour: the last token, which the model has not seen."""
    parts = pieces_of(tokenizer, result.prompt + result.tokens)
    seen, prompt = len(result.depth), len(result.prompt)
    text = coloured(segments(parts[:seen], result.depth), depths) + Text(
        "".join(texts(parts[seen:]))
    )
    # A stop token or string is not shown.
    return text[: len("".join(texts(parts[:prompt]))) + len(result.text or "")]
