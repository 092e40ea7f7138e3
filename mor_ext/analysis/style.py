"""What all pictures share: colours that colour-blind readers tell apart, axes, PNG."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

# Okabe & Ito (2008), without yellow, which is faint on white; black goes to what has no name.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"  # shapes too tell runs apart
GREY = "#6b6b6b"
SKIPPED = "#f1f1f4"  # depth 0
PLAIN = "#b4b4bd"  # where nothing is routed


def depth_colours(depths: int) -> list[str]:
    """Hex colours of depths 0 to ``depths``: neutral, then light to dark (YlGnBu)."""
    steps = [0.3 + 0.6 * i / max(1, depths - 1) for i in range(depths)]
    return [SKIPPED, *(to_hex(colormaps["YlGnBu"](step)) for step in steps)]


def ink(background: str) -> str:
    """Black or white, whichever has more contrast on a colour (relative luminance of WCAG 2)."""
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(background)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure in inches, of no window, and its axes row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=9, colors="#333333")
    return figure, axes


def png(figure: Figure, dpi: int = 130) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Writes a PNG."""
    Path(path).write_bytes(png(figure))
