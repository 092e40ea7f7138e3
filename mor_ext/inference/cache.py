"""The K/V of running sequences in paged caches, a lane for each (sequence, depth)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mor_ext import ops
from mor_ext.models import MoRForCausalLM
from mor_ext.nn import Recursion, Rotary, Tokens
from mor_ext.nn.kv import shared_key_limit

BLOCK_SIZE = 16  # entries


class PagedKV:
    """A :class:`mor_ext.nn.KVStore` for prefill, chunked prefill and decode of a fixed batch.

    Recursion-wise, every depth of a stage has its own lanes, and a token has entries in those of
    the depths it reached. Shared, a stage has the lanes of depth 1 only. Every lane has the blocks
    of ``max_length`` tokens from the start.
    """

    def __init__(self, model: MoRForCausalLM, batch: int, max_length: int) -> None:
        config, weight = model.config, model.embed_tokens.weight
        self.shared = config.kv_strategy == "shared"
        self.rotary = model.rotary
        self.past = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        blocks = -(-max_length // BLOCK_SIZE)
        self.lanes: list[list[Lanes]] = []  # [stage][depth]
        self.first: dict[int, PagedView] = {}  # by stage: this step's view of depth 1
        for stage in model.stages:
            assert isinstance(stage, Recursion)
            depths = 1 if self.shared else stage.num_recursions
            shape = (batch * blocks, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
            self.lanes.append(
                [Lanes(stage.block.numbers, batch, shape, weight) for _ in range(depths)]
            )

    def enter(self, lengths: Sequence[int], device: torch.device) -> Tokens:
        tokens = Tokens.of_batch(lengths, device, self.past)
        self.past = self.past + tokens.cu_seqlens.diff()
        return tokens

    def view(self, stage: int, depth: int, active: Tokens) -> "PagedView":
        if self.shared and depth > 0:
            return PagedView(self.rotary, active, self.lanes[stage][0], self.first[stage])
        self.first[stage] = PagedView(self.rotary, active, self.lanes[stage][depth])
        return self.first[stage]


class Lanes:
    """The caches of the layers of a stage at one depth, a lane for each sequence."""

    def __init__(self, layers: list[int], batch: int, shape: tuple[int, ...], like: Tensor) -> None:
        self.caches = {layer: (like.new_zeros(shape), like.new_zeros(shape)) for layer in layers}
        table = torch.arange(shape[0], dtype=torch.int32, device=like.device)
        self.block_table = table.view(batch, -1)  # [batch, blocks of a lane]
        self.seqlens = table.new_zeros(batch)  # entries that a lane holds


class PagedView:
    def __init__(
        self, rotary: Rotary, active: Tokens, lanes: Lanes, first: "PagedView | None" = None
    ) -> None:
        self.rotary = rotary
        self.active = active
        self.lanes = lanes
        self.queries_only = first is not None
        self.key_limit = None
        if first is None:
            self.before = lanes.seqlens
            lanes.seqlens = lanes.seqlens + active.cu_seqlens.diff()
        else:
            self.key_limit = shared_key_limit(active, first.active, first.before)

    def attend(self, layer: int, query: Tensor, key: Tensor | None, value: Tensor | None) -> Tensor:
        key_cache, value_cache = self.lanes.caches[layer]
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
                key_cache,
                value_cache,
                self.lanes.block_table,
                self.before,
                self.active.cu_seqlens,
            )
        out, _ = ops.paged_attention(
            query,
            key_cache,
            value_cache,
            self.lanes.block_table,
            self.lanes.seqlens,
            self.active.cu_seqlens,
            self.key_limit,
            self.active.max_seqlen,
            query.shape[-1] ** -0.5,
        )
        return out
