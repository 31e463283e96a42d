"""What other engines call drafting: names, and vLLM's speculative_config."""

from __future__ import annotations

import json
import logging

import pytest

from forerun.drafting.elsewhere import METHODS_REFUSED, REFUSED, reaching, translated
from forerun.drafting.registry import ALIASES, method, names
from forerun.drafting.spec import describe
from forerun.errors import DrafterError

EXPECTED = [
    ({"method": "ngram", "num_speculative_tokens": 5}, {"drafter": "lookup", "depth": 5, "nodes": 5}),
    ({"model": "ngram", "num_speculative_tokens": 5}, {"drafter": "lookup", "depth": 5, "nodes": 5}),
    ({"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4}, {"drafter": "lookup", "min_match": 2}),
    (
        {"method": "draft_model", "model": "m", "num_speculative_tokens": 3},
        {"drafter": "small", "checkpoint": "m", "length": 3},
    ),
    (
        {"model": "m", "num_speculative_tokens": 4, "revision": "v2"},
        {"drafter": "small", "checkpoint": "m@v2", "length": 4},
    ),
    (
        {"model": "m", "num_speculative_tokens": 4, "draft_sample_method": "greedy"},
        {"drafter": "small", "checkpoint": "m", "tree": {"width": 1, "depth": 4, "nodes": 4}},
    ),
    ({"method": "medusa", "model": "heads"}, {"drafter": "medusa", "checkpoint": "heads"}),
    (
        {"method": "suffix", "suffix_decoding_max_tree_depth": 24, "suffix_decoding_min_token_prob": 0.1},
        {"drafter": "hierarchy", "depth": 24, "cost": 0.1},
    ),
    (
        {
            "method": "ngram",
            "draft_tensor_parallel_size": 1,
            "rejection_sample_method": "standard",
            "quantization": None,
        },
        {"drafter": "lookup"},
    ),
]


@pytest.mark.parametrize("name", ALIASES)
def test_names_of_other_engines_are_names_of_ours(name):
    ours = ALIASES[name]
    assert name not in names() and ours in names()
    assert describe(name) == describe({"drafter": name}) == {"drafter": ours}
    assert describe(f"{name}:place") == {"drafter": ours, "checkpoint": "place"}
    assert method(name) is method(ours)
    inner = describe(f"verified:m({name}) | {name}")["sources"]
    assert inner == [{"drafter": "verified", "checkpoint": "m", "inner": {"drafter": ours}}, {"drafter": ours}]


def test_they_are_understood_in_files_too(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.yaml").write_text("drafter: draft_model\ncheckpoint: model\n")
    assert describe(str(tmp_path / "mine.yaml")) == {"drafter": "small", "checkpoint": str(tmp_path / "model")}
    (tmp_path / "theirs.json").write_text(json.dumps({"method": "draft_model", "model": "model"}))
    assert describe(str(tmp_path / "theirs.json")) == {"drafter": "small", "checkpoint": str(tmp_path / "model")}


def test_a_slip_in_such_a_name_is_mended():
    with pytest.raises(DrafterError, match="prompt_lookup"):
        describe("prompt_lokup")


@pytest.mark.parametrize(("theirs", "ours"), EXPECTED)
def test_a_speculative_config_is_translated(theirs, ours):
    assert translated(theirs) == describe(theirs) == describe(json.dumps(theirs)) == ours
    method(ours["drafter"]).checked({key: value for key, value in ours.items() if key != "drafter"})


def test_what_is_not_needed_is_said(caplog):
    with caplog.at_level(logging.INFO, "forerun"):
        translated({"method": "ngram", "prompt_lookup_max": 4, "enforce_eager": True})
    assert "prompt_lookup_max" in caplog.text and "enforce_eager" in caplog.text


@pytest.mark.parametrize("key", REFUSED)
def test_what_cannot_be_had_is_refused_with_its_reason(key):
    with pytest.raises(DrafterError, match="refused") as error:
        translated({"method": "ngram", key: [1]})
    assert REFUSED[key] in str(error.value)
    assert translated({"method": "ngram", key: False}) == {"drafter": "lookup"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"method": "ngram", "draft_tensor_parallel_size": 2}, "can only be 1"),
        ({"method": "ngram", "rejection_sample_method": "synthetic"}, "'standard'"),
        ({"method": "ngram", "tensor_parallel_size": 2}, "not known"),
        ({"method": "dflash9"}, "none of ours"),
        ({"method": "medusa", "model": "heads", "num_speculative_tokens": 3}, "num_speculative_tokens"),
        *(({"method": name}, reason.partition(" ")[0]) for name, reason in METHODS_REFUSED.items()),
    ],
)
def test_refusals(wrong, named):
    with pytest.raises(DrafterError, match=named):
        translated(wrong)


def test_running_ahead_sets_what_the_drafter_calls_it():
    assert reaching({"drafter": "lookup"}, 3) == {"drafter": "lookup", "depth": 3, "nodes": 3}
    assert reaching(describe("verified:m(lookup)"), 3)["length"] == 3
    for name in ("none", "fallback"):
        with pytest.raises(DrafterError, match=name):
            reaching({"drafter": name}, 3)
