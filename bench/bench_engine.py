"""The engine, end to end: python bench/bench_engine.py

Tokens generated a second, of vanilla and MoR of the same unrolled depth in the same engine, and of
vanilla beside transformers' ``generate()``. Everything is in the time: prefill, writing K/V, first
and last layers, head, sampling, scheduling. The jobs of a comparison take turns in one process, and
a ratio is the median over rounds.

With --device cuda the model is larger and in bf16, MoR runs at two numbers of requests at once, the
second as many as there is memory for, and the results go to bench/results.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_models import commit, cpu
from energy import Energy
from engine_report import Found, engine_section, median_ratio
from engine_work import (
    CAPACITY,
    NEW,
    PROMPT,
    EngineJob,
    Job,
    Lengths,
    Requests,
    forced_mor,
    largest_batch,
    random_tokens,
    requests_of,
    trained,
    transformers_job,
    vanilla_and_llama,
    vanilla_like,
)
from models_worker import Sizes

RESULTS = Path(__file__).parent / "results"
BATCH = 32
# The 360M of arXiv 2507.10524.
LARGE = Sizes(BATCH, 512, 49152, 960, 2560, 32, 15, 5)
VANILLA, MOR, SEQUENCE, THEIRS = "vanilla", "MoR", "MoR, sequence-wise", "transformers"


@dataclass(frozen=True)
class Goal:
    what: str
    bound: float
    at_least: bool
    measure: Callable[[Found], float]

    def outcome(self, found: Found) -> dict[str, Any]:
        measured = self.measure(found)
        met = measured >= self.bound if self.at_least else measured <= self.bound
        goal = {"what": self.what, "bound": self.bound, "at_least": self.at_least}
        return {**goal, "measured": measured, "met": met}


def faster(name: str, than: str, bound: float) -> Goal:
    return Goal(f"tokens/s, {name} / {than}", bound, True, lambda f: median_ratio(f, name, than))


def share_of_kv(found: Found) -> float:
    return found[MOR]["facts"]["kv_bytes"] / found[VANILLA]["facts"]["kv_bytes"]


def scheduling(name: str) -> Goal:
    return Goal(
        f"scheduler's share, {name}", 0.03, False, lambda f: f[name]["facts"]["scheduler_share"]
    )


def mor_goals(bound: float) -> list[Goal]:
    kv = Goal("KV bytes a token, MoR / vanilla", 0.72, False, share_of_kv)
    return [faster(MOR, VANILLA, bound), kv, scheduling(MOR), scheduling(VANILLA)]


@dataclass(frozen=True)
class Setting:
    sizes: Sizes
    device: torch.device
    dtype: torch.dtype
    batches: tuple[int | None, ...]  # requests at once; None is as many as there is memory for
    bounds: tuple[float, ...]  # MoR / vanilla, for each of the batches
    rounds: int = 3
    requests: int = 4  # for each that runs at once
    prompt: Lengths = PROMPT
    new: Lengths = NEW

    @staticmethod
    def on(device: torch.device) -> "Setting":
        if device.type == "cuda":
            return Setting(LARGE, device, torch.bfloat16, (BATCH, None), (1.33, 1.95))
        sizes = Sizes(length=PROMPT.most + NEW.most)
        return Setting(sizes, device, torch.float32, (BATCH,), (1.25,))

    def placed(self, model: torch.nn.Module) -> Any:
        return model.to(self.device, self.dtype).eval()


# ---- measuring ----


def measure(jobs: Mapping[str, Job], setting: Setting, energy: Energy) -> Found:
    """Tokens, seconds and joules of every round, by name; facts of the jobs that know some."""
    found: Found = {}
    for name, job in jobs.items():  # each is warm from then on
        facts = job.facts() if isinstance(job, EngineJob) else job() and None
        found[name] = {"facts": facts, "turns": []}
    names = list(jobs)
    for turn in range(setting.rounds):
        first = turn % len(names)  # whatever comes before or after whom, not always the same
        for name in names[first:] + names[:first]:
            found[name]["turns"].append(timed(jobs[name], setting.device, energy))
        print(f"round {turn + 1} of {setting.rounds}: {', '.join(names)}", file=sys.stderr)
    return found


def timed(job: Job, device: torch.device, energy: Energy) -> dict[str, Any]:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    joules, wall, used = energy.joules(), time.perf_counter(), time.process_time()
    tokens = job()
    wait()
    wall, used = time.perf_counter() - wall, time.process_time() - used
    if joules is not None:
        joules = (energy.joules() or 0) - joules
    return {"tokens": tokens, "seconds": wall, "cpu": used, "joules": joules}


def comparisons(
    setting: Setting, energy: Energy, own: tuple[Path, Path] | None
) -> Iterator[dict[str, Any]]:
    """own: folder of a trained model, and a text for its prompts."""
    sizes, lengths = setting.sizes, (setting.prompt, setting.new)
    tokens = random_tokens(sizes)
    vanilla, theirs = map(setting.placed, vanilla_and_llama(sizes))
    mor = setting.placed(forced_mor(sizes))

    @torch.no_grad()
    def compare(title: str, jobs: Mapping[str, Job], goals: Iterable[Goal]) -> dict[str, Any]:
        found = measure(jobs, setting, energy)
        return {"title": title, "jobs": found, "goals": [goal.outcome(found) for goal in goals]}

    for batch, bound in zip(setting.batches, setting.bounds, strict=True):
        size = largest_batch(vanilla, *lengths) if batch is None else batch
        requests = requests_of(setting.requests * size, tokens, *lengths)
        shares = ", ".join(f"{c:.3g}" for c in CAPACITY)
        title = f"depths by the capacities {shares}, {size} at once"
        yield compare(title, mor_jobs(mor, vanilla, requests, size), mor_goals(bound))
    if own is not None:
        model, text = trained(*own)
        room = model.config.max_position_embeddings
        fitting = [replace(part, most=min(part.most, room // 2)) for part in lengths]
        requests = requests_of(setting.requests * BATCH, text, *fitting)
        like = vanilla_like(model.config)
        jobs = mor_jobs(setting.placed(model), setting.placed(like), requests, BATCH)
        title = f"depths by a trained model's router, {BATCH} at once"
        yield compare(title, jobs, [faster(MOR, VANILLA, setting.bounds[0])])
    one = Requests([tokens[: setting.prompt.median]], [setting.new.median])
    mixed = requests_of(BATCH, tokens, *lengths)
    for title, requests, bound in (
        ("one request", one, 1.0),
        (f"{BATCH} requests of mixed length", mixed, 3.0),
    ):
        mine = EngineJob(vanilla, requests, BATCH, temperature=0)
        jobs = {VANILLA: mine, THEIRS: transformers_job(theirs, requests)}
        yield compare(title, jobs, [faster(VANILLA, THEIRS, bound)])


def mor_jobs(model: Any, vanilla: Any, requests: Requests, batch: int) -> dict[str, Job]:
    models = {VANILLA: (vanilla, True), MOR: (model, True), SEQUENCE: (model, False)}
    return {
        name: EngineJob(own, requests, batch, 1.0, steady=True, depthwise=depthwise)
        for name, (own, depthwise) in models.items()
    }


# ---- conditions ----


def conditions(setting: Setting, energy: Energy, own: tuple[Path, Path] | None) -> list[str]:
    sizes = setting.sizes
    size = (
        f"d {sizes.hidden_size}, ffn {sizes.intermediate_size}, {sizes.num_hidden_layers} unrolled "
        f"layers, {sizes.num_attention_heads}/{sizes.num_key_value_heads} heads, vocabulary "
        f"{sizes.vocab_size}, {str(setting.dtype).removeprefix('torch.')}, random weights; MoR: "
        f"middle-cycle, {len(CAPACITY)} recursions"
    )
    work = (
        f"{setting.requests} requests for each place, sampled at temperature 1, until none waits, "
        f"so that the batch is full all the time; beside transformers {BATCH} requests, greedy, "
        f"until the last ends; log-normal lengths, prompts {setting.prompt}, continuations "
        f"{setting.new}; one request: {setting.prompt.median} and {setting.new.median} tokens; "
        f"prefill is part of the time; medians of {setting.rounds} rounds in turns"
    )
    theirs = (
        "transformers: generate() of LlamaForCausalLM with the same weights, SDPA, one batch "
        "padded on the left, until the longest ends; tokens beyond a request's length do not count"
    )
    model = "no trained model given" if own is None else f"trained model: {own[0].name}"
    lines = [size, work, theirs, model, machine(setting.device), commit()]
    if setting.device.type == "cuda":
        lines.append(f"energy: {energy.missing or 'by NVML, of the whole GPU'}")
    return lines


def machine(device: torch.device) -> str:
    import transformers

    import mor_ext

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
        name = torch.cuda.get_device_name(device)
        return f"{name}, driver {driver}, CUDA {torch.version.cuda}, {versions}"
    return (
        f"{cpu()}, {torch.get_num_threads()} threads, OMP_WAIT_POLICY "
        f"{os.environ.get('OMP_WAIT_POLICY', 'default')}, load average {os.getloadavg()[0]:.1f} at "
        f"the start; {versions}, kernels {mor_ext.build_info()['cpu_isa']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine end to end, as one table.")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4, help="for each that runs at once")
    parser.add_argument("--trained", type=Path, metavar="DIR", help="what `mor train` wrote")
    parser.add_argument("--text", type=Path, metavar="FILE", help="of whose end its prompts are")
    parser.add_argument("--json", type=Path, help="where the times of all rounds go")
    options = parser.parse_args()
    if (options.trained is None) != (options.text is None):
        parser.error("--trained and --text must be given together")
    own = None if options.trained is None else (options.trained, options.text)
    setting = Setting.on(options.device)
    setting = replace(setting, rounds=options.rounds, requests=options.requests)
    energy = Energy(setting.device)
    described = conditions(setting, energy, own)
    found: list[dict[str, Any]] = []
    result = {"conditions": described, "sizes": asdict(setting.sizes), "comparisons": found}
    path = options.json
    if path is None and setting.device.type == "cuda":
        path = RESULTS / f"engine-{time.strftime('%Y-%m-%d-%H%M', time.gmtime())}.json"
    for comparison in comparisons(setting, energy, own):
        found.append(comparison)
        if path is not None:  # whole or not: it may be stopped at a time limit
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1))
    print(engine_section(result))


if __name__ == "__main__":
    main()
