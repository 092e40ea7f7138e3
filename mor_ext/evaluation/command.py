"""``mor eval``: a saved model on text and on tasks, beside tables of n-grams."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mor_ext.evaluation.checkpoint import load
from mor_ext.evaluation.dump import DepthWriter
from mor_ext.evaluation.evaluate import Evaluation, Measures, evaluate
from mor_ext.evaluation.ngram import ngram_scores
from mor_ext.training.dataset import PackedDataset, join
from mor_ext.training.text import load_documents, read_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="folder of a saved model and its tokenizer")
    text = parser.add_argument_group("on text")
    add = text.add_argument
    add("--text", nargs="+", metavar="FILE", help="UTF-8 text; globs are expanded")
    add("--dataset", metavar="NAME", help="of the datasets library, or a folder of its files")
    add("--dataset-config", metavar="NAME", help="of the data set")
    add("--split", default="test", help="of the data set (test)")
    add("--column", default="text", help="of the data set (text)")
    add("--length", type=int, help="tokens of a window (as many as the model can read)")
    add("--windows", type=int, metavar="N", help="the first N alone")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--ngram", type=int, metavar="N", help="tables of 1 to N tokens beside it")
    add("--train-text", nargs="+", metavar="FILE", help="what these tables count")
    add("--dump", metavar="FILE", help="depth and loss of every token, as JSON Lines")
    tasks = parser.add_argument_group("on tasks (lm-evaluation-harness)")
    add = tasks.add_argument
    add("--tasks", metavar="NAME,..", help="NAME is DIR/NAME.jsonl")
    add("--data", metavar="DIR", help="folder of the tasks' files")
    add("--limit", type=int, metavar="N", help="the first N items of each task alone")
    add = parser.add_argument
    add("--batch-size", type=int, default=8, metavar="N", help="windows or items (8)")
    add("--device", help="cpu, cuda, ... (a GPU if there is one)")
    add("--json", metavar="FILE", help="writes all numbers there")


def run(arguments: argparse.Namespace) -> None:
    """Prints tables, and writes files where told.

    Raises:
        ValueError: arguments that do not go together, or what these name does not fit.
    """
    a = arguments
    _check(a)
    console = Console()
    report: dict[str, Any] = {"model": str(a.model)}
    if a.text or a.dataset:
        model, tokenizer = load(a.model, a.device)
        report |= _on_text(a, model, tokenizer, console)
    if a.tasks:
        from mor_ext.evaluation import harness

        report["tasks"] = harness.run(
            a.model, a.tasks.split(","), a.data, a.limit, a.batch_size, a.device
        )
        console.print(_task_table(report["tasks"]))
    if a.json:
        Path(a.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _check(a: argparse.Namespace) -> None:
    if a.text and a.dataset:
        raise ValueError(f"--text and --dataset must not both be given, got {a.dataset}")
    if not (a.text or a.dataset or a.tasks):
        raise ValueError("one of --text, --dataset, --tasks must be given, got none")
    if bool(a.tasks) != bool(a.data):
        raise ValueError(f"--tasks and --data must be given together, got {a.tasks or a.data}")
    if bool(a.ngram) != bool(a.train_text):
        given = a.ngram or a.train_text
        raise ValueError(f"--ngram and --train-text must be given together, got {given}")
    for name in ("length", "windows", "ngram", "limit", "batch_size"):
        value = getattr(a, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def _on_text(
    a: argparse.Namespace, model: Any, tokenizer: PreTrainedTokenizerFast, console: Console
) -> dict[str, Any]:
    if a.text:
        texts = read_files(a.text)
    else:
        texts = load_documents(a.dataset, a.dataset_config, a.split, a.column)["text"]
    tokens = join(tokenizer, texts)
    longest = model.config.get_text_config().max_position_embeddings
    length = a.length or min(longest, len(tokens))
    windows = PackedDataset(tokens, length, length - 1)
    with DepthWriter(a.dump, tokenizer) if a.dump else nullcontext() as writer:
        result = evaluate(
            model,
            windows,
            a.batch_size,
            a.windows,
            torch.bfloat16 if a.bf16 else None,
            progress=console.is_terminal,
            on_batch=writer,
        )
    console.print(_measures_table(result))
    report = {"length": length, "text": result.to_dict()}
    if a.ngram:
        train = join(tokenizer, read_files(a.train_text))
        same = tokens[: result.tokens + 1]
        size = max(model.config.get_text_config().vocab_size, len(tokenizer))
        scores = ngram_scores(train.ids, same.ids, size, a.ngram)
        bits = len(same) / math.log(2) / int(same.num_bytes.sum())  # a byte, of a nat a token
        report["ngram"] = [asdict(s) | {"bits_per_byte": s.nll * bits} for s in scores]
        console.print(_ngram_table(report["ngram"]))
    return report


def _measures_table(result: Evaluation) -> Table:
    """A column for each rule, or one for both where they are the same."""
    columns = {"causal rule": result.causal, "rule of training": result.training}
    if result.training is result.causal:
        columns = {"": result.causal}
    known = {name: measures for name, measures in columns.items() if measures is not None}
    table = Table(box=SIMPLE_HEAD)
    table.add_column(f"{result.tokens:,} tokens, {result.windows:,} windows")
    for name in known:
        table.add_column(name, justify="right")
    for name, cell in ROWS.items():
        table.add_row(name, *map(cell, known.values()))
    if len(known) == 2:
        table.add_row("same depth by both rules", f"{result.agreement:.2%}")
    return table


ROWS: dict[str, Callable[[Measures], str]] = {
    "nats a token": lambda m: f"{m.nll:.4f}",
    "  standard error": lambda m: "" if m.nll_error is None else f"{m.nll_error:.4f}",
    "perplexity": lambda m: f"{m.perplexity:.4g}",
    "bits a byte": lambda m: "" if m.bits_per_byte is None else f"{m.bits_per_byte:.4f}",
    "accuracy": lambda m: f"{m.accuracy:.2%}",
    "layers (effective depth)": lambda m: f"{m.layers:.3f}",
    "depth": lambda m: f"{m.depth:.3f}",
    "share of 0, 1, .. passes": lambda m: " ".join(f"{share:.1%}" for share in m.load),
    "dead": lambda m: f"{m.dead:.2%}",
}


def _ngram_table(scores: list[dict[str, Any]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("table of the training text")
    for name in ("nats a token", "bits a byte", "accuracy"):
        table.add_column(name, justify="right")
    for s in scores:
        numbers = (f"{s['nll']:.4f}", f"{s['bits_per_byte']:.4f}", f"{s['accuracy']:.2%}")
        table.add_row(f"{s['order']}-grams", *numbers)
    return table


def _task_table(tasks: dict[str, dict[str, float]]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("task")
    for name in ("items", "metric", "value", "standard error"):
        table.add_column(name, justify="right")
    for task, metrics in tasks.items():
        label, items = task, str(metrics["items"])
        for name in (name for name in metrics if f"{name}_stderr" in metrics):
            numbers = (f"{metrics[name]:.4g}", f"{metrics[f'{name}_stderr']:.2g}")
            table.add_row(label, items, name, *numbers)
            label = items = ""
    return table
