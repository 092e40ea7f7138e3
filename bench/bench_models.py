"""Whole models: python bench/bench_models.py

Training step, forward pass and memory of the variants beside vanilla and beside the same model in
transformers, as one table. Each model has a process of its own; the rounds of all take turns, and a
ratio is the median over rounds of a model's time over vanilla's in the same round. CPU time is that
of all threads: with OMP_WAIT_POLICY=passive it leaves out waiting, and is then what to read where
other work runs beside.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from models_worker import LLAMA, MODELS, Sizes, Spec
from tables import table

BENCH = Path(__file__).parent
VANILLA = MODELS[0]
# The most that a model may take of vanilla's, or of its own FLOP ratio.
STEP_GOALS = {"MoR-3 expert choice": 0.72, "MoR-3 expert choice, shared KV": 0.76}
FLOP_GOALS = {"MoR-3 token choice": 1.03}
MEMORY_GOAL = 0.80
ROUTING_GOAL = 0.01  # of the CPU time of the model's own step

Found = dict[str, Any]


class Worker:
    """A model's process, between whose turns it waits for its input."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def ask(self, command: str = "") -> Found:
        assert self.process.stdin is not None and self.process.stdout is not None
        if command:
            print(command, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args}: ended with {self.process.wait()}")
        return json.loads(line)


@contextmanager
def worker(spec: Spec) -> Iterator[Worker]:
    command = [sys.executable, str(BENCH / "models_worker.py"), json.dumps(asdict(spec))]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        try:
            yield Worker(process)
        finally:
            process.kill()


def measure(sizes: Sizes, rounds: int, threads: int, keep_freed_memory: bool) -> dict[str, Found]:
    """Facts and times of every model."""
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(worker(Spec(name, sizes, threads, keep_freed_memory)))
            for name in MODELS
        }
        for process in workers.values():
            process.ask()  # until it is ready
        found: dict[str, Found] = {name: {"step": [], "forward": []} for name in MODELS}
        for turn in range(rounds):
            first = turn % len(MODELS)  # whatever comes before or after whom, not always the same
            for work in ("step", "forward"):
                for name in MODELS[first:] + MODELS[:first]:
                    found[name][work].append(workers[name].ask(work))
        for name in MODELS:
            found[name] |= workers[name].ask("facts")
    same = ("parameters", "step_flops", "forward_flops")
    assert [found[LLAMA][key] for key in same] == [found[VANILLA][key] for key in same]
    return found


# ---- what follows ----


def judged(found: dict[str, Found]) -> list[Found]:
    """A row a model: medians, ratios to vanilla, goals as (what, bound, measured)."""
    rows = []
    for name, entry in found.items():
        row = {
            "model": name,
            "memory": entry["memory"],
            "memory_ratio": entry["memory"] / found[VANILLA]["memory"],
            "depth": entry.get("depth"),
            "routing_share": entry.get("routing_share"),
        }
        for work in ("step", "forward"):
            row |= {
                work: statistics.median(turn["seconds"] for turn in entry[work]),
                f"{work}_ratio": ratio(found, work, name, VANILLA),
                f"{work}_ratios": ratios(found, work, name, VANILLA),
                f"{work}_cpu_ratio": ratio(found, work, name, VANILLA, "cpu"),
                f"{work}_flop_ratio": entry[f"{work}_flops"] / found[VANILLA][f"{work}_flops"],
            }
        row["goals"] = goals(row, found)
        rows.append(row)
    return rows


def ratios(
    found: dict[str, Found], work: str, name: str, to: str, clock: str = "seconds"
) -> list[float]:
    turns = zip(found[name][work], found[to][work], strict=True)
    return [mine[clock] / other[clock] for mine, other in turns]


def ratio(*args: Any) -> float:
    return statistics.median(ratios(*args))


