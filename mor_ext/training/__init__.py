"""Training on text, byte by byte, and what a simple predictor makes of the same text."""

from mor_ext.training.data import Text, bigram_nll, read_text, stdlib_text
from mor_ext.training.loop import Evaluation, Recipe, evaluate, keep_freed_memory, train
from mor_ext.training.profiling import routing_shares

__all__ = [
    "Evaluation",
    "Recipe",
    "Text",
    "bigram_nll",
    "evaluate",
    "keep_freed_memory",
    "read_text",
    "routing_shares",
    "stdlib_text",
    "train",
]
