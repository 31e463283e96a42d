"""Cascades: whatever K, the text is the target's; calls and passes are those of a trace by hand.

`Saying` is a last drafter that is always right or always wrong about models that say the token 1 everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from enumeration import distance, plain_law
from fakes import Near, TableNetwork, Wild, engine_of, plain
from forerun.drafters.cascade import Cascade, Part
from forerun.drafters.verified import Verified
from forerun.drafting.drafter import Context, Drafter, Tally
from forerun.drafting.method import Method
from forerun.drafting.registry import REGISTRY
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError
from forerun.model import Model
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree
from test_engine import engine_law, processed

EXACT = 1e-6
CPU = torch.device("cpu")
FLAGSHIP = [[5, 14, 10], [0, 1, 10], [0, 0, 10]]


class One(TableNetwork):
    """Says the token 1, greedily."""

    def logits(self, prefix: Sequence[int]) -> Tensor:
        return torch.tensor([0.0, 9.0, 0.0, 0.0], dtype=self.dtype)


class Saying(Drafter):
    """A chain of so many tokens, all of them the same."""

    name = "saying"

    def __init__(self, token: int, length: int):
        self._token, self.max_nodes = token, length

    def propose(self, context: Context) -> TokenTree:
        sizes = [min(*most, self.max_nodes) for most in zip(context.depths, context.budgets, strict=True)]
        chains = [[row.tokens[-1], *[self._token] * size] for row, size in zip(context.rows, sizes, strict=True)]
        return TokenTree.chain(chains, context.device)


@dataclass(frozen=True)
class Said:
    token: int = 1
    length: int = 10


@dataclass(frozen=True)
class Seeded:
    seed: int = 0


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """saying and wild, as the last drafter of a description."""

    def saying(workshop: Workshop, settings: Said) -> Drafter:
        return Saying(settings.token, settings.length)

    def wild(workshop: Workshop, settings: Seeded) -> Drafter:
        return Wild(workshop.target.vocab_size, 4, settings.seed)

    for method in (Method("saying", "", Said, saying, "certain"), Method("wild", "", Seeded, wild, "drawn")):
        monkeypatch.setitem(REGISTRY, method.name, method.name)
        monkeypatch.setitem(sys.modules, method.name, SimpleNamespace(METHOD=method))  # type: ignore[arg-type]


def one_step(k: list[list[int]], token: int) -> tuple[list[int], int, list[tuple[str, int, int, int]]]:
    """The tokens of a first step, how many were drafted for it, and every tally: its name, asked, drafted, passes."""
    models = [f"model {number}" for number in range(len(k) - 1)]
    description = {
        "drafter": "cascade",
        "models": models,
        "k": k,
        "last": {"drafter": "saying", "token": token},
    }
    engine = engine_of(One(), description, dict.fromkeys(models, One()))
    engine.add([0], SamplingParams(max_new_tokens=100))
    (piece,) = engine.step()
    drafted = engine._running[0].stats.drafted_tokens
    return piece.token_ids, drafted, [(t.name, t.asked, t.drafted, t.passes) for t in engine.drafter.tallies()]


# ---- traces by hand (cs_drafting.md, 3.3 and 10.3)


def test_a_last_drafter_that_is_always_right_is_asked_once() -> None:
    """K = [[2, 3], [0, 3]]: the model is given ten tokens instead of three and says eleven, which
    meets both thresholds."""
    tokens, drafted, tallies = one_step([[2, 3], [0, 3]], token=1)
    assert (tokens, drafted) == ([1] * 12, 11)
    assert tallies == [
        ("cascade, part 1", 1, 11, 0),
        ("verified", 1, 11, 1),
        ("cascade, part 1", 1, 10, 0),
        ("cascade, part 2", 0, 0, 0),
    ]


def test_a_last_drafter_that_is_always_wrong_costs_a_pass_per_token() -> None:
    """The model is called twice and says one token each time, then the last drafter adds ten: twelve are reviewed."""
    tokens, drafted, tallies = one_step([[2, 3], [0, 3]], token=2)
    assert (tokens, drafted) == ([1] * 3, 12)
    assert tallies == [
        ("cascade, part 1", 2, 2, 0),
        ("verified", 2, 2, 2),
        ("cascade, part 1", 2, 20, 0),
        ("cascade, part 2", 1, 10, 0),
    ]


def test_the_flagship_setting_with_a_last_drafter_that_is_always_right() -> None:
    """base: small says 11 of 10, which also meets the threshold behind it, base 12; small 11 more: 23; ten more: 33.

    When its turn comes as a part, small has not read base's twelve tokens: more than are read in
    passing, so one pass more.
    """
    tokens, drafted, tallies = one_step(FLAGSHIP, token=1)
    assert (tokens, drafted) == ([1] * 34, 33)
    assert tallies == [
        ("cascade, part 1", 1, 12, 0),
        ("verified", 1, 12, 1),
        ("cascade, part 1", 1, 11, 0),
        ("verified", 1, 11, 1),
        ("cascade, part 1", 1, 10, 0),
        ("cascade, part 2", 0, 0, 0),
        ("cascade, part 2", 1, 11, 0),
        ("verified", 1, 11, 2),
        ("cascade, part 1", 1, 10, 0),
        ("cascade, part 3", 1, 10, 0),
    ]


def test_the_flagship_setting_with_a_last_drafter_that_is_always_wrong() -> None:
    """base is given 1 + 10 and says 2, three times; small is given 10 and says 1, thirteen times; then ten."""
    tokens, drafted, tallies = one_step(FLAGSHIP, token=2)
    assert (tokens, drafted) == ([1] * 20, 29)
    assert tallies == [
        ("cascade, part 1", 3, 6, 0),
        ("verified", 3, 6, 3),
        ("cascade, part 1", 3, 3, 0),
        ("verified", 3, 3, 3),
        ("cascade, part 1", 3, 30, 0),
        ("cascade, part 2", 3, 30, 0),
        ("cascade, part 2", 13, 13, 0),
        ("verified", 13, 13, 13),
        ("cascade, part 1", 13, 130, 0),
        ("cascade, part 3", 1, 10, 0),
    ]


def test_accepted_tokens_are_counted_for_the_part_that_said_them() -> None:
    cascade = Cascade([Part(Saying(1, 2), 3), Part(Saying(1, 1), 6)])
    engine = engine_of(One(), cascade)
    engine.generate([[0]], SamplingParams(max_new_tokens=14))
    assert [tally.accepted for tally in cascade.tallies()] == [[2] * 4, [0] * 4 + [2] * 2]
    assert [(tally.asked, tally.hits, tally.drafted) for tally in cascade.tallies()] == [(4, 4, 8), (4, 4, 4)]


@pytest.mark.parametrize(
    ("token", "count", "said"), [(1, 100, [1] * 2), (2, 100, [2] * 11), (2, 9, [2] * 8), (2, 4, [2] * 3), (2, 1, [])]
)
def test_a_cascade_asks_nobody_behind_an_end_and_says_no_more_than_there_is_room_for(
    token: int, count: int, said: list[int]
) -> None:
    """Two tokens at a time until there are three, then seven; 1 ends the text."""
    cascade = Cascade([Part(Saying(token, 2), 3), Part(Saying(token, 7), 8)])
    row = Row([0], 1, SamplingParams(), 0, limit=1 + count, ends=frozenset({1}))
    cascade.admit(row, {})
    assert cascade.propose(Context([row], [99], [row.remaining - 1], CPU)).tokens == [[0, *said]]
    assert row.tokens == [0] and row.tentative == 0


class Once(Saying):
    """Has something to say the first time only."""

    asked = 0

    def propose(self, context: Context) -> TokenTree:
        self.asked += 1
        if self.asked > 1:
            return TokenTree.root([row.tokens[-1] for row in context.rows], context.device)
        return super().propose(context)


def test_a_part_with_nothing_more_to_say_gives_way_to_the_next() -> None:
    once = Once(1, 2)
    cascade = Cascade([Part(once, 5), Part(Saying(2, 3), 6)])
    engine = engine_of(One(), cascade)
    engine.add([0], SamplingParams(max_new_tokens=50))
    (piece,) = engine.step()
    assert once.asked == 2 and piece.token_ids == [1, 1, 1]
    first, second = cascade.tallies()
    assert (first.asked, first.hits, first.drafted) == (2, 1, 2) and (second.asked, second.drafted) == (2, 6)


def test_a_piece_names_who_thought_of_each_token_in_a_cascade_of_levels() -> None:
    """A level names its own words, and those below it theirs; the target's own has no name."""
    below = Once(1, 2)
    below.name = "once"
    engine = engine_of(One(), Cascade([Part(Verified(Model(One(), 3), below, 1), 4), Part(Saying(1, 2), 6)]))
    engine.add([0], SamplingParams(max_new_tokens=50))
    (piece,) = engine.step()
    assert piece.origins == ["once", "once", "verified", "verified", "saying", "saying", ""]
    assert piece.drafted == [True] * 6 + [False] and piece.token_ids == [1] * 7


