"""Typed wrappers of ``torch.ops.mor``; importing this registers fakes and autograd."""

from mor_ext.ops.attention import attention, paged_attention
from mor_ext.ops.compact import (
    compact_depth,
    gather_rms_norm,
    gather_tokens,
    scatter_tokens,
    scatter_tokens_,
)
from mor_ext.ops.kv_cache import kv_append, rotary, rotary_kv_append
from mor_ext.ops.route import route_depth, route_topk

__all__ = [
    "attention",
    "compact_depth",
    "gather_rms_norm",
    "gather_tokens",
    "kv_append",
    "paged_attention",
    "rotary",
    "rotary_kv_append",
    "route_depth",
    "route_topk",
    "scatter_tokens",
    "scatter_tokens_",
]
