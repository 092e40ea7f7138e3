"""Tokens as items of one length: what a model trains on and is evaluated on.

An item has ``input_ids`` and ``labels``, int64 ``[length]``, and ``num_bytes``, int64 ``[]``: the
UTF-8 bytes that its scored tokens stand for. As for every causal model of Hugging Face, position i
is scored by ``labels[i + 1]``: the first token of an item is context alone. -100 is not scored.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import asdict, dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mor_ext.training.tokenizer import Tokens, encode

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
DOCUMENTS_AT_ONCE = 256  # encoded together, and between two marks
MARKS = 256  # that a stream keeps


def join(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Tokens:
    """All tokens of the texts, the tokenizer's eos (of no bytes) between two texts."""
    end, parts, chunk = _end(tokenizer), [], []
    for text in texts:
        chunk.append(text)
        if len(chunk) == DOCUMENTS_AT_ONCE:
            parts += encode(tokenizer, chunk)
            chunk = []
    parts += encode(tokenizer, chunk)
    return Tokens.concatenate(part for text in parts for part in (text, end))[: -len(end) or None]


def _end(tokenizer: PreTrainedTokenizerFast) -> Tokens:
    if tokenizer.eos_token_id is None:
        return Tokens.empty()
    return Tokens(np.array([tokenizer.eos_token_id], np.int32), np.zeros(1, np.int32))


def item(tokens: Tokens, first_label: int = 0) -> dict[str, Tensor]:
    """An item of all these tokens; labels before ``first_label`` are not scored."""
    input_ids = torch.from_numpy(tokens.ids.astype(np.int64))
    labels = input_ids.clone()
    labels[:first_label] = IGNORED
    num_bytes = int(tokens.num_bytes[max(1, first_label) :].sum())
    return {"input_ids": input_ids, "labels": labels, "num_bytes": torch.tensor(num_bytes)}


class PackedDataset(Dataset[dict[str, Tensor]]):
    """Windows of ``length`` tokens, each ``stride`` after the one before.

    The last window ends where the tokens end, and does not score again what it shares with the one
    before. So with a stride of ``length - 1`` every token but the first is scored exactly once, as
    an evaluation should; ``length`` (the default) is plain packing; less gives training windows at
    more places than packing has.

    Raises:
        ValueError: there are fewer than ``length`` tokens, or sizes that make no sense.
    """

    def __init__(self, tokens: Tokens, length: int, stride: int | None = None) -> None:
        self.tokens, self.length = tokens, length
        self.stride = length if stride is None else stride
        if length < 2:
            raise ValueError(f"length must be at least 2, got {length}")
        if not 1 <= self.stride <= length:
            raise ValueError(f"stride must be from 1 to length = {length}, got {self.stride}")
        if len(tokens) < length:
            raise ValueError(f"text must have at least length = {length} tokens, got {len(tokens)}")

    def __len__(self) -> int:
        return 1 + -(-(len(self.tokens) - self.length) // self.stride)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}")
        start = index * self.stride
        last = len(self.tokens) - self.length
        scored = 0 if start <= last else start - last + self.length - self.stride
        start = min(start, last)
        return item(self.tokens[start : start + self.length], scored)


@dataclass
class Mark:
    """Where a stream was before it read some documents."""

    position: int  # items before
    epoch: int
    documents: dict[str, Any] | None  # state of the documents; None at an epoch's beginning
    ids: list[int]  # tokens that were left over, fewer than an item has
    num_bytes: list[int]

    @staticmethod
    def at(position: int, epoch: int, documents: dict[str, Any], left_over: Tokens) -> Mark:
        ids, num_bytes = left_over.ids.tolist(), left_over.num_bytes.tolist()
        return Mark(position, epoch, documents, ids, num_bytes)

    def left_over(self) -> Tokens:
        return Tokens(np.array(self.ids, np.int32), np.array(self.num_bytes, np.int32))


class PackedStream(IterableDataset[dict[str, Tensor]]):
    """Streamed documents, joined with eos after each and cut into items; begins anew at their end.

    The order is the same in every run: that of the documents, whose ``set_epoch`` is told how often
    they have been read. Whoever skips the items that an interrupted run has seen goes on as that
    run would have. ``state_dict`` saves reading them again, without workers; with some, each reads
    its share of the documents.

    Args:
        documents: a ``datasets.IterableDataset`` with a column ``text``. A shuffle buffer has no
            state that could be saved: shuffle the order of shards (``buffer_size=1``).
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        tokenizer: PreTrainedTokenizerFast,
        length: int,
    ) -> None:
        self.documents, self.tokenizer, self.length = documents, tokenizer, length
        self._begin = Mark(0, 0, None, [], [])
        self._skipped = 0  # items up to this position are not yielded
        self._marks = deque([self._begin], maxlen=MARKS)

    def state_dict(self, position: int) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on after ``position`` items since the very first.

        A loader may have read ahead of what was trained on, so it is the caller who knows.

        Raises:
            ValueError: that was longer ago than this stream remembers.
        """
        marks = [mark for mark in self._marks if mark.position <= position]
        if not marks:
            raise ValueError(f"position must be at least {self._marks[0].position}, got {position}")
        return {"position": position, "mark": asdict(marks[-1])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration begins with the item after the state's position."""
        self._begin, self._skipped = Mark(**state["mark"]), state["position"]
        self._marks = deque([self._begin], maxlen=MARKS)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        begin = self._begin
        self._marks = deque([begin], maxlen=MARKS)
        position, left_over = begin.position, begin.left_over()
        documents = self._own_documents()
        for epoch in count(begin.epoch):
            documents.set_epoch(epoch)
            if epoch == begin.epoch and begin.documents is not None:
                documents.load_state_dict(begin.documents)
            empty = True
            for batch in documents.iter(DOCUMENTS_AT_ONCE):
                empty = False
                tokens = self._tokens(left_over, batch["text"])
                whole = len(tokens) // self.length * self.length
                for start in range(0, whole, self.length):
                    position += 1
                    if position > self._skipped:
                        yield item(tokens[start : start + self.length])
                left_over = tokens[whole:]
                self._marks.append(Mark.at(position, epoch, documents.state_dict(), left_over))
            if empty and epoch > begin.epoch:  # what was loaded may be the end of an epoch
                raise ValueError("dataset must have documents, got none")

    def _tokens(self, left_over: Tokens, texts: list[str]) -> Tokens:
        end = _end(self.tokenizer)
        parts = (part for text in encode(self.tokenizer, texts) for part in (text, end))
        return Tokens.concatenate([left_over, *parts])

    def _own_documents(self) -> datasets.IterableDataset:
        """A copy, for its state to be that of this iteration."""
        worker = get_worker_info()
        if worker is None:
            return copy(self.documents)
        if self._skipped:
            raise ValueError(f"workers must be 0 after load_state_dict, got {worker.num_workers}")
        from datasets.distributed import split_dataset_by_node

        return split_dataset_by_node(self.documents, worker.id, worker.num_workers)
