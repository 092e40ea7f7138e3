"""Tokenizers: what goes in comes out, also after loading; no byte is lost or counted twice."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mor_ext.training import tokenizer as module
from mor_ext.training.tokenizer import END, encode, load_tokenizer, train_tokenizer

KINDS = ["byte", "char", "bpe", "sentencepiece"]
TEXT = "The cat sat on the mat; the cat, that  cat!\n\n\tÜber €5 naïve 😀 \r\nthe end. " * 40
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    """One of each kind, saved and loaded."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        train_tokenizer(kind, [TEXT[:1000], "", TEXT], 320).save_pretrained(folder / kind)
    return {kind: AutoTokenizer.from_pretrained(folder / kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_was_seen_comes_back(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in (TEXT, " cat ", "\n", "", "  the  \t"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("kind", ["byte", "bpe", "sentencepiece"])
def test_any_text_comes_back(tokenizers, kind):
    tokenizer = tokenizers[kind]

    @settings(max_examples=60, deadline=None)
    @given(TEXTS)
    def check(text: str) -> None:
        if kind == "sentencepiece":
            text = text.replace("\u2581", " ")  # its sign for a space
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_after_loading(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END
    assert tokenizer(END).input_ids == [tokenizer.eos_token_id]
    assert tokenizer.eos_token_id not in tokenizer(TEXT).input_ids  # none is added by itself
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1


def test_byte_ids_are_the_bytes(tokenizers):
    text = "a\0é€😀\x7f\n"
    assert tokenizers["byte"](text).input_ids == list(text.encode())
    assert tokenizers["byte"].eos_token_id == 256 == len(tokenizers["byte"]) - 1


def test_characters_that_were_not_seen_are_unknown(tokenizers):
    tokenizer = tokenizers["char"]
    c, t = tokenizer("ct").input_ids
    unknown = tokenizer.unk_token_id
    assert tokenizer("cßßt").input_ids == [c, unknown, unknown, t]
    assert tokenizer.decode([c, unknown, t]) == "c<unk>t"
    assert len(tokenizer) == len(set(TEXT)) + 2


def test_vocabularies_have_the_size_they_can(tokenizers):
    assert len(train_tokenizer("bpe", [TEXT], 280)) == 280
    assert len(train_tokenizer("sentencepiece", [TEXT], 285)) == 285
    words = [len(tokenizers[kind](" the cat sat").input_ids) for kind in KINDS]
    assert words[0] == words[1] == 12 > max(words[2:])
    assert len(train_tokenizer("bpe", ["ab"], 1000)) == 258  # bytes, end, "ab"


@pytest.mark.parametrize("kind", KINDS)
def test_training_repeats(tokenizers, kind):
    again = train_tokenizer(kind, iter([TEXT[:1000], "", TEXT]), 320)
    assert again.get_vocab() == tokenizers[kind].get_vocab()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_are_those_of_the_text(tokenizers, kind):
    tokenizer = tokenizers[kind]

    @settings(max_examples=60, deadline=None)
    @given(st.lists(TEXTS, max_size=4))
    def check(texts: list[str]) -> None:
        encoded = encode(tokenizer, texts)
        assert [int(t.num_bytes.sum()) for t in encoded] == [len(t.encode()) for t in texts]
        assert all((t.num_bytes >= 0).all() and len(t.ids) == len(t.num_bytes) for t in encoded)

    check()


def test_bytes_of_each_token(tokenizers):
    assert encode(tokenizers["char"], ["aß€😀"])[0].num_bytes.tolist() == [1, 2, 3, 4]
    assert encode(tokenizers["byte"], ["a€b"])[0].num_bytes.tolist() == [1, 3, 0, 0, 1]
    for kind in ("bpe", "sentencepiece"):
        (tokens,) = encode(tokenizers[kind], [" the cat"])
        pieces = [tokenizers[kind].decode([number]) for number in tokens.ids]
        assert tokens.num_bytes.tolist() == [len(piece.encode()) for piece in pieces]


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_are_encoded_in_pieces(tokenizers, kind, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 50)
    for text in (TEXT, TEXT.replace("\n", " ")):
        (tokens,) = encode(tokenizers[kind], [text])
        assert tokenizers[kind].decode(tokens.ids) == text
        assert tokens.num_bytes.sum() == len(text.encode())


def test_a_tokenizer_of_others_is_encoded_whole_and_without_its_own_additions(tokenizers, tmp_path):
    """A prefix token, truncation and padding, all in the file."""
    from tokenizers.processors import TemplateProcessing

    other = train_tokenizer("bpe", [TEXT], 300)
    template = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, other.eos_token_id)])
    other.backend_tokenizer.post_processor = template
    other.backend_tokenizer.enable_truncation(8)
    other.backend_tokenizer.enable_padding(length=12)
    other.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    long, short = encode(loaded, [TEXT, "cat"])
    assert loaded.decode(long.ids) == TEXT and loaded.decode(short.ids) == "cat"


@pytest.mark.parametrize(
    "kind, texts, vocab_size, message",
    [
        (
            "word",
            ["a"],
            None,
            "tokenizer must be one of byte, char, bpe, .*, got 'word'",
        ),
        ("char", [], None, "text to make a char tokenizer of must not be empty"),
        ("bpe", ["", ""], 300, "text to make a bpe tokenizer of must not be empty"),
        ("bpe", ["a"], 100, "vocab_size must be at least 258 .*, got 100"),
        ("sentencepiece", ["a"], None, "vocab_size must be at least 258 .*, got None"),
        ("sentencepiece", [TEXT], 260, "vocab_size must suit the text, got 260: .*"),
    ],
)
def test_what_cannot_be_made_is_named(kind, texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(kind, texts, vocab_size)


def test_what_cannot_be_loaded_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=f"tokenizer must be one that loads, got {tmp_path}"):
        load_tokenizer(str(tmp_path))
