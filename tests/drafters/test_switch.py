"""The switch and its controller: who is asked for how much, what that may cost, and that no law changes by it.

Seconds are computed here (`pacing`): nothing depends on the machine that the tests run on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafters.pacing import Machine, Part, controlled, fixed
from drafters.test_fallback import Stub, context_of, networks, told
from enumeration import distance, plain_law
from fakes import Near, TableNetwork, Wild, engine_of, plain
from forerun.chance import key_of
from forerun.cost import Table
from forerun.drafters.small import DraftModel
from forerun.drafters.switch import Switch
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.growth import Chain, Form, SampledTree, TopTree
from forerun.drafting.pace import PLAIN, Choice, Outcome, Pace, Wish, Yield, _guesses, levels_of
from forerun.drafting.stopping import Fixed
from forerun.errors import DrafterError
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree
from test_engine import engine_law, processed

__all__ = ["networks"]  # a fixture

# ---- what a part has brought


def test_budgets_are_powers_of_two_and_the_most() -> None:
    assert [levels_of(most) for most in (0, 1, 2, 7, 8, 9)] == [
        (),
        (1,),
        (1, 2),
        (1, 2, 4, 7),
        (1, 2, 4, 8),
        (1, 2, 4, 8, 9),
    ]


OUTCOMES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.sets(st.integers(1, 9)), st.sampled_from([1, 2, 4, 8, 9])),
    max_size=12,
)


@given(OUTCOMES)
def test_a_proposal_tells_of_every_budget_that_it_would_have_been_the_same_in_or_the_beginning_of(
    told: list[tuple[int, int, set[int], int]],
) -> None:
    """Against sums over everything, weighted by age."""
    one, seen, step = Yield(levels_of(9), 0.5), [], 0
    for pause, size, path, budget in told:
        step += pause
        drafted = min(size, budget)
        kept = [0, *sorted(node for node in path if node <= drafted)]
        one.learn(Outcome(drafted, kept), budget, step)
        seen.append((step, drafted, kept, budget))
    for i, level in enumerate(levels_of(9)):
        expected = [0.0] * 4
        for at, n, kept, budget in seen:
            if level <= budget or n < budget:
                accepted = sum(0 < node <= level for node in kept)
                for k, value in enumerate((1, min(n, level), accepted, n > 0)):
                    expected[k] += 0.5 ** (step - at) * value
        assert [sums[i] / one.unit for sums in one.sums] == pytest.approx(expected)


def test_all_rows_speak_for_one_that_has_said_little() -> None:
    own, rest = Yield((2,), 1.0), Yield((2,), 1.0)
    assert own.guess(0, rest) is None
    for _ in range(24):
        rest.learn(Outcome(2, [0, 1, 2]), 2, 0)
    guess = own.guess(0, rest)
    assert guess is not None and guess == pytest.approx((2, 2, 1))
    for _ in range(8):
        own.learn(Outcome(0, [0]), 2, 0)
    guess = own.guess(0, rest)
    assert guess is not None and guess == pytest.approx((1, 1, 0.5))


@pytest.mark.parametrize(("seen", "believed"), [(2, 0.5), (6, 0.75), (198, 0.99)])
def test_where_rows_run_together_a_few_good_proposals_are_doubted(seen: int, believed: float) -> None:
    rest = Yield((2,), 1.0)
    for _ in range(seen):
        rest.learn(Outcome(2, [0, 1, 2]), 2, 0)
    nodes_RL, tokens_RL = _guesses([Yield((2,), 1.0)], rest)
    assert nodes_RL[0, 0] == pytest.approx(2) and tokens_RL[0, 0] == pytest.approx(2 * believed)


# ---- the plan


def pace_of(brought: Sequence[Sequence[tuple[int, int]]], most: int = 1) -> Pace:
    """A row for each of `brought`, whose parts had so many (accepted, drafted) nodes of one step remembered a lot."""
    pace = Pace([most] * len(brought[0]))
    for row in brought:
        pace.admit()
        for part, (accepted, drafted) in enumerate(row):
            for _ in range(400):
                outcome = Outcome(drafted, range(accepted + 1))
                pace.seats[-1].brought[part].learn(outcome, most, 0)
                pace._parts[part].brought.learn(outcome, most, 0)
    return pace


@given(
    st.lists(st.floats(0.05, 1.0), min_size=1, max_size=5),
    st.floats(0.05, 1.5),
    st.floats(0.0, 1.0),
)
def test_a_plan_is_the_best_of_all_that_could_be_made(shares: list[float], node: float, drafting: float) -> None:
    """One part with one budget, where steps cost so much and so much more by node: every set of rows is tried."""
    rows = len(shares)
    pace = Pace([1])
    for share in shares:
        pace.admit()
        pace.seats[-1].brought[0].sums = ([1e9], [1e9], [share * 1e9], [1e9])
    pace._parts[0].brought.learn(Outcome(1, [0, 1]), 1, 0)
    pace.drafted(0, 1, drafting)
    costs = Table([(rows, 1.0), (2 * rows, 1.0 + rows * node), (3 * rows, 1.0 + 2 * rows * node)], rows)
    wish = [Wish(9, frozenset([0]))] * rows

    def speed(asked: Sequence[bool]) -> float:
        tokens = rows + sum(share for share, one in zip(shares, asked, strict=True) if one)
        return tokens / (1 + sum(asked) * node + (drafting if any(asked) else 0.0))

    best = max(speed(asked) for asked in product([False, True], repeat=rows))
    pace._plan(costs, wish)
    found = speed([seat.choice != PLAIN for seat in pace.seats])
    assert found == pytest.approx(best, rel=0.021), "a margin of two hundredths is left to plain steps"


def test_rows_choose_for_themselves_and_parts_stand_side_by_side() -> None:
    pace = pace_of([[(4, 4), (0, 4)], [(0, 4), (4, 4)], [(0, 4), (0, 4)]], 4)
    costs = Table([(3, 1.0), (8, 1.2), (20, 1.5)], 3)
    pace._plan(costs, [Wish(9, frozenset([0, 1]))] * 3)
    assert [seat.choice.part for seat in pace.seats] == [0, 1, -1]


@pytest.mark.parametrize("rows", [1, 3])
def test_to_read_a_text_first_has_a_price(rows: int) -> None:
    """What one row took at first is held against rows that have not been read, and not against the others."""
    pace = pace_of([[(4, 4)]] * rows, 4)
    costs = Table([(rows, 1.0), (2 * rows, 1.2), (5 * rows, 1.5)], rows)
    for reading, chosen in ((1.0, [0] * rows), (1000.0, [-1] * (rows - 1) + [-1 if rows == 1 else 0])):
        pace._parts[0].reading = reading
        pace.seats[-1].known_to = {0} if rows > 1 else set()
        pace._plan(costs, [Wish(9, frozenset([0]))] * rows)
        assert [seat.choice.part for seat in pace.seats] == chosen


def test_a_part_that_a_row_may_not_have_is_not_its_choice() -> None:
    pace = pace_of([[(4, 4), (3, 4)]], 4)
    costs = Table([(1, 1.0), (5, 1.2)])
    for allowed, expected in ((frozenset([0, 1]), 0), (frozenset([1]), 1), (frozenset[int](), -1)):
        pace._plan(costs, [Wish(9, allowed)])
        assert pace.seats[0].choice.part == expected


# ---- what it may cost, on machines of numbers


MACHINES: dict[str, Callable[[int, int], float]] = {
    "a matrix unit": lambda nodes, rows: 1 + 0.35 * (nodes > 1) + 0.05 * (nodes - 1),
    "every node counts": lambda nodes, rows: 0.9 + 0.1 * nodes,
    "nodes are nearly free": lambda nodes, rows: 1 + 0.02 * nodes,
}
USELESS = {
    "nothing is right": [Part(lambda row, step: 0.03)],
    "a lookup that misses": [Part(lambda row, step: 0.05, 12, 0.3, lambda rows: 0.01 * rows)],
    "dear": [Part(lambda row, step: 0.8, 8, 1.0, lambda rows: 4.0)],
    "both": [Part(lambda row, step: 0.05, 8), Part(lambda row, step: 0.1, 6, 1.0, lambda rows: 0.5)],
}
GOOD = {
    "always right": [Part(lambda row, step: 0.85)],
    "one of two": [Part(lambda row, step: 0.1), Part(lambda row, step: 0.85, 6)],
    "every other row": [Part(lambda row, step: 0.05 if row % 2 else 0.85)],
    "a lookup and a model": [
        Part(lambda row, step: 0.8, 12, 0.3, lambda rows: 0.01 * rows),
        Part(lambda row, step: 0.6, 6, 1.0, lambda rows: 0.3),
    ],
}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("parts", USELESS.values(), ids=USELESS)
@pytest.mark.parametrize("verify", MACHINES.values(), ids=MACHINES)
def test_where_nothing_pays_hardly_anything_is_lost(
    verify: Callable[[int, int], float], parts: list[Part], rows: int
) -> None:
    steps = 1500
    found = controlled(Machine(verify, parts, 0.1, 1), steps, rows)
    plain = fixed(Machine(verify, parts, 0.1, 1), steps, rows, PLAIN)
    best = max([plain, *all_fixed(verify, parts, steps, rows)])
    assert best < 1.15 * plain, "the case is what it says"
    assert found > 0.97 * plain


def all_fixed(verify: Callable[[int, int], float], parts: Sequence[Part], steps: int, rows: int) -> list[float]:
    choices = [Choice(number, budget) for number, part in enumerate(parts) for budget in levels_of(part.most)]
    return [fixed(Machine(verify, parts, 0.1, 1), steps, rows, choice) for choice in choices]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("parts", GOOD.values(), ids=GOOD)
@pytest.mark.parametrize("verify", MACHINES.values(), ids=MACHINES)
def test_it_is_nearly_as_fast_as_the_best_choice_in_hindsight(
    verify: Callable[[int, int], float], parts: list[Part], rows: int
) -> None:
    steps = 1500
    found = controlled(Machine(verify, parts, 0.1, 1), steps, rows)
    plain = fixed(Machine(verify, parts, 0.1, 1), steps, rows, PLAIN)
    assert found > 0.85 * max([plain, *all_fixed(verify, parts, steps, rows)])


def test_it_notices_when_a_drafter_becomes_good_and_when_it_becomes_bad() -> None:
    part = Part(lambda row, step: 0.9 if 1000 <= step < 2000 else 0.03)
    machine = Machine(MACHINES["nodes are nearly free"], [part], 0.1, 1)
    controlled(machine, 3000, 1)
    asked = [choices[0] != PLAIN for choices in machine.choices]
    first, second, third = (sum(asked[begin : begin + 1000]) for begin in (0, 1000, 2000))
    assert first < 100 and second > 800 and third < 450


@pytest.mark.parametrize("rows", [1, 8])
def test_a_part_that_must_read_the_texts_first_is_tried_all_the_same(rows: int) -> None:
    """That takes more than all probes may lose, for the part that is useless and for the one that is good."""
    parts = [Part(lambda row, step: 0.05, reading=20.0), Part(lambda row, step: 0.85, 6, reading=20.0)]
    machine = Machine(MACHINES["nodes are nearly free"], parts, 0.1, 1)
    controlled(machine, 300, rows)
    late = [choice.part for choices in machine.choices[200:] for choice in choices]
    assert late.count(1) > 0.8 * len(late)


def test_to_read_a_text_is_no_part_of_what_proposals_take() -> None:
    pace = Pace([4])
    for step in range(3):
        pace.admit()  # a new row at every step
        for seat in pace.seats:
            seat.before, seat.now = seat.now, Choice(0, 4)
        pace.drafted(0, step + 1, 9.0)
        pace.learn([Outcome(0, [0])] * len(pace.seats))
    for seat in pace.seats:
        seat.before = seat.now
    pace.drafted(0, 3, 0.1)
    assert pace._parts[0].draft(3) == 0.1 and pace._parts[0].reading > 1


def test_plain_decoding_is_what_wide_steps_are_compared_with() -> None:
    """Plain steps between wide ones take 1.4 here, so drafting seems to pay, and plain decoding takes 1."""
    part = Part(lambda row, step: 0.35, 4, draft=lambda rows: 0.02)
    machine = Machine(lambda nodes, rows: 1.2 if nodes > rows else 1.0, [part], 0.02, 1, heat=0.4)
    found = controlled(machine, 1500, 1)
    assert found > 0.97 * fixed(Machine(machine.verify, [part], 0.02, 1, heat=0.4), 1500, 1, PLAIN)


def test_plain_steps_stay_a_fresh_yardstick() -> None:
    """The machine becomes slower, and drafting then costs more than it brings."""
    slow = {"factor": 0.0}
    part = Part(lambda row, step: 0.5, 8)
    machine = Machine(lambda nodes, rows: 1 + slow["factor"] * (nodes - rows), [part], 0.05, 1)
    pace = Pace([8])
    pace.admit()
    machine.run(600, 1, pace.choose, pace)
    assert sum(choices[0] != PLAIN for choices in machine.choices[-100:]) > 90
    slow["factor"] = 1.0
    machine.choices.clear()
    machine.run(600, 1, pace.choose, pace)
    assert sum(choices[0] != PLAIN for choices in machine.choices[-100:]) < 10


def test_a_row_that_is_left_alone_is_not_planned_for_by_what_eight_rows_cost() -> None:
    """Nodes are free beside seven other rows here, and cost half a plain step each without them."""

    def verify(nodes: int, rows: int) -> float:
        return 4.0 if rows > 1 else 1 + 0.5 * (nodes - 1)

    machine = Machine(verify, [Part(lambda row, step: 0.5, 2)], 0.0, 1)
    pace = Pace([2])
    for _ in range(8):
        pace.admit()
    costs = Table()
    machine.run(400, 8, lambda _, wishes: pace.choose(costs, wishes), pace, costs)
    for _ in range(7):
        pace.release(0)
    machine.seconds, machine.tokens = 0.0, 0
    assert machine.run(400, 1, lambda _, wishes: pace.choose(costs, wishes), pace, costs) > 0.95


def test_a_part_that_never_has_a_node_is_never_asked() -> None:
    machine = Machine(MACHINES["nodes are nearly free"], [Part(lambda row, step: 0.9, 0), Part(lambda row, step: 0.9)])
    assert controlled(machine, 300, 1) > 2
    assert {choices[0].part for choices in machine.choices} == {-1, 1}


def test_rows_that_come_begin_with_what_is_typical_and_rows_that_go_leave_no_trace() -> None:
    machine = Machine(MACHINES["nodes are nearly free"], [Part(lambda row, step: 0.9)], 0.0, 1)
    pace = Pace([8])
    for _ in range(3):
        pace.admit()
    machine.run(200, 3, pace.choose, pace)
    pace.admit()
    assert pace.seats[3].choice.part == 0
    pace.release(0)
    assert len(pace.seats) == 3 and pace.seats[0].choice.part == 0


# ---- in the engine


def test_a_switch_asks_each_part_for_its_rows_alone_and_puts_them_together() -> None:
    stubs = [Stub("a", [2, 2, 2], token=1), Stub("b", [3, 3, 3], token=2)]
    one, context = Switch(stubs, [True, True]), replace(context_of(3), costs=Table())
    one.pace.choose = lambda costs, wishes: [Choice(1, 2), PLAIN, Choice(0, 9)]  # type: ignore[method-assign]
    one.pace.learn = lambda outcomes: seen.append(outcomes)  # type: ignore[method-assign]
    seen: list[Sequence[Outcome]] = []
    tree = one.propose(context)
    assert stubs[0].asked == [[0, 0, 9]] and stubs[1].asked == [[9, 0, 0]]
    assert [row[1:] for row in tree.tokens] == [[2, 2, 2], [], [1, 1]]
    assert [one.origins(row, [0, 1]) for row in (0, 2)] == [["b"], ["a"]]
    told(one, context, tree, [[0, 1], [0], [0, 1, 2]])  # type: ignore[arg-type]
    assert stubs[0].told[0][1] == [[0], [0], [0, 1, 2]] and stubs[1].told[0][1] == [[0, 1], [0], [0]]
    assert [tuple(outcome.path) for outcome in seen[0]] == [(0, 1), (0,), (0, 1, 2)]


@pytest.mark.parametrize("form", [Chain(Fixed(3)), TopTree(2, 2, 4), SampledTree([2, 1])])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_proposes_the_same_whomever_it_was_asked_for_before(
    form: Form, temperature: float, networks: dict[str, TableNetwork]
) -> None:
    rows = [Row([0, 1] * size, 1, SamplingParams(temperature=temperature), key_of(size), 200) for size in (1, 12, 4)]
    one, depths = DraftModel.on(networks["small"], form), [[9, 0, 0], [0, 0, 9], [0, 9, 9], [9, 9, 9], [0, 9, 0]]
    for row in rows:
        one.admit(row, {})
    for step, asked in enumerate(depths):
        fresh = DraftModel.on(networks["small"], form)
        for row in rows:
            fresh.admit(row, {})
        found, expected = (
            drafter.propose(Context(rows, [99] * 3, [9 * bool(depth) for depth in each], torch.device("cpu")))
            for drafter, each in ((one, asked), (fresh, [9, 9, 9]))
        )
        for index, depth in enumerate(asked):
            assert found.tokens[index] == (expected.tokens[index] if depth else rows[index].tokens[-1:])
        kept = [[0, 1] if depth else [0] for depth in asked]
        told(one, None, found, kept)  # type: ignore[arg-type]
        for row, tokens, path in zip(rows, found.tokens, kept, strict=True):
            row.tokens += [*(tokens[node] for node in path[1:]), step % 2]


def test_where_the_clock_has_no_say_the_first_part_answers_in_full() -> None:
    stubs = [Stub("a", [2]), Stub("b", [3])]
    one = Switch(stubs, [True, True])
    for _ in range(5):
        assert one.propose(context_of(1)).sizes == (3,)
    assert not stubs[1].asked


def test_a_row_that_names_its_seed_is_served_without_luck(networks: dict[str, TableNetwork]) -> None:
    """And says what plain decoding says, whatever its neighbours have."""
    description = {"drafter": "switch", "parts": ["small:small", "lookup"]}
    wishes = [SamplingParams(temperature=1.0, max_new_tokens=60, seed=seed) for seed in (1, 2, None)]
    prompts = [[1, 0, 1, 0]] * 3
    drafted = engine_of(networks["target"], description, networks).generate(prompts, wishes)
    none = engine_of(networks["target"]).generate(prompts[:2], wishes[:2])
    assert [one.token_ids for one in drafted[:2]] == [one.token_ids for one in none]


class Scripted(Switch):
    """Chooses by what the rows have said, without a clock; every row may have every part."""

    def _choices(self, context: Context) -> list[Choice]:
        return [self.script(row) for row in context.rows]

    def script(self, row: Row) -> Choice:
        return [Choice(0, 2), Choice(1, 2), Choice(1, 1), PLAIN][sum(row.tokens) % 4]


def scripted(networks: dict[str, TableNetwork], kind: type[Switch]) -> Callable[[], Drafter]:
    def make() -> Drafter:
        parts = [DraftModel.on(networks[name], Chain(Fixed(2))) for name in ("small", "other")]
        return kind([*parts, Wild(3, 3, 1)], [False, False, False])

    return make


def off(networks: dict[str, TableNetwork], drafter: Callable[[], Drafter]) -> float:
    wishes = SamplingParams(temperature=1.0, max_new_tokens=3)
    law = engine_law(drafter, networks, [1, 0], wishes)
    return distance(law, plain_law(processed(wishes, networks["target"], [1, 0]), 3))


class Wilder(Scripted):
    def script(self, row: Row) -> Choice:
        return [Choice(2, 3), Choice(0, 1), PLAIN, Choice(2, 9)][(3 * row.tokens[-1] + len(row.tokens)) % 4]


@pytest.mark.parametrize("kind", [Scripted, Wilder])
def test_the_law_is_the_targets_when_the_past_decides(kind: type[Switch], networks: dict[str, TableNetwork]) -> None:
    assert off(networks, scripted(networks, kind)) < 1e-6


class Peeking(Scripted):
    """Takes the first part's proposal only if it likes it."""

    def script(self, row: Row) -> Choice:
        return Choice(0, 2)

    def _answer(self, chosen: Sequence[int], context: Context) -> TokenTree:
        liked = [one if tokens[1:2] == [0] else -1 for one, tokens in zip(chosen, self._trees[0].tokens, strict=True)]
        return super()._answer(liked, context)


