"""The race finds what trying everything finds, and its error bars hold on laws that were planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from forerun.plan.hierarchy import Autoregressive, Chain, Verifier, at_least
from forerun.plan.replay import Spent
from forerun.plan.search import KEPT, Worth, promising, race, ranked, speed, survivors
from plan.planted import Planted

ANSWERS = 32


class Known:
    """A player whose answers cost what was drawn beforehand; `played` counts them."""

    def __init__(self, spent: Sequence[Spent]):
        self.spent, self.played, self.is_closed = spent, 0, False

    def close(self) -> None:
        self.is_closed = True

    def play(self, wave: Sequence[int]) -> list[Spent]:
        assert not self.is_closed
        self.played += len(wave)
        return [self.spent[number] for number in wave]


def instance(seed: int) -> dict[str, Known]:
    """Candidates that differ in acceptance and in cost, on texts that differ in how easy they are for all of them."""
    rng = np.random.default_rng(seed)
    ease, players = rng.normal(0, 0.35, ANSWERS), {}
    for place in range(int(rng.integers(6, 30))):
        rate, cost = rng.uniform(0.5, 4), rng.uniform(0.02, 0.6)
        accepted = rate * np.exp(ease + rng.normal(0, 0.2, ANSWERS))
        steps = [max(1, round(96 / (1 + each))) for each in accepted]
        spent = [Spent(number, 96, count, 4 * count, cost * count, 1.0 * count) for number, count in enumerate(steps)]
        players[f"drafter {place}"] = Known(spent)
    players["none"] = Known([Spent(number, 96, 96, 96, 0.0, 96.0) for number in range(ANSWERS)])
    return players


@pytest.mark.parametrize("rows", [1, 8])
def test_the_race_ends_where_brute_force_ends_and_plays_less(rows: int) -> None:
    waves = [list(range(begin, begin + rows)) for begin in range(0, ANSWERS, rows)]
    won, played, asked = 0, 0, 0
    for seed in range(60):
        players = instance(seed)
        found = ranked(race(players, waves))[0]
        best = max(players, key=lambda name: speed(players[name].spent))
        won += found == best
        assert speed(players[found].spent) > 0.99 * speed(players[best].spent)
        played += sum(each.played for each in players.values())
        asked += len(players) * ANSWERS
    assert won >= 58 and played < 0.6 * asked


def test_plain_decoding_wins_where_a_draft_costs_more_than_it_saves() -> None:
    """draft_design, section 9, checks 2 and 10: 0.3 accepted tokens for half a step."""
    steps = round(96 / 1.3)
    drafting = Known([Spent(number, 96, steps, 2 * steps, 0.5 * steps, 1.0 * steps) for number in range(8)])
    plain = Known([Spent(number, 96, 96, 96, 0.0, 96.0) for number in range(8)])
    assert ranked(race({"small": drafting, "none": plain}, [[number] for number in range(8)]))[0] == "none"


@pytest.mark.parametrize("seed", range(3))
def test_faster_drafting_is_never_worse_and_units_do_not_matter(seed: int) -> None:
    """draft_design, section 9, check 9."""
    players = instance(seed)
    spent = {name: list(each.spent) for name, each in players.items()}
    order = sorted(spent, key=lambda name: speed(spent[name]))
    dearer = {
        name: [replace(one, draft_seconds=7 * one.draft_seconds, verify_seconds=7 * one.verify_seconds) for one in own]
        for name, own in spent.items()
    }
    assert sorted(dearer, key=lambda name: speed(dearer[name])) == order
    assert speed(dearer[order[0]]) == pytest.approx(speed(spent[order[0]]) / 7)
    cheaper = {name: [replace(one, draft_seconds=one.draft_seconds / 2) for one in own] for name, own in spent.items()}
    assert max(map(speed, cheaper.values())) >= max(map(speed, spent.values()))


@pytest.mark.parametrize("sizes", [(4,), (3, 6)])
def test_predictions_on_planted_laws_are_within_their_error_bars(sizes: tuple[int, ...]) -> None:
    """Answers of planted rounds: what the formula says lies within two standard errors almost always."""
    costs, rates = [0.3, 1.0][-len(sizes) :], [0.7, 0.9][-len(sizes) :]
    first = sizes[0]
    chain = Chain(Autoregressive(0.05), tuple(Verifier(c, a) for c, a in zip(costs, rates, strict=True)))
    truth = 1 / at_least(chain, sizes).latency
    laws = Planted(
        lambda rows: (np.full(rows, first), np.full(rows, 0.05 * first)),
        [lambda tokens, cost=cost: np.full(len(tokens), cost) for cost in costs],
        rates,
        sizes[1:],
    )
    rng, inside = np.random.default_rng(5), 0
    for _ in range(120):
        answers = [laws.verify(rng, len(rates) - 1, 40) for _ in range(ANSWERS)]
        spent = [Spent(n, int(tokens.sum()), 40, 0, 0.0, float(each.sum())) for n, (tokens, each) in enumerate(answers)]
        found = Worth.of(spent)
        inside += abs(found.tokens_per_second - truth) <= 2 * found.error
    assert 0.88 <= inside / 120 < 1


def test_an_error_of_the_costs_does_not_average_out() -> None:
    spent = [Spent(number, 96, 48, 99, 1.0, 47.0) for number in range(ANSWERS)]
    assert Worth.of(spent) == Worth(2.0, 0.0)
    assert Worth.of(spent, 0.03).error == pytest.approx(0.06)


def test_few_answers_decide_nothing_and_the_best_stay_whatever_happens() -> None:
    clear = {f"{n}": [Spent(a, 96, 96, 0, 0.0, 1.0 + n) for a in range(8)] for n in range(9)}
    assert set(survivors({name: own[:3] for name, own in clear.items()})) == set(clear)
    assert survivors(clear) == ["0", "1", "2", "3"] and len(survivors(clear)) == KEPT
    assert promising(clear, 0.5) == ["0", "1"]


def test_who_comes_too_late_is_not_seen_and_the_yardstick_stays() -> None:
    players = {f"{n}": Known([Spent(a, 96, 96, 0, 0.0, 1.0 + n) for a in range(12)]) for n in range(9)}
    late = race(players, [[0, 1, 2, 3], [4]], lambda: True)
    assert list(late) == ["0", "1", "2", "3"] and {len(own) for own in late.values()} == {4}
    found = race(players, [[0, 1, 2, 3], [4, 5], [6]], yardstick="8")
    assert {name: len(own) for name, own in found.items() if len(own) > 4} == dict.fromkeys(
        ["0", "1", "2", "3", "8"], 7
    )
    assert players["7"].is_closed and not players["8"].is_closed
    for each in players.values():
        each.is_closed = False
    again = race({name: players[name] for name in "0128"}, [[0, 1, 2, 3], [4, 5]], begun=late)
    assert {len(own) for own in again.values()} == {6} and players["0"].played == 4 + 7 + 2


def test_an_opening_and_the_rest_are_one_race() -> None:
    """Those that come later are held against what the others had spent by then."""
    for seed in range(20):
        waves, players = [[number] for number in range(ANSWERS)], instance(seed)
        some = {name: players[name] for name in list(players)[::3]}
        begun = race(some, waves[:4], yardstick="none")
        for each in some.values():
            each.is_closed = False
        whole = race(instance(seed), waves, yardstick="none")
        assert race(players, waves, yardstick="none", begun=begun) == whole
