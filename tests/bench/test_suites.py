"""The built-in suite keeps its promises, and a suite of one's own is read with readable errors."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources

import pytest

from forerun.bench import suites
from forerun.errors import RequestError, TrainingError


def words(text: str) -> list[int]:
    """A stand-in tokenizer: one token for a word, a sign or a line end."""
    return [sum(map(ord, word)) % 1000 for word in text.replace("(", " ( ").replace("\n", " \n ").split(" ") if word]


def module(name: str, methods: int) -> dict[str, str]:
    prose = "".join(
        f"    Sentence {n} explains at some length what {name} does with the number {n * n}.\n" for n in range(60)
    )
    code = "".join(
        f"    def {name}_{n}(self, first_{n}, second_{n}):\n        kept_{n} = first_{n} + second_{n} * {n}\n"
        f"        return self.{name}_{n + 1}(kept_{n}, {n * 3}) if kept_{n} else None\n\n"
        for n in range(methods)
    )
    return {
        "name": f"{name}.py",
        "licence": "MIT",
        "text": f'class {name}:\n    """What it does.\n\n{prose}    """\n\n{code}',
    }


@pytest.fixture
def heldout(tmp_path):
    """Enough made-up documents to fill every category, and one whose licence keeps it out."""
    names = [f"module{n}" for n in range(30)]
    homes = ["python-stdlib" if n % 3 == 0 else f"package{n}" for n in range(30)]
    rows = [module(name, 75) | {"distribution": home} for name, home in zip(names, homes, strict=True)]
    rows.append(module("copyleft", 90) | {"distribution": "python-stdlib", "licence": "MPL-2.0"})
    path = tmp_path / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_built_in_suite_has_twelve_prompts_of_each_category():
    prompts = suites.load()
    assert Counter(prompt.category for prompt in prompts) == dict.fromkeys(suites.CATEGORIES, 12)
    assert len({prompt.id for prompt in prompts}) == len({prompt.prompt for prompt in prompts}) == 48


def test_built_in_prompts_are_whole_lines_with_a_source_and_a_licence():
    for prompt in suites.load():
        assert prompt.prompt.endswith("\n")
        assert prompt.prompt.strip()
        assert prompt.source.endswith(".py")
        assert prompt.licence
        assert "\t" not in prompt.prompt
        assert "://" not in prompt.prompt
        assert 600 < len(prompt.prompt) < 4000


def test_the_built_in_file_is_small():
    assert len(resources.files("forerun.bench").joinpath("suite.jsonl").read_bytes()) < 250_000


def test_building_is_deterministic_and_round_trips(heldout, tmp_path):
    first = suites.build_suite(heldout, words, tmp_path / "first.jsonl")
    second = suites.build_suite(heldout, words, tmp_path / "second.jsonl")
    assert first == second == suites.load(tmp_path / "first.jsonl")
    assert Counter(prompt.category for prompt in first) == dict.fromkeys(suites.CATEGORIES, 12)


def test_built_prompts_have_the_promised_length_and_continuation(heldout, tmp_path):
    texts = {row["name"]: row["text"] for row in map(json.loads, heldout.read_text().splitlines())}
    for prompt in suites.build_suite(heldout, words, tmp_path / "suite.jsonl"):
        text = texts[prompt.source.split(": ")[1]]
        following = text[text.index(prompt.prompt) + len(prompt.prompt) :]
        assert suites.SHORTEST <= len(words(prompt.prompt)) <= suites.LONGEST
        assert len(words(following)) >= suites.FOLLOWING
        assert "copyleft" not in prompt.source


def test_too_few_documents_are_refused(heldout, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text(heldout.read_text().split("\n")[0] + "\n")
    with pytest.raises(TrainingError, match="held-out passages"):
        suites.build_suite(few, words, tmp_path / "suite.jsonl")
    assert not (tmp_path / "suite.jsonl").exists()


def test_a_suite_of_ones_own_needs_only_prompts(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "Once"}\n\n{"prompt": "Twice", "category": "tale", "id": "two"}\n')
    first, second = suites.load(path)
    assert (first.id, first.category, first.prompt) == ("row-1", "custom", "Once")
    assert (second.id, second.category, second.prompt) == ("two", "tale", "Twice")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense\n", "line 1 is not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no text"),
        ("[1]\n", "line 1 has no text"),
        ("\n", "holds no prompts"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', "more than once"),
    ],
)
def test_a_broken_suite_says_where(tmp_path, content, message):
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(RequestError, match=message):
        suites.load(path)


def test_an_unknown_name_and_a_missing_file_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="unknown suite 'spec-bench'; use 'builtin'"):
        suites.load("spec-bench")
    with pytest.raises(ValueError, match="cannot read the suite"):
        suites.load(tmp_path / "missing.jsonl")
