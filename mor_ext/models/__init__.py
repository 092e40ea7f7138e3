"""Causal language models with token-level adaptive depth."""

from mor_ext.models.config import MoRConfig
from mor_ext.models.model import MoRForCausalLM, MoROutput

__all__ = ["MoRConfig", "MoRForCausalLM", "MoROutput"]
