"""``mor calibrate``: thresholds for wanted mean depths, and what quality they leave."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mor_ext.analysis.pareto import Point, draw_pareto
from mor_ext.analysis.style import save
from mor_ext.evaluation.calibrate import Calibration, Setting, save_thresholds
from mor_ext.evaluation.checkpoint import load
from mor_ext.models import MoRForCausalLM
from mor_ext.training.dataset import PackedDataset, join
from mor_ext.training.text import read_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="folder of a saved model and its tokenizer")
    add("--text", nargs="+", required=True, metavar="FILE", help="UTF-8; globs are expanded")
    add(
        "--depth",
        nargs="+",
        type=float,
        required=True,
        metavar="D",
        help="wanted passes of a token through shared blocks, the mean; one or several",
    )
    add("--length", type=int, help="tokens of a window (as many as the model can read)")
    add("--windows", type=int, metavar="N", help="the first N alone")
    add("--batch-size", type=int, default=8, metavar="N", help="windows (8)")
    add("--device", help="cpu, cuda, ... (a GPU if there is one)")
    add("--save", type=float, metavar="D", help="writes its thresholds into the model's config")
    add("--json", metavar="FILE", help="writes all numbers there")
    add("--picture", metavar="FILE", help="quality against layers, as PNG")


def run(arguments: argparse.Namespace) -> None:
    """Prints a table, and writes files where told.

    Raises:
        ValueError: arguments that do not go together, or a model or text that does not fit.
    """
    a = arguments
    _check(a)
    model, tokenizer = load(a.model, a.device)
    if not isinstance(model, MoRForCausalLM):
        raise ValueError(f"model must be one of mor_ext, got {type(model).__name__}")
    tokens = join(tokenizer, read_files(a.text))
    length = a.length or min(model.config.max_position_embeddings, len(tokens))
    windows = PackedDataset(tokens, length, length - 1)
    calibration = Calibration(model, windows, a.batch_size, a.windows)
    console = Console()
    with Console(stderr=True).status("as it is") as status:
        settings = [calibration.measure()]
        for wanted in a.depth:
            status.update(f"depth {wanted:g}")
            settings.append(calibration.for_depth(wanted))
    console.print(_table(settings, model.config.num_hidden_layers))
    if a.json:
        report = {"model": str(a.model), "length": length, "windows": calibration.count}
        report |= {"settings": [asdict(setting) for setting in settings]}
        Path(a.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if a.picture:
        points = [
            Point(
                "as it is" if s.wanted is None else "calibrated",
                s.layers,
                s.bits_per_byte,
                f"depth {s.depth:.2f}",
            )
            for s in settings
        ]
        save(draw_pareto(points, "layers a token", "bits per byte"), a.picture)
    if a.save is not None:
        chosen = next(setting for setting in settings if setting.wanted == a.save)
        save_thresholds(a.model, chosen.thresholds)
        console.print(f"{a.model} now has the thresholds of depth {chosen.wanted:g}")


def _check(a: argparse.Namespace) -> None:
    if a.save is not None and a.save not in a.depth:
        depths = ", ".join(f"{depth:g}" for depth in a.depth)
        raise ValueError(f"--save must be one of --depth {depths}, got {a.save:g}")
    for name in ("length", "windows", "batch_size"):
        value = getattr(a, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def _table(settings: Sequence[Setting], layers: int) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name in ("wanted", "depth", f"of {layers} layers", "nats a token", "bits a byte"):
        table.add_column(name, justify="right")
    table.add_column("thresholds")
    for s in settings:
        table.add_row(
            "as it is" if s.wanted is None else f"{s.wanted:g}",
            f"{s.depth:.3f}",
            f"{s.layers:.2f}",
            f"{s.nll:.4f}",
            f"{s.bits_per_byte:.4f}",
            " ".join("-" if t is None else f"{t:.4f}" for t in s.thresholds),
        )
    return table
