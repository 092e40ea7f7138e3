"""Typed wrappers of ``torch.ops.mor``; importing this registers fakes and autograd."""

from mor_ext.ops.attention import attention, paged_attention
from mor_ext.ops.compact import gather_tokens
from mor_ext.ops.kv_cache import kv_append, rotary, rotary_kv_append

__all__ = [
    "attention",
    "gather_tokens",
    "kv_append",
    "paged_attention",
    "rotary",
    "rotary_kv_append",
]
