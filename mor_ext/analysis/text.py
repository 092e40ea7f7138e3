"""Tokens as text coloured by depth, for a terminal."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from mor_ext.analysis.style import depth_colours, ink

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Segment:
    """The text of a token, or of several that are bytes of one character."""

    text: str
    depth: int  # of the last of the tokens
    loss: float = math.nan  # in nats, of what the last of the tokens predicts; NaN is unknown


def pieces_of(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[bytes]:
    """The UTF-8 bytes of each token's text; of a character split over several, at the last."""

    def decoded(first: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[first:end])))

    pieces = []
    # Tokens from ``before`` to ``start`` are context: some tokenizers drop a space at the start.
    before = start = 0
    for end in range(1, len(ids) + 1):
        text = decoded(before, end)
        if text.endswith("\ufffd") and end - start < 4 and end < len(ids):
            pieces.append(b"")  # within a character, of 4 bytes at most
        else:
            pieces.append(text[len(decoded(before, start)) :].encode())
            before, start = start, end
    return pieces


def texts(pieces: Sequence[bytes]) -> list[str]:
    """The text that each token completes: none where a character's bytes go on in the next.

    Args:
        pieces: the UTF-8 bytes of each token. Bytes that are no UTF-8, and characters that cannot
            be shown, become U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last = len(pieces) - 1
    decoded = [decoder.decode(piece, final=i == last) for i, piece in enumerate(pieces)]
    return ["".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in t) for t in decoded]


def segments(
    pieces: Sequence[bytes], depth: Sequence[int], loss: Sequence[float] | None = None
) -> list[Segment]:
    """The text of tokens, whole characters at a time.

    Args:
        pieces: see :func:`texts`.
        depth: of each token.
        loss: of each token, in nats.

    Raises:
        ValueError: not as many depths or losses as tokens.
    """
    loss = [math.nan] * len(pieces) if loss is None else loss
    if not len(pieces) == len(depth) == len(loss):
        raise ValueError(
            f"depth and loss must be one for each of {len(pieces)} tokens, "
            f"got {len(depth)} and {len(loss)}"
        )
    return [
        Segment(text, int(d), float(nats))
        for text, d, nats in zip(texts(pieces), depth, loss, strict=True)
        if text
    ]


def coloured(parts: Iterable[Segment], depths: int) -> Text:
    """For :mod:`rich`: each segment on the colour of its depth; ``depths`` is the largest."""
    styles = [f"{ink(colour)} on {colour}" for colour in depth_colours(depths)]
    return Text.assemble(*((part.text, styles[part.depth]) for part in parts))


def legend(depths: int) -> Text:
    """The colour of each depth from 0."""
    return coloured((Segment(f" {depth} ", depth) for depth in range(depths + 1)), depths)
