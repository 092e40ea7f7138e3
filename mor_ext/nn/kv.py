"""Where attention finds its keys and values at a depth: the KV strategies of MoR.

A layer sees only a :class:`KVView`. Recursion-wise, a depth attends to its own active tokens.
Shared, a layer's K/V are computed once, at depth 1, by the tokens active there; every deeper depth
computes queries only, and a query sees those of depth 1 up to its own position.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from mor_ext import ops
from mor_ext.nn.rotary import Rotary
from mor_ext.nn.tokens import Tokens


class KVView(Protocol):
    """The K/V of every layer of a block at one depth."""

    queries_only: bool  # the K/V are there already: a layer computes queries only

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        """Rotates query ``[k, heads, head_dim]`` and key, keeps what later depths or steps need,
        and returns the attention's output ``[k, heads, head_dim]``."""
        ...


class KVStore(Protocol):
    """The K/V of a batch of sequences."""

    def enter(self, lengths: Sequence[int], device: torch.device) -> Tokens:
        """The next ``lengths`` tokens of the sequences, at the start of a forward pass."""
        ...

    def view(self, stage: int, depth: int, active: Tokens) -> KVView:
        """What the tokens active at a depth (from 0) of the model's stage see."""
        ...


class PackedKV:
    """The K/V of whole sequences, kept for one pass: training, and evaluation without a cache."""

    def __init__(self, shared: bool, rotary: Rotary) -> None:
        self.shared = shared
        self.rotary = rotary
        self.first: dict[int, PackedView] = {}  # by stage: the view of depth 1

    def enter(self, lengths: Sequence[int], device: torch.device) -> Tokens:
        return Tokens.of_batch(lengths, device)

    def view(self, stage: int, depth: int, active: Tokens) -> "PackedView":
        if not self.shared:
            return PackedView(self.rotary, active)
        if depth == 0:
            self.first[stage] = PackedView(self.rotary, active)
            return self.first[stage]
        return PackedView(self.rotary, active, self.first[stage])


class PackedView:
    def __init__(self, rotary: Rotary, active: Tokens, first: "PackedView | None" = None) -> None:
        self.rotary = rotary
        self.active = active
        self.queries_only = first is not None
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
        out, _ = ops.attention(
            query,
            key,
            value,
            self.active.cu_seqlens,
            self.seen.cu_seqlens,
            self.key_limit,
            self.active.max_seqlen,
            self.seen.max_seqlen,
            query.shape[-1] ** -0.5,
        )
        return out


def shared_key_limit(active: Tokens, first: Tokens, past: Tensor | None = None) -> Tensor:
    """int32 ``[k]``: how many K/V of depth 1 each active token sees, its own the last of them.

    ``first`` are the tokens active at depth 1; the active ones are among them, and ``past`` (int32
    ``[batch]``) more are cached before. With every token active at depth 1 and nothing cached
    this is the position + 1.
    """
    if active.index is None:
        row = torch.arange(active.total, dtype=torch.int32, device=active.positions.device)
    elif first.index is None:
        row = active.index
    else:
        row = torch.searchsorted(first.index, active.index, out_int32=True)
    sequence = torch.searchsorted(first.cu_seqlens, row, right=True) - 1
    limit = row - first.cu_seqlens[sequence] + 1
    return limit if past is None else limit + past[sequence]