def test_to_look_at_a_proposal_before_choosing_would_give_another_law(networks: dict[str, TableNetwork]) -> None:
    assert off(networks, scripted(networks, Peeking)) > 0.01


def test_it_drafts_where_that_pays_and_stops_where_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an engine of tables, whose every look at the clock is a second later."""
    monkeypatch.setattr("time.perf_counter", count().__next__)
    target = TableNetwork(4, 3, 12)
    for share, least, most in ((0.0, 0.7, 1.0), (50.0, 0.0, 0.35)):
        networks = {"target": target, "small": Near(target, share, 1)}
        one = engine_of(target, {"drafter": "switch", "parts": ["small:small"]}, networks)
        (output,) = one.generate([[1, 2, 3]], SamplingParams(max_new_tokens=400))
        assert output.token_ids == plain(target, [1, 2, 3], 400)
        asked = one.drafter.tallies()[0].asked / output.stats.steps
        assert least <= asked <= most, (share, asked)


@pytest.mark.parametrize("outer", ["fallback", "cascade"])
def test_inside_another_drafter_the_clock_has_no_say(outer: str, networks: dict[str, TableNetwork]) -> None:
    """So a seed says the same again, whatever the engine has served before."""
    switch = {"drafter": "switch", "parts": ["lookup"]}
    small = {"drafter": "small", "checkpoint": "small"}
    parts = {"sources": [switch, small]}
    if outer == "cascade":
        parts = {"parts": [{**switch, "until": 2}, {**small, "until": 4}]}
    wish = SamplingParams(temperature=1.0, seed=5, max_new_tokens=80)
    texts = []
    for plain_steps in (0, 3):
        one = engine_of(networks["target"], {"drafter": outer, **parts}, networks)
        for _ in range(plain_steps):
            one.generate([[0, 1, 2]], SamplingParams(max_new_tokens=1))  # which leaves no room for a draft
        texts.append(one.generate([[1, 0, 1, 0]], wish)[0].token_ids)
    assert texts[0] == texts[1]


def test_a_part_that_was_not_asked_has_thought_of_nothing(networks: dict[str, TableNetwork]) -> None:
    """Where a verified model asks of rows that nobody was asked for."""
    inner = {"drafter": "switch", "parts": ["lookup", "lookup | maxgram"]}
    description = {"drafter": "verified", "checkpoint": "other", "inner": inner, "length": 3}
    (output,) = engine_of(networks["target"], description, networks).generate(
        [[1, 2]], SamplingParams(max_new_tokens=40)
    )
    assert output.token_ids == plain(networks["target"], [1, 2], 40)


@pytest.mark.parametrize("settings", [{}, {"parts": []}, {"parts": "lookup"}])
def test_a_switch_without_parts_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(DrafterError, match="parts is a list of drafters"):
        engine_of(TableNetwork(3, 3, 2, 1.0), {"drafter": "switch", **settings})
