"""Whom to ask for how much, from what steps cost and what proposals have brought: the controller.

Every row is served by one of several parts within a budget, or decodes plainly. A *plan* says which,
and is the one of most tokens per second by what is known:

    speed = (rows + tokens accepted) / (verifying all nodes + drafting)

What a row has brought is remembered per part and budget, and forgotten within some steps; where a
row has said little, all rows speak for it. Seconds are those of the engine's own steps (`cost.Table`)
and of the parts' proposals.

What is not asked cannot be known, so now and then something else than the plan is tried: plain
steps, so that the yardstick is fresh, or a part for a few steps and few rows. What such *probes* lose
against the plan is kept as an account, and no part is tried again while that is more than a share of
all time (`SHARE`). Every part is tried once, whatever that takes: a model may have to read a whole
text first. What a mistaken plan loses is not counted.

Nothing here looks at a clock, at tokens or at proposals that are not settled: a choice depends on
the past alone, so it changes no law.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from forerun.cost import SETTLING, Floats, Step, Table
from forerun.drafting.several import NOBODY
from forerun.slots import Slots

OWN, ALL = 0.95, 0.99
"""How much of what is known survives a step: of one row, and of all rows together."""
TRUST = 8.0
"""Steps of a row that count as much as what is known of all rows."""
DOUBT = 2.0
"""Proposals that are taken to have brought nothing before all others, where rows run together: a part that seems good
after a few was lucky too, and a mistake would be made for all rows at once."""
EVERY_ONE, EVERY = 4, 16
"""Steps between two plans, of one row and of several: planning must cost next to nothing."""
SHARE, GRACE = 0.01, 1.0
"""What probes may lose: a share of all time, and so many plain steps more, with which everything begins."""
BURST = 4
"""Steps of one probe. In the first a part may have to read what it has missed, so the others say what they take."""
PAYBACK = 64
"""Steps within which it must be worth while that a part has to read a row's text first."""
MARGIN = 1.02
"""By so much a plan must promise to be faster than a simpler one: less is within what is not known exactly."""
FRESH, UNSURE = 128, 16
"""Steps after which plain ones are made again while all rows draft: usually, and as long as none of plain decoding's
own have been seen."""
YARDSTICK = SETTLING + 2
"""Plain steps that are made then."""
PAUSE = 16
"""Steps at least between two probes of a part."""
SETTLED = 16
"""Steps of so many rows after which a plain step of just that many is wanted."""


LONG_AGO, LARGE, TINY = 1000, 1e100, 1e-9
"""Steps after which all is forgotten, the unit at which sums are scaled down, and what stands in for no node at all."""


class Choice(NamedTuple):
    """Who answers for a row, and within how many nodes."""

    part: int = NOBODY
    budget: int = 0


PLAIN = Choice()


class Wish(NamedTuple):
    """Of one row at a step. budget: the most nodes that it may have, 0 for none. parts: who may answer for it."""

    budget: int
    parts: frozenset[int]


class Outcome(NamedTuple):
    """What came of a row's proposal. drafted: its nodes; path: those that were kept, node 0 first."""

    drafted: int
    path: Sequence[int]


class Guess(NamedTuple):
    """What a proposal within a budget is expected to be. hits: how often there is one at all."""

    nodes: float
    tokens: float
    hits: float


class Expected(NamedTuple):
    """Of a part before it was ever asked, as a plan has it. nodes, tokens: of a proposal and what is accepted of it,
    node 0 and the token that comes in any case not counted. seconds: of drafting, by rows, as far as known."""

    nodes: float
    tokens: float
    seconds: Mapping[int, float]


