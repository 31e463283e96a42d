"""Stopping rules decide about the next token, by looking at the last ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.drafters.small import Settings
from forerun.drafting.stopping import RULES, Confidence, CumulativeConfidence, Drafted, Fixed, Stopping, stopping
from forerun.errors import DrafterError
from forerun.row import Row
from forerun.sampling import SamplingParams

BARE = sorted({*RULES} - {"acceptance"})
"""Those that have learnt nothing; the others are in tests/test_specdec.py."""
ROW = Row([0], 1, SamplingParams(), key=0, limit=99)
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def asked(rule: Stopping, *rows: list[float]) -> list[bool]:
    probs = torch.tensor(rows, dtype=torch.float64)
    return rule.goes_on(Drafted(probs.shape[1], [ROW] * len(rows), probs)).tolist()


def length(rule: Stopping, probs: list[float]) -> int:
    """How long a chain with these draft probabilities gets."""
    for count in range(1, len(probs)):
        if not asked(rule, probs[:count])[0]:
            return count
    return len(probs)


def test_fixed_draws_so_many_whatever_comes() -> None:
    assert [asked(Fixed(3), [0.0] * count)[0] for count in range(1, 6)] == [True, True, False, False, False]
    assert asked(Fixed(1), [1.0]) == [False]


def test_confidence_looks_at_the_last_token_alone() -> None:
    rule = Confidence(0.5, 9)
    assert asked(rule, [0.1, 0.5], [0.9, 0.49], [0.9, 0.9]) == [True, False, True]


def test_cumulative_confidence_looks_at_the_whole_chain() -> None:
    rule = CumulativeConfidence(0.25, 9)
    assert asked(rule, [0.5, 0.5], [0.9, 0.2], [0.2, 1.0]) == [True, False, False]


@settings(max_examples=60, deadline=None)
@given(probabilities, st.sampled_from(BARE), st.integers(1, 6))
def test_no_chain_is_longer_than_the_most(probs: list[float], name: str, most: int) -> None:
    rule = stopping(name, most=most)
    assert 1 <= length(rule, probs) <= max(1, most)
    assert asked(rule, [1.0] * most) == [False]
    assert rule.most == most


@settings(max_examples=60, deadline=None)
@given(probabilities, st.sampled_from(BARE), st.floats(0, 1))
def test_the_last_token_stays_whatever_it_is(probs: list[float], name: str, threshold: float) -> None:
    """The decision about a length depends on the tokens up to it: changing the last one cannot shorten the chain."""
    settings_ = {} if name == "fixed" else {"threshold": threshold}
    rule = stopping(name, most=8, **settings_)
    end = length(rule, probs)
    for other in (0.0, 1.0):
        assert length(rule, [*probs[: end - 1], other, *probs[end:]]) >= end


@settings(max_examples=30, deadline=None)
@given(st.lists(probabilities, min_size=2, max_size=4), st.sampled_from(BARE))
def test_rows_are_asked_each_for_itself(rows: list[list[float]], name: str) -> None:
    rule, shortest = stopping(name, most=5), min(map(len, rows))
    rows = [row[:shortest] for row in rows]
    assert asked(rule, *rows) == [asked(rule, row)[0] for row in rows]


def test_rules_are_made_by_name() -> None:
    assert stopping() == Fixed(5)
    assert stopping("confidence", threshold=0.2, most=7) == Confidence(0.2, 7)
    assert stopping("cumulative", threshold=0.1) == CumulativeConfidence(0.1, 20)


@pytest.mark.parametrize(
    ("rule", "settings_", "says"),
    [
        ("confident", {}, "confidence"),
        ("fixed", {"threshold": 0.5}, "threshold"),
        ("confidence", {"checkpoint": "head"}, "no setting 'checkpoint': it takes threshold, most"),
        ("confidence", {"most": 0}, "at least 1 and at most 1024, not 0"),
        ("confidence", {"most": 2.5}, "not 2.5"),
        ("confidence", {"most": True}, "not True"),
        ("confidence", {"most": 5000}, "not 5000"),
        ("confidence", {"threshold": True}, "threshold=True"),
        ("confidence", {"most": "many"}, "many"),
        ("confidence", {"threshold": "high"}, "high"),
        ("confidence", {"threshold": "0.5"}, "threshold='0.5'"),
        ("confidence", {"threshold": 1.5}, "threshold=1.5"),
        ("cumulative", {"threshold": -0.1}, "threshold=-0.1"),
        ("acceptance", {}, "acceptance:PATH"),
        ("acceptance", {"checkpoint": 3}, "acceptance:PATH"),
        ("acceptance", {"checkpoint": "head", "threshold": "automatic"}, "threshold='automatic'"),
        ("acceptance", {"checkpoint": "head", "least": 0}, "least is a whole number of at least 1"),
        ("acceptance", {"checkpoint": "head", "least": 4, "most": 3}, "at least 4 tokens and at most 3"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_a_sentence(rule: str, settings_: dict, says: str) -> None:
    with pytest.raises(DrafterError, match=says) as caught:
        stopping(rule, **settings_)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("nameless", ["", {}, {"most": 4}])
def test_a_rule_has_a_name(nameless: Any) -> None:
    with pytest.raises(DrafterError, match="rule"):
        Settings("small", stopping=nameless)
