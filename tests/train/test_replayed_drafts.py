"""Acceptance by replay, by hand and against the engine."""

from __future__ import annotations

import numpy as np
import pytest

from forerun.train.replay import emitted, tokens_per_step

TRUTH = "abcdefgh"


def hits(wrong: str) -> np.ndarray:
    return np.array([letter not in wrong for letter in TRUTH])


def test_by_hand() -> None:
    """Drafts of three; the model is wrong at one place alone."""
    assert emitted(hits("d"), 3) == [4, 4]
    assert tokens_per_step([hits("d")], 3) == 4
    assert emitted(hits("c"), 3)[:2] == [3, 4] and sum(emitted(hits("c"), 3)) == 8
    assert emitted(hits("d"), 3, guard=True) == [4]
    assert emitted(hits(TRUTH), 3) == [1] * 8
    assert emitted(hits(""), 3) == [4, 4]
    assert tokens_per_step([], 3) == 1


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_as_if_every_draft_were_made_anew(length: int) -> None:
    """The loop of the paper's demo, over a model that is right where it is right."""
    right = np.random.default_rng(length).random(200) < 0.7
    place, steps = 0, []
    while place < len(right):
        matched = 0
        while matched < length and place + matched < len(right) and right[place + matched]:
            matched += 1
        steps.append(min(matched + 1, len(right) - place))
        place += steps[-1]
    assert emitted(right, length) == steps
