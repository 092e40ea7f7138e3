"""Results of bench/gpu.py: what follows from the measurements, and tables of them."""

import json
from pathlib import Path
from typing import Any

from engine_report import engine_section
from tables import table

MATMUL = "bfloat16_matmul_tflop_s"  # of 16-bit work
RESULTS = Path(__file__).parent / "results"
NONE_YET = "no GPU results yet"

Entry = dict[str, Any]


def judged(case: Entry, found: Entry, ceilings: dict[str, float]) -> Entry:
    """A case as described with what was measured, its floor, its rates and how its goals fared."""
    entry = {**case, **found}
    goals = entry.pop("goals")
    if "ours" not in found:
        return entry
    us, size, flops = found["ours"]["us"], found["bytes"], found["flops"]
    matmul = ceilings["float32_matmul_tflop_s" if case["dtype"] == "float32" else MATMUL]
    least_us = max(size / ceilings["copy_gb_s"] / 1e3, flops / matmul / 1e6)
    for peer in timed(entry).values():
        peer["ratio"] = peer["us"] / us
    entry |= {
        "floor_us": least_us + found["fixed_us"],
        "share_of_ceiling": least_us / us,
        "gb_s": size / us / 1e3,
        "tflop_s": flops / us / 1e6,
    }
    entry["goals"] = [{**goal, **outcome(goal, measured(goal, entry))} for goal in goals]
    return entry


def measured(goal: Entry, entry: Entry) -> float | None:
    """What a goal is about; None where the peer has no time."""
    peer = timed(entry).get(goal["peer"], {})
    return {
        "us": entry["ours"]["us"],
        "share": entry["share_of_ceiling"],
        "tflop_s": entry["tflop_s"],
        "ratio": peer.get("ratio"),
        "rate": entry["flops"] * peer["ratio"] / peer["flops"] if peer.get("flops") else None,
    }[goal["kind"]]


def outcome(goal: Entry, value: float | None) -> Entry:
    def met(bound: float | None) -> bool | None:
        if value is None or bound is None:
            return None
        return value <= bound if goal["kind"] == "us" else value >= bound

    return {"measured": value, "met": met(goal["bound"]), "stretch_met": met(goal["stretch"])}


def timed(entry: Entry) -> Entry:
    """Peers and yardsticks that have a time."""
    return {n: p for n, p in (entry["peers"] | entry["yardsticks"]).items() if "us" in p}


# ---- tables ----


SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def goal_text(goal: Entry) -> str:
    text = {None: "not measured", True: "yes", False: "**no**"}[goal["met"]]
    if goal["kind"] == "rate" and goal["measured"] is not None:
        text += f" ({goal['measured']:.2f})"
    return f"{goal['goal']}: {text}{', stretch too' if goal['stretch_met'] else ''}"


def row(entry: Entry) -> list[str]:
    work = [entry["op"], SHORT.get(entry["dtype"], entry["dtype"]), entry["shape"]]
    if "ours" not in entry:
        return [*work, entry["failed"], "", "", "", ""]
    compared = {n: f"{p['ratio']:.2f}x" for n, p in timed(entry).items() if not p.get("flops")}
    compared |= {n: "failed" for n, p in entry["peers"].items() if "failed" in p}
    rate = f"{entry['tflop_s']:.0f} TFLOP/s" if entry["flops"] else f"{entry['gb_s']:.0f} GB/s"
    return [
        *work,
        f"{entry['ours']['us']:.1f}",
        ", ".join(f"{name} {text}" for name, text in compared.items()),
        rate,
        f"{entry['share_of_ceiling']:.0%}",
        "; ".join(map(goal_text, entry["goals"])),
    ]


HEADER = ["op", "dtype", "shape", "us", "times faster than", "rate", "of ceiling", "goals"]


def conditions(found: Entry) -> list[str]:
    device, software, library = found["device"], found["software"], found["library"]
    ceilings = found["ceilings"]
    tests, sanitizer = found.get("tests"), found.get("sanitizer")
    lines = [
        f"{device['name']}, driver {device.get('driver_version', 'unknown')}, torch "
        f"{software['torch']}, CUDA {software['cuda']}, cuDNN {software['cudnn']}",
        f"{found['date']}, commit {found['commit'][:12]}"
        f"{' with local changes' if found['dirty'] else ''}, library "
        f"{library['sha256'][:12]}{', built elsewhere' if library['prebuilt'] else ''}",
        f"ceilings of this run: copy {ceilings['copy_gb_s']:.0f} GB/s (read + write); matrix "
        f"product, TFLOP/s: bf16 {ceilings[MATMUL]:.0f}, fp32 "
        f"{ceilings['float32_matmul_tflop_s']:.0f}; a kernel of one element "
        f"{ceilings['one_element_us']:.1f} us",
    ]
    if tests:
        count = tests.get("tests", 0) - tests.get("skipped", 0)
        wrong = tests.get("failures", 0) + tests.get("errors", 0)
        late = ", stopped at the time limit" if tests["timed_out"] else ""
        lines.append(f"tests on the GPU: {count} run, {wrong} failed{late}")
    if isinstance(sanitizer, dict):
        lines += [
            f"{tool}: {'clean' if result['ok'] else '**not clean**'}, {result['right']} small cases"
            f"{', stopped at the time limit' if result['timed_out'] else ''}"
            for tool, result in sanitizer.items()
        ]
    return lines


def summary(found: Entry) -> str:
    """The conditions, the engine, and a line a case; or, of bench_engine.py alone, that."""
    if "ceilings" not in found:
        return engine_section(found)
    parts = ["\n".join(f"- {line}" for line in conditions(found))]
    if "comparisons" in found.get("engine", {}):
        parts.append(engine_section(found["engine"]))
    if found.get("benchmarks"):
        parts.append(table(HEADER, list(map(row, found["benchmarks"]))))
    return "\n\n".join(parts)


def gpu_section(folder: Path = RESULTS) -> str:
    """Markdown about all results in a folder, the newest first."""
    files = sorted(folder.glob("*.json"), reverse=True)
    if not files:
        return f"{NONE_YET}\n"
    return (
        "\n\n".join(f"### {f.stem}\n\n{summary(json.loads(f.read_text()))}" for f in files) + "\n"
    )
