"""Rotary embedding and the paged KV cache."""

from typing import Any

import torch
from torch import Tensor

from mor_ext.ops._autocast import register_autocast
from mor_ext.ops._fake import register_fake


def rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys, in the half-split convention of Llama.

    With ``x1, x2`` the halves of a head: ``[x1 * cos - x2 * sin, x2 * cos + x1 * sin]``, in fp32
    (fp64 for fp64), rounded once.

    Args:
        query: ``[N, heads, head_dim]``, fp32, bf16 or fp16 (fp64 too on CPU), head_dim even.
            Under autocast query and key take the autocast dtype.
        key: ``[N, kv_heads, head_dim]``, dtype of query.
        cos, sin: fp32 ``[max_positions, head_dim / 2]`` (fp64 too where query is), at row p the
            cosine and sine of the angles of position p.
        positions: int32 ``[N]`` in ``[0, max_positions)``, in tokens of the original sequence.
            On CUDA without :func:`mor_ext.set_debug` a position out of range gives NaN.

    Returns:
        Rotated query and key, new tensors. Differentiable in query and key.

    Raises:
        RuntimeError: ``mor::rotary: <argument> must be <rule>, got <value>``.

    Source: RoFormer (arXiv 2104.09864), section 3.2, with the pairs (i, i + head_dim / 2).
    """
    return torch.ops.mor.rotary(query, key, cos, sin, positions)


def kv_append(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens: Tensor,
) -> None:
    """Writes keys and values of new tokens behind those that their lanes hold.

    The token of rank j in lane s becomes entry ``n = cache_seqlens[s] + j`` of the lane, which is
    ``key_cache[block_table[s, n // block_size], n % block_size]``.

    Args:
        key, value: ``[N, kv_heads, head_dim]``, fp32, bf16 or fp16 (fp64 too on CPU).
        key_cache, value_cache: ``[num_blocks, block_size, kv_heads, head_dim]``, dtype of key,
            contiguous in their last two dimensions. Written in place.
        block_table: int32 ``[lanes, max_blocks]``, physical block of each logical block. Only the
            elements of blocks that are written are read. Where two lanes name the same slot,
            either may win, element by element.
        cache_seqlens: int32 ``[lanes]``, entries a lane holds before this call. Not changed.
        cu_seqlens: int32 ``[lanes + 1]``, cumulative numbers of new tokens of the lanes.

    On CUDA without :func:`mor_ext.set_debug` a token whose slot is out of range is skipped, and so
    are those outside every lane, which may fill up the batch of a CUDA graph.

    Raises:
        RuntimeError: ``mor::kv_append: <argument> must be <rule>, got <value>``; the caches are
            then as they were.

    Source: PagedAttention (arXiv 2309.06180), section 4.3.
    """
    torch.ops.mor.kv_append(
        key, value, key_cache, value_cache, block_table, cache_seqlens, cu_seqlens
    )


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
    """:func:`rotary`, then :func:`kv_append` of the rotated key and the value, in one pass.

    Args:
        query, key, cos, sin, positions: as in :func:`rotary`.
        value: ``[N, kv_heads, head_dim]``, dtype of query. Takes the autocast dtype too.
        key_cache, value_cache, block_table, cache_seqlens, cu_seqlens: as in :func:`kv_append`.

    Returns:
        The rotated query. Not differentiable: for inference.

    Raises:
        RuntimeError: ``mor::rotary_kv_append: <argument> must be <rule>, got <value>``; the
            caches are then as they were.
    """
    return torch.ops.mor.rotary_kv_append(
        query,
        key,
        value,
        cos,
        sin,
        positions,
        key_cache,
        value_cache,
        block_table,
        cache_seqlens,
        cu_seqlens,
    )


@register_fake("rotary")
def _(query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@register_fake("kv_append")
def _(*_: Any) -> None:
    return None


@register_fake("rotary_kv_append")
def _(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, positions = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    # The transpose of a rotation is the rotation by the opposite angle.
    grads = torch.ops.mor.rotary(grad_query, grad_key, cos, -sin, positions)
    return *grads, None, None, None


torch.library.register_autograd("mor::rotary", _backward, setup_context=_setup_context)
register_autocast("rotary", ["query", "key"])
register_autocast("rotary_kv_append", ["query", "key", "value"])
