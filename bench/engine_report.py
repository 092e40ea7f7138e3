"""Tables of what bench_engine.py has measured."""

import statistics
from typing import Any

from tables import table

Found = dict[str, Any]  # of the jobs of a comparison, by name
HEADER = ["", "", "tokens/s", "of the first (rounds)", "CPU time", "mean depth", "layers"]
HEADER += ["KV a token", "blocks held a token", "scheduler"]


def ratios(found: Found, name: str, than: str, clock: str = "seconds") -> list[float]:
    """Of tokens a second, by round."""
    mine, theirs = (
        [turn["tokens"] / turn[clock] for turn in found[which]["turns"]] for which in (name, than)
    )
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def median_ratio(found: Found, name: str, than: str) -> float:
    return statistics.median(ratios(found, name, than))


def engine_section(result: dict[str, Any]) -> str:
    """The JSON of a run as Markdown."""
    conditions = "\n".join(f"- {line}" for line in result["conditions"])
    return f"{conditions}\n\n{speeds(result['comparisons'])}\n\n{goals(result['comparisons'])}"


def speeds(comparisons: list[dict[str, Any]]) -> str:
    rows = []
    for comparison in comparisons:
        jobs = comparison["jobs"]
        first = next(iter(jobs))
        for name in jobs:
            title = comparison["title"] if name == first else ""
            rows.append([title, name, *cells(jobs, name, first)])
    read = len(rows[0]) > len(HEADER)
    return table([*HEADER, "J a token"] if read else HEADER, rows)


def cells(jobs: Found, name: str, first: str) -> list[str]:
    turns, facts = jobs[name]["turns"], jobs[name]["facts"]
    speed = statistics.median(turn["tokens"] / turn["seconds"] for turn in turns)
    by_round = ratios(jobs, name, first)
    cpu_time = 1 / statistics.median(ratios(jobs, name, first, "cpu"))
    found = [
        f"{speed:,.1f}",
        f"{statistics.median(by_round):.3f} ({min(by_round):.2f} - {max(by_round):.2f})",
        f"{cpu_time:.3f}",
    ]
    if facts is None:
        found += [""] * 5
    else:
        found += [
            f"{facts['depth']:.2f}",
            f"{facts['layers']:.2f}",
            f"{facts['kv_bytes'] / 1e3:.2f} kB",
            f"{facts['kv_bytes_held'] / 1e3:.2f} kB",
            f"{facts['scheduler_share']:.2%}",
        ]
    if turns[0]["joules"] is not None:
        found.append(f"{statistics.median(t['joules'] / t['tokens'] for t in turns):.3g}")
    return found


def goals(comparisons: list[dict[str, Any]]) -> str:
    rows = []
    for comparison in comparisons:
        for goal in comparison["goals"]:
            sign = ">=" if goal["at_least"] else "<="
            met = "yes" if goal["met"] else "**no**"
            what = f"{goal['what']}, {comparison['title']}"
            rows.append([what, f"{sign} {goal['bound']:g}", f"{goal['measured']:.3g}", met])
    return table(["goal", "bound", "measured", "met"], rows)