class Yield:
    """What a part has brought within budgets of every level, each proposal with a weight that fades from step to step,
    asked or not: what was true a while ago is doubted when it is tried again.

    sums: of weights, nodes, tokens and proposals that were one at all, by level. Not the old weights
    fade; the new ones grow, and `unit` is that of now. seen: proposals, none forgotten.
    """

    __slots__ = ("_growth", "_step", "levels", "seen", "sums", "unit")

    def __init__(self, levels: tuple[int, ...], fade: float):
        self.levels, self.unit = levels, 1.0
        self.sums: tuple[list[float], ...] = tuple([0.0] * len(levels) for _ in range(4))
        self._growth, self._step, self.seen = 1 / fade, 0, 0

    def learn(self, outcome: Outcome, budget: int, step: int) -> None:
        """A proposal tells of all smaller ones too: nodes come in the order of their promise, so
        they are its first ones. One that did not fill its budget would have been no larger."""
        drafted, path = outcome
        if step != self._step:
            self._grow(step)
        self.seen += 1
        unit, (weights, nodes, tokens, hits) = self.unit, self.sums
        for i, level in enumerate(self.levels):
            if level > budget and drafted >= budget:
                break
            weights[i] += unit
            if drafted:
                nodes[i] += unit * min(drafted, level)
                tokens[i] += unit * (bisect_right(path, level) - 1)
                hits[i] += unit

    def expect(self, expected: Expected) -> None:
        """As if the whole budget had been given a few times."""
        self.seen = LONG_AGO
        for sums, value in zip(self.sums, (1.0, expected.nodes, expected.tokens, 1.0), strict=True):
            sums[-1] = TRUST * value

    def _grow(self, step: int) -> None:
        self.unit *= self._growth ** min(step - self._step, LONG_AGO)
        self._step = step
        if self.unit > LARGE:
            self.sums = tuple([one / self.unit for one in each] for each in self.sums)
            self.unit = 1.0

    @property
    def trust(self) -> float:
        """The share of what it has brought that may be expected of it."""
        return self.seen / (self.seen + DOUBT)

    def guess(self, i: int, rest: Yield) -> Guess | None:
        """At the level i, where the rest speaks for what is not known here. None where nobody knows."""
        known = rest.sums[0][i]
        if not known:
            return None
        weight, nodes, tokens, hits = self.sums
        share = TRUST * self.unit / known  # of the rest, in units of what is known here
        total = weight[i] + TRUST * self.unit
        return Guess(
            (nodes[i] + share * rest.sums[1][i]) / total,
            (tokens[i] + share * rest.sums[2][i]) / total,
            (hits[i] + share * rest.sums[3][i]) / total,
        )


def _guesses(own: Sequence[Yield], rest: Yield) -> tuple[Floats, Floats]:
    """Nodes and tokens, [R, L]; NaN where nobody knows."""
    sums_R4L = np.array([[[one / each.unit for one in sums] for sums in each.sums] for each in own])
    rest_4L = np.array(rest.sums)
    with np.errstate(invalid="ignore"):
        typical_3L = rest_4L[1:] / rest_4L[0]
    typical_3L[1] *= rest.trust
    mixed_R3L = sums_R4L[:, 1:] + TRUST * typical_3L
    mixed_R3L /= sums_R4L[:, :1] + TRUST
    return mixed_R3L[:, 0], mixed_R3L[:, 1]


def levels_of(most: int) -> tuple[int, ...]:
    """The budgets that are told apart: powers of two, and the most."""
    return (*(2**i for i in range(most.bit_length()) if 2**i < most), most) if most else ()


@dataclass
class _Part:
    """One part. draft: seconds of its proposals by the rows that it is asked for. reading: what the first one for a
    row takes more. next: when it may be probed. is_known: it need not be tried at any price."""

    levels: tuple[int, ...]
    brought: Yield
    draft: Table = field(default_factory=Table)
    reading: float = 0.0
    next: int = 0
    is_known: bool = False

    def expect(self, expected: Expected) -> None:
        self.brought.expect(expected)
        for rows, seconds in expected.seconds.items():
            self.draft.add(rows, seconds)
        self.is_known = True

    def read(self, rows: int, new: int, seconds: float) -> None:
        """It was asked for so many rows, of which some were new to it."""
        usual = self.draft.near(rows, 1) if self.draft.points else 0.0
        self.reading += (max(0.0, seconds - usual) / new - self.reading) * (0.5 if self.reading else 1.0)


