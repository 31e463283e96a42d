"""From answers to a choice: what is looked at, what wins, and what a plan for another machine says."""

from __future__ import annotations

from typing import Any

import pytest

from fakes import Near, TableNetwork, engine_of
from forerun.drafting.drafter import Drafter
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError, ForerunError
from forerun.model import Model
from forerun.plan.candidates import AtHand, Candidate, hierarchy_of, in_turn, named
from forerun.plan.costs import Costs, Point
from forerun.plan.planner import Elsewhere, Planner, Rank, Ranking, Wishes
from forerun.plan.search import Worth
from forerun.sampling import SamplingParams

TARGET = TableNetwork(vocab_size=5, seed=3, order=3)
MODELS = {"small": Near(TARGET, 0.6, seed=1), "middle": Near(TARGET, 0.2, seed=2)}
PROMPTS = [[1, 2, 3], [4], [0, 0, 1, 2, 3, 4, 0], [2, 2], [3, 1]]
FREE = Costs((Point(1, 1, 1, 1.0), Point(1, 1, 9, 1.0)))
DEAR = Costs((Point(1, 1, 1, 1.0), Point(1, 1, 9, 9.0)))
GREEDY = SamplingParams(max_new_tokens=24, seed=0)


def planner(costs: Costs | None, batches: tuple[int, ...] = (1,), **drafts: dict[str, float]) -> Planner:
    workshop = Workshop(Model(TARGET, 0), MODELS.__getitem__)
    there = Elsewhere(costs, drafts) if costs else None
    return Planner(engine_of(TARGET, max_rows=4), workshop, Wishes(batches, GREEDY, 0.5), there)


@pytest.mark.parametrize(("costs", "wins"), [(FREE, True), (DEAR, False)], ids=["nodes are free", "nodes are dear"])
def test_what_wins_depends_on_what_nodes_cost(costs: Costs, wins: bool) -> None:
    """Costs of another machine: nothing there is measured, and the choice follows from its table."""
    at_hand = AtHand.of(
        [{"drafter": "lookup", "cost": 0.02}, {"drafter": "small", "checkpoint": "middle", "length": 4}]
    )
    names = [one.name for one in (*at_hand.variations(), *at_hand.compositions())]
    (ranking,) = (
        planner(costs, (1,), none={"1": 0.0}, **{name: {"1": 0.1} for name in names}).plan(at_hand, PROMPTS).rankings
    )
    assert (ranking.winner.candidate.name != "none") == wins and not ranking.measured
    plain = ranking.plain.worth.tokens_per_second
    assert plain == pytest.approx(1.0, rel=1e-3), "a plain step takes a second there"
    assert (ranking.winner.worth.tokens_per_second > 1.3 * plain) == wins


def test_drafting_takes_elsewhere_what_it_took_there() -> None:
    at_hand = AtHand.of([{"drafter": "small", "checkpoint": "middle", "length": 4}])
    (name,) = [named(one) for one in at_hand.models]
    found = planner(FREE, (2,), **{name: {"2": 0.5}}).plan(at_hand, PROMPTS)
    rank = next(one for one in found.rankings[0].ranks if one.candidate.name == name)
    assert found.drafts[name]["2"] == pytest.approx(0.5)
    steps = rank.sum_of("steps")
    expected = rank.sum_of("tokens") / (steps / 2 * 0.5 + rank.sum_of("verify_seconds"))
    assert rank.worth.tokens_per_second == pytest.approx(expected)


def test_here_the_best_and_plain_decoding_are_measured_in_turn() -> None:
    """For two numbers of rows, the second of which begins with what is known from the first."""
    result = planner(None, (2, 1)).plan(AtHand.of(["lookup", "small:middle"]), PROMPTS)
    assert [one.rows for one in result.rankings] == [1, 2] and result.costs.rows == [1, 2]
    for ranking in result.rankings:
        assert len(ranking.measured) == 4 and ranking.plain in ranking.measured
        assert len({len(one.measured) for one in ranking.measured}) == 1, "they took turns"
        assert ranking.winner in ranking.measured
        off = ranking.off(ranking.measured[0])
        assert off == pytest.approx((1 + ranking.measured[0].off) / (1 + ranking.plain.off) - 1)


def test_what_is_broken_beside_the_target_is_left_out_and_what_was_named_is_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = AtHand.of(["hydra:no/heads"])
    (ranking,) = planner(FREE).plan(AtHand.of(["lookup"]), PROMPTS, broken).rankings
    assert "hydra:heads is left out" in caplog.text and "hydra" not in str(
        [one.candidate.name for one in ranking.ranks]
    )
    with pytest.raises(ForerunError, match="no/heads"):
        planner(FREE).plan(broken, PROMPTS)


def measured(name: str, *speeds: float) -> Rank:
    return Rank(Candidate(name, {"drafter": name}, name), Worth(9.0, 1.0), (), False, 9.0, speeds)


def test_the_winner_was_faster_than_plain_in_most_rounds() -> None:
    plain = measured("none", 10, 20, 10)
    quick, lucky = measured("quick", 11, 22, 9), measured("lucky", 9, 19, 90)
    assert Ranking(1, (lucky, quick, plain)).winner is quick
    assert Ranking(1, (lucky, plain)).winner is plain, "the best of one round is luck"
    assert Ranking(1, (quick, plain)).over_plain(quick) == pytest.approx(1.1)


# ---- candidates


def test_variations_and_compositions_of_what_is_at_hand() -> None:
    at_hand = AtHand.of(["hierarchy", "small:a/b", "hydra:heads", "none"])
    names = [one.name for one in in_turn([*at_hand.variations(), *at_hand.compositions()])]
    assert len(names) == len(set(names))
    assert {"hierarchy nodes 4", "small:b length 8", "small:b stopping cumulative 0.5 12", "hydra:heads"} <= {*names}
    assert {"hierarchy | hydra:heads", "hierarchy | small:b length 3", "verified:b(hierarchy) length 7"} <= {*names}
    assert "cascade models b" in names and "none" not in names
    assert names[:3] == ["hierarchy nodes 16", "hydra:heads", "small:b length 3"], "one of every kind comes first"


def test_what_a_user_has_settled_is_not_varied() -> None:
    at_hand = AtHand.of([{"drafter": "small", "checkpoint": "m", "length": 5}, {"drafter": "lookup", "nodes": 3}])
    assert [one.name for one in at_hand.variations()] == ["lookup nodes 3", "small:m length 5"]
    assert "lookup nodes 3 | small:m length 5" in [one.name for one in at_hand.compositions()]


def test_both_together_have_each_once() -> None:
    assert AtHand.of(["lookup", "small:m"]) + AtHand.of(["lookup", "small:n"]) == AtHand.of(
        ["lookup", "small:m", "small:n"]
    )


@pytest.mark.parametrize("spec", ["auto", {"drafter": "switch", "parts": ["lookup"]}])
def test_who_chooses_while_running_is_no_candidate(spec: Any) -> None:
    with pytest.raises(DrafterError, match="name the drafters"):
        AtHand.of([spec])


def test_of_several_models_the_formulas_name_a_hierarchy_and_a_bound() -> None:
    some = planner(FREE)
    texts = some.answer(PROMPTS)
    found = hierarchy_of(some.engine, {"small": MODELS["small"], "middle": MODELS["middle"]}, texts, GREEDY)
    assert 0 < found.bound <= found.plan.latency * (1 + 1e-9)
    assert (found.candidate is not None) == (len(found.plan.drafters) > 1)
    assert isinstance(some.build({"drafter": "lookup"}), Drafter)
