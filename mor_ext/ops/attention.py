"""Flash-style attention whose whole mask is one number a query: how many keys it sees."""

from typing import Any

import torch
from torch import Tensor

from mor_ext.ops._autocast import register_autocast
from mor_ext.ops._fake import register_fake


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
    """Attention over packed sequences; query i sees the first ``key_limit[i]`` keys of its own.

    Args:
        query: ``[total_q, heads, head_dim]``, fp32, bf16 or fp16 (fp64 too on CPU); head_dim a
            multiple of 8 up to 256.
        key, value: ``[total_k, kv_heads, head_dim]``, dtype of query; heads is a multiple of
            kv_heads, query head h reads KV head ``h // (heads // kv_heads)``.
        cu_seqlens_q, cu_seqlens_k: int32 ``[batch + 1]``, cumulative lengths in tokens.
        key_limit: int32 ``[total_q]``, in ``[0, len_k]`` and non-decreasing within a sequence.
            None is causal, aligned to the last key: ``len_k - len_q + rank + 1``.
        max_seqlen_q, max_seqlen_k: at least the longest sequence of either side.
        softmax_scale: factor on ``query . key``, usually ``head_dim ** -0.5``.

    Returns:
        out ``[total_q, heads, head_dim]`` of query's dtype and lse fp32 (fp64 for fp64)
        ``[heads, total_q]``, the log of the softmax's denominator. A query that sees no key gives
        0 and lse -inf. Both are differentiable, deterministically.

    Under autocast query, key and value take the autocast dtype.

    Raises:
        RuntimeError: ``mor::attention: <argument> must be <rule>, got <value>``.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
    """
    return torch.ops.mor.attention(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        key_limit,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
    )


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
    """Attention over the lanes of a paged cache: decode, chunked prefill and mixtures of both.

    Args:
        query: ``[total_q, heads, head_dim]``, as in :func:`attention`.
        key_cache, value_cache: ``[num_blocks, block_size, kv_heads, head_dim]``, dtype of query.
        block_table: int32 ``[lanes, max_blocks]``, physical block of each logical block.
        cache_seqlens: int32 ``[lanes]``, entries a lane holds, this step's tokens included.
        cu_seqlens_q: int32 ``[lanes + 1]``, cumulative numbers of queries of the lanes.
        key_limit: int32 ``[total_q]`` as in :func:`attention`; None is causal, aligned to the
            last entry of the lane.
        max_seqlen_q: at least the largest number of queries of a lane.
        softmax_scale: factor on ``query . key``.

    Returns:
        out ``[total_q, heads, head_dim]`` and lse ``[heads, total_q]`` as in :func:`attention`.
        Not differentiable.

    Raises:
        RuntimeError: ``mor::paged_attention: <argument> must be <rule>, got <value>``.

    Source: PagedAttention (arXiv 2309.06180); split over keys as in Flash-Decoding.
    """
    return torch.ops.mor.paged_attention(
        query,
        key_cache,
        value_cache,
        block_table,
        cache_seqlens,
        cu_seqlens_q,
        key_limit,
        max_seqlen_q,
        softmax_scale,
    )


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


@register_fake("attention")
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=_lse_dtype(query))
    return query.new_empty(query.shape), lse


@register_fake("paged_attention")
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=_lse_dtype(query))
    return query.new_empty(query.shape), lse


@register_fake("attention_bwd")
def _(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens_q, cu_seqlens_k, key_limit, *sizes = inputs
    ctx.sizes = sizes
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, cu_seqlens_q, cu_seqlens_k, key_limit)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, *lengths = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = torch.ops.mor.attention_bwd(
        grad_out, grad_lse, query, key, value, out, lse, *lengths, *ctx.sizes
    )
    return *grads, None, None, None, None, None, None


torch.library.register_autograd("mor::attention", _backward, setup_context=_setup_context)
register_autocast("attention", ["query", "key", "value"])
