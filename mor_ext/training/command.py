"""``mor train``: a run from a config, its resumption, or what it would be."""

from __future__ import annotations

import argparse
import dataclasses

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mor_ext.training.recipe import RunRecipe, config_names
from mor_ext.training.run import Facts, Result, facts_of, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = ", ".join(config_names())
    add("--config", required=True, metavar="FILE", help=f"YAML, or an example: {names}")
    add("overrides", nargs="*", metavar="key=value", help="such as training.steps=100")
    add("--output", metavar="DIR", help="instead of the config's")
    add(
        "--resume",
        metavar="CHECKPOINT",
        help="go on from there; auto: from the last whole one in the output, if there is one",
    )
    add("--dry-run", action="store_true", help="tell the model's size and compute, do not train")


def run(arguments: argparse.Namespace) -> None:
    """Trains, and prints what came of it.

    Raises:
        ValueError: the config, what it names, or the checkpoint does not fit.
        OSError: a file cannot be read or written.
    """
    recipe = RunRecipe.load(arguments.config, arguments.overrides)
    if arguments.output is not None:
        recipe = dataclasses.replace(recipe, output=arguments.output)
    console = Console()
    if arguments.dry_run:
        console.print(_facts_table(facts_of(recipe)))
        return
    result = train(recipe, arguments.resume, console)
    if result is not None:
        console.print(_result_table(result))
        console.print(f"Model, tokenizer and recipe: {recipe.output}   page: {result.page}")


def _facts_table(facts: Facts) -> Table:
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters", f"{facts.parameters:,}")
    table.add_row("  of them embeddings", f"{facts.embeddings:,}")
    table.add_row("layers, unrolled", f"{facts.layers:,}")
    table.add_row("layers with weights of their own", f"{facts.own_layers:,}")
    table.add_row("layers a token goes through, as routing aims at", f"{facts.aimed_layers:.2f}")
    table.add_row("FLOPs a token, forward", f"{facts.flops:,.0f}")
    table.add_row("  of the same model without routing", f"{facts.full_flops:,.0f}")
    table.add_row("tokens a step, of one process", f"{facts.tokens_a_step:,}")
    return table


def _result_table(result: Result) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("on held-out text, depths by the causal rule")
    table.add_column(justify="right")
    for name, value in result.shown().items():
        table.add_row(name, value)
    return table
