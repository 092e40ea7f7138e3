"""Attention over packed sequences and over a paged cache, in plain PyTorch."""

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_limit: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = [], []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        rows = slice(starts_q[b], starts_q[b + 1])
        keys = slice(starts_k[b], starts_k[b + 1])
        limit = None if key_limit is None else key_limit[rows]
        out_b, lse_b = _one_sequence(query[rows], key[keys], value[keys], limit, softmax_scale)
        out.append(out_b)
        lse.append(lse_b)
    if not out:
        return torch.empty_like(query), query.new_empty((query.shape[1], 0))
    return torch.cat(out), torch.cat(lse, dim=1)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor,
    key_limit: Tensor | None,
    max_seqlen_q: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    block_size = key_cache.shape[1]
    keys, values = [], []
    for lane, length in enumerate(cache_seqlens.tolist()):
        blocks = block_table[lane, : -(-length // block_size)].long()
        keys.append(key_cache[blocks].flatten(0, 1)[:length])
        values.append(value_cache[blocks].flatten(0, 1)[:length])
    none = key_cache.new_empty((0, *key_cache.shape[2:]))
    cu_seqlens_k = torch.nn.functional.pad(cache_seqlens.cumsum(0), (1, 0)).int()
    max_seqlen_k = int(cache_seqlens.max()) if len(keys) else 0
    return attention(
        query,
        torch.cat([none, *keys]),
        torch.cat([none, *values]),
        cu_seqlens_q,
        cu_seqlens_k,
        key_limit,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
    )


def _one_sequence(
    query: Tensor, key: Tensor, value: Tensor, key_limit: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    len_q, heads, _ = query.shape
    len_k, kv_heads, _ = key.shape
    if key_limit is None:  # causal, aligned to the last key
        key_limit = torch.arange(len_q, device=query.device) + 1 + len_k - len_q
    visible = torch.arange(len_k, device=query.device) < key_limit.unsqueeze(1)  # [len_q, len_k]

    group = heads // kv_heads
    key = key.repeat_interleave(group, dim=1)
    value = value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key).to(_accumulate(query)) * softmax_scale
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(dim=-1)  # [heads, len_q], -inf where a query sees no key
    blind = lse == float("-inf")
    weights = torch.exp(scores - lse.masked_fill(blind, 0).unsqueeze(-1))
    out = torch.einsum("hqk,khd->qhd", weights.to(value.dtype), value)
    return out, lse


def _accumulate(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
