"""Costs: what was measured at once and what is learned from steps are one table, and prices follow
from it. No clock is asked."""

from __future__ import annotations

import pytest
import torch

from forerun.chance import key_of
from forerun.cost import CHEAPEST, DEAREST, ENOUGH, REFRESH, SETTLING, NodePrice, Step, Table
from forerun.drafters.lookup import Lookup, Settings, limits_within
from forerun.drafting.drafter import Context
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.stores.store import Bounds

PLAIN, NODE = 0.010, 0.0005
"""Seconds of a plain step and of a node more."""


def step(nodes: int, rows: int = 1, tokens: int = 1, drafting: float = 0.0, seconds: float | None = None) -> Step:
    spent = PLAIN + NODE * (nodes - rows) if seconds is None else seconds
    return Step(rows, nodes, 100, tokens, drafting, 0.9 * spent, 0.1 * spent)


def learned(*steps: Step) -> Table:
    table = Table()
    for one in steps:
        table.learn(one)
    return table


# ---- the table


def test_a_table_that_learns_says_what_one_that_was_given_the_averages_says() -> None:
    table = learned(*(step(nodes) for nodes in (9, 1, 5, 1, 9, 5)))
    given = Table([(nodes, PLAIN + NODE * (nodes - 1)) for nodes in (1, 5, 9)])
    assert [nodes for nodes, _ in table.points] == [nodes for nodes, _ in given.points] == [1, 5, 9]
    for nodes in (1, 2, 5, 7, 9, 30):
        assert table(nodes) == pytest.approx(given(nodes)) == pytest.approx(PLAIN + NODE * (nodes - 1))
    table.learn(step(13, seconds=PLAIN + 20 * NODE))
    assert table(11) == pytest.approx(PLAIN + 14 * NODE), "what was asked before is not believed for ever"


def test_drafting_is_no_part_of_it() -> None:
    assert learned(step(3, drafting=7.0))(3) == pytest.approx(PLAIN + 2 * NODE)


def test_rows_are_kept_apart() -> None:
    table = learned(step(1), step(4, rows=4, seconds=0.02), step(12, rows=4, seconds=0.04))
    assert (table(1), table(4, rows=4), table(8, rows=4)) == pytest.approx((PLAIN, 0.02, 0.03))
    assert table.points_of(3) == ()
    with pytest.raises(LookupError):
        table(3, rows=3)


def test_what_was_held_up_counts_for_little() -> None:
    slow_start = learned(step(1, seconds=1.0), *[step(1)] * 3)
    assert slow_start(1) == pytest.approx(PLAIN)
    held_up = learned(*[step(1)] * 63, step(1, seconds=5.0))
    assert held_up(1) == pytest.approx(PLAIN, rel=0.02)


def test_it_follows_a_machine_that_slows_down() -> None:
    table = learned(*[step(1)] * 500, *[step(1, seconds=1.5 * PLAIN)] * 300)
    assert table(1) == pytest.approx(1.5 * PLAIN, rel=0.01)


def test_the_share_of_a_node_is_the_slope_and_waits_for_enough() -> None:
    assert Table().node_share() is None
    assert learned(*[step(1)] * 100).node_share() is None, "nothing but plain steps"
    assert learned(*[step(5)] * 100).node_share() is None, "no plain step"
    assert learned(*[step(1)] * 100, *[step(5)] * (ENOUGH - 1)).node_share() is None
    some = [step(nodes) for nodes in (1, 3, 9, 17)] * ENOUGH
    assert learned(*some).node_share() == pytest.approx(NODE / PLAIN)
    rows = [step(nodes, rows=4) for nodes in (4, 5, 30)] * ENOUGH
    assert learned(*rows).node_share(4) == pytest.approx(NODE / PLAIN) and learned(*rows).node_share(1) is None
    falling = [step(1), step(5, seconds=PLAIN / 2)] * ENOUGH
    assert learned(*falling).node_share() == 0, "more never comes for less"


def test_plain_steps_between_wider_ones_are_not_plain_decoding() -> None:
    table = learned(step(1, seconds=0.012), step(5), *[step(1, seconds=0.012)] * SETTLING)
    assert not table.is_steady(1) and table.plain(1) == pytest.approx(0.012), "until something better is known"
    table.learn(step(1))
    table.learn(step(5))
    table.learn(step(1, seconds=0.012))
    assert table.is_steady(1) and table.plain(1) == pytest.approx(PLAIN)
    assert table(1) > 1.1 * PLAIN


