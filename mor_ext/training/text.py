"""Text to train on: local files, or any data set of the ``datasets`` library."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

Paths = str | Path | Sequence[str | Path]


def read_files(paths: Paths) -> list[str]:
    """The text of each file, a document each.

    Args:
        paths: a file, a glob (``**`` goes through folders; its files are read in the order of their
            names), or a list of these.

    Raises:
        ValueError: a file is missing, empty, binary (has a NUL byte) or not UTF-8.
    """
    items = [paths] if isinstance(paths, str | Path) else paths
    return [_read(path) for path in chain.from_iterable(map(_expand, items))]


def _expand(item: str | Path) -> list[Path]:
    if Path(item).exists() or not glob.has_magic(str(item)):
        return [Path(item)]
    found = sorted(
        path for path in map(Path, glob.glob(str(item), recursive=True)) if path.is_file()
    )
    if not found:
        raise ValueError(f"files must exist, got {item}, which matches none")
    return found


def _read(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path} must be a file, got a folder (its files are {path}/*)")
    if not path.exists():
        raise ValueError(f"files must exist, got {path}")
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path} must have text, got {len(data)} bytes of white space")
    if b"\0" in data:
        raise ValueError(f"{path} must be text, got a NUL byte at byte {data.index(0)}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8, got {data[error.start]:#04x} at byte {error.start}"
        ) from error


def hold_out_end(texts: Iterable[str], share: float) -> tuple[list[str], list[str]]:
    """Splits texts in two: the last ``share`` of all their characters is held out.

    The text that the cut goes through is in both lists, its beginning in the first.

    Raises:
        ValueError: ``share`` is not between 0 and 1, or one part would be empty.
    """
    texts = list(texts)
    if not 0 < share < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {share}")
    total = sum(map(len, texts))
    left = total - int(total * share)
    if not 0 < left < total:
        raise ValueError(f"held_out must leave characters on both sides, got {share} of {total}")
    train, held_out = [], []
    for text in texts:
        train.append(text[:left])
        held_out.append(text[left:])
        left = max(0, left - len(text))
    return [text for text in train if text], [text for text in held_out if text]


def load_documents(
    name: str,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """A split of a data set with the one column ``text``.

    Args:
        name, config, split, streaming: as ``datasets.load_dataset`` takes them; a name may also be
            a folder of JSON Lines, Parquet, CSV or text files.
        column: where the text is.

    Raises:
        ValueError: there is no such data set, configuration or split, it has no documents, or no
            such column of strings.
    """
    import datasets

    try:
        documents = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError) as error:  # not found, or unreachable
        reason = str(error).splitlines()[0]
        raise ValueError(f"dataset must be one that can be loaded, got {name}: {reason}") from error
    first = next(iter(documents), None)
    if first is None:
        raise ValueError(f"dataset must have documents, got none in {name}, split {split}")
    if column not in first:
        raise ValueError(f"column must be one of {', '.join(first)}, got {column}")
    if not isinstance(first[column], str):
        raise ValueError(
            f"column must hold strings, got {type(first[column]).__name__} in {column}"
        )
    documents = documents.select_columns([column])
    return documents if column == "text" else documents.rename_column(column, "text")
