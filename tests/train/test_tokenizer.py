"""The tokenizer: SentencePiece and Hugging Face give the same ids, and every text comes back exactly."""

from __future__ import annotations

import argparse
import sys
import textwrap
import tokenize
from pathlib import Path

import pytest

from forerun.errors import TrainingError
from forerun.train import tokenizer

pytest.importorskip("sentencepiece")

TEXTS = [
    "def f(x):\n    return x + 1\n\n\nclass A(B):\n    def __init__(self):\n        self.x = [1, 2, 3]\n",
    "",
    " ",
    "\n",
    "  leading and trailing  ",
    "tabs\tand\ttabs\n\t\tindented\n",
    "runs:" + " " * 37 + "of" + " " * 3 + "blanks\n" + " " * 21 + "x\n",
    "\n\n\n    after blank lines\n\n        deeper\n    \n",
    "windows\r\nline ends\r",
    "größer, 漢字, עברית, 🐈‍⬛, e\u0301, \u00a0, \ufeff, \x00, \x7f, \U0010ffff\n",
    '"""A docstring.\n\n    >>> f(10_000)\n    0x1F\n    """\n',
    "<s> </s> <unk> <0x0A> <0xFF> are only text\n",
    "=" * 79 + "\n" + "-" * 53 + "\n" + "#" * 7 + "\n",
]


def library_sources() -> list[str]:
    return [Path(module.__file__).read_text(encoding="utf-8") for module in (textwrap, argparse, tokenize)]


@pytest.fixture(scope="module")
def model() -> bytes:
    return tokenizer.train(library_sources(), tokenizer.Settings(vocabulary=600))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer.write(model, folder)
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_ids_agree_and_text_comes_back(model, text):
    ours, theirs = tokenizer.processor_of(model), tokenizer.fast(model)
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert theirs.decode(ids) == text
    assert ours.decode(ids) == text


def test_the_written_folder_loads_in_transformers_and_agrees(folder):
    pytest.importorskip("transformers")
    passages = [text[start : start + 700] for text in library_sources() for start in range(0, len(text), 700)]
    agreement = tokenizer.compare(folder, [*TEXTS, *passages])
    assert agreement.is_exact
    assert agreement.characters_per_token > 1.5


def test_only_the_names_of_special_tokens_are_read_differently(folder):
    loaded = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    text = f"x = '{tokenizer.EOS}'"
    assert loaded.eos_token_id in loaded(text)["input_ids"]
    assert (
        tokenizer.processor_of((folder / "tokenizer.model").read_bytes()).decode(loaded(text)["input_ids"]) == "x = ''"
    )


def test_transformers_knows_the_special_tokens(folder):
    loaded = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    assert (loaded.unk_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded.is_fast
    assert loaded.model_max_length == tokenizer.MODEL_MAX_LENGTH
    assert loaded("x")["input_ids"][0] == 1
    assert (
        loaded.decode([1, *loaded("x = 1", add_special_tokens=False)["input_ids"]], skip_special_tokens=True) == "x = 1"
    )


def test_a_line_end_always_ends_its_token(model):
    pieces = tokenizer.pieces_of(model)
    assert any(piece.endswith(":\n") for piece in pieces)
    assert all("\n" not in piece.rstrip("\n") for piece in pieces)


def test_cutting_at_a_line_end_does_not_change_a_token(model):
    encode = tokenizer.processor_of(model).encode
    text = library_sources()[0]
    lines = text.splitlines(keepends=True)
    cuts = [n for n in range(1, len(lines)) if lines[n].strip()]  # a run of line ends is one token
    for cut in cuts:
        assert encode("".join(lines[:cut])) + encode("".join(lines[cut:])) == encode(text)


def test_every_kind_of_piece_is_one_that_converters_know(model):
    processor = tokenizer.processor_of(model)
    kinds = [
        (processor.is_unknown(i), processor.is_control(i), processor.is_byte(i), processor.is_unused(i))
        for i in range(len(processor))
    ]
    assert [index for index, kind in enumerate(kinds) if kind[0]] == [0]
    assert [index for index, kind in enumerate(kinds) if kind[1]] == [1, 2]
    assert sum(kind[2] for kind in kinds) == 256
    assert not any(kind[3] for kind in kinds)


def test_training_twice_gives_the_same_model(model):
    assert tokenizer.train(library_sources(), tokenizer.Settings(vocabulary=600)) == model


def test_too_large_a_vocabulary_is_refused_in_one_sentence():
    with pytest.raises(TrainingError, match="vocabulary of 5000"):
        tokenizer.train(["too little text\n"], tokenizer.Settings(vocabulary=5000))


def test_a_missing_sentencepiece_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TrainingError, match="pip install"):
        tokenizer.train(["text"])
