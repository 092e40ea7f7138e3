"""Causal generation that skips what a token's router says to skip."""

from mor_ext.inference.beam import Beam, beam_search
from mor_ext.inference.cache import PagedKV
from mor_ext.inference.engine import Engine, Statistics
from mor_ext.inference.generate import Generated, generate
from mor_ext.inference.request import Result, Token
from mor_ext.inference.sampling import SamplingParams

__all__ = [
    "Beam",
    "Engine",
    "Generated",
    "PagedKV",
    "Result",
    "SamplingParams",
    "Statistics",
    "Token",
    "beam_search",
    "generate",
]
