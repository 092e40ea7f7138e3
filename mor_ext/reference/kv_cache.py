"""Rotary embedding and the paged KV cache in plain PyTorch."""

from itertools import pairwise

import torch
from torch import Tensor


def rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    cos = cos[positions.long()].unsqueeze(1)  # [N, 1, head_dim / 2]
    sin = sin[positions.long()].unsqueeze(1)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def kv_append(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens: Tensor,
) -> None:
    block_size = key_cache.shape[1]
    for lane, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        entry = cache_seqlens[lane] + torch.arange(end - start, device=key.device)
        block = block_table[lane, entry // block_size].long()
        key_cache[block, entry % block_size] = key[start:end]
        value_cache[block, entry % block_size] = value[start:end]


def rotary_kv_append(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    query, key = rotary(query, key, cos, sin, positions)
    kv_append(key, value, key_cache, value_cache, block_table, cache_seqlens, cu_seqlens)
    return query


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)  # [N, heads, head_dim / 2], the products are at least fp32
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)
