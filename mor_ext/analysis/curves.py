"""Training curves from the log of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from mor_ext.analysis.style import LINES, new_figure


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis: label by key of the log."""

    title: str
    unit: str
    curves: Mapping[str, str]


def _with_evaluation(**curves: str) -> dict[str, str]:
    """The same numbers of an evaluation, which the Trainer logs with a prefix, beside them."""
    return {
        prefix + key: label + suffix
        for key, label in curves.items()
        for prefix, suffix in (("", ""), ("eval_", ", held-out"))
    }


PANELS = (
    Panel(
        "Loss", "nats a token", _with_evaluation(loss="loss", nll="prediction", aux_loss="routers")
    ),
    Panel("Bits per byte", "bits a byte", _with_evaluation(bits_per_byte="bits per byte")),
    Panel("Effective depth", "layers a token", _with_evaluation(effective_depth="effective depth")),
    Panel(
        "Routing",
        "share of tokens",
        _with_evaluation(agreement="agreement of both rules", dead_tokens="dead tokens"),
    ),
    Panel("Load of depths: MaxVio", "largest / mean load - 1", _with_evaluation(max_vio="MaxVio")),
    Panel("Load of depths: entropy", "nats", _with_evaluation(load_entropy="entropy")),
    Panel("Speed", "tokens a second", {"tokens_per_second": "training"}),
    Panel("Router's time", "share of a step", {"router_share": "training"}),
    Panel("Learning rate", "rate", {"learning_rate": "learning rate"}),
)


def draw_curves(log: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each kind of number that the log has.

    Args:
        log: records with ``step``, such as ``log_history`` in the ``trainer_state.json`` of Hugging
            Face's Trainer; the keys of :data:`PANELS` are drawn where they are there.

    Raises:
        ValueError: the log has none of them.
    """
    drawn = []
    for panel in PANELS:
        curves = {label: _curve(log, key) for key, label in panel.curves.items()}
        curves = {label: curve for label, curve in curves.items() if curve}
        if curves:
            drawn.append((panel, curves))
    if not drawn:
        keys = sorted({key for record in log for key in record})
        raise ValueError(f"log must have numbers with a step to draw, got the keys {keys}")
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = new_figure(4.4 * columns, 3 * rows, rows, columns)
    for axis, (panel, curves) in zip(axes, drawn, strict=False):
        for number, (label, curve) in enumerate(curves.items()):
            steps, values = zip(*curve, strict=True)
            few = len(curve) < 30
            axis.plot(
                steps,
                values,
                color=LINES[number],
                marker="o" if few else None,
                markersize=3.5,
                linewidth=1.4,
                label=label,
            )
        axis.set_title(panel.title, fontsize=10, loc="left")
        axis.set_xlabel("step", fontsize=9)
        axis.set_ylabel(panel.unit, fontsize=9)
        axis.legend(fontsize=8, frameon=False)
    for axis in axes[len(drawn) :]:
        axis.remove()
    return figure


def _curve(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(record["step"], record[key]) for record in log if "step" in record and key in record]
