"""Causal language models with token-level adaptive depth, as Hugging Face models.

Importing this registers them with ``AutoConfig`` and ``AutoModelForCausalLM``.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from mor_ext.models.config import MoRConfig
from mor_ext.models.llama import from_llama
from mor_ext.models.model import MoRForCausalLM, MoROutput

AutoConfig.register(MoRConfig.model_type, MoRConfig)
AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM)

__all__ = ["MoRConfig", "MoRForCausalLM", "MoROutput", "from_llama"]