def goals(row: Found, found: dict[str, Found]) -> list[tuple[str, float, float]]:
    name = row["model"]
    wanted = []
    if name == VANILLA:
        wanted.append(("step / transformers", 1.0, ratio(found, "step", VANILLA, LLAMA)))
    if name in STEP_GOALS:
        wanted.append(("step", STEP_GOALS[name], row["step_ratio"]))
    if name in FLOP_GOALS:
        share = row["step_ratio"] / row["step_flop_ratio"]
        wanted.append(("step / FLOP ratio", FLOP_GOALS[name], share))
    if name not in (VANILLA, LLAMA):
        wanted.append(("memory", MEMORY_GOAL, row["memory_ratio"]))
        wanted.append(("routing", ROUTING_GOAL, row["routing_share"]))
    return wanted


def models_table(models: list[Found]) -> str:
    header = ["model", "training step", "of vanilla (rounds)", "CPU time", "FLOPs"]
    header += ["forward", "of vanilla", "FLOPs", "peak memory", "routing", "goal: measured, met"]
    rows = []
    for row in models:
        low, high = min(row["step_ratios"]), max(row["step_ratios"])
        share = row["routing_share"]
        rows.append(
            [
                row["model"] + (f", mean depth {row['depth']:.2f}" if share else ""),
                f"{row['step']:.2f} s",
                f"{row['step_ratio']:.3f} ({low:.2f} - {high:.2f})",
                f"{row['step_cpu_ratio']:.3f}",
                f"{row['step_flop_ratio']:.3f}",
                f"{row['forward']:.2f} s",
                f"{row['forward_ratio']:.3f}",
                f"{row['forward_flop_ratio']:.3f}",
                f"{row['memory'] / 1e6:.0f} MB, {row['memory_ratio']:.2f}",
                f"{share:.2%}" if share else "",
                "; ".join(
                    f"{what} <= {bound:g}: {got:.3g}, {'yes' if got <= bound else '**no**'}"
                    for what, bound, got in row["goals"]
                ),
            ]
        )
    return table(header, rows)


def conditions(sizes: Sizes, rounds: int, threads: int, keep_freed_memory: bool) -> str:
    import transformers

    import mor_ext

    size = (
        f"d {sizes.hidden_size}, ffn {sizes.intermediate_size}, {sizes.num_hidden_layers} unrolled "
        f"layers, {sizes.num_attention_heads}/{sizes.num_key_value_heads} heads, vocabulary "
        f"{sizes.vocab_size}, {sizes.batch} x {sizes.length} tokens, fp32; a step is zero_grad, "
        "forward, loss, backward, fused AdamW; a forward pass gives all logits, routed as in "
        f"training; medians of {rounds} rounds in turns, a process each"
    )
    machine = (
        f"{cpu()}, {threads} threads, OMP_WAIT_POLICY "
        f"{os.environ.get('OMP_WAIT_POLICY', 'default')}, load average {os.getloadavg()[0]:.1f} at "
        f"the start; torch {torch.__version__}, transformers {transformers.__version__}, kernels "
        f"{mor_ext.build_info()['cpu_isa']}"
    )
    kept = "keeps freed memory" if keep_freed_memory else "default settings"
    libc = " ".join(platform.libc_ver())
    return "\n".join(
        f"- {line}" for line in (size, machine, f"allocator: {libc}, {kept}", f"{commit()}")
    )


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "?")


def commit() -> str:
    def git(*args: str) -> str:
        command = ["git", "-C", str(BENCH), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = " with local changes" if git("status", "--porcelain") else ""
    return f"{time.strftime('%Y-%m-%d')}, commit {git('rev-parse', '--short=12', 'HEAD')}{changed}"


def models_section(result: dict[str, Any]) -> str:
    """The JSON of a run as Markdown."""
    return f"{result['conditions']}\n\n{models_table(judged(result['models']))}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Whole models against vanilla, as one table.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="leaves glibc's as it is; else it keeps freed memory, as in training",
    )
    parser.add_argument("--json", type=Path, help="where the times of all rounds go")
    options = parser.parse_args()
    setting = (Sizes(), options.rounds, options.threads, not options.default_allocator)
    result = {"conditions": conditions(*setting), "models": measure(*setting)}
    print(models_section(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
