"""Packing: what is in an item, that nothing is scored twice, and streams that go on."""

import json
import re
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from mor_ext.training import dataset as module
from mor_ext.training.corpus import load_corpus
from mor_ext.training.dataset import IGNORED, PackedDataset, PackedStream, join
from mor_ext.training.recipe import DataRecipe, RunRecipe, TokenizerRecipe, TrainingRecipe
from mor_ext.training.tokenizer import Tokens, encode, train_tokenizer

BYTE = train_tokenizer("byte", [])
END = BYTE.eos_token_id


def numbered(count: int) -> Tokens:
    """Token i is i and stands for i bytes."""
    return Tokens(np.arange(count, dtype=np.int32), np.arange(count, dtype=np.int32))


def scored(item: dict[str, torch.Tensor]) -> list[int]:
    """As a causal model scores: not the first."""
    return [label for label in item["labels"][1:].tolist() if label != IGNORED]


def test_end_is_between_documents():
    tokens = join(BYTE, ["aé", "", "b"])
    assert tokens.ids.tolist() == [97, 0xC3, 0xA9, END, END, 98]
    assert tokens.num_bytes.tolist() == [1, 2, 0, 0, 0, 1]
    assert len(join(BYTE, [])) == 0
    without = train_tokenizer("byte", [])
    without.eos_token = None
    assert join(without, ["ab", "c"]).ids.tolist() == [97, 98, 99]


def test_many_documents_are_joined_as_few(monkeypatch):
    texts = [f"text {i}" for i in range(7)]
    whole = join(BYTE, texts)
    monkeypatch.setattr(module, "DOCUMENTS_AT_ONCE", 3)
    assert join(BYTE, iter(texts)).ids.tolist() == whole.ids.tolist()


def test_packing_by_hand():
    packed = PackedDataset(numbered(10), length=4)
    assert [item["input_ids"].tolist() for item in packed] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [6, 7, 8, 9],
    ]
    assert packed[0]["labels"].tolist() == [0, 1, 2, 3]
    assert packed[2]["labels"].tolist() == [IGNORED, IGNORED, 8, 9]  # 6 and 7 had their turn
    assert [item["num_bytes"].item() for item in packed] == [1 + 2 + 3, 5 + 6 + 7, 8 + 9]
    assert all(value.dtype == torch.int64 for value in packed[0].values())


@pytest.mark.parametrize("length", [2, 3, 7, 16])
@pytest.mark.parametrize("total", [16, 17, 31, 100])
def test_an_evaluation_scores_every_token_but_the_first_once(length, total):
    packed = PackedDataset(numbered(total), length, stride=length - 1)
    assert [token for item in packed for token in scored(item)] == list(range(1, total))
    assert sum(item["num_bytes"].item() for item in packed) == sum(range(total))


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_windows_are_a_stride_apart(stride):
    packed = PackedDataset(numbered(33), length=8, stride=stride)
    starts = [item["input_ids"][0].item() for item in packed]
    assert starts[:-1] == list(range(0, 25, stride))[: len(starts) - 1] and starts[-1] == 25
    assert all((item["input_ids"].diff() == 1).all() for item in packed)


@pytest.mark.parametrize(
    "length, stride, message",
    [
        (11, None, "text must have at least length = 11 tokens, got 10"),
        (1, None, "length must be at least 2, got 1"),
        (4, 0, "stride must be from 1 to length = 4, got 0"),
        (4, 5, "stride must be from 1 to length = 4, got 5"),
    ],
)
def test_sizes_that_do_not_fit_are_named(length, stride, message):
    with pytest.raises(ValueError, match=message):
        PackedDataset(numbered(10), length, stride)
    with pytest.raises(IndexError):
        PackedDataset(numbered(10), 4)[3]


