"""Quality against compute of several runs, and which of them nothing beats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from mor_ext.analysis.style import GREY, LINES, MARKERS, new_figure


@dataclass(frozen=True)
class Point:
    """A model at one setting; less is better for both numbers."""

    run: str
    compute: float  # such as FLOPs a token, or effective depth
    quality: float  # such as nats a token, or bits per byte
    setting: str = ""  # of several points of a run, such as a threshold


def on_front(points: Sequence[Point]) -> list[bool]:
    """Whether each point is on the Pareto front: no other is at least as good in both numbers and
    better in one."""
    return [
        not any(
            other.compute <= point.compute
            and other.quality <= point.quality
            and (other.compute, other.quality) != (point.compute, point.quality)
            for other in points
        )
        for point in points
    ]


def draw_pareto(points: Sequence[Point], compute: str, quality: str) -> Figure:
    """A point for each, those of a run in one colour and joined; the front as steps.

    Args:
        compute, quality: what the axes show, with units.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("points must be at least one, got none")
    figure, (axis,) = new_figure(7.5, 5)
    axis.grid(axis="both", color="#dddddd", linewidth=0.6)
    front = sorted(
        {(p.compute, p.quality) for p, best in zip(points, on_front(points), strict=True) if best}
    )
    axis.step(*zip(*front, strict=True), where="post", color=GREY, linestyle="--", linewidth=1)
    axis.plot(
        *zip(*front, strict=True),
        "o",
        markersize=15,
        markerfacecolor="none",
        markeredgecolor=GREY,
        label="Pareto front",
    )
    for number, run in enumerate(dict.fromkeys(point.run for point in points)):
        mine = sorted((p for p in points if p.run == run), key=lambda p: p.compute)
        axis.plot(
            [p.compute for p in mine],
            [p.quality for p in mine],
            marker=MARKERS[number % len(MARKERS)],
            color=LINES[number % len(LINES)],
            linewidth=1.2,
            label=run,
        )
        for point in mine:
            axis.annotate(
                point.setting,
                (point.compute, point.quality),
                xytext=(9, 7),
                textcoords="offset points",
                fontsize=8,
            )
    axis.margins(0.12)
    axis.xaxis.set_major_formatter(EngFormatter())
    axis.set(xlabel=compute, ylabel=quality)
    axis.legend(fontsize=9, frameon=False)
    return figure


def pareto_table(points: Sequence[Point], compute: str, quality: str) -> Table:
    """For :mod:`rich`: the points in the order of their compute, the front starred."""
    table = Table(box=SIMPLE_HEAD, caption="* on the Pareto front")
    for name in ("run", "setting", compute, quality, ""):
        table.add_column(name, justify="left" if name in ("run", "setting", "") else "right")
    marked = zip(points, on_front(points), strict=True)
    for point, best in sorted(marked, key=lambda pair: (pair[0].compute, pair[0].quality)):
        table.add_row(
            point.run,
            point.setting,
            EngFormatter(places=3)(point.compute),
            f"{point.quality:.4f}",
            "*" if best else "",
        )
    return table
