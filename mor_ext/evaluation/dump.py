"""What every token got, as JSON Lines, for whoever draws or correlates it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mor_ext.evaluation.score import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD = 8  # tokens that may make up one character


class DepthWriter:
    """Writes a line for every window it is called with; see :func:`~.evaluate.evaluate`.

    A line is an object of lists, one entry a token: ``token_ids``; ``pieces``, its text (without a
    tokenizer absent); ``depth``, ``layers`` and ``stage_depth`` (a list by stage), see
    :class:`~mor_ext.models.MoROutput`; ``nll``, in nats, of the token *after* it, which is what the
    depth was spent on; null where there is none to score.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.tokenizer = tokenizer
        self.file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115

    def __call__(self, batch: dict[str, Tensor], scores: Scores) -> None:
        for row, ids in enumerate(batch["input_ids"].tolist()):
            line: dict[str, Any] = {"token_ids": ids}
            if self.tokenizer is not None:
                line["pieces"] = pieces(self.tokenizer, ids)
            for name in ("depth", "layers", "stage_depth"):
                line[name] = getattr(scores, name)[row].tolist()
            nats = zip(scores.nll[row].tolist(), scores.scored[row].tolist(), strict=True)
            line["nll"] = [round(nll, 6) if scored else None for nll, scored in nats]
            self.file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def __enter__(self) -> DepthWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()


def read_depths(path: str | Path) -> list[dict[str, Any]]:
    """The lines that a :class:`DepthWriter` wrote."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined they are that of all.

    Of a character that several tokens make up, the last one gets all, the others nothing.
    """

    def text(start: int, end: int) -> str:
        return str(tokenizer.decode(list(ids[start:end]), clean_up_tokenization_spaces=False))

    result = []
    context = start = 0  # the token before goes along: a decoder may treat a text's beginning apart
    for end in range(1, len(ids) + 1):
        piece = text(context, end)[len(text(context, start)) :]
        incomplete = piece.endswith("\ufffd") and end < len(ids) and end - start < HELD
        result.append("" if incomplete else piece)
        if not incomplete:
            context, start = start, end
    return result
