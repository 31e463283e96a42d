"""The corpus: cleaned, without copies, and a held-out part that training never sees in any form."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from forerun.errors import TrainingError
from forerun.train import corpus
from forerun.train.corpus import Distribution, Document

WORDS = ("alpha", "beta", "gamma", "delta", "omega", "sigma", "theta", "kappa", "table", "index", "value", "token")


def made_up(seed: int, functions: int = 8) -> str:
    """A plausible module; different seeds share next to no line."""
    draw = random.Random(seed)

    def name() -> str:
        return "_".join(draw.choice(WORDS) for _ in range(3))

    bodies = (
        f"def {name()}({name()}):\n    {name()} = {name()}\n    return {name()} + {name()}\n" for _ in range(functions)
    )
    return "\n\n".join(bodies)


def document(text: str, name: str = "a.py") -> Document:
    return Document(name, "made-up", "MIT", text)


@pytest.fixture(scope="module")
def many() -> list[Document]:
    return [document(made_up(seed), f"{seed}.py") for seed in range(400)]


def source_with(folder: Path, **files: str) -> Distribution:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8", newline="")
    return Distribution("made-up", "MIT", folder, tuple(PurePosixPath(f"{name}.py") for name in files))


def test_normalised_text_has_no_licence_no_tabs_and_one_line_end():
    header = "#!/usr/bin/env python\r\n# Copyright 2020 Someone\r\n# All rights reserved.\r\n\r\n"
    assert corpus.normalise(header + "import os  \r\n\tx = 1\r\n\r\n\r\n") == "import os\n    x = 1\n"


def test_a_comment_that_is_no_licence_stays():
    assert corpus.normalise("# How the scheduler works\nimport os\n").startswith("# How the scheduler works")


@pytest.mark.parametrize(
    "text",
    [
        "x = '" + "a" * 1200 + "'\n",
        "# This file was automatically generated from another one.\n" + made_up(1),
        "".join(f"    ({i}, {i * 7919}, {i * 104729}),\n" for i in range(200)),
        "".join(f'    "{word}_{other}": "x",\n' for word in WORDS for other in WORDS),
        made_up(1) + "\u2581\n",
    ],
    ids=["long line", "generated", "numbers", "table", "space mark"],
)
def test_what_nobody_would_want_to_predict_is_dropped(text):
    assert corpus.is_prose_or_code(made_up(1))
    assert not corpus.is_prose_or_code(text)


def test_collect_drops_small_large_foreign_and_copied_files(tmp_path):
    source = source_with(tmp_path, good=made_up(1), small="x = 1\n", large=made_up(2) * 400, copy=made_up(1) + "\n")
    (tmp_path / "latin.py").write_bytes(made_up(3).encode() + "é".encode("latin-1"))
    source = replace(source, files=(*source.files, PurePosixPath("latin.py"), PurePosixPath("missing.py")))
    assert [found.text for found in corpus.collect([source])] == [made_up(1)]


def test_the_cap_is_kept_and_the_choice_does_not_depend_on_file_order(tmp_path):
    source = source_with(tmp_path, **{f"m{seed}": made_up(seed) for seed in range(40)})
    capped = replace(source, cap_bytes=10_000)
    found = corpus.collect([capped])
    assert 5_000 < sum(one.size_bytes for one in found) <= 10_000
    assert found == corpus.collect([replace(capped, files=capped.files[::-1])])


def test_the_split_depends_on_the_text_alone(many):
    shuffled = random.Random(0).sample(many, len(many))
    renamed = [replace(one, name=f"elsewhere/{one.name}") for one in shuffled]
    first, second = corpus.split(many), corpus.split(renamed)
    assert [one.text for one in first.train] == [one.text for one in second.train]
    assert [one.text for one in first.held_out] == [one.text for one in second.held_out]
    assert 2 <= len(first.held_out) <= 30  # 3 % of 400 are 12


def test_training_never_sees_a_held_out_document_or_its_near_copy(many):
    held_out = corpus.split(many).held_out
    edited = [document(one.text.replace("return", "return  ", 1) + "\n\nlast_words = None\n") for one in held_out]
    swallowed = [document(one.text + made_up(1000 + i, functions=60)) for i, one in enumerate(held_out)]
    excerpts = [document(one.text[: len(one.text) // 2]) for one in held_out]
    parts = corpus.split([*many, *edited, *swallowed, *excerpts])
    trained = {line for one in parts.train for line in corpus.telling_lines(one.text)}
    assert not {one.text for one in parts.train} & {one.text for one in parts.held_out}
    kept = {line for one in parts.held_out for line in corpus.telling_lines(one.text)}
    assert all(share_of(one, trained) <= corpus.NEAR_DUPLICATE for one in parts.held_out)
    assert all(share_of(one, kept) <= corpus.NEAR_DUPLICATE for one in parts.train)


def share_of(one: Document, known: set[int]) -> float:
    lines = corpus.telling_lines(one.text)
    return sum(line in known for line in lines) / len(lines)


def test_a_family_of_copies_is_taken_once():
    family = [document(made_up(5) + f"\nversion_of_copy = {n}\n", f"{n}.py") for n in range(6)]
    assert len(list(corpus._unlike(family))) == 1


def test_every_document_starts_with_bos():
    tokens = corpus.encode([document("ab"), document("c")], lambda text: [ord(letter) for letter in text])
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == [1, 97, 98, 1, 99]


def test_ids_that_do_not_fit_are_refused():
    with pytest.raises(TrainingError, match="65,536"):
        corpus.encode([document("a")], lambda text: [70_000])


def test_written_files_agree_with_the_summary(many, tmp_path):
    parts = corpus.split(many)
    summary = corpus.write(parts, lambda text: list(text.encode()), tmp_path)
    assert np.fromfile(tmp_path / "train.bin", np.uint16).size == summary["train_tokens"]
    assert np.fromfile(tmp_path / "heldout.bin", np.uint16).size == summary["heldout_tokens"]
    assert json.loads((tmp_path / "sources.json").read_text()) == summary
    assert summary["distributions"]["made-up"]["licence"] == "MIT"
    assert corpus.read_documents(tmp_path / "heldout.jsonl") == parts.held_out
    assert not list(tmp_path.glob("*.partial"))


def test_a_broken_held_out_file_names_its_line(tmp_path):
    broken = tmp_path / "heldout.jsonl"
    broken.write_text('{"name": "a"}\n')
    with pytest.raises(TrainingError, match="line 1"):
        corpus.read_documents(broken)


def test_the_standard_library_is_found_without_its_tests():
    names = {str(path) for path in corpus.standard_library().files}
    assert "argparse.py" in names
    assert not [name for name in names if name.startswith(("test/", "site-packages/", "encodings/", "_sysconfigdata"))]


def test_installed_distributions_state_a_licence():
    sources = {source.distribution: source for source in corpus.installed()}
    assert sources[corpus.STDLIB].licence == "PSF-2.0"
    assert "forerun" not in sources
    assert sources["torch"].licence != "unknown"
    assert all(source.cap_bytes == corpus.CAP_BYTES for name, source in sources.items() if name != corpus.STDLIB)
