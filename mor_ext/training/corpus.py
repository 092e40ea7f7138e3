"""From a recipe to what a run trains on: text, tokenizer, windows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from mor_ext.training.dataset import PackedDataset, PackedStream, join
from mor_ext.training.recipe import DataRecipe, RunRecipe, TokenizerRecipe
from mor_ext.training.text import hold_out_end, load_documents, read_files
from mor_ext.training.tokenizer import load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Corpus:
    tokenizer: PreTrainedTokenizerFast
    train: PackedDataset | PackedStream
    validation: PackedDataset  # every token but the first is scored, once


def load_corpus(recipe: RunRecipe, tokenizer: PreTrainedTokenizerFast | None = None) -> Corpus:
    """Reads the text, makes the tokenizer of its training part, and packs both parts.

    Args:
        recipe: of the run.
        tokenizer: taken instead of the recipe's, as for a run that goes on.

    Raises:
        ValueError: of what the recipe names, something is not there or does not fit.
    """
    data, length = recipe.data, recipe.training.length
    if data.dataset is None:
        train, validation = _local_texts(data)
    else:
        documents, held_out = _documents(data)
        train, validation = documents["text"], held_out["text"]
    if tokenizer is None:
        tokenizer = _tokenizer(recipe.tokenizer, train)
    if data.streaming:
        packed: PackedDataset | PackedStream = PackedStream(documents, tokenizer, length)
    else:
        packed = PackedDataset(join(tokenizer, train), length, data.stride)
    return Corpus(tokenizer, packed, PackedDataset(join(tokenizer, validation), length, length - 1))


def _local_texts(data: DataRecipe) -> tuple[Iterable[str], Iterable[str]]:
    assert data.files is not None
    texts = read_files(data.files)
    if data.validation_files is None:
        return hold_out_end(texts, data.held_out)
    return texts, read_files(data.validation_files)


def _documents(data: DataRecipe) -> tuple[Any, Any]:
    """Training and validation part of a data set, or of a streamed one."""
    assert data.dataset is not None
    name = data.dataset

    def load(split: str) -> Any:
        return load_documents(name, data.config, split, data.column, data.streaming)

    documents = load(data.split)
    if data.validation_split is not None:
        return documents, load(data.validation_split)
    count = data.validation_documents
    return documents.skip(count), documents.take(count)


def _tokenizer(recipe: TokenizerRecipe, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    if recipe.name is not None:
        return load_tokenizer(recipe.name)
    return train_tokenizer(recipe.kind, islice(texts, recipe.documents), recipe.vocab_size)
