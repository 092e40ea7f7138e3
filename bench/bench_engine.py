"""The engine, end to end: python bench/bench_engine.py

Tokens generated a second, of vanilla and MoR of the same unrolled depth in the same engine, and of
vanilla beside transformers' ``generate()``. Everything is in the time: prefill, writing K/V, first
and last layers, head, sampling, scheduling. The jobs of a comparison take turns in one process, and
a ratio is the median over rounds.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_models import commit, cpu
from engine_work import (
    CAPACITY,
    NEW,
    PROMPT,
    EngineJob,
    Job,
    Lengths,
    Requests,
    forced_mor,
    random_tokens,
    requests_of,
    trained,
    transformers_job,
    vanilla_and_llama,
    vanilla_like,
)
from models_worker import Sizes

BATCH = 32
VANILLA, MOR, SEQUENCE, THEIRS = "vanilla", "MoR", "MoR, sequence-wise", "transformers"
Found = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    what: str
    bound: float
    at_least: bool
    measured: Callable[[Found], float]  # of a comparison

    def met(self, found: Found) -> bool:
        got = self.measured(found)
        return got >= self.bound if self.at_least else got <= self.bound


def faster(name: str, than: str) -> Callable[[Found], float]:
    return lambda found: statistics.median(ratios(found, name, than))


def share(name: str, fact: str, of: str) -> Callable[[Found], float]:
    return lambda found: found[name]["facts"][fact] / found[of]["facts"][fact]


MOR_GOALS = [
    Goal("tokens/s, MoR / vanilla", 1.25, True, faster(MOR, VANILLA)),
    Goal("KV bytes a token, MoR / vanilla", 0.72, False, share(MOR, "kv_bytes", VANILLA)),
    Goal("scheduler's share, MoR", 0.03, False, lambda f: f[MOR]["facts"]["scheduler_share"]),
    Goal(
        "scheduler's share, vanilla", 0.03, False, lambda f: f[VANILLA]["facts"]["scheduler_share"]
    ),
]
FORCED = f"depths by the capacities {', '.join(f'{c:.3g}' for c in CAPACITY)}"
TRAINED = "depths by a trained model's router"
ONE, MIXED = "one request", f"{BATCH} requests of mixed length"
GOALS = {
    FORCED: MOR_GOALS,
    TRAINED: MOR_GOALS[:1],
    ONE: [Goal("tokens/s, vanilla / transformers", 1.0, True, faster(VANILLA, THEIRS))],
    MIXED: [Goal("tokens/s, vanilla / transformers", 3.0, True, faster(VANILLA, THEIRS))],
}


# ---- measuring ----


def measure(jobs: Mapping[str, Job], rounds: int) -> Found:
    """Tokens, and seconds of every round, by name; facts of the jobs that know some."""
    found: Found = {name: {"tokens": job(), "turns": []} for name, job in jobs.items()}  # warm
    names = list(jobs)
    for turn in range(rounds):
        first = turn % len(names)  # whatever comes before or after whom, not always the same
        for name in names[first:] + names[:first]:
            wall, used = time.perf_counter(), time.process_time()
            jobs[name]()
            wall, used = time.perf_counter() - wall, time.process_time() - used
            found[name]["turns"].append({"seconds": wall, "cpu": used})
    for name, job in jobs.items():
        if isinstance(job, EngineJob):
            found[name]["facts"] = job.facts()
    return found


def ratios(found: Found, name: str, than: str, clock: str = "seconds") -> list[float]:
    """Of tokens a second, by round."""
    tokens = found[name]["tokens"] / found[than]["tokens"]
    turns = zip(found[name]["turns"], found[than]["turns"], strict=True)
    return [tokens * theirs[clock] / mine[clock] for mine, theirs in turns]


@torch.no_grad()
def comparisons(
    sizes: Sizes,
    count: int,
    rounds: int,
    lengths: tuple[Lengths, Lengths],
    own: tuple[Path, Path] | None,
) -> dict[str, Found]:
    """own: folder of a trained model, and a text for its prompts."""
    tokens = random_tokens(sizes)
    vanilla, theirs = vanilla_and_llama(sizes)
    requests = requests_of(count, tokens, *lengths)
    found = {FORCED: measure(mor_jobs(forced_mor(sizes), vanilla, requests), rounds)}
    if own is not None:
        model, text = trained(*own)
        room = model.config.max_position_embeddings
        fitting = tuple(
            Lengths(part.median, part.sigma, part.least, min(part.most, room // 2))
            for part in lengths
        )
        jobs = mor_jobs(model, vanilla_like(model.config), requests_of(count, text, *fitting))
        found[TRAINED] = measure(jobs, rounds)
    middle = Requests([requests.prompts[0][:1] * lengths[0].median], [lengths[1].median])
    mixed = requests_of(BATCH, tokens, *lengths)
    for name, some in ((ONE, middle), (MIXED, mixed)):
        mine = EngineJob(vanilla, some, BATCH, temperature=0)
        found[name] = measure({VANILLA: mine, THEIRS: transformers_job(theirs, some)}, rounds)
    return found


def mor_jobs(model: Any, vanilla: Any, requests: Requests) -> dict[str, Job]:
    return {
        VANILLA: EngineJob(vanilla, requests, BATCH, temperature=1),
        MOR: EngineJob(model, requests, BATCH, temperature=1, depthwise=True),
        SEQUENCE: EngineJob(model, requests, BATCH, temperature=1, depthwise=False),
    }


# ---- what follows ----


def table(found: dict[str, Found]) -> str:
    header = ["", "", "tokens/s", "of the first (rounds)", "CPU time", "mean depth", "layers"]
    header += ["KV a token", "blocks held a token", "scheduler"]
    lines = [header, ["---"] * len(header)]
    for title, group in found.items():
        first = next(iter(group))
        for name, entry in group.items():
            seconds = statistics.median(turn["seconds"] for turn in entry["turns"])
            by_round = ratios(group, name, first)
            cpu_time = 1 / statistics.median(ratios(group, name, first, "cpu"))
            facts = entry.get("facts")
            cells = [title if name == first else "", name, f"{entry['tokens'] / seconds:,.1f}"]
            cells += [
                f"{statistics.median(by_round):.3f} ({min(by_round):.2f} - {max(by_round):.2f})",
                f"{cpu_time:.3f}",
            ]
            if facts:
                cells += [
                    f"{facts['depth']:.2f}",
                    f"{facts['layers']:.2f}",
                    f"{facts['kv_bytes'] / 1e3:.2f} kB",
                    f"{facts['kv_bytes_held'] / 1e3:.2f} kB",
                    f"{facts['scheduler_share']:.2%}",
                ]
            lines.append(cells + [""] * (len(header) - len(cells)))
    goals = [["goal", "bound", "measured", "met"], ["---"] * 4]
    for title, group in found.items():
        for goal in GOALS[title]:
            sign = ">=" if goal.at_least else "<="
            met = "yes" if goal.met(group) else "**no**"
            got = f"{goal.measured(group):.3g}"
            goals.append([f"{goal.what}, {title}", f"{sign} {goal.bound:g}", got, met])
    return "\n\n".join(
        "\n".join("| " + " | ".join(line) + " |" for line in part) for part in (lines, goals)
    )


def conditions(sizes: Sizes, count: int, rounds: int, own: tuple[Path, Path] | None) -> str:
    import transformers

    import mor_ext

    size = (
        f"d {sizes.hidden_size}, ffn {sizes.intermediate_size}, {sizes.num_hidden_layers} unrolled "
        f"layers, {sizes.num_attention_heads}/{sizes.num_key_value_heads} heads, vocabulary "
        f"{sizes.vocab_size}, fp32; MoR: middle-cycle, {len(CAPACITY)} recursions"
    )
    work = (
        f"{count} requests at once for {BATCH} places, sampled at temperature 1 (beside "
        f"transformers greedy); log-normal lengths, prompts {PROMPT}, continuations {NEW}; one "
        f"request: {PROMPT.median} and {NEW.median} tokens; all of a run in the time, prefill "
        f"included; medians of {rounds} rounds in turns"
    )
    theirs = (
        "transformers: generate() of LlamaForCausalLM with the same weights, SDPA, one batch "
        "padded on the left, until the longest ends; tokens beyond a request's length do not count"
    )
    model = "no trained model given" if own is None else f"trained model: {own[0].name}"
    machine = (
        f"{cpu()}, {torch.get_num_threads()} threads, OMP_WAIT_POLICY "
        f"{os.environ.get('OMP_WAIT_POLICY', 'default')}, load average {os.getloadavg()[0]:.1f} at "
        f"the start; torch {torch.__version__}, transformers {transformers.__version__}, kernels "
        f"{mor_ext.build_info()['cpu_isa']}"
    )
    return "\n".join(f"- {line}" for line in (size, work, theirs, model, machine, commit()))


def engine_section(result: dict[str, Any]) -> str:
    """The JSON of a run as Markdown."""
    return f"{result['conditions']}\n\n{table(result['comparisons'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine end to end, as one table.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2 * BATCH)
    parser.add_argument("--trained", type=Path, metavar="DIR", help="what `mor train` wrote")
    parser.add_argument("--text", type=Path, metavar="FILE", help="of whose end its prompts are")
    parser.add_argument("--json", type=Path, help="where the times of all rounds go")
    options = parser.parse_args()
    if (options.trained is None) != (options.text is None):
        parser.error("--trained and --text must be given together")
    own = None if options.trained is None else (options.trained, options.text)
    sizes = Sizes(length=PROMPT.most + NEW.most)
    setting = (sizes, options.requests, options.rounds)
    described = conditions(*setting, own)
    found = comparisons(*setting, (PROMPT, NEW), own)
    result = {"conditions": described, "comparisons": found}
    print(engine_section(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
