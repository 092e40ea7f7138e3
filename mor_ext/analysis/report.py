"""The page of a run: what its log and an evaluation of its model have to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from mor_ext.analysis.curves import draw_curves
from mor_ext.analysis.depth import draw_depth_loss, draw_heat_map
from mor_ext.analysis.flops import executed_flops, expected_flops, layout
from mor_ext.analysis.page import ColouredText, Facts, Picture, Section, Table, write_page
from mor_ext.analysis.rank import correlate
from mor_ext.analysis.text import segments, texts
from mor_ext.models import MoRConfig

SHOWN = 384  # tokens of the heat map


def write_report(
    path: str | Path,
    title: str,
    config: MoRConfig,
    results: Mapping[str, object],
    log: Sequence[Mapping[str, Any]],
    pieces: Sequence[bytes],
    stage_depth: Tensor,
    loss: Tensor,
    subtitle: str = "",
) -> None:
    """Writes the HTML page of a run.

    Args:
        results: numbers of the evaluation by name, units in the names.
        log: see :func:`mor_ext.analysis.curves.draw_curves`; empty draws none.
        pieces: UTF-8 bytes of the tokens of the first sequence.
        stage_depth: integers ``[batch, length, stages]``, see
            :class:`~mor_ext.models.MoROutput`.
        loss: ``[batch, length]``, nats of what each token predicts; NaN where it predicts nothing.

    Raises:
        ValueError: shapes that do not fit each other or the config.
        OSError: the file cannot be written.
    """
    depth = stage_depth.sum(dim=-1) - config.unshared_layers  # [batch, length]
    deepest = sum(stage.num_recursions for stage in layout(config)) - config.unshared_layers
    coloured = segments(pieces, depth[0].tolist(), loss[0].tolist())
    sections: list[Section] = [Facts("Results", results), _compute(config, stage_depth)]
    if log:
        sections.append(Picture("Training", draw_curves(log)))
    sections += [
        ColouredText(
            "Depth of held-out text",
            coloured,
            deepest,
            "Each token on the colour of its depth, the passes through shared blocks that it took; "
            "at rest, the pointer tells it and the loss of the token that follows.",
        ),
        Picture(
            "Depth over tokens and layers",
            draw_heat_map(config, texts(pieces)[:SHOWN], stage_depth[0, :SHOWN]),
            "The layers that each token went through, the first at the bottom.",
        ),
        Picture(
            "Depth against loss",
            draw_depth_loss(depth, loss, correlate(depth, loss)),
            "Loss of the token that follows, by the depth of the token that predicts it. The "
            "interval is a bootstrap over sequences. A correlation says nothing of the cause: "
            "it does not tell whether depth lowered a loss that would have been higher.",
        ),
        Facts("Configuration", _settings(config)),
    ]
    write_page(path, title, *sections, subtitle=subtitle)


def _compute(config: MoRConfig, stage_depth: Tensor) -> Table:
    length, n = stage_depth.shape[1], config.num_recursions
    executed = executed_flops(config, stage_depth).mean()
    full = expected_flops(config, length, [1.0] * n)
    rows: list[list[object]] = []
    for name, part in [*executed.parts().items(), ("total", executed.total)]:
        whole = full.total if name == "total" else full.parts()[name]
        share = f"{part / whole:.0%}" if whole > 0 else "\u2013"
        rows.append([name, round(part.item()), share])
    return Table(
        "Compute",
        ["part", "FLOPs a token, forward", "of full depth"],
        rows,
        f"Matrix products and visible pairs of attention, in sequences of {length:,} tokens; "
        "full depth is every token through every recursion.",
    )


def _settings(config: MoRConfig) -> dict[str, object]:
    """The fields of our own that say something, not those of every Hugging Face config."""
    names = [field.name for field in fields(config) if field.name in MoRConfig.__annotations__]
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}
