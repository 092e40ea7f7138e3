"""Causal generation that skips what a token's router says to skip."""

from mor_ext.inference.cache import PagedKV
from mor_ext.inference.generate import Generated, generate

__all__ = ["Generated", "PagedKV", "generate"]
