"""``python -m mor_ext.demo``: a Mixture-of-Recursions model learns real text in minutes.

Trains it and a vanilla transformer of the same unrolled depth on bytes, compares them on held-out
text, and shows how many recursions each character took.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mor_ext.inference import generate
from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.training import (
    Evaluation,
    Recipe,
    Text,
    bigram_nll,
    evaluate,
    keep_freed_memory,
    read_text,
    routing_shares,
    stdlib_text,
    train,
)

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from mor_ext.analysis.depth import draw_heat_map
    from mor_ext.analysis.style import GREY, LINES, new_figure, save
    from mor_ext.analysis.text import coloured, legend, segments, texts
except ImportError as error:
    raise SystemExit(f"the demo needs {error.name}: pip install 'mor_ext[demo]'") from error

RECURSIONS = 3
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.08,  # about hidden_size ** -0.5
}
MODELS = {
    "MoR": MoRConfig(**SIZES, num_recursions=RECURSIONS, routing="expert_choice"),
    "vanilla": MoRConfig(**SIZES),
}
# The better of 3e-3 and 5e-3 for each, on the default text: one rate could flatter one of them.
LEARNING_RATES = {"MoR": 5e-3, "vanilla": 3e-3}


@dataclass
class Run:
    """A trained model and what was measured on it."""

    model: MoRForCausalLM
    losses: list[float]  # nats a byte, by step
    tokens_per_second: float
    evaluation: Evaluation
    routing: float | None  # share of a training step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mor_ext.demo", description=__doc__)
    parser.add_argument("--text", metavar="FILE", help="default: the standard library's source")
    parser.add_argument("--out", default="out", metavar="DIR", help="for pictures; default: out")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="default: 400")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    options = parser.parse_args(arguments)
    recipe = Recipe(steps=options.steps, seed=options.seed)
    try:
        data = stdlib_text(4_000_000)
        if options.text is not None:
            data = read_text(options.text, least=20 * recipe.length)
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    run_demo(Text.split(data), recipe, out, Console())


def run_demo(text: Text, recipe: Recipe, out: Path, console: Console) -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler announces itself on stderr
    keep_freed_memory()
    windows = text.windows(recipe.length, count=64)
    bigram = bigram_nll(text, windows)
    console.print(
        f"{len(text.train):,} bytes to learn from; {windows.numel():,} held-out bytes to score"
    )
    with Progress(
        TextColumn("{task.description:8}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, {task.fields[loss]:.2f} bits/byte"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        tasks = {n: progress.add_task(n, total=recipe.steps, loss=8.0) for n in MODELS}
        runs = {
            name: run(name, text, windows, recipe, reporter(progress, tasks[name]))
            for name in MODELS
        }
    console.print(table(runs, bigram))

    mor = runs["MoR"]
    console.print(
        f"A token's depth depends on nothing after it; {mor.evaluation.agreement:.0%} of the "
        "held-out tokens get the depth that top-k over the sequence would give."
    )
    console.print("\nA sample, coloured by depth:", legend(RECURSIONS))
    prompt = windows[0, :64]
    generator = torch.Generator().manual_seed(recipe.seed)
    sample = generate(mor.model, [prompt], 500, temperature=0.7, generator=generator)[0]
    parts = segments(bytes_of(sample.tokens), sample.depth.tolist())
    console.print(coloured(parts, RECURSIONS))

    excerpt = windows[0]
    depth = mor.model(excerpt[None]).stage_depth[0]
    save(draw_heat_map(mor.model.config, texts(bytes_of(excerpt)), depth), out / "depth.png")
    draw_losses(runs, bigram, out / "loss.png")
    console.print(f"\nDepth heat map: {out / 'depth.png'}   loss curves: {out / 'loss.png'}")


def reporter(progress: Progress, task: TaskID) -> Callable[[float], None]:
    return lambda loss: progress.update(task, advance=1, loss=loss / math.log(2))


def run(
    name: str, text: Text, windows: Tensor, recipe: Recipe, report: Callable[[float], None]
) -> Run:
    torch.manual_seed(recipe.seed)
    config = MODELS[name]
    recipe = replace(recipe, learning_rate=LEARNING_RATES[name])
    model = MoRForCausalLM(config)
    losses = []
    start = time.perf_counter()
    for loss in train(model, text, recipe):
        losses.append(loss)
        report(loss)
    seconds = time.perf_counter() - start
    batch = windows[: recipe.batch_size]
    share = None
    if config.routing != "none":
        parts = routing_shares(lambda: model(batch, labels=batch).loss.backward())
        share = sum(parts.values())
        model.zero_grad()
    tokens = recipe.steps * recipe.batch_size * recipe.length
    return Run(model, losses, tokens / seconds, evaluate(model, windows), share)


def table(runs: dict[str, Run], bigram: float) -> Table:
    result = Table(
        title="On held-out text, each token's depth chosen causally",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for name in ("", "parameters", "loss", "bits/byte", "tokens/s", "depth", "layers", "routing"):
        result.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, r in runs.items():
        config, e = r.model.config, r.evaluation
        layers = config.unshared_layers + config.shared_layers * e.depth
        result.add_row(
            name,
            f"{sum(p.numel() for p in r.model.parameters()):,}",
            f"{e.nll:.3f}",
            f"{e.bits:.3f}",
            f"{r.tokens_per_second:,.0f}",
            f"{e.depth:.2f}/{config.num_recursions}",
            f"{layers:.1f}/{config.num_hidden_layers}",
            "-" if r.routing is None else f"{r.routing:.1%}",
        )
    result.add_row("byte bigram", "65,536", f"{bigram:.3f}", f"{bigram / math.log(2):.3f}")
    result.caption = (
        "loss: nats a byte; tokens/s: in training; depth: recursions a token took;\n"
        "layers: those it went through; routing: share of a training step.\n"
        "One seed, minutes of training: this shows that it works, not which is better."
    )
    return result


def bytes_of(tokens: Tensor) -> list[bytes]:
    return [bytes([token]) for token in tokens.tolist()]


def draw_losses(runs: dict[str, Run], bigram: float, path: Path) -> None:
    figure, (axis,) = new_figure(8, 5)
    for colour, (name, r) in zip(LINES, runs.items(), strict=False):
        bits = torch.tensor(r.losses) / math.log(2)
        window = max(1, len(bits) // 30)
        smooth = bits.unfold(0, window, 1).mean(dim=1)
        steps = range(window, len(bits) + 1)
        axis.plot(steps, smooth, color=colour, label=f"{name}, training")
        axis.plot(len(bits), r.evaluation.bits, "o", color=colour)
    axis.axhline(bigram / math.log(2), color=GREY, linestyle="--", label="byte bigram table")
    axis.plot([], [], "o", color=GREY, label="held-out text, causal depths")
    axis.set(xlabel="step", ylabel="bits per byte", title="Loss")
    axis.legend(frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()