def test_the_most_tokens_of_a_cascade_are_what_its_parts_may_overshoot_by() -> None:
    for parts in ([(2, 3), (5, 6)], [(4, 1), (1, 9)], [(3, 7)]):
        cascade = Cascade([Part(Saying(1, length), until) for length, until in parts])
        engine = engine_of(One(), cascade)
        engine.add([0], SamplingParams(max_new_tokens=100))
        (piece,) = engine.step()
        assert len(piece.token_ids) - 1 <= cascade.max_nodes == max(until - 1 + length for length, until in parts)


# ---- the text is the target's


@st.composite
def matrices(draw: st.DrawFn) -> list[list[int]]:
    size = draw(st.integers(1, 3))
    rows = [
        [0 if column < row else draw(st.integers(int(row == column), 4)) for column in range(size)]
        for row in range(size)
    ]
    rows[0][0] = rows[0][0] or draw(st.integers(0, 1))
    rows[0][-1] += not any(rows[0])
    return rows


FAMILY = TableNetwork(4, 3, 12)
KIN = {"target": FAMILY, "0": Near(FAMILY, 0.5, 1), "1": Near(FAMILY, 1.0, 2)}


@settings(max_examples=40, deadline=None)
@given(matrices(), st.sampled_from([1, 1.5, 2, 5, 1e6]), st.integers(0, 99))
def test_greedy_text_is_the_targets_for_any_matrix_and_leniency_over_random_drafts(
    k: list[list[int]], leniency: float, seed: int
) -> None:
    description = {
        "drafter": "cascade",
        "models": ["0", "1"][: len(k) - 1],
        "k": k,
        "leniency": leniency,
        "last": {"drafter": "wild", "seed": seed},
    }
    prompts = [[1, 2, 3], [0], [2, 2]]
    wishes = [SamplingParams(max_new_tokens=count) for count in (25, 9, 17)]
    outputs = engine_of(FAMILY, description, KIN, max_rows=2).generate(prompts, wishes)
    for prompt, wish, output in zip(prompts, wishes, outputs, strict=True):
        assert output.token_ids == plain(FAMILY, prompt, wish.max_new_tokens)


