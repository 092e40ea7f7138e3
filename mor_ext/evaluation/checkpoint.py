"""Saved models, and what is wrong with those that do not load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import mor_ext.models  # noqa: F401  registers them
from mor_ext.training.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load(path: str | Path, device: str | None = None) -> tuple[Any, PreTrainedTokenizerFast]:
    """The causal language model in a folder, ours or of transformers, and its tokenizer.

    Args:
        device: None is the first GPU if there is one.

    Raises:
        ValueError: there are none, or they do not load.
    """
    with readable(path):
        model: Any = AutoModelForCausalLM.from_pretrained(path)
    return model.to(device or default_device()).eval(), load_tokenizer(str(path))


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """What goes wrong with a model that is read inside becomes a ValueError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model must be one that loads, got {path}: {reason}") from error