@dataclass
class _Seat:
    """One row: what each part has brought for it, who is to answer for it, who does now, who did before, and who has
    ever."""

    brought: list[Yield]
    choice: Choice = PLAIN
    now: Choice = PLAIN
    before: Choice = PLAIN
    known_to: set[int] = field(default_factory=set)


@dataclass
class _Probe:
    """choice: PLAIN is for all rows. seats: the rows that another one is for."""

    choice: Choice
    seats: list[_Seat]
    left: int


class Pace:
    """The controller of so many parts. most: the nodes that each proposes at most. expected: what is known of some, by
    number; these need no trying."""

    def __init__(self, most: Sequence[int], expected: Mapping[int, Expected] | None = None):
        self.most, self._expected = tuple(most), expected or {}
        self.seats: Slots[_Seat] = Slots()
        self.reset()

    def reset(self) -> None:
        levels = [levels_of(most) for most in self.most]
        self._parts = [_Part(each, Yield(each, ALL)) for each in levels]
        for number, expected in self._expected.items():
            self._parts[number].expect(expected)
        self._typical = PLAIN
        self._speed, self._planned_rows = 0.0, 0  # tokens per second of so many rows, as planned
        self._steps = self._until_plan = self._since_plain = self._same_rows = self._last_rows = 0
        self._lost = self._elapsed = 0.0
        self._probe: _Probe | None = None
        self._seen: Step | None = None

    def admit(self) -> None:
        self.seats.admit(_Seat([Yield(part.levels, OWN) for part in self._parts], self._typical))
        self._until_plan = 0 if len(self.seats) == 1 else min(self._until_plan, EVERY // 4)

    def release(self, slot: int) -> None:
        self.seats.release(slot)
        self._until_plan = min(self._until_plan, EVERY // 4 if len(self.seats) > 1 else 0)

    # ---- before a step

    def choose(self, costs: Table, wishes: Sequence[Wish]) -> list[Choice]:
        """Who answers for each row at this step. costs: of the engine's steps, the last one included."""
        rows = len(wishes)
        self._account(costs.last)
        self._steps += 1
        self._same_rows = self._same_rows + 1 if rows == self._last_rows else 0
        self._last_rows = rows
        self._until_plan -= 1
        if self._until_plan < 0:
            is_new = self._plan(costs, wishes)
            self._until_plan = 1 if is_new else EVERY_ONE if rows == 1 else EVERY
        probe = self._probe or self._next_probe(costs, wishes)
        self._probe = probe
        for seat, wish in zip(self.seats, wishes, strict=True):
            seat.before, seat.now = seat.now, _within(seat.choice, wish)
        if probe is not None:
            probe.left -= 1
            for seat, wish in zip(self.seats, wishes, strict=True):
                if probe.choice == PLAIN or any(seat is one for one in probe.seats):
                    seat.now = _within(probe.choice, wish)
        choices = [seat.now for seat in self.seats]
        self._since_plain = self._since_plain + 1 if any(choice != PLAIN for choice in choices) else 0
        return choices

    def drafted(self, part: int, rows: int, seconds: float) -> None:
        """A part was asked for so many rows. For a new one it may have had to read a whole text, once: that is not
        what proposals take."""
        one, asked = self._parts[part], [seat for seat in self.seats if seat.now.part == part]
        new = sum(part not in seat.known_to for seat in asked)
        if new:
            one.read(rows, new, seconds)
        if not one.draft.points or all(seat.before.part == part for seat in asked):
            one.draft.add(rows, seconds)

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """What came of the proposals just chosen, of every row."""
        for seat, outcome in zip(self.seats, outcomes, strict=True):
            part, budget = seat.now
            if part != NOBODY:
                seat.brought[part].learn(outcome, budget, self._steps)
                self._parts[part].brought.learn(outcome, budget, self._steps)
                seat.known_to.add(part)
        if self._probe is not None and self._probe.left <= 0:
            self._until_plan = 0

    def _account(self, step: Step | None) -> None:
        """The last step is known now: its time, and what it has lost if it was a probe."""
        if step is None or step is self._seen:
            return
        self._seen = step
        seconds = step.draft_seconds + step.verify_seconds + step.other_seconds
        self._elapsed += seconds
        if self._probe is None:
            return
        planned = step.tokens / self._speed if step.rows == self._planned_rows else seconds
        loss = max(0.0, seconds - planned)
        if self._probe.choice == PLAIN or self._parts[self._probe.choice.part].is_known:
            self._lost += loss
        is_dear = loss * self._speed > step.rows  # lost more than a plain step takes: that says enough
        has_begun = self._probe.choice == PLAIN or self._probe.left < BURST - 1
        if self._probe.left <= 0 or (is_dear and has_begun):
            self._end_probe()

    # ---- trying something else

    def _next_probe(self, costs: Table, wishes: Sequence[Wish]) -> _Probe | None:
        rows = len(wishes)
        if not costs.knows_near(rows) or (self._same_rows == SETTLED and not costs.knows(rows)):
            return _Probe(PLAIN, [], 1)
        if self._since_plain >= (FRESH if costs.is_steady(rows) else UNSURE):
            return _Probe(PLAIN, [], YARDSTICK)
        may_lose = self._lost <= SHARE * self._elapsed + GRACE * costs.plain(rows)
        for number, part in enumerate(self._parts):
            if self._steps < part.next or not part.levels or (part.is_known and not may_lose):
                continue
            seats = [
                seat
                for seat, wish in zip(self.seats, wishes, strict=True)
                if number in wish.parts and wish.budget and seat.choice != (number, self.most[number])
            ]
            if seats:
                seats.sort(key=lambda seat: seat.brought[number].sums[0][-1] / seat.brought[number].unit)
                return _Probe(Choice(number, self.most[number]), seats[: max(1, rows // 8)], BURST)
        return None

    def _end_probe(self) -> None:
        assert self._probe is not None
        if self._probe.choice != PLAIN:
            part = self._parts[self._probe.choice.part]
            part.next, part.is_known = self._steps + PAUSE, True
        self._probe = None

    # ---- the plan

    def _plan(self, costs: Table, wishes: Sequence[Wish]) -> bool:
        """Make a plan; True if it asks somebody for whom the last one did not ask at all, which soon shows what it
        is worth."""
        rows = len(wishes)
        if not costs.knows_near(rows):
            return False
        self._planned_rows = rows
        before = {seat.choice.part for seat in self.seats}
        choices, self._speed = self._of_one(costs, wishes[0]) if rows == 1 else self._of_many(costs, wishes)
        for seat, choice in zip(self.seats, choices, strict=True):
            seat.choice = choice
        self._typical = max(set(choices), key=choices.count)
        return not before.issuperset(choice.part for choice in choices)

    def _of_one(self, costs: Table, wish: Wish) -> tuple[list[Choice], float]:
        """For a row that runs alone: every part and level in turn. A step without a proposal is a plain one between
        others."""
        seat, plain = self.seats[0], costs.near(1, 1)
        best, speed = PLAIN, MARGIN / costs.plain(1)
        for number in wish.parts:
            part = self._parts[number]
            drafting = part.draft.near(1, 1) if part.draft.points else 0.0
            drafting += 0.0 if number in seat.known_to else part.reading / PAYBACK
            for i, level in enumerate(part.levels):
                guess = seat.brought[number].guess(i, part.brought)
                if level > wish.budget:
                    break
                if guess is None:
                    continue
                seconds = drafting + plain
                if guess.hits:
                    seconds += guess.hits * (costs.near(1 + guess.nodes / guess.hits, 1) - plain)
                if (1 + guess.tokens) / seconds > speed:
                    best, speed = Choice(number, level), (1 + guess.tokens) / seconds
        return [best], speed if best != PLAIN else 1 / costs.plain(1)

    def _of_many(self, costs: Table, wishes: Sequence[Wish]) -> tuple[list[Choice], float]:
        """One part at one level for those rows for which it pays; then, for the others, another one beside it."""
        rows = len(wishes)
        plan = _Draft([PLAIN] * rows, float(rows), float(rows), 0.0, costs.plain(rows))
        brought = [
            _guesses([seat.brought[number] for seat in self.seats], part.brought)
            for number, part in enumerate(self._parts)
        ]
        left = set(range(len(self._parts)))
        while left:
            joined = {number: self._joined(plan, costs, wishes, number, *brought[number]) for number in left}
            number = max(joined, key=lambda one: joined[one].speed)
            if joined[number].speed <= MARGIN * plan.speed:
                break
            plan = joined[number]
            left.remove(number)
        return plan.choices, plan.speed

    def _joined(
        self, plan: _Draft, costs: Table, wishes: Sequence[Wish], number: int, nodes_RL: Floats, tokens_RL: Floats
    ) -> _Draft:
        """The plan, with this part asked for the best of the rows that nobody answers for yet, at the best level."""
        part = self._parts[number]
        budgets_R = np.array(
            [
                wish.budget if choice == PLAIN and number in wish.parts else 0
                for wish, choice in zip(wishes, plan.choices, strict=True)
            ]
        )
        levels_L = np.array(part.levels)
        allowed_RL = (levels_L <= budgets_R[:, None]) & ~np.isnan(nodes_RL)
        if not allowed_RL.any():
            return plan
        reading_R = np.array([number not in seat.known_to for seat in self.seats]) * part.reading / PAYBACK
        net_RL = tokens_RL - plan.speed * reading_R[:, None]
        worth_RL = np.where(allowed_RL, net_RL / np.maximum(nodes_RL, TINY), -np.inf)
        order_RL = np.argsort(-worth_RL, axis=0, kind="stable")
        taken_RL = np.take_along_axis(allowed_RL, order_RL, 0)
        tokens_RL = plan.tokens + np.cumsum(np.take_along_axis(tokens_RL, order_RL, 0), 0)
        nodes_RL = plan.nodes + np.cumsum(np.take_along_axis(nodes_RL, order_RL, 0), 0)
        drafting_R = np.full(len(wishes), plan.drafting)
        if part.draft.points:
            drafting_R += part.draft.near_all(np.arange(1.0, len(wishes) + 1), 1)
        seconds_RL = costs.near_all(nodes_RL, len(wishes)) + drafting_R[:, None] + np.cumsum(reading_R[order_RL], 0)
        row, level = np.unravel_index(np.argmax(np.where(taken_RL, tokens_RL / seconds_RL, -1)), taken_RL.shape)
        choices = list(plan.choices)
        for slot in order_RL[: row + 1, level].tolist():
            choices[slot] = Choice(number, part.levels[level])
        of = float(tokens_RL[row, level]), float(nodes_RL[row, level])
        return _Draft(choices, *of, float(drafting_R[row]), float(seconds_RL[row, level]))


@dataclass(frozen=True)
class _Draft:
    """A plan while it is made: what a step of it is expected to bring and to take. drafting: seconds of the parts."""

    choices: list[Choice]
    tokens: float
    nodes: float
    drafting: float
    seconds: float

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def _within(choice: Choice, wish: Wish) -> Choice:
    if choice.part == NOBODY or choice.part not in wish.parts or not wish.budget:
        return PLAIN
    return Choice(choice.part, min(choice.budget, wish.budget))
