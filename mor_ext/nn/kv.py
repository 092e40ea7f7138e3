"""Where attention finds its keys and values at a depth: the KV strategies of MoR.

A layer sees only a :class:`KVView`. What a query sees at a depth, always up to its own position:

* recursion_wise: the tokens active at that depth (arXiv 2507.10524, section 2.2.2).
* shared: the tokens active at depth 1, whose K/V are computed once, there; every deeper depth
  computes queries only (same section).
* hybrid: the tokens active at depth 1, each with the K/V of the last depth it reached.
* frozen: every token; one that has gone no further leaves the K/V that each layer of the block
  makes of its exit state (Mo2BERTa-v2; the skip router's "skipped tokens still write K/V").

Hybrid and frozen carry the K/V of tokens that are not active from depth to depth.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mor_ext import ops
from mor_ext.nn.rotary import Rotary
from mor_ext.nn.tokens import Tokens

CARRIED = ("hybrid", "frozen")


class KVView(ABC):
    """The K/V of every layer of a block at one depth."""

    new_rows: int | None = None  # so many rows, the first, bring K/V of their own; None is all

    @abstractmethod
    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        """Rotates query ``[k, heads, head_dim]`` and key, keeps what later depths or steps need,
        and returns the attention's output ``[k, heads, head_dim]``. Key and value are those of the
        new rows, None if there are none."""


class KeepingView(KVView):
    """A view that also keeps K/V of tokens which have gone no further."""

    exited: Tokens | None = None  # those that have just left, if their K/V change by that

    @abstractmethod
    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Takes the K/V ``[e, kv_heads, head_dim]`` of the exited tokens, before ``attend``."""


class KVStore(Protocol):
    """The K/V of a batch of sequences."""

    every_depth: bool  # to be asked for a view of every depth, even if nobody is active there

    def enter(self, lengths: Sequence[int], device: torch.device) -> Tokens:
        """The next ``lengths`` tokens of the sequences, at the start of a forward pass."""
        ...

    def view(self, stage: int, depth: int, active: Tokens) -> KVView:
        """What the tokens active at a depth (from 0) of the model's stage see."""
        ...


class PackedKV:
    """The K/V of whole sequences, kept for one pass: training, and evaluation without a cache."""

    every_depth = False

    def __init__(self, strategy: str, rotary: Rotary) -> None:
        self.strategy = strategy
        self.rotary = rotary
        self.last: PackedView | CarriedView | None = None  # of the depth before

    def enter(self, lengths: Sequence[int], device: torch.device) -> Tokens:
        self.tokens = Tokens.of_batch(lengths, device)
        return self.tokens

    def view(self, stage: int, depth: int, active: Tokens) -> KVView:
        before = self.last if depth > 0 else None
        if self.strategy in CARRIED:
            carried = carry(self.strategy, self.tokens, active, before)
            self.last = CarriedView(self.rotary, carried)
        elif before is None or self.strategy == "recursion_wise":
            self.last = PackedView(self.rotary, active)
        else:  # shared
            assert isinstance(before, PackedView)
            return PackedView(self.rotary, active, first=before)
        return self.last


class PackedView(KVView):
    """Active tokens that see each other, or the K/V of the view of depth 1."""

    def __init__(self, rotary: Rotary, active: Tokens, first: "PackedView | None" = None) -> None:
        self.rotary = rotary
        self.active = active
        self.new_rows = None if first is None else 0
        if first is None:
            self.seen = active  # whose K/V are seen
            self.key_limit = None
            self.kv: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, [k, kv_heads, head_dim]
        else:
            self.seen = first.active
            self.key_limit = shared_key_limit(active, first.active)
            self.kv = first.kv

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        if key is None or value is None:
            query = self.rotary.query(query, self.active.positions)
            key, value = self.kv[layer]
        else:
            query, key = self.rotary(query, key, self.active.positions)
            self.kv[layer] = key, value
        return attend(query, key, value, self.active, self.seen, self.key_limit)


