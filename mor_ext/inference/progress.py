"""How far a batch of requests is, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mor_ext.inference.request import Result


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[Result], None]]:
    """Gives what is to be called with every result. Needs rich, if shown."""
    if not shown:
        yield lambda result: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("Generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens, {task.fields[speed]:.1f}/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, tokens=0, speed=0.0)

        def show(result: Result) -> None:
            state = bar.tasks[task]
            tokens = state.fields["tokens"] + len(result.tokens)
            speed = tokens / max(state.elapsed or 0, 1e-9)
            bar.update(task, advance=1, tokens=tokens, speed=speed)

        yield show
