"""Modules of adaptive-depth transformers over packed tokens: ``[total, ...]``, no padding."""

from mor_ext.nn.attention import Attention
from mor_ext.nn.block import Block, Layer
from mor_ext.nn.kv import KVStore, KVView, PackedKV
from mor_ext.nn.linear import Linear, PackedWeight
from mor_ext.nn.loss import linear_cross_entropy
from mor_ext.nn.mlp import SwiGLU
from mor_ext.nn.norm import RMSNorm
from mor_ext.nn.recursion import Recursion
from mor_ext.nn.rotary import Rotary
from mor_ext.nn.routers import (
    ActionRouter,
    ExpertChoiceRouter,
    FixedDepthRouter,
    RandomRouter,
    Router,
    TokenChoiceRouter,
)
from mor_ext.nn.tokens import Tokens, cu_seqlens_of

__all__ = [
    "ActionRouter",
    "Attention",
    "Block",
    "ExpertChoiceRouter",
    "FixedDepthRouter",
    "KVStore",
    "KVView",
    "Layer",
    "Linear",
    "PackedKV",
    "PackedWeight",
    "RMSNorm",
    "RandomRouter",
    "Recursion",
    "Rotary",
    "Router",
    "SwiGLU",
    "TokenChoiceRouter",
    "Tokens",
    "cu_seqlens_of",
    "linear_cross_entropy",
]