def documents(count: int, shards: int = 1) -> datasets.IterableDataset:
    rows = [{"text": f"document {i} " + "x" * (i * i % 37)} for i in range(count)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOCUMENTS_AT_ONCE", 3)


def stream(count: int = 10) -> PackedStream:
    return PackedStream(documents(count), BYTE, length=16)


def ids(items) -> list[list[int]]:
    return [item["input_ids"].tolist() for item in items]


@pytest.mark.usefixtures("small_chunks")
def test_a_stream_is_its_documents_joined_again_and_again():
    texts = [row["text"] for row in documents(10)]
    once = [token for tokens in encode(BYTE, texts) for token in [*tokens.ids.tolist(), END]]
    items = list(islice(stream(), 3 * len(once) // 16))
    assert [token for item in ids(items) for token in item] == (3 * once)[: len(items) * 16]
    assert [item["num_bytes"].item() for item in items] == [
        int((item["input_ids"][1:] != END).sum()) for item in items
    ]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("position", [0, 1, 5, 11, 17, 18, 19, 40, 59])
def test_a_stream_goes_on_where_it_was(position):
    expected = ids(islice(stream(), 60 + 25))
    interrupted = stream()
    list(islice(interrupted, 60))  # as a loader that read ahead
    state = json.loads(json.dumps(interrupted.state_dict(position)))
    resumed = stream()
    resumed.load_state_dict(state)
    assert ids(islice(resumed, 20)) == expected[position : position + 20]
    assert ids(islice(resumed, 20)) == expected[position : position + 20]  # and again
    again = stream()
    again.load_state_dict(resumed.state_dict(position + 20))
    assert ids(islice(again, 5)) == expected[position + 20 : position + 25]


@pytest.mark.usefixtures("small_chunks")
def test_a_stream_goes_on_without_reading_again():
    whole = stream(1000)
    list(islice(whole, 300))
    state = whole.state_dict(290)
    assert 250 < state["mark"]["position"] <= 290
    assert len(state["mark"]["ids"]) < 16


@pytest.mark.usefixtures("small_chunks")
def test_a_stream_tells_what_it_has_forgotten(monkeypatch):
    monkeypatch.setattr(module, "MARKS", 4)
    forgetful = stream()
    list(islice(forgetful, 60))
    with pytest.raises(ValueError, match=r"position must be at least \d+, got 3"):
        forgetful.state_dict(3)
    assert ids(islice(forgetful, 60)) == ids(islice(stream(), 60))  # but not where it began


@pytest.mark.usefixtures("small_chunks")
def test_the_trainer_skips_what_was_seen():
    """What it does by itself when it resumes: the same batches as by a state."""
    loader = prepare_data_loader(DataLoader(stream(), batch_size=4))
    batches = ids(islice(loader, 9))
    assert ids(islice(skip_first_batches(loader, 5), 4)) == batches[5:]
    resumed = stream()
    list(islice(resumed, 40))
    resumed.load_state_dict(resumed.state_dict(20))
    assert ids(islice(DataLoader(resumed, batch_size=4), 4)) == batches[5:]


def test_workers_share_the_documents():
    shared = PackedStream(documents(40, shards=4), BYTE, length=16)
    loader = DataLoader(shared, batch_size=1, num_workers=2)
    items = [batch["input_ids"][0].tolist() for batch in islice(loader, 120)]  # by turns
    texts = [BYTE.decode(list(chain.from_iterable(items[worker::2]))) for worker in range(2)]
    read = [set(re.findall(r"document (\d+) ", text)) for text in texts]
    assert len(read[0]) == len(read[1]) == 20 and len(read[0] | read[1]) == 40


def test_a_state_is_not_for_workers(monkeypatch):
    worker = SimpleNamespace(id=0, num_workers=2)
    monkeypatch.setattr(module, "get_worker_info", lambda: worker)
    resumed = stream()
    resumed.load_state_dict(resumed.state_dict(0) | {"position": 1})
    with pytest.raises(ValueError, match="workers must be 0 after load_state_dict, got 2"):
        next(iter(resumed))


def test_a_stream_without_documents_ends_with_an_error():
    with pytest.raises(ValueError, match="dataset must have documents, got none"):
        next(iter(PackedStream(documents(5).skip(5), BYTE, length=16)))


# ---- from a recipe ----


def run(data: DataRecipe, tokenizer: TokenizerRecipe | None = None, length: int = 8) -> RunRecipe:
    return RunRecipe(
        data, TrainingRecipe(steps=1, length=length), tokenizer=tokenizer or TokenizerRecipe()
    )


def test_corpus_of_a_file(tmp_path: Path):
    """The tokenizer is made of the training half alone."""
    (tmp_path / "text.txt").write_text("abcdefgh" * 4 + "ABCDEFGH" * 4)
    recipe = run(DataRecipe(str(tmp_path / "text.txt"), held_out=0.5, stride=1))
    recipe.tokenizer = TokenizerRecipe("char")
    corpus = load_corpus(recipe)
    assert len(corpus.tokenizer) == 2 + 8
    assert len(corpus.train) == 32 - 8 + 1
    assert corpus.tokenizer.decode(corpus.train[3]["input_ids"]) == "defghabc"
    assert sum(len(scored(item)) for item in corpus.validation) == 31
    assert {t for item in corpus.validation for t in scored(item)} == {
        corpus.tokenizer.unk_token_id
    }
    assert load_corpus(recipe, BYTE).tokenizer is BYTE


def test_corpus_of_files_for_either_part(tmp_path: Path):
    for name in ("a", "b", "v"):
        (tmp_path / f"{name}.txt").write_text(name * 20)
    data = DataRecipe(f"{tmp_path}/[ab].txt", validation_files=f"{tmp_path}/v.txt")
    corpus = load_corpus(run(data, TokenizerRecipe("bpe", 258)))
    assert "b" in corpus.tokenizer.decode(corpus.train[len(corpus.train) - 1]["input_ids"])
    assert set(corpus.tokenizer.decode(corpus.validation[0]["input_ids"])) == {"v"}


@pytest.mark.parametrize("streaming", [False, True])
def test_corpus_of_a_data_set(tmp_path: Path, monkeypatch, streaming):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [json.dumps({"story": f"story {i} " * 3}) for i in range(30)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    data = DataRecipe(dataset=str(folder), column="story", streaming=streaming)
    data.validation_documents = 10
    corpus = load_corpus(run(data, TokenizerRecipe("sentencepiece", 280, documents=5)))
    held_out = "".join(corpus.tokenizer.decode(item["input_ids"]) for item in corpus.validation)
    assert "story 0" in held_out and "story 9" in held_out and "story 10" not in held_out
    train = corpus.tokenizer.decode([i for item in ids(islice(corpus.train, 30)) for i in item])
    assert train.startswith("story 10") and "story 9" not in train
