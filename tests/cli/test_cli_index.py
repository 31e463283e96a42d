"""`forerun index`: which files are read, what is said about them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from forerun.sources.tokenizer import fingerprint_of
from forerun.stores import index
from forerun.stores.corpus import Corpus

TEXT = "def main(arguments):\n    return arguments\n"


def texts_in(store: Path, tokenizer: Path) -> list[str]:
    """The documents of a store."""
    corpus, reader, found = Corpus.open(store), AutoTokenizer.from_pretrained(tokenizer), [[]]
    for token in corpus.tokens.tolist():
        if token == corpus.vocabulary:
            found.append([])
        else:
            found[-1].append(token)
    return [reader.decode(ids) for ids in found[:-1]]


@pytest.fixture
def indexed(forerun: Callable[..., tuple[int, str, str]], family: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Index these files; the texts in the store."""

    def call(*files: object) -> list[str]:
        out = tmp_path / "out" / "text.store"
        out.parent.mkdir(exist_ok=True)
        code, _, err = forerun("index", *files, "--tokenizer", family / "target", "--out", out)
        assert code == 0, err
        assert [path.name for path in out.parent.iterdir()] == ["text.store"]
        return texts_in(out, family / "target")

    return call


def test_files_are_texts(indexed: Callable[..., list[str]], tmp_path: Path) -> None:
    for name in ("b.py", "a.strange", "empty.txt"):
        (tmp_path / name).write_text("" if name == "empty.txt" else f"# {name}\n{TEXT}")
    assert indexed(tmp_path / "b.py", tmp_path / "a.strange", tmp_path / "empty.txt") == [
        f"# b.py\n{TEXT}",
        f"# a.strange\n{TEXT}",
    ]


def test_folders_are_searched_for_texts(
    forerun: Callable[..., tuple[int, str, str]], family: Path, tmp_path: Path
) -> None:
    for name in ("x/b.py", "x/deep/a.md", "x/.hidden/c.py", "x/picture.png", "x/broken.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff\xfe" if name == "x/broken.txt" else f"{name}\n".encode())
    (tmp_path / "x" / "link.py").symlink_to(tmp_path / "x" / "b.py")
    (tmp_path / "x" / "numbers.jsonl").write_text('{"text": "not this one either"}\n{"value": 1}\n')
    out = tmp_path / "text.store"
    code, said, err = forerun("index", tmp_path / "x", "--tokenizer", family / "target", "--out", out)
    assert code == 0 and texts_in(out, family / "target") == ["x/b.py\n", "x/deep/a.md\n"]
    assert "2 texts from 4 files" in said and "bytes per token" in said and " s\n" in said
    assert "1 have another suffix" in err and "1 are not UTF-8" in err and "1 are not rows" in err


def test_rows_hold_texts_or_ids(indexed: Callable[..., list[str]], tmp_path: Path) -> None:
    rows = [
        {"forerun": "distilled", "version": 1},
        {"text": "one"},
        {"prompt": "two ", "answer": "three"},
        {"prompt": [9, 9], "answer": [300, 301, 302]},
        {"prompt": [9], "answer": []},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"text": "cut o')
    found = indexed(path)
    assert found[:2] == ["one", "two three"] and len(found) == 3
    assert Corpus.open(tmp_path / "out" / "text.store").tokens.tolist()[-4:-1] == [300, 301, 302]


def test_a_store_knows_its_tokenizer(indexed: Callable[..., list[str]], family: Path, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(TEXT)
    indexed(tmp_path / "a.py")
    corpus = Corpus.open(tmp_path / "out" / "text.store")
    assert corpus.vocabulary == 600
    assert corpus.fingerprint == fingerprint_of(AutoTokenizer.from_pretrained(family / "target").get_vocab())


def test_what_is_wrong_is_said_in_one_sentence(refused: Callable[..., str], family: Path, tmp_path: Path) -> None:
    good, out = tmp_path / "a.py", tmp_path / "text.store"
    good.write_text(TEXT)
    to = ("--tokenizer", family / "target", "--out", out)
    rows, words, ids = tmp_path / "rows.jsonl", tmp_path / "words.txt", tmp_path / "ids.jsonl"
    rows.write_text('{"text": "fine"}\n{"words": 1}\n')
    words.write_bytes(b"\xff\xfe")
    ids.write_text('{"answer": [1, 600]}\n')
    (tmp_path / "empty").mkdir()
    assert "there is no file or folder" in refused("index", tmp_path / "nothing", *to)
    assert "no texts in" in refused("index", tmp_path / "empty", *to)
    assert "line 2" in refused("index", rows, *to)
    assert "is not UTF-8" in refused("index", words, *to)
    assert "holds the token 600" in refused("index", ids, *to)
    rows.write_text('{"text": \n{"text": "fine"}\n')
    assert "line 1 is not JSON" in refused("index", rows, *to)
    assert "no tokenizer" in refused("index", good, "--tokenizer", tmp_path / "empty", "--out", out)
    assert "there is no folder" in refused("index", good, *to[:-1], tmp_path / "nowhere" / "text.store")
    assert "it is no file" in refused("index", good, *to[:-1], tmp_path / "empty")
    assert not out.exists() and not list(tmp_path.glob("*.partial"))


def test_ctrl_c_leaves_what_was_there(
    forerun: Callable[..., tuple[int, str, str]],
    indexed: Callable[..., list[str]],
    family: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a.py").write_text(TEXT)
    indexed(tmp_path / "a.py")
    before = (tmp_path / "out" / "text.store").read_bytes()

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(index, "_header", interrupted)
    to = ("--tokenizer", family / "target", "--out", tmp_path / "out" / "text.store")
    assert forerun("index", tmp_path / "a.py", *to)[0] == 130
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [before]


def test_nothing_but_a_store_is_written_over(
    refused: Callable[..., str], indexed: Callable[..., list[str]], family: Path, tmp_path: Path
) -> None:
    text, other, link = tmp_path / "notes.txt", tmp_path / "other.txt", tmp_path / "link"
    text.write_text(TEXT)
    other.write_text(TEXT)
    link.symlink_to(text)
    to = ("--tokenizer", family / "target", "--out")
    for place in (text, link):
        assert "is one of the texts to be indexed" in refused("index", text, *to, place)
    assert "is there and is no store" in refused("index", text, *to, other)
    assert text.read_text() == other.read_text() == TEXT
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "text.store").touch()
    assert indexed(text) == indexed(text) == [TEXT]


def test_brackets_without_end_are_no_row(refused: Callable[..., str], family: Path, tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    to = ("--tokenizer", family / "target", "--out", tmp_path / "text.store")
    assert "line 1 is not JSON" in refused("index", tmp_path / "deep.jsonl", *to)
