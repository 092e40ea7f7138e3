"""Tokenizers trained on the spot, and how many bytes of text each token stands for.

Each is a ``PreTrainedTokenizerFast``: ``save_pretrained`` writes ``tokenizer.json`` and
``tokenizer_config.json`` beside the model, and ``AutoTokenizer.from_pretrained`` reads them.

One token, ``<|endoftext|>``, is bos, eos and padding at once, as for GPT-2: training puts it
between documents, so that it both ends a text and is what a text begins after; padding is told by
the attention mask alone. Encoding adds no token by itself.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
UNKNOWN = "<unk>"
KINDS = ("byte", "char", "bpe", "sentencepiece")
PIECE = 50_000  # characters that are encoded in one call


def train_tokenizer(
    kind: str, texts: Iterable[str], vocab_size: int | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer made for these texts.

    Args:
        kind: ``byte`` (token b is byte b, and 256 the end), ``char`` (the characters of the texts;
            others become ``<unk>``), ``bpe`` (byte-level, words split as by GPT-2) or
            ``sentencepiece`` (unigram, bytes for what has no piece; no prefix space, no
            normalisation). ``decode(encode(text)) == text`` for every text, but for unknown
            characters, and that SentencePiece reads U+2581 as a space.
        vocab_size: of ``bpe`` and ``sentencepiece``, the end token included; fewer where the texts
            do not have that many. Ignored by the others.

    Raises:
        ValueError: no such kind, a vocabulary too small, or no text.
    """
    if kind not in KINDS:
        raise ValueError(f"tokenizer must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "byte":
        return _finished(_byte())
    first, texts = _peek(texts)
    if not first:
        raise ValueError(f"text to make a {kind} tokenizer of must not be empty")
    if kind == "char":
        return _finished(_char(texts), UNKNOWN)
    if vocab_size is None or vocab_size < 258:
        raise ValueError(f"vocab_size must be at least 258 (the bytes and more), got {vocab_size}")
    if kind == "bpe":
        return _finished(_bpe(texts, vocab_size))
    return _finished(_sentencepiece(texts, vocab_size), UNKNOWN)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, or of a model on the Hugging Face Hub.

    Raises:
        ValueError: there is none, or it is not a fast one (which token comes from which characters
            is known of those alone).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"tokenizer must be one that loads, got {name}: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer must be a fast one, got {type(tokenizer).__name__} in {name}")
    return tokenizer


@dataclass
class Tokens:
    """Token ids and the UTF-8 bytes of text that each stands for, both int32 ``[total]``.

    The bytes of a text's tokens sum up to those of the text. A character that is split over several
    tokens counts for the first of them; characters that a tokenizer drops, for the token after.
    """

    ids: NDArray[np.int32]
    num_bytes: NDArray[np.int32]

    @staticmethod
    def concatenate(parts: Iterable[Tokens]) -> Tokens:
        parts = [Tokens.empty(), *parts]
        return Tokens(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.num_bytes for part in parts]),
        )

    @staticmethod
    def empty() -> Tokens:
        return Tokens(np.zeros(0, np.int32), np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice) -> Tokens:
        return Tokens(self.ids[rows], self.num_bytes[rows])


def encode(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[Tokens]:
    """The tokens of each text, without tokens of its beginning and end.

    A long text is encoded in pieces that end with a line where they can, on all cores.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # a tokenizer that was loaded may have either
    backend.no_padding()
    pieces = [list(_pieces(text)) for text in texts]
    encodings = iter(
        backend.encode_batch(list(chain.from_iterable(pieces)), add_special_tokens=False)
    )
    return [
        Tokens.concatenate(
            _with_bytes(piece, encoding.ids, encoding.offsets)
            for piece, encoding in zip(own, encodings, strict=False)
        )
        for own in pieces
    ]


def _with_bytes(text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
    """Each token gets the bytes up to its last character that no earlier one has."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)  # [characters]
    lengths = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000).astype(np.int32)
    before = np.concatenate([[0], np.cumsum(lengths)])  # bytes before each character
    ends = np.array([end for _, end in offsets], np.int64)
    if len(ends):
        ends[-1] = len(text)
    covered = before[np.maximum.accumulate(ends)]
    return Tokens(np.array(ids, np.int32), np.diff(covered, prepend=0).astype(np.int32))


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of PIECE characters or the rest of a line more."""
    cuts = [0]
    while cuts[-1] < len(text):
        line = text.find("\n", cuts[-1] + PIECE, cuts[-1] + 2 * PIECE)
        cuts.append(min(len(text), line + 1 if line >= 0 else cuts[-1] + 2 * PIECE))
    yield from (text[start:end] for start, end in pairwise(cuts))


def _peek(texts: Iterable[str]) -> tuple[str | None, Iterator[str]]:
    """The first text that is not empty, and all texts from it on."""
    rest = filter(None, texts)
    first = next(rest, None)
    return first, chain([] if first is None else [first], rest)


def _finished(tokenizer: Tokenizer, unknown: str | None = None) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,  # or decoding would lose spaces
    )


def _byte() -> Tokenizer:
    """BPE without merges over the letters that stand for bytes; the wrapper adds the end, 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    vocab = {letters[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _char(texts: Iterable[str]) -> Tokenizer:
    """BPE without merges over the characters, in the order of their code points."""
    from tokenizers import Tokenizer, decoders, models

    characters = sorted(set().union(*texts))
    vocab = {token: number for number, token in enumerate([END, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain.from_iterable(map(_pieces, texts)), trainer)
    return tokenizer


def _sentencepiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trained by the library of that name, converted by transformers."""
    from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
    from transformers.convert_slow_tokenizer import SpmConverter

    model = io.BytesIO()
    lines = (line for text in texts for line in re.split("[\r\n]+", text) if line)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            unk_piece=UNKNOWN,
            eos_id=1,
            eos_piece=END,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,  # bytes; longer lines are left out
            num_threads=1,  # the order of the sums, and so the pieces, would depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size must suit the text, got {vocab_size}: {error}") from error
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.getvalue())
    vocab = [(piece.piece, piece.score) for piece in proto.pieces]
    return SpmConverter.build_tokenizer_from_spm_proto(proto, vocab)