class Carried:
    """The K/V of ``listed`` tokens at one depth: of the active ones new, of the others carried.

    Attributes:
        exited: those that have just left, if their K/V change by that; ``exited_rows`` and
            ``active_rows`` are their rows, and those of the active, in the list.
        kv: by layer, ``[listed, kv_heads, head_dim]``, complete after ``merge``.
    """

    def __init__(
        self, listed: Tokens, active: Tokens, exited: Tokens | None, before: "Carried | None"
    ) -> None:
        self.listed = listed
        self.active = active
        self.exited = exited
        self.active_rows = rows_among(active, listed).long()
        self.exited_rows = None if exited is None else rows_among(exited, listed).long()
        self.kept = {} if before is None else dict(before.kv)
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, rotary: Rotary, layer: int, key: Tensor, value: Tensor) -> None:
        assert self.exited is not None and self.exited_rows is not None
        key = rotary.query(key, self.exited.positions)
        self.kept[layer] = self._put(layer, self.exited_rows, key, value)

    def merge(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the K/V of the active tokens, rotated, among the others'; returns all."""
        self.kv[layer] = self._put(layer, self.active_rows, key, value)
        return self.kv[layer]

    def _put(self, layer: int, rows: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.kept:
            keys, values = self.kept[layer]
        else:
            shape = (self.listed.total, *key.shape[1:])
            keys, values = key.new_zeros(shape), value.new_zeros(shape)
        return keys.index_copy(0, rows, key), values.index_copy(0, rows, value)


def carry(strategy: str, tokens: Tokens, active: Tokens, before: object) -> Carried:
    """The list of a depth of a carried strategy after that of the view ``before`` it.

    tokens: all of the pass.
    """
    last = before.carried if isinstance(before, CarriedView) else None
    if strategy == "hybrid":
        return Carried(active if last is None else last.listed, active, None, last)
    exited = without(tokens if last is None else last.active, active)
    return Carried(tokens, active, exited, last)


class CarriedView(KeepingView):
    """Active tokens that see every listed one up to themselves."""

    def __init__(self, rotary: Rotary, carried: Carried) -> None:
        self.rotary = rotary
        self.carried = carried
        self.exited = carried.exited
        self.key_limit = shared_key_limit(carried.active, carried.listed)

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.carried.keep(self.rotary, layer, key, value)

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        assert key is not None and value is not None
        active, listed = self.carried.active, self.carried.listed
        query, key = self.rotary(query, key, active.positions)
        key, value = self.carried.merge(layer, key, value)
        return attend(query, key, value, active, listed, self.key_limit)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    active: Tokens,
    seen: Tokens,
    key_limit: Tensor | None,
) -> Tensor:
    out, _ = ops.attention(
        query,
        key,
        value,
        active.cu_seqlens,
        seen.cu_seqlens,
        key_limit,
        active.max_seqlen,
        seen.max_seqlen,
        query.shape[-1] ** -0.5,
    )
    return out


def rows_among(active: Tokens, listed: Tokens) -> Tensor:
    """int32 ``[k]``: the number of each active token among the listed, which hold them all."""
    if active.index is None:
        return torch.arange(active.total, dtype=torch.int32, device=active.positions.device)
    if listed.index is None:
        return active.index
    return torch.searchsorted(listed.index, active.index, out_int32=True)


def without(tokens: Tokens, active: Tokens) -> Tokens:
    """The tokens that are not active. Only the host knows how many: no copy to wait for."""
    left = torch.ones_like(tokens.positions).index_fill(0, rows_among(active, tokens).long(), 0)
    lengths = [a - b for a, b in zip(tokens.lengths, active.lengths, strict=True)]
    index, cu_seqlens = ops.compact_depth(left, tokens.cu_seqlens, 1)
    return tokens.select(index[0, : sum(lengths)], lengths, cu_seqlens[0])


def shared_key_limit(active: Tokens, first: Tokens, past: Tensor | None = None) -> Tensor:
    """int32 ``[k]``: how many of the K/V of ``first`` each active token sees, its own the last.

    The active ones are among ``first``, and ``past`` (int32 ``[batch]``) more are cached before.
    Where every token is in ``first`` and nothing cached this is the position + 1.
    """
    row = rows_among(active, first)
    sequence = torch.searchsorted(first.cu_seqlens, row, right=True) - 1
    limit = row - first.cu_seqlens[sequence] + 1
    return limit if past is None else limit + past[sequence]
