"""What work costs: the record of a step, and the table that knows what steps and forwards take.

Nothing here looks at a clock: the numbers are handed in by whoever did the work, or are units of the target's cost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forerun.errors import DrafterError

Floats = NDArray[np.float64]
Cost = Callable[[int], float]
"""Seconds of one forward that reads so many new tokens (1 or more). Verifying S drafts reads S + 1:
the newest committed token has not been read yet."""
Price = float | Cost
"""A Cost, or plain seconds that hold for every number of tokens."""

MEMORY = 64
"""Steps of one kind over which a table averages: the text grows longer, and the machine slower or faster."""
SETTLING = 4
"""Plain steps behind a wider one that are slower than plain decoding is: a processor that has been hot for a while
takes tens of milliseconds to become fast again. Those that follow are steady."""
HALF = 128
"""Steps of any kind after which what a table knows of one counts half: the next of that kind counts as much."""


class Step(NamedTuple):
    """What one step of an engine took, measured where it happened.

    rows: that made it together. nodes: of all their trees, node 0 of each included. context:
    committed tokens of all rows before it. tokens: that it settled. Seconds: of drafting and
    learning, of the target's forward, and of judging and keeping. rejected: rows of which a drafted
    token was rejected.
    """

    rows: int
    nodes: int
    context: int
    tokens: int
    draft_seconds: float
    verify_seconds: float
    other_seconds: float
    rejected: int = 0


@dataclass(frozen=True)
class Affine:
    """A fitted law: seconds + per_token * tokens."""

    seconds: float
    per_token: float = 0.0

    def __call__(self, tokens: int) -> float:
        return self.seconds + self.per_token * tokens


class Table:
    """Seconds by the number of tokens that are read, and by the rows that they are read for: points that were measured.

    Straight lines between the points; past the last one the last slope goes on, because a flat end
    would make long drafts look free. Before the first, the first. points: (tokens, seconds) of so
    many rows, tokens ascending, such as medians of timings. Without them the table is empty, and
    `learn` fills it: numbers of tokens that lie close together share a point then, and old
    measurements fade. last: the step learned last; lately: it and those before it.

    A plain step between wider ones and a step of plain decoding are two things (`SETTLING`): the
    former is a point of the table, the latter is `plain`.
    """

    def __init__(self, points: Sequence[tuple[int, float]] | None = None, rows: int = 1):
        self.last: Step | None = None
        self.lately = Lately()
        self._rows: dict[int, dict[int, _Mean]] = {}
        self._lines: dict[int, Line] = {}  # the points of so many rows, until more is learned
        self._plain: dict[int, _Mean] = {}  # of steady steps, by rows
        self._streak = 0  # of plain steps, up to the last one
        self._added = 0
        if points is None:
            return
        tokens = [tokens for tokens, _ in points]
        if not tokens or tokens != sorted(set(tokens)):
            raise DrafterError(f"a table of costs at {tokens} tokens: give one or more numbers of tokens, ascending")
        self._rows[rows] = {tokens: _Mean(tokens, seconds, 0) for tokens, seconds in points}

    @property
    def points(self) -> Line:
        """(tokens, seconds) of one row, tokens ascending."""
        return self.points_of(1)

    def points_of(self, rows: int) -> Line:
        line = self._lines.get(rows)
        if line is None:
            means = self._rows.get(rows, {})
            line = self._lines[rows] = tuple(sorted((mean.tokens, mean.seconds) for mean in means.values()))
        return line

    def __call__(self, tokens: float, rows: int = 1) -> float:
        """Seconds of reading so many tokens, all rows together. LookupError where nothing is known of so many rows."""
        return _on(self.points_of(rows), tokens)

    def learn(self, step: Step) -> None:
        """A step was made: what it took, drafting apart."""
        self.last = step
        self.lately.learn(step)
        seconds = step.verify_seconds + step.other_seconds
        self.add(step.nodes, seconds, step.rows)
        self._streak = self._streak + 1 if step.nodes == step.rows else 0
        if self._streak > SETTLING:
            _note(self._plain, step.rows, step.rows, seconds, self._added)

    def know(self, points: Sequence[tuple[int, float, int]]) -> None:
        """(tokens, seconds, rows) as they are when nothing else is done for a while."""
        for tokens, seconds, rows in points:
            self.add(tokens, seconds, rows)
            if tokens == rows:
                _note(self._plain, rows, tokens, seconds, self._added)

    def add(self, tokens: int, seconds: float, rows: int = 1) -> None:
        """Reading so many tokens took so long."""
        self._added += 1
        self._lines.pop(rows, None)
        place = rows if tokens == rows else _place(tokens)
        _note(self._rows.setdefault(rows, {}), place, tokens, seconds, self._added)

    # ---- where little is known

    def knows(self, rows: int) -> bool:
        """A plain step of so many rows was measured."""
        return rows in self._rows.get(rows, {})

    def knows_near(self, rows: int) -> bool:
        """A plain step was measured of half to twice as many rows."""
        return any(rows <= 2 * known <= 4 * rows and self.knows(known) for known in self._rows)

    def is_steady(self, rows: int) -> bool:
        """Plain decoding of so many rows was measured, and not only plain steps between others."""
        return rows in self._plain

    def plain(self, rows: int) -> float:
        """Seconds of a step of plain decoding, or what is nearest to it. LookupError where nothing is known at all."""
        return self._plain[rows].seconds if rows in self._plain else self.near(rows, rows)

    def near(self, tokens: float, rows: int) -> float:
        """As `table(tokens, rows)`, or what that is likely to be: what is known of the nearest number of rows of which
        enough is known, in proportion to the plain steps of both. LookupError where nothing is known at all."""
        line, scale = self._nearest(rows)
        return scale * _on(line, tokens)

    def near_all(self, tokens: Floats, rows: int) -> Floats:
        """The same for many numbers of tokens."""
        line, scale = self._nearest(rows)
        known, seconds = np.array(line).T
        beyond: Floats = np.maximum(tokens - known[-1], 0) * _last_slope(line)
        found: Floats = scale * (np.interp(tokens, known, seconds) + beyond)
        return found

    def _nearest(self, rows: int) -> tuple[Line, float]:
        rich = [known for known, means in self._rows.items() if len(means) >= RICH] or list(self._rows)
        if not rich:
            raise LookupError("nothing has been measured yet")
        if rows in rich:
            return self.points_of(rows), 1.0
        line = self.points_of(min(rich, key=lambda known: abs(log2(known / rows))))
        return line, self.points_of(rows)[0][1] / _on(line, rows) if self.knows(rows) else 1.0

    def node_share(self, rows: int = 1) -> float | None:
        """What one node more costs, as a share of a plain step of so many rows: the slope of the
        straight line through all that is known of them. None while too little is."""
        means = self._rows.get(rows, {})
        plain, wide = means.get(rows), [mean.count for mean in means.values() if mean.tokens > rows]
        if plain is None or plain.count < ENOUGH or sum(wide) < ENOUGH:
            return None
        total = sum(mean.count for mean in means.values())
        middle = sum(mean.count * mean.tokens for mean in means.values()) / total
        spread = sum(mean.count * (mean.tokens - middle) ** 2 for mean in means.values())
        rise = sum(mean.count * (mean.tokens - middle) * mean.seconds for mean in means.values())
        return max(0.0, rise / spread / plain.seconds)


@dataclass
class Lately:
    """Sums over the steps so far, in which those before the last `MEMORY` hardly count. drafted: tokens, of which so
    many were accepted and so many rejected (what stands behind a rejected one was not asked about). seconds: of whole
    steps."""

    drafted: float = 0.0
    accepted: float = 0.0
    rejected: float = 0.0
    tokens: float = 0.0
    draft_seconds: float = 0.0
    seconds: float = 0.0

    def learn(self, step: Step) -> None:
        keep = 1 - 1 / MEMORY
        self.drafted = keep * self.drafted + step.nodes - step.rows
        self.accepted = keep * self.accepted + step.tokens - step.rows
        self.rejected = keep * self.rejected + step.rejected
        self.tokens = keep * self.tokens + step.tokens
        self.draft_seconds = keep * self.draft_seconds + step.draft_seconds
        whole = step.draft_seconds + step.verify_seconds + step.other_seconds
        self.seconds = keep * self.seconds + whole

    @property
    def acceptance(self) -> float:
        """Of the drafted tokens that were asked about, the share that was accepted; 1 where there were none."""
        asked = self.accepted + self.rejected
        return self.accepted / asked if asked else 1.0


Line = tuple[tuple[float, float], ...]
"""(tokens, seconds), tokens ascending."""
ENOUGH = 8
"""Steps of either kind, plain ones and others, before a table says what a node costs."""
RICH = 2
"""Points that make a line."""


def _place(tokens: int) -> int:
    """Which numbers of tokens share a point: each of the small ones has its own, of the others an eighth of a doubling
    or more lies between two. Negative, for plain steps have places of their own."""
    shift = max(0, tokens.bit_length() - 4)
    return -(tokens >> shift << shift)


class _Mean:
    """An average that forgets: of the last `MEMORY` values or so, and sooner what nothing was added to for long.

    One that is far above it was held up by something else and counts as twice the average; one far
    below says that the first were, and begins anew.
    """

    __slots__ = ("count", "last", "seconds", "tokens")

    def __init__(self, tokens: float, seconds: float, now: int):
        self.count, self.tokens, self.seconds, self.last = 1, tokens, seconds, now

    def add(self, tokens: int, seconds: float, now: int) -> None:
        """now: how many values the whole table has been told."""
        mean, since = self.seconds, now - self.last
        self.last = now
        if seconds + seconds < mean:
            self.count, self.tokens, self.seconds = 1, tokens, seconds
            return
        if self.count < MEMORY:
            self.count += 1
        share = max(1 / self.count, 1 - 0.5 ** (since / HALF))
        self.seconds = mean + (min(seconds, mean + mean) - mean) * share
        self.tokens += (tokens - self.tokens) * share


def _note(means: dict[int, _Mean], place: int, tokens: int, seconds: float, now: int) -> None:
    if place in means:
        means[place].add(tokens, seconds, now)
    else:
        means[place] = _Mean(tokens, seconds, now)


def _on(points: Line, tokens: float) -> float:
    place = bisect_right(points, tokens, key=lambda point: point[0])
    if place == 0:
        return points[0][1]
    (known, seconds) = points[place - 1]
    if place < len(points):
        further, later = points[place]
        return seconds + (later - seconds) * (tokens - known) / (further - known)
    return seconds + max(0.0, tokens - known) * _last_slope(points)


def _last_slope(points: Line) -> float:
    if len(points) < 2:
        return 0.0
    (before, faster), (last, slower) = points[-2:]
    return max((slower - faster) / (last - before), 0.0)


REFRESH = 64
"""Steps between two prices. Whoever drafts keeps what belongs to a price, so it must not change with every step."""
CHEAPEST, DEAREST = 1 / 64, 1 / 2


class NodePrice:
    """What a node must promise to be worth its while: the probability to survive at which it
    neither gains nor loses time.

    That is what one node more adds to a step, as a share of a plain step, times the speed-up: at
    twice the speed a token is worth half a plain step. Prices are powers of the square root of two,
    so that they seldom change. value: None until there is one.
    """

    def __init__(self, table: Table):
        self.table = table
        self.value: float | None = None
        self._steps, self._tokens, self._seconds = 0, 0.0, 0.0

    def learn(self, step: Step) -> None:
        """A step was made, by the table's engine."""
        self._steps += 1
        self._tokens += step.tokens
        self._seconds += step.draft_seconds + step.verify_seconds + step.other_seconds
        if self._steps % REFRESH == 0:
            self.value = self._price(step.rows)
            self._tokens, self._seconds = self._tokens / 2, self._seconds / 2

    def _price(self, rows: int) -> float | None:
        share = self.table.node_share(rows)
        if share is None or self._seconds <= 0:
            return None
        speed = self._tokens / self._seconds * self.table(rows, rows)  # tokens per plain step's time
        fair = min(max(share * speed, CHEAPEST), DEAREST)
        return float(2 ** (round(2 * log2(fair)) / 2))


def cost_of(price: Price) -> Cost:
    return price if callable(price) else Affine(price)