@pytest.mark.parametrize("leniency", [1, 3])
@pytest.mark.parametrize(
    "k",
    [[[1, 1], [0, 1]], [[2, 1], [0, 2]], [[1, 1, 1], [0, 1, 1], [0, 0, 1]], [[0, 1], [0, 1]]],
    ids=str,
)
def test_the_law_is_the_targets_with_and_without_leniency(k: list[list[int]], leniency: float) -> None:
    target = TableNetwork(2, 3, 2, 1.0)
    networks = {"target": target, "0": Near(target, 1.0, 1), "1": Near(target, 2.0, 2)}
    models = ["0", "1"][: len(k) - 1]
    last = {"drafter": "small", "checkpoint": "1", "length": 1}
    description = {"drafter": "cascade", "models": models, "k": k, "leniency": leniency, "last": last}
    wishes = SamplingParams(temperature=1.0, max_new_tokens=3)
    law = engine_law(lambda: description, networks, [1, 0], wishes)
    assert distance(law, plain_law(processed(wishes, target, [1, 0]), 3)) < EXACT


@pytest.mark.parametrize("seed", range(3))
def test_the_law_is_the_targets_whatever_trees_the_parts_propose(seed: int) -> None:
    """Of siblings the first is taken, with the law that it was drawn from; deterministic tokens
    stand beside drawn ones."""
    networks: dict[str, Any] = {"target": TableNetwork(2, 3, 2, 1.0)}
    wishes = SamplingParams(temperature=1.0, max_new_tokens=3)

    def cascade() -> Drafter:
        return Cascade([Part(Wild(2, 3, seed), 1), Part(Wild(2, 3, seed + 10), 2)])

    law = engine_law(cascade, networks, [1, 0], wishes)
    assert distance(law, plain_law(processed(wishes, networks["target"], [1, 0]), 3)) < EXACT


