"""The K/V of running sequences in paged caches, a lane for each (sequence, depth)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mor_ext import ops
from mor_ext.nn import KVView, Recursion, Rotary, Tokens
from mor_ext.nn.kv import CARRIED, Carried, CarriedView, carry, shared_key_limit

if TYPE_CHECKING:  # models make caches
    from mor_ext.models import MoRForCausalLM

BLOCK_SIZE = 16  # entries


class PagedKV:
    """A :class:`mor_ext.nn.KVStore` for prefill, chunked prefill and decode of a fixed batch.

    Recursion-wise, every depth of a stage has its own lanes, and a token has entries in those of
    the depths it reached. Shared, a stage has the lanes of depth 1 only. Hybrid and frozen have
    lanes for every depth, and in each an entry for every token listed there. Lanes grow, all alike.

    The methods named as in ``transformers.Cache`` let ``generate()`` use it.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # no layer has linear attention

    def __init__(self, model: "MoRForCausalLM", batch: int, max_length: int = 0) -> None:
        """max_length: tokens of a sequence that lanes have room for from the start."""
        config, weight = model.config, model.embed_tokens.weight
        self.strategy = config.kv_strategy
        self.every_depth = self.strategy in CARRIED
        self.rotary = model.rotary
        self.batch = batch
        self.length = 0  # the most tokens that a sequence has had
        self.room = 0
        self.past = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        assert config.num_key_value_heads is not None and config.head_dim is not None
        entry = (BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
        self.lanes: list[list[Lanes]] = []  # [stage][depth]
        self.last: PagedView | PagedCarriedView | None = None  # of the depth before
        for stage in model.stages:
            assert isinstance(stage, Recursion)
            depths = 1 if self.strategy == "shared" else stage.num_recursions
            self.lanes.append(
                [Lanes(stage.block.numbers, batch, entry, weight) for _ in range(depths)]
            )
        self._reserve(max_length)

    def _reserve(self, length: int) -> None:
        """Room for so many tokens a sequence; grows by half at least, so that copies are rare."""
        if length > self.room:
            blocks = -(-max(length, self.room * 3 // 2) // BLOCK_SIZE)
            self.room = blocks * BLOCK_SIZE
            for lanes in self._all():
                lanes.grow(blocks)

    def _all(self) -> list["Lanes"]:
        return [lanes for stage in self.lanes for lanes in stage]

    def enter(self, lengths: Sequence[int], device: torch.device) -> Tokens:
        if len(lengths) != self.batch:
            raise ValueError(f"lengths must be those of {self.batch} sequences, got {len(lengths)}")
        self.length += max(lengths, default=0)
        self._reserve(self.length)
        self.tokens = Tokens.of_batch(lengths, device, self.past)
        self.past = self.past + self.tokens.cu_seqlens.diff()
        return self.tokens

    def view(self, stage: int, depth: int, active: Tokens) -> KVView:
        before = self.last if depth > 0 else None
        if self.strategy in CARRIED:
            carried = carry(self.strategy, self.tokens, active, before)
            self.last = PagedCarriedView(self.rotary, carried, self.lanes[stage][depth])
        elif before is None or self.strategy == "recursion_wise":
            self.last = PagedView(self.rotary, active, self.lanes[stage][depth])
        else:  # shared
            assert isinstance(before, PagedView)
            return PagedView(self.rotary, active, self.lanes[stage][0], first=before)
        return self.last

    # ---- transformers.Cache ----

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The most tokens that a sequence has, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b goes on from what sequence ``beam_idx[b]`` has."""
        self.past = self.past[beam_idx]
        for lanes in self._all():
            lanes.reorder(beam_idx)


class Lanes:
    """The caches of the layers of a stage at one depth, a lane for each sequence."""

    def __init__(self, layers: list[int], batch: int, entry: tuple[int, ...], like: Tensor) -> None:
        empty = like.new_zeros(0, *entry)
        self.caches = dict.fromkeys(layers, (empty, empty))
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=like.device)  # entries
        self.block_table = self.seqlens.new_zeros(batch, 0)  # [batch, blocks of a lane]

    def grow(self, blocks: int) -> None:
        """To so many blocks a lane."""
        batch, old = self.block_table.shape

        def grown(cache: Tensor) -> Tensor:
            new = cache.new_zeros(batch, blocks, *cache.shape[1:])
            new[:, :old] = cache.view(batch, old, *cache.shape[1:])
            return new.flatten(0, 1)

        self.caches = {layer: (grown(k), grown(v)) for layer, (k, v) in self.caches.items()}
        table = torch.arange(batch * blocks, dtype=torch.int32, device=self.seqlens.device)
        self.block_table = table.view(batch, blocks)

    def reorder(self, order: Tensor) -> None:
        batch, blocks = self.block_table.shape

        def reordered(cache: Tensor) -> Tensor:
            return cache.view(batch, blocks, *cache.shape[1:])[order].flatten(0, 1)

        self.caches = {layer: (reordered(k), reordered(v)) for layer, (k, v) in self.caches.items()}
        self.seqlens = self.seqlens[order]

    def attend(
        self, layer: int, query: Tensor, active: Tokens, seqlens: Tensor, key_limit: Tensor | None
    ) -> Tensor:
        """query ``[k, heads, head_dim]`` of the active tokens, over the lanes' entries."""
        out, _ = ops.paged_attention(
            query,
            *self.caches[layer],
            self.block_table,
            seqlens,
            active.cu_seqlens,
            key_limit,
            active.max_seqlen,
            query.shape[-1] ** -0.5,
        )
        return out


class PagedView(KVView):
    def __init__(
        self, rotary: Rotary, active: Tokens, lanes: Lanes, first: "PagedView | None" = None
    ) -> None:
        self.rotary = rotary
        self.active = active
        self.lanes = lanes
        self.new_rows = None if first is None else 0
        self.key_limit = None
        if first is None:
            self.before = lanes.seqlens
            lanes.seqlens = lanes.seqlens + active.cu_seqlens.diff()
        else:
            self.key_limit = shared_key_limit(active, first.active, first.before)

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        if key is None or value is None:
            query = self.rotary.query(query, self.active.positions)
        else:
            query = ops.rotary_kv_append(
                query,
                key,
                value,
                self.rotary.cos,
                self.rotary.sin,
                self.active.positions,
                *self.lanes.caches[layer],
                self.lanes.block_table,
                self.before,
                self.active.cu_seqlens,
            )
        return self.lanes.attend(layer, query, self.active, self.lanes.seqlens, self.key_limit)


class PagedCarriedView(CarriedView):
    """The listed tokens of a pass are appended to the lanes of the depth."""

    def __init__(self, rotary: Rotary, carried: Carried, lanes: Lanes) -> None:
        super().__init__(rotary, carried)
        self.lanes = lanes
        self.before = lanes.seqlens
        lanes.seqlens = lanes.seqlens + carried.listed.cu_seqlens.diff()
        self.key_limit = shared_key_limit(carried.active, carried.listed, self.before)

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        assert key is not None and value is not None
        active, listed = self.carried.active, self.carried.listed
        query, key = self.rotary(query, key, active.positions)
        key, value = self.carried.merge(layer, key, value)
        ops.kv_append(
            key,
            value,
            *self.lanes.caches[layer],
            self.lanes.block_table,
            self.before,
            listed.cu_seqlens,
        )
        return self.lanes.attend(layer, query, active, self.lanes.seqlens, self.key_limit)
