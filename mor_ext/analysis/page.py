"""One HTML page about a run, in one file that opens offline: no script, pictures inlined.

Whatever text goes in is escaped; a content security policy keeps the page from loading anything.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure

from mor_ext.analysis.style import depth_colours, ink, png
from mor_ext.analysis.text import Segment

STYLE = Path(__file__).with_name("page.css")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Section(Protocol):
    @property
    def title(self) -> str: ...

    def html(self) -> str:
        """What stands below the title, escaped."""
        ...


@dataclass(frozen=True)
class Paragraph:
    title: str
    text: str

    def html(self) -> str:
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Facts:
    """Names with a value each, such as a config."""

    title: str
    values: Mapping[str, object]

    def html(self) -> str:
        pairs = (
            f"<div><dt>{escape(str(name))}</dt><dd>{_shown(value)}</dd></div>"
            for name, value in self.values.items()
        )
        return f"<dl>{''.join(pairs)}</dl>"


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Iterable[Sequence[object]]
    caption: str = ""

    def html(self) -> str:
        header = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.header)
        rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in self.rows)
        table = f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>"
        return f'<div class="wide">{table}</div>{_caption(self.caption)}'


@dataclass(frozen=True)
class Picture:
    title: str
    figure: Figure
    caption: str = ""

    def html(self) -> str:
        data = base64.b64encode(png(self.figure)).decode()
        inches = self.figure.get_figwidth()
        least = 46 if inches > 9 else 0  # what does not fit a narrow screen is scrolled
        style = f"max-width:{6 * inches:.0f}rem;min-width:{least}rem"
        image = (
            f'<img style="{style}" alt="{escape(self.title)}" src="data:image/png;base64,{data}">'
        )
        return f'<div class="wide">{image}</div>{_caption(self.caption)}'


@dataclass(frozen=True)
class ColouredText:
    """Text on the colours of its tokens' depths, which a pointer at rest tells with the loss."""

    title: str
    segments: Sequence[Segment]
    depths: int  # the largest depth of the model
    caption: str = ""

    def html(self) -> str:
        styles = [f"background:{c};color:{ink(c)}" for c in depth_colours(self.depths)]
        legend = "".join(f'<span style="{s}">{depth}</span>' for depth, s in enumerate(styles))
        text = "".join(_span(segment, styles[segment.depth]) for segment in self.segments)
        return (
            f'<div class="legend faint">depth {legend}</div>'
            f'<div class="text">{text}</div>{_caption(self.caption)}'
        )


def write_page(path: str | Path, title: str, *sections: Section, subtitle: str = "") -> None:
    """Writes the page, UTF-8.

    Raises:
        OSError: the file cannot be written.
    """
    body = "\n".join(
        f"<section><h2>{escape(section.title)}</h2>\n{section.html()}</section>"
        for section in sections
    )
    Path(path).write_text(
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>
{STYLE.read_text()}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{_caption(subtitle)}
{body}
</body>
</html>
""",
        encoding="utf-8",
    )


def _shown(value: object) -> str:
    """Escaped; floats to 4 significant digits."""
    if value is None:
        return "\u2013"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value))
    return escape(str(value))


def _cell(value: object) -> str:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"<td{' class=number' if number else ''}>{_shown(value)}</td>"


def _span(segment: Segment, style: str) -> str:
    loss = "" if math.isnan(segment.loss) else f", loss {segment.loss:.2f} nats"
    text = escape(segment.text).replace("\n", "\u23ce\n")  # a newline has a depth too
    return f'<span style="{style}" title="depth {segment.depth}{loss}">{text}</span>'


def _caption(text: str) -> str:
    return f'<p class="faint">{escape(text)}</p>' if text else ""
