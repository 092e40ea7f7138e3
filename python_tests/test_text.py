"""Text from files and data sets: what is read, how it is split, and what is refused."""

import json
from pathlib import Path

import pytest

from mor_ext.training.text import hold_out_end, load_documents, read_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_bytes("first\r\nünï".encode())
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "c.txt").write_text("third")
    return tmp_path


def test_a_file_is_a_document_as_it_is(folder):
    assert read_files(folder / "a.txt") == ["first\r\nünï"]
    assert read_files(str(folder / "b.txt")) == ["second"]


def test_globs_are_in_the_order_of_names_and_lists_in_their_own(folder):
    assert read_files(f"{folder}/*.txt") == ["first\r\nünï", "second"]
    assert read_files(f"{folder}/**/*") == ["first\r\nünï", "second", "third"]
    assert read_files([folder / "b.txt", f"{folder}/**/c*"]) == ["second", "third"]


def test_a_name_with_glob_characters_is_a_file_first(tmp_path):
    (tmp_path / "[a].txt").write_text("bracketed")
    assert read_files(tmp_path / "[a].txt") == ["bracketed"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "bad.txt must have text, got 0 bytes of white space"),
        (b" \n\t", "bad.txt must have text, got 3 bytes of white space"),
        (b"ELF\0\1", "bad.txt must be text, got a NUL byte at byte 3"),
        (b"caf\xe9 ol\xe9", "bad.txt must be UTF-8, got 0xe9 at byte 3"),
        ("cut €".encode()[:-1], "bad.txt must be UTF-8, got 0xe2 at byte 4"),
    ],
)
def test_files_that_are_not_text_are_named(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_files(tmp_path / "bad.txt")


def test_files_that_are_not_there_are_named(folder):
    with pytest.raises(ValueError, match=r"files must exist, got .*/none.txt"):
        read_files([folder / "a.txt", folder / "none.txt"])
    with pytest.raises(ValueError, match=r"files must exist, got .*\*.md, which matches none"):
        read_files(f"{folder}/*.md")
    with pytest.raises(ValueError, match="deep must be a file, got a folder"):
        read_files(folder / "deep")


def test_the_end_is_held_out():
    assert hold_out_end(["0123456789"], 0.5) == (["01234"], ["56789"])
    assert hold_out_end(["0123", "4567", "89"], 0.3) == (["0123", "456"], ["7", "89"])
    assert hold_out_end(["0123", "4567"], 0.5) == (["0123"], ["4567"])


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, 0.01])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(ValueError, match=r"held_out must .*, got"):
        hold_out_end(["0123456789"], share)


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that ``datasets`` reads, with a cache of its own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split, texts in {"train": ["one", "two", "three"], "validation": ["four"]}.items():
        lines = [json.dumps({"id": i, "content": text}) for i, text in enumerate(texts)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_of_a_data_set(data_set, streaming):
    train = load_documents(data_set, column="content", streaming=streaming)
    assert list(train) == [{"text": "one"}, {"text": "two"}, {"text": "three"}]
    held_out = load_documents(data_set, split="validation", column="content", streaming=streaming)
    assert list(held_out) == [{"text": "four"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_a_data_set_does_not_have_is_named(data_set, streaming):
    with pytest.raises(ValueError, match="column must be one of id, content, got text"):
        load_documents(data_set, streaming=streaming)
    with pytest.raises(ValueError, match="column must hold strings, got int in id"):
        load_documents(data_set, column="id", streaming=streaming)
    with pytest.raises(ValueError, match=r"dataset must be one that can be loaded.*test"):
        load_documents(data_set, split="test", streaming=streaming)
    with pytest.raises(ValueError, match=r"dataset must be one that can be loaded, got .*/nowhere"):
        load_documents(data_set + "/nowhere", streaming=streaming)
