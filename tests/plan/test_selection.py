"""The selection finds what trying everything finds, and says no when no is the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from scipy.optimize import OptimizeResult, minimize_scalar

from forerun.cost import Affine, Price, Table, cost_of
from forerun.errors import DrafterError
from forerun.plan.hierarchy import Draft, Round, Verifier, at_least, expected_tokens, fixed_block, verified
from forerun.plan.selection import (
    Detour,
    Family,
    Plan,
    Start,
    best,
    best_within,
    chain_bound,
    cheapest_token,
    detours,
    fitting,
    longest_draft,
    lower_bound,
    lower_bounds,
    polished,
    useless_edges,
)
from plan.planted import mean, rounds_by_recursion, yields_of

WORKED = Family((0.01, 0.06, 0.25, 1.0), ((0, 0.80, 0.72, 0.66), (0, 0, 0.88, 0.80), (0, 0, 0, 0.92), (0, 0, 0, 0)))
RNG = np.random.default_rng


def some_family(seed: int, kind: str) -> Family:
    """Two to four models with costs and rates of all sorts; sometimes a store that begins at one or two of them."""
    rng = RNG(seed)
    models = int(rng.integers(2, 5))
    costs: list[Price] = np.append(np.sort(rng.uniform(0.005, 0.5, models - 1)), 1.0).tolist()
    if kind == "affine":
        costs = [Affine(cost, cost * slope) for cost, slope in zip(costs, rng.uniform(0, 0.2, models), strict=True)]
    if kind == "table":
        costs = [Table(((1, cost), (2, cost * 1.4), (3, cost * 1.45), (6, cost * 3))) for cost in costs]
    rates = tuple(map(tuple, rng.uniform(0.2, 0.98, (models, models)).tolist()))
    starts = (some_start(rng, model) for model in range(models) if kind == "store" and rng.random() < 0.5)
    return Family(tuple(costs), rates, tuple(starts))


def some_start(rng: np.random.Generator, model: int) -> Start:
    yields = np.append(0, rng.dirichlet(np.ones(6)))
    return Start(model, Round(yields, float(rng.uniform(0.02, 0.6)) * (model + 1)), f"store at {model}")


def everything(family: Family, most: int) -> Iterator[tuple[Plan, float]]:
    """All hierarchies with all sizes, and what each costs: straight from the definition, with the plain recursion."""
    target = family.target
    for count in range(target + 1):
        for drafters in combinations(range(target), count):
            lowest = (*drafters, target)[0]
            for start in (None, *family.starts_at(lowest)):
                for sizes in product(range(1, most + 1), repeat=count):
                    plan = Plan(drafters, sizes, 0.0, start)
                    yield plan, latency_of(family, plan)


def latency_of(family: Family, plan: Plan) -> float:
    models = (*plan.drafters, family.target)
    costs = [cost_of(family.costs[model]) for model in models]
    if plan.start:
        yields, seconds = tuple(plan.start.round.yields.tolist()), plan.start.round.seconds
    else:
        yields, seconds = (0.0, 1.0), costs[0](1)
    for (low, high), size, cost in zip(pairwise(models), plan.sizes, costs[1:], strict=True):
        seconds = cost(size + 1) + rounds_by_recursion(yields, size) * seconds
        yields = yields_of(family.rates[low][high], size)
    return seconds / mean(yields)


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-9)


def test_the_worked_numbers() -> None:
    plan = best(WORKED, 16)
    assert (plan.drafters, plan.sizes) == ((0, 1, 2), (4, 5, 12))
    assert plan.latency == pytest.approx(0.2801203820, abs=5e-11)
    smaller = best(WORKED, 5)
    assert (smaller.drafters, smaller.sizes) == ((0, 1), (4, 5))
    assert smaller.latency == pytest.approx(0.3198456067, abs=5e-11)


@pytest.mark.parametrize(("model", "size", "latency"), [(0, 8, 0.3761380), (1, 7, 0.3412527), (2, 7, 0.4519485)])
def test_the_worked_single_drafts(model: int, size: int, latency: float) -> None:
    plan = best(WORKED, 16, [model])
    assert (plan.drafters, plan.sizes) == ((model,), (size,)) and plan.latency == pytest.approx(latency, abs=5e-8)


@pytest.mark.parametrize(
    ("drafters", "sizes", "latency"),
    [((0, 1, 2), (4, 6, 9), 0.2491905), ((0, 2), (6, 10), 0.2622083), ((0, 1), (4, 8), 0.2849877)],
)
def test_polishing_comes_close_to_the_worked_best_sizes(
    drafters: tuple[int, ...], sizes: tuple[int, ...], latency: float
) -> None:
    assert at_least(Plan(drafters, sizes, 0.0).chain(WORKED), sizes).latency == pytest.approx(latency, abs=1e-7)
    found = polished(WORKED, best(WORKED, 16, drafters), 16)
    assert latency - 1e-7 <= found.latency <= latency * 1.002
    assert found.latency == near(at_least(found.chain(WORKED), found.sizes).latency)


def test_no_sizes_of_two_drafters_beat_the_worked_ones() -> None:
    for drafters, expected in (((0, 2), (6, 10)), ((0, 1), (4, 8))):
        chain = Plan(drafters, expected, 0.0).chain(WORKED)
        assert min(product(range(1, 13), repeat=2), key=lambda sizes: at_least(chain, sizes).latency) == expected


def test_the_worked_fluid_bound() -> None:
    """Fractional lengths, 4.37, 7.77 and 12.11, reach .2450505; whole ones come closer to what can be run."""
    fractional, below, lengths = 0.01, 0.01, []
    for cost, rate in ((0.06, 0.80), (0.25, 0.88), (1.0, 0.92)):
        found = fluid(cost, rate, fractional)
        lengths.append(found.x)
        fractional, below = found.fun, cheapest_token(cost_of(cost), rate, below, 100)
    assert lengths == pytest.approx([4.37, 7.77, 12.11], abs=0.005)
    assert fractional == pytest.approx(0.2450505, abs=5e-8)
    assert fractional < lower_bound(WORKED, 16) < 0.2491904
    assert lower_bound(WORKED, 16) == near(below) == near(chain_bound(best(WORKED, 16).chain(WORKED), 64))


def fluid(cost: float, rate: float, below: float) -> OptimizeResult:
    return minimize_scalar(lambda length: (cost + length * below) / expected_tokens(rate, length), bounds=(1, 100))


@pytest.mark.parametrize("kind", ["flat", "affine", "table"])
def test_the_bound_of_two_models_is_reached(kind: str) -> None:
    for seed in range(40):
        family = some_family(seed, kind)
        pair = Family((family.costs[0], family.costs[-1]), ((0, family.rates[0][-1]), (0, 0)))
        bound = chain_bound(Plan((0,), (1,), 0.0).chain(pair), 9)
        assert best(pair, 9).latency == near(min(bound, pair.cost(1)(1)))


@pytest.mark.parametrize("kind", ["flat", "affine", "table", "store"])
def test_the_program_finds_what_trying_everything_finds(kind: str) -> None:
    depths = set()
    for seed in range(40):
        family = some_family(seed, kind)
        most = 5 if seed % 2 else 3
        plan = best(family, most)
        depths.add((len(plan.drafters), plan.start is not None))
        assert plan.latency == near(min(latency for _, latency in everything(family, most)))
        assert plan.latency == near(latency_of(family, plan))
        assert plan.latency == near(fixed_block(plan.chain(family), plan.sizes).latency)
    assert len(depths) > 2, "hierarchies of different depths win"


@pytest.mark.parametrize("kind", ["flat", "affine", "table", "store"])
def test_more_to_choose_from_is_never_worse(kind: str) -> None:
    for seed in range(12):
        family = some_family(seed, kind)
        latencies = [best(family, most).latency for most in (1, 2, 3, 6, 10)]
        assert latencies == sorted(latencies, reverse=True)
        everyone = set(range(family.target))
        for left_out in everyone:
            assert best(family, 4, sorted(everyone - {left_out})).latency >= best(family, 4).latency
        assert best(replace(family, starts=()), 4).latency >= best(family, 4).latency


@pytest.mark.parametrize("kind", ["flat", "affine", "table", "store"])
def test_bounds_hold_for_every_hierarchy(kind: str) -> None:
    for seed in range(12):
        family = some_family(seed, kind)
        bound, plan = lower_bound(family, 4), best(family, 4)
        finer = polished(family, plan, 4)
        assert bound <= finer.latency + 1e-12 and bound <= plan.latency + 1e-12
        if kind in ("flat", "store"):
            assert finer.latency <= plan.latency + 1e-12
        for other, latency in list(everything(family, 4))[::7]:
            chain = other.chain(family)
            outer = at_least(chain, other.sizes)
            assert bound <= min(outer.latency, latency) + 1e-12
            assert chain_bound(chain, longest_draft(family, 4)) <= outer.latency + 1e-12
            assert len(outer.yields) <= longest_draft(family, 4) + 2


def test_no_single_size_is_better_after_polishing() -> None:
    """From wherever it begins."""
    families = [(WORKED, Plan((0, 1, 2), sizes, 0.0)) for sizes in ((1, 1, 1), (12, 1, 12), (4, 5, 12))]
    families += [(family, best(family, 12)) for family in (some_family(seed, "affine") for seed in range(8))]
    for family, begun in families:
        plan = polished(family, begun, 12)
        for place, size in product(range(len(plan.sizes)), range(1, 13)):
            sizes = (*plan.sizes[:place], size, *plan.sizes[place + 1 :])
            assert at_least(plan.chain(family), sizes).latency >= plan.latency - 1e-12


def test_the_answer_may_be_not_to_speculate() -> None:
    hopeless = Family((0.5, 1.0), ((0, 0.3), (0, 0)))
    plan = best(hopeless, 8)
    assert not plan.speculates and plan.latency == 1.0 and plan.chain(hopeless).verifiers == ()
    assert polished(hopeless, plan, 8) == plan
    assert best(Family((1.0,), ()), 8).latency == 1.0
    assert not best(WORKED, 16, []).speculates


def test_a_store_may_begin_at_any_model() -> None:
    proposals = Draft(np.array([0.2, 0, 0, 0, 0, 0, 0.8]), 0.001)

    def starting(model: int, rate: float) -> Start:
        return Start(model, verified(proposals, Verifier(WORKED.costs[model], rate)), "lookup")

    with_store = replace(WORKED, starts=(starting(1, 0.85), starting(3, 0.5)))
    plan = best(with_store, 16)
    assert plan.start == with_store.starts[0] and plan.drafters == (1, 2)
    assert plan.latency < best(WORKED, 16).latency
    alone = best(with_store, 16, [])
    assert alone.speculates and alone.drafters == () and alone.start == with_store.starts[1]
    assert alone.latency == near((1 + 0.001) / (0.2 + 0.8 * mean(yields_of(0.5, 6))))


def test_models_that_do_not_fit_together_are_not_chosen_together() -> None:
    memory, sets = (1, 4, 9, 40), list(fitting((1, 4, 9), 10))
    assert sets == [(0, 1), (0, 2)]
    for budget in (40, 41, 44, 45, 50, 53, 54):
        fits = [d for n in range(4) for d in combinations(range(3), n) if sum(memory[m] for m in d) + 40 <= budget]
        plan = best_within(WORKED, 8, memory, budget)
        assert plan.latency == min(best(WORKED, 8, drafters).latency for drafters in fits)
        assert sum(memory[model] for model in plan.drafters) + 40 <= budget
    with pytest.raises(DrafterError, match="target needs 40"):
        best_within(WORKED, 8, memory, 39)


def test_rates_that_break_the_triangle_inequality_are_told() -> None:
    assert detours(WORKED, 0.0) == ()
    apart = replace(WORKED, rates=((0, 0.9, 0.72, 0.66), (0, 0, 0.95, 0.80), *WORKED.rates[2:]))
    low = detours(apart, 0.0)
    assert [(one.low, one.high, one.via) for one in low] == [(0, 2, 1), (0, 3, 1), (1, 3, 2)]
    assert [one.excess for one in low] == near([0.13, 0.04, 0.07])
    assert detours(apart, 0.05) == (low[0], low[2]) and isinstance(low[0], Detour)


def test_rates_of_any_models_keep_the_triangle_inequality() -> None:
    laws = RNG(2).dirichlet(np.ones(5), (4, 50))
    rates = tuple(tuple(float(np.minimum(a, b).sum(1).mean()) for b in laws) for a in laws)
    assert detours(Family((0.1, 0.2, 0.5, 1.0), rates), 1e-12) == ()


def test_useless_edges_never_help() -> None:
    """A drafter dearer than what it drafts for, even if all it says is accepted."""
    family = Family((0.3, 0.2, 1.0), ((0, 0.5, 0.9), (0, 0, 0.9), (0, 0, 0)))
    assert useless_edges(family, 8) == ((0, 1),)
    eager = replace(family, rates=((0, 1.0, 0.9), (0, 0, 0.9), (0, 0, 0)))
    assert lower_bounds(eager, 8)[1] == 0.2 and best(eager, 8).drafters == (1,)
    assert useless_edges(WORKED, 16) == ()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Family((0.1, 1.0), ((0.5,),)), "2 by 2"),
        (lambda: Family((0.1, 1.0), ((0, 1.5), (0, 0))), "from 0 to 1"),
        (lambda: Family((-0.1, 1.0), ((0, 0.5), (0, 0))), "0 or more"),
        (lambda: Family((1.0,), (), (Start(1, Round(np.array([0, 1]), 1.0), "lookup"),)), "lookup"),
        (lambda: best(WORKED, 0), "1 or more"),
    ],
)
def test_wrong_inputs_are_named(wrong: object, says: str) -> None:
    with pytest.raises(DrafterError, match=says):
        wrong()  # type: ignore[operator]
