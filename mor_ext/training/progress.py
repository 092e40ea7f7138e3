"""A progress bar with the run's last numbers."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressCallback(TrainerCallback):
    """Shows steps, the last loss, and the last evaluation; one process does, not all.

    Where the console is no terminal, as in a file, it is a line an evaluation.
    """

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[trained]}"),
            TextColumn("[dim]{task.fields[held_out]}[/]"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task("", trained="", held_out="")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero:
            self.progress.update(self.task, total=state.max_steps)
            self.progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "eval_nll" in logs:
            held_out = f"held out: {logs['eval_nll']:.3f} nats"
            self.progress.update(self.task, held_out=held_out)
            console, fields = self.progress.console, self.progress.tasks[0].fields
            if state.is_world_process_zero and not console.is_terminal:
                console.print(f"step {state.global_step}: {fields['trained']}; {held_out}")
        elif "nll" in logs:
            shown = (
                f"{logs['nll']:.3f} nats, {logs['effective_depth']:.2f} layers, "
                f"{logs['tokens_per_second']:,.0f} tokens/s"
            )
            self.progress.update(self.task, trained=shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.progress.stop()