def test_a_part_that_is_asked_again_has_luck_of_its_own_again() -> None:
    """One token at a time, two of them; shared luck would make the second depend on the first."""
    target = TableNetwork(2, 3, 2, 1.0)
    networks = {"target": target, "0": Near(target, 2.0, 1)}
    parts = [{"drafter": "small", "checkpoint": "0", "length": 1, "until": 2}]
    wishes = SamplingParams(temperature=1.0, max_new_tokens=4)
    law = engine_law(lambda: {"drafter": "cascade", "parts": parts}, networks, [1, 0], wishes)
    assert distance(law, plain_law(processed(wishes, target, [1, 0]), 4)) < EXACT


def test_tokens_keep_the_law_of_their_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic mistake: every token is taken to be certain, although it was drawn. No harm; and
    to take it for drawn from the law of another part would be another law."""
    target = TableNetwork(2, 3, 2, 1.0)
    networks = {"target": target, "0": Near(target, 2.0, 1), "1": Near(target, 2.0, 2)}
    parts = [{"drafter": "small", "checkpoint": name, "length": 1, "until": at} for at, name in enumerate("01", 1)]
    wishes = SamplingParams(temperature=1.0, max_new_tokens=3)

    def far() -> float:
        law = engine_law(lambda: {"drafter": "cascade", "parts": parts}, networks, [1, 0], wishes)
        return distance(law, plain_law(processed(wishes, target, [1, 0]), 3))

    assert far() < EXACT
    chain = sys.modules["forerun.drafters.cascade"]._chain

    def mixed_up(said: Sequence[Any], device: torch.device) -> TokenTree:
        for row in said:
            row.laws[:] = row.laws[::-1]
        return chain(said, device)

    monkeypatch.setattr("forerun.drafters.cascade._chain", mixed_up)
    assert far() > 0.01


# ---- descriptions


def built(**settings: Any) -> Cascade:
    target = One()
    drafter = engine_of(target, {"drafter": "cascade", **settings}, {"a": One(), "b": One()}).drafter
    assert isinstance(drafter, Cascade)
    return drafter


def test_a_cascade_without_a_matrix_reviews_once_per_model() -> None:
    by_default, written = built(models=["a", "b"]), built(models=["a", "b"], k=[[1, 1, 10], [0, 1, 10], [0, 0, 10]])
    for one in (by_default, written):
        assert [part.until for part in one.parts] == [1, 2, 12]
        assert [part.drafter.name for part in one.parts] == ["verified", "verified", "maxgram"]
        inner = one.parts[0].drafter.inner  # type: ignore[attr-defined]
        assert [part.until for part in inner.parts] == [1, 11]
    assert all(isinstance(tally, Tally) for tally in by_default.tallies()) and len(by_default.tallies()) == 10


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, 'either "models"'),
        ({"models": ["a"], "parts": [{"drafter": "none", "until": 1}]}, 'either "models"'),
        ({"models": "a"}, "models is a list of checkpoints"),
        ({"models": 5}, "models is a list of checkpoints"),
        ({"models": [5]}, "models is a list of checkpoints"),
        ({"parts": []}, "at least one"),
        ({"parts": "lookup"}, "parts is a list"),
        ({"parts": {"drafter": "lookup", "until": 2}}, "parts is a list"),
        ({"parts": ["lookup"]}, '"until"'),
        ({"parts": [{"drafter": "lookup"}]}, '"until"'),
        ({"parts": [{"drafter": "lookup", "until": 0}]}, '"until"'),
        ({"parts": [{"drafter": "lookup", "until": True}]}, '"until"'),
        ({"parts": [{"drafter": "lookup", "until": 2, "depht": 3}]}, "no setting 'depht'"),
        ({"parts": [{"drafter": "lookup", "until": 2}], "leniency": 2}, "says it all"),
        ({"parts": [{"drafter": "lookup", "until": 2}], "k": [[1]]}, "says it all"),
        ({"models": ["a"], "k": 5}, "2 rows of 2 whole numbers"),
        ({"models": ["a"], "k": [[1, 2]]}, "2 rows of 2 whole numbers"),
        ({"models": ["a"], "k": [[1, 2], [0, 1.5]]}, "2 rows of 2 whole numbers"),
        ({"models": ["a"], "k": [[1, -2], [0, 1]]}, "2 rows of 2 whole numbers"),
        ({"models": ["a"], "k": ["12", [0, 1]]}, "2 rows of 2 whole numbers"),
        ({"models": ["a"], "k": [[1, 2], [1, 1]]}, "upper triangular"),
        ({"models": ["a"], "k": [[1, 2], [0, 0]]}, "at least 1 on its diagonal"),
        ({"models": ["a"], "k": [[0, 0], [0, 1]]}, "at least 1 on its diagonal"),
        ({"models": ["a"], "leniency": 0.5}, "leniency is a factor of at least 1"),
        ({"models": ["a"], "leniency": "two"}, "leniency is a factor of at least 1"),
        ({"models": ["a"], "leniency": float("nan")}, "leniency is a factor of at least 1"),
        ({"models": ["a"], "leniency": float("inf")}, "leniency is a factor of at least 1"),
        ({"models": ["a"], "leniency": True}, "leniency is a factor of at least 1"),
        ({"models": ["a"], "last": "nobody"}, "nobody"),
    ],
    ids=str,
)
def test_a_cascade_that_cannot_be_is_refused_with_a_sentence(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DrafterError, match=says) as caught:
        built(**settings)
    assert "\n" not in str(caught.value)


def test_heads_cannot_stand_behind_tokens_that_are_not_verified() -> None:
    class Reading(Saying):
        name, reads = "reading", frozenset({1})

    with pytest.raises(DrafterError, match="the drafter reading reads hidden states of verified tokens"):
        Cascade([Part(Saying(1, 2), 2), Part(Reading(1, 2), 4)])


def test_a_model_of_another_vocabulary_has_no_place_in_a_cascade() -> None:
    with pytest.raises(DrafterError, match="vocabulary of 3 tokens and the target one of 4"):
        engine_of(One(), {"drafter": "cascade", "models": ["other"]}, {"other": TableNetwork(3)})
    assert Model(One(), 1).vocab_size == 4
