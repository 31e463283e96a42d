"""Words of the field: every synonym, and what all commands understand."""

from __future__ import annotations

import json

import pytest
import typer
from typer.main import get_command

from forerun.cli import app

HEADS = ("--target", "m", "--data", "d", "--out", "o")
SYNONYMS = [
    *(
        ((command, *rest), word, "max_new_tokens", 7)
        for command, *rest in (
            ("generate", "m"),
            ("chat", "m"),
            ("check", "m"),
            ("demo",),
            ("distill", "m", "--out", "o"),
            ("calibrate", "m", "--drafter", "hydra:h"),
            ("plan", "m"),
        )
        for word in ("-n", "--max-tokens", "--max-new-tokens")
    ),
    (("generate", "m"), "--batch-size", "max_rows", 7),
    (("distill", "m", "--out", "o"), "--batch-size", "rows", 7),
    (("calibrate", "m", "--drafter", "hydra:h"), "--batch-size", "rows", 7),
    (("plan", "m"), "--batch-size", "batch", "7"),
    (("check", "m"), "--batch-size", "rows", "7"),
    (("train", "lm", "--corpus", "c"), "--batch-size", "rows", 7),
    (("train", "hydra", *HEADS), "--batch-size", "rows", 7),
    (("train", "hydra", *HEADS), "--lr", "rate", 7.0),
    (("train", "medusa2", *HEADS), "--lr", "rate", 7.0),
    (("train", "medusa2", *HEADS), "--batch-size", "rows", 7),
    (("train", "medusa2", *HEADS), "--threads", "threads", 7),
    (("train", "hydra", *HEADS), "--threads", "threads", 7),
    (("train", "lm", "--corpus", "c"), "--threads", "threads", 7),
    (("distill", "m", "--out", "o"), "--speculative-config", "speculative_config", "7"),
    (("generate", "m"), "--num-speculative-tokens", "num_speculative_tokens", 7),
    (("generate", "m"), "--revision", "revision", "7"),
    (("distill", "m", "--out", "o"), "--template", "chat_template", None),
    (("check", "m"), "--prompt-file", "prompts", None),
    (("demo",), "--drafters", "drafters", ["7"]),
]


@pytest.mark.parametrize(("words", "synonym", "name", "value"), SYNONYMS, ids=lambda one: str(one))
def test_a_synonym_is_the_option_itself(words, synonym, name, value):
    command = get_command(app)
    words = list(words)
    while hasattr(command, "get_command"):
        command = command.get_command(typer.Context(command), words.pop(0))
    given = command.make_context("forerun", [*words, synonym, "7"]).params
    assert given[name] == value if value is not None else str(given[name]) == "7"


@pytest.mark.parametrize("command", ["generate", "chat", "check", "inspect", "distill"])
def test_strange_code_is_refused_with_a_reason(refused, command):
    assert "no code that comes with a model" in refused(command, "model", "--trust-remote-code")


def test_a_revision_belongs_to_a_hub_id(refused, family, monkeypatch):
    assert "no revisions" in refused("generate", family / "target", "x", "--revision", "main")
    asked = {}

    def download(name, revision, **rest):
        asked.update(name=name, revision=revision)
        return str(family / "target")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    from forerun.sources.source import Source

    assert Source.of("somebody/model@v1.0").path == family / "target"
    assert asked == {"name": "somebody/model", "revision": "v1.0"}
    Source.of("somebody/model")
    assert asked == {"name": "somebody/model", "revision": None}


def test_vllm_s_words_draft_like_ours(family, said):
    options = ("generate", family / "target", "def f(x):\n" * 6, "-n", 40, "--dtype", "fp32")
    plain = said(*options)
    config = json.dumps({"method": "ngram", "num_speculative_tokens": 3})
    ours = said(*options, "--drafter", "prompt_lookup", "--num-speculative-tokens", 3)
    theirs = said(*options, "--speculative-config", config)
    assert theirs["token_ids"] == ours["token_ids"] == plain["token_ids"]
    assert theirs["stats"]["drafter"] == ours["stats"]["drafter"] == "lookup"
    assert theirs["stats"]["drafted_tokens"] == ours["stats"]["drafted_tokens"] > 0
    small = json.dumps({"model": str(family / "small"), "num_speculative_tokens": 2})
    assert said(*options, "--speculative-config", small)["stats"]["drafter"] == "small"


def test_vllm_s_words_that_mean_nothing_here(refused, family):
    base = ("generate", family / "target", "x")
    assert "give one of them" in refused(*base, "--drafter", "lookup", "--speculative-config", '{"method": "ngram"}')
    assert "is not vLLM's" in refused(*base, "--speculative-config", "ngram")
    assert "is not vLLM's" in refused(*base, "--speculative-config", "{}")
    strange = {"method": "draft_model", "model": {"a": 1}}
    assert "a folder or a hub id" in refused(*base, "--speculative-config", json.dumps(strange))
    strange = {"model": str(family / "small"), "draft_sample_method": "x"}
    assert "'greedy' or 'probabilistic'" in refused(*base, "--speculative-config", json.dumps(strange))
    assert "leave it out" in refused(*base, "--num-speculative-tokens", 3)
    assert "at least 1" in refused(*base, "--drafter", "lookup", "--num-speculative-tokens", 0)


def test_quiet_and_verbose(family, forerun):
    base = ("generate", family / "target", "x", "-n", 4, "--drafter", "none")
    _, out, usual = forerun(*base)
    code, text, nothing = forerun(*base, "-q")
    assert (code, text, nothing) == (0, out, "") and "tokens per step" in usual
    assert forerun(*base, "--quiet")[2] == ""
    for word in ("-v", "--verbose"):
        code, text, much = forerun(*base, word)
        assert code == 0 and text == out and "parameters on" in much and "tokens per step" in much
    assert forerun(*base)[2].count("\n") == 1, "one command's words are not another's"


@pytest.mark.parametrize("words", [("-q", "generate"), ("generate", "-q"), ("--quiet", "generate")])
def test_quiet_before_and_behind_the_command(forerun, family, words):
    code, out, err = forerun(*words, family / "target", "x", "-n", 3)
    assert code == 0 and out and not err
    assert "tokens per step" in forerun("generate", family / "target", "x", "-n", 3)[2]


def test_verbose_before_the_command(forerun, family):
    assert "parameters" in forerun("-v", "generate", family / "target", "x", "-n", 3)[2]
    assert "parameters" in forerun("-q", "generate", family / "target", "x", "-n", 3, "-v")[2]