def test_what_was_timed_by_itself_is_plain_decoding() -> None:
    table = Table()
    table.know([(1, 0.01, 1), (9, 0.02, 1), (16, 0.03, 8)])
    assert (table.plain(1), table(5), table.is_steady(8)) == (0.01, 0.015, False)


# ---- the price


def priced(steps: list[Step]) -> NodePrice:
    price = NodePrice(Table())
    for one in steps:
        price.table.learn(one)
        price.learn(one)
    return price


def test_a_node_costs_its_share_of_a_step_times_the_speed_up() -> None:
    """Nodes cost 0.05 of a plain step; two tokens a step of 1.2 plain ones are 1.67 times plain decoding."""
    price = priced([step(1, tokens=2), step(9, tokens=2)] * (REFRESH // 2))
    assert price.value == pytest.approx(2**-3.5)  # 0.083 among 0.0625, 0.088, 0.125
    slow = priced([step(1, tokens=1), step(9, tokens=1, drafting=PLAIN)] * (REFRESH // 2))
    assert slow.value == pytest.approx(2**-5)  # 0.05 at 0.59 times the speed


def test_there_is_no_price_before_there_is_a_measurement_and_it_is_renewed_seldom() -> None:
    steps = [step(1), step(9)] * REFRESH
    assert priced(steps[: REFRESH - 1]).value is None and priced([step(1)] * 500).value is None
    price = priced(steps[:REFRESH])
    before = price.value
    for _ in range(REFRESH - 1):
        price.learn(step(9, tokens=9))
        assert price.value == before
    price.learn(step(9, tokens=9))
    assert before is not None and price.value is not None and price.value > before


def test_prices_keep_within_reason() -> None:
    free = [step(1), step(9, seconds=PLAIN)] * REFRESH
    dear = [step(1), step(9, tokens=9, seconds=20 * PLAIN)] * REFRESH
    assert priced(free).value == CHEAPEST and priced(dear).value == DEAREST


# ---- who follows it


def row(seed: int | None = None, temperature: float = 0.0) -> Row:
    text = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]
    return Row(text, len(text), SamplingParams(temperature=temperature, seed=seed), key_of(0), 99)


def context(rows: list[Row], prices: list[float] | None, path: tuple[int, ...] = (0,)) -> Context:
    return Context(rows, [64] * len(rows), [64] * len(rows), torch.device("cpu"), path, prices)


def costs(cost: float | None, told: Context) -> list[float]:
    return [limits.cost for limits in limits_within(Bounds(Settings(9, 8, 1, cost).limits), told)]


def test_a_cost_that_is_given_holds_and_one_that_is_not_follows_the_price() -> None:
    rows = [row(), row()]
    assert costs(0.08, context(rows, [0.25, 0.125])) == [0.08, 0.08]
    assert costs(None, context(rows, [0.25, 0.125])) == [0.25, 0.125]
    assert costs(None, context(rows, None)) == [0.1, 0.1], "once in ten proposals, of nine nodes and node 0"
    assert Settings(1, 8, 1, None).limits.cost == 0.5


def test_the_clock_has_no_say_in_what_a_repeatable_request_draws() -> None:
    rows = [row(seed=1, temperature=1.0), row(seed=1), row(temperature=1.0)]
    assert costs(None, context(rows, [0.25] * 3)) == [0.25] * 3
    assert costs(None, context(rows, [0.25] * 3, path=(0, 1))) == [0.1, 0.25, 0.25]


def test_limits_are_the_same_object_as_long_as_the_price_is() -> None:
    bounds, rows = Bounds(Settings(9, 8, 1, None).limits), [row()]
    (first,) = limits_within(bounds, context(rows, [0.25]))
    (other,) = limits_within(bounds, context(rows, [0.5]))
    assert limits_within(bounds, context(rows, [0.25]))[0] is first is not other


def test_a_dearer_node_is_proposed_less() -> None:
    sizes = []
    for price in (0.01, 0.5):
        drafter, rows = Lookup(Settings(16, 16, 1, None).limits), [row()]
        drafter.admit(rows[0], {})
        sizes.append(drafter.propose(context(rows, [price])).nodes)
    assert sizes[0] > sizes[1]
