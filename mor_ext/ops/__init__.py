"""Typed wrappers of ``torch.ops.mor``; importing this registers fakes and autograd."""

from mor_ext.ops.attention import attention, paged_attention
from mor_ext.ops.compact import gather_tokens

__all__ = ["attention", "gather_tokens", "paged_attention"]
