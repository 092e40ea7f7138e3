"""Tables and charts of a bench run: python bench/report.py bench/out/bench.json

Writes report.md and, where matplotlib is installed, one PNG a family beside the JSON file; prints
the Markdown, which ends with the whole models of bench_models.py and the engine of bench_engine.py,
if models.json and engine.json are there too, and the results of bench/gpu.py that are in
bench/results. Without a file it prints these last alone.
Ratios are medians over rounds in which the peer and mor_ext took turns.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench_models import models_section
from engine_report import engine_section
from gpu_report import gpu_section
from tables import table

OURS = "mor"
PEERS = ["eager", "eager mask", "compiled", "sdpa"]

Entry = dict[str, Any]
Group = dict[str, Entry]  # of one piece of work: an entry a peer


def families(report: dict[str, Any]) -> dict[str, list[Group]]:
    """Groups by family, in the order of the run."""
    groups: dict[tuple[str, str], Group] = defaultdict(dict)
    for entry in report["benchmarks"]:
        family = Path(entry["fullname"].split("::")[0]).stem.removeprefix("bench_")
        groups[family, entry["group"]][entry["extra_info"]["peer"]] = entry
    result: dict[str, list[Group]] = defaultdict(list)
    for (family, _), group in groups.items():
        if OURS in group:  # a run cut down with -k may have peers alone
            result[family].append(group)
    return result


def name(group: Group) -> str:
    info = group[OURS]["extra_info"]
    return f"{info['op']}, {info['dtype']}, {info['shape']}"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def ratio(entry: Entry) -> float:
    return entry["extra_info"]["ratio"]


def goals(group: Group) -> list[tuple[str, str, str, bool]]:
    """(work, goal, measured, met), a row for every goal of a group."""
    rows = []
    for peer, entry in group.items():
        least = entry["extra_info"].get("goal")
        if least:
            got = ratio(entry)
            rows.append((name(group), f">= {least:g}x {peer}", f"{got:.2f}x", got >= least))
    return rows


def family_table(groups: list[Group]) -> str:
    peers = [peer for peer in PEERS if any(peer in group for group in groups)]
    rows = []
    for group in groups:
        info = group[OURS]["extra_info"]
        cells = [info["op"], info["dtype"], info["shape"]]
        cells.append(duration(group[OURS]["stats"]["median"]))
        for peer in peers:
            entry = group.get(peer)
            text = f"{duration(entry['stats']['median'])}, {ratio(entry):.2f}x" if entry else ""
            cells.append(text)
        share = info["share_of_ceiling"]  # 0 where neither bytes nor FLOPs are counted
        rows.append([*cells, f"{share:.0%}" if share else ""])
    return table(["op", "dtype", "shape", "mor_ext", *peers, "of ceiling"], rows)


def conditions(report: dict[str, Any]) -> str:
    machine, commit = report["machine_info"], report["commit_info"]
    ceilings = machine["ceilings"]
    rates = ", ".join(
        f"{key.removesuffix('_gemm_gflop_s')} {value:.0f}"
        for key, value in ceilings.items()
        if key.endswith("_gemm_gflop_s")
    )
    allocator = machine["allocator"]
    settings = ", ".join(f"{k}={v}" for k, v in allocator.items() if k != "libc")
    return "\n".join(
        f"- {line}"
        for line in (
            f"{machine['cpu'].get('brand_raw', machine['processor'])}, {machine['threads']} "
            f"threads, load average {machine['load_average']:.1f} at the start",
            f"kernels: torch {machine['cpu_capability']}, mor_ext {machine['mor_ext']['cpu_isa']}",
            f"torch {machine['torch']}, Python {machine['python_version']}, "
            f"{machine['mor_ext']['compiler']}",
            f"allocator: {allocator['libc']}, {settings or 'default settings'}",
            f"ceilings of this run: copy {ceilings['copy_gb_s']:.1f} GB/s (read + write); matrix "
            f"product, GFLOP/s: {rates}",
            f"{report['datetime'][:10]}, commit {commit['id'][:12]}"
            f"{' with local changes' if commit['dirty'] else ''}",
        )
    )


def markdown(report: dict[str, Any], folder: Path) -> str:
    """folder: where the JSON of other benches may be."""
    found = families(report)
    wanted = [row for groups in found.values() for group in groups for row in goals(group)]
    parts = ["## Conditions", conditions(report)]
    if wanted:
        rows = [[*row[:3], "yes" if row[3] else "**no**"] for row in wanted]
        parts += ["## Goals", table(["work", "goal", "measured", "met"], rows)]
    for family, groups in found.items():
        parts += [f"## {family}", family_table(groups)]
    for title, name, section in (
        ("Whole models", "models.json", models_section),
        ("The engine", "engine.json", engine_section),
    ):
        if (folder / name).exists():
            parts += [f"## {title}", section(json.loads((folder / name).read_text()))]
    parts += ["## GPU", gpu_section().rstrip()]
    return "\n\n".join(parts) + "\n"


def plot(family: str, groups: list[Group], folder: Path) -> None:
    """Bars of how many times faster than each peer; ticks where the goals are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    bars = [(group, peer) for group in groups for peer in PEERS if peer in group]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(bars)), layout="constrained")
    colours = dict(zip(PEERS, plt.get_cmap("tab10").colors, strict=False))
    for y, (group, peer) in enumerate(bars):
        value = ratio(group[peer])
        axes.barh(y, value - 1, left=1, color=colours[peer], label=peer)
        axes.text(max(value, 1), y, f" {value:.2f}", va="center", fontsize=7)
        goal = group[peer]["extra_info"].get("goal")
        if goal:
            axes.plot([goal, goal], [y - 0.45, y + 0.45], color="black", linewidth=2)
    first = [i for i, (group, _) in enumerate(bars) if i == 0 or bars[i - 1][0] is not group]
    axes.set_yticks(first, [name(bars[i][0]) for i in first], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time of the peer / time of mor_ext (black tick: goal)")
    axes.set_title(family)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=7, loc="lower right")
    figure.savefig(folder / f"{family}.png", dpi=120)
    plt.close(figure)


def main(path: Path | None) -> None:
    if path is None:
        print(gpu_section(), end="")
        return
    report = json.loads(path.read_text())
    text = markdown(report, path.parent)
    (path.parent / "report.md").write_text(text)
    print(text)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("No charts: matplotlib is not installed.", file=sys.stderr)
        return
    for family, groups in families(report).items():
        if any(len(group) > 1 for group in groups):
            plot(family, groups, path.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
