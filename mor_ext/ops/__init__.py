"""Typed wrappers of ``torch.ops.mor``; importing this registers fakes and autograd."""

from mor_ext.ops.compact import gather_tokens
from mor_ext.ops.kv_cache import kv_append, rotary, rotary_kv_append

__all__ = ["gather_tokens", "kv_append", "rotary", "rotary_kv_append"]
