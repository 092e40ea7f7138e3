"""Depth of tokens as a picture: a heat map over tokens and layers, and depth against loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Patch
from torch import Tensor

from mor_ext.analysis.flops import is_routed, layout
from mor_ext.analysis.rank import Correlation
from mor_ext.analysis.style import GREY, LINES, PLAIN, depth_colours, new_figure
from mor_ext.models import MoRConfig

FONT = FontProperties(family="monospace", size=8)


def draw_heat_map(
    config: MoRConfig, texts: Sequence[str], stage_depth: Tensor, width: int = 64
) -> Figure:
    """Which layers each token went through: a column for each token, its text below.

    A row is one application of a block, the first at the bottom, labelled by the unrolled layers
    that it stands for; the colour says how many applications of the block this makes.

    Args:
        texts: of each token.
        stage_depth: integers ``[tokens, stages]``, see :class:`~mor_ext.models.MoROutput`.
        width: tokens a line.

    Raises:
        ValueError: stage_depth is not of that shape.
    """
    stages = layout(config)
    if list(stage_depth.shape) != [len(texts), len(stages)]:
        raise ValueError(
            f"stage_depth must be [{len(texts)}, {len(stages)}] for these texts and this config, "
            f"got {list(stage_depth.shape)}"
        )
    rows, labels, first = [], [], 1
    plain = config.num_recursions + 1  # the colour of layers that every token goes through once
    for depth, stage in zip(stage_depth.cpu().T, stages, strict=True):
        routed = is_routed(stage) or stage.num_recursions > 1
        for application in range(1, stage.num_recursions + 1):
            colour = application if routed else plain
            rows.append(torch.where(depth >= application, colour, 0))  # [tokens]
            last = first + len(stage.block.layers) - 1
            labels.append(str(first) if first == last else f"{first}\u2013{last}")
            first = last + 1
    cells = torch.stack(rows)  # [applications, tokens]

    lines = max(1, -(-len(texts) // width))
    figure, axes = new_figure(14, lines * (0.42 + 0.16 * len(rows)) + 0.9, lines)
    colours = [*depth_colours(config.num_recursions), PLAIN]
    for line, axis in enumerate(axes):
        part = slice(line * width, (line + 1) * width)
        _draw_strip(axis, cells[:, part], texts[part], labels, colours, width)
    names = ["skipped", *(f"application {i}" for i in range(1, plain)), "not routed"]
    used = cells.unique().tolist()
    handles = [Patch(facecolor=colours[i], edgecolor="#999999", label=names[i]) for i in used]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(used), frameon=False)
    figure.supylabel("unrolled layer", fontsize=10)
    figure.supxlabel("token", fontsize=10)
    return figure


def _draw_strip(
    axis: Axes,
    cells: Tensor,  # [applications, tokens]
    texts: Sequence[str],
    labels: Sequence[str],
    colours: Sequence[str],
    width: int,
) -> None:
    palette = ListedColormap(colours)
    top = len(colours) - 1
    axis.pcolormesh(
        cells.numpy(), cmap=palette, vmin=0, vmax=top, edgecolors="white", linewidth=0.4
    )
    axis.set_xlim(0, width)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, pad=2)
    long = any(len(text) > 1 for text in texts)
    axis.set_xticks(
        [column + 0.5 for column in range(len(texts))],
        [_label(text) for text in texts],
        fontproperties=FONT,
        rotation=90 if long else 0,
        parse_math=False,
    )
    step = -(-len(labels) // 12)  # a dozen labels at most
    rows = range(0, len(labels), step)
    axis.set_yticks([row + 0.5 for row in rows], [labels[row] for row in rows], fontsize=7)


def _label(text: str) -> str:
    """A token's text on an axis: newline and space visible, a box for what the font lacks."""
    font = get_font(findfont(FONT))
    text = text.replace("\n", "\u23ce").replace("\t", "\u21e5")
    if len(text) > 1:
        text = text.replace(" ", "\u2423")
    if len(text) > 12:
        text = text[:11] + "\u2026"
    return "".join(c if font.get_char_index(ord(c)) else "\u25a1" for c in text)


def draw_depth_loss(depth: Tensor, loss: Tensor, correlation: Correlation | None = None) -> Figure:
    """The losses of the tokens of each depth: quartiles, 5 to 95 % and mean.

    Args:
        depth: integers, any shape.
        loss: of each token, in nats; NaN is left out.
    """
    known = ~loss.isnan()
    depth, loss = depth[known], loss[known]
    figure, (axis,) = new_figure(7, 4.2)
    depths = depth.unique().tolist()
    groups = [loss[depth == d].tolist() for d in depths]
    line = {"color": LINES[0]}
    axis.boxplot(
        groups,
        positions=range(len(depths)),
        widths=0.5,
        whis=(5, 95),
        showfliers=False,
        showmeans=True,
        patch_artist=True,
        boxprops={"facecolor": "#d6e6f2", **line},
        whiskerprops=line,
        capprops=line,
        medianprops={"color": LINES[0], "linewidth": 2},
        meanprops={
            "marker": "D",
            "markersize": 5,
            "markerfacecolor": LINES[1],
            "markeredgecolor": "white",
        },
    )
    labels = [f"{d}\n({len(group):,})" for d, group in zip(depths, groups, strict=True)]
    axis.set_xticks(range(len(depths)), labels)
    axis.set(xlabel="depth: applications of shared blocks (tokens)", ylabel="loss (nats a token)")
    note = "box: quartiles and median; whiskers: 5 to 95 %; diamond: mean"
    if correlation is not None:
        note = f"Spearman's rank correlation {correlation}\n{note}"
    axis.set_title(note, fontsize=9, color=GREY, loc="left")
    return figure
