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


class Step(NamedTuple):
    """What one step of an engine took, measured where it happened.

    rows: that made it together. nodes: of all their trees, node 0 of each included. context:
    committed tokens of all rows before it. tokens: that it settled. Seconds: of drafting and
    learning, of the target's forward, and of judging and keeping.
    """

    rows: int
    nodes: int
    context: int
    tokens: int
    draft_seconds: float
    verify_seconds: float
    other_seconds: float


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
    `learn` fills it.
    """

    def __init__(self, points: Sequence[tuple[int, float]] | None = None, rows: int = 1):
        self._rows: dict[int, dict[int, _Mean]] = {}
        self._lines: dict[int, tuple[tuple[int, float], ...]] = {}  # the points of so many rows, until more is learned
        if points is None:
            return
        tokens = [tokens for tokens, _ in points]
        if not tokens or tokens != sorted(set(tokens)):
            raise DrafterError(f"a table of costs at {tokens} tokens: give one or more numbers of tokens, ascending")
        self._rows[rows] = {tokens: _Mean(seconds) for tokens, seconds in points}

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """(tokens, seconds) of one row, tokens ascending."""
        return self.points_of(1)

    def points_of(self, rows: int) -> tuple[tuple[int, float], ...]:
        line = self._lines.get(rows)
        if line is None:
            means = self._rows.get(rows, {})
            line = self._lines[rows] = tuple(sorted((tokens, mean.seconds) for tokens, mean in means.items()))
        return line

    def __call__(self, tokens: int, rows: int = 1) -> float:
        """Seconds of reading so many tokens, all rows together. LookupError where nothing is known of so many rows."""
        points = self.points_of(rows)
        place = bisect_right(points, tokens, key=lambda point: point[0])
        if place == 0:
            return points[0][1]
        (known, seconds) = points[place - 1]
        if place < len(points):
            further, later = points[place]
            return seconds + (later - seconds) * (tokens - known) / (further - known)
        return seconds + max(0, tokens - known) * _last_slope(points)

    def learn(self, step: Step) -> None:
        """A step was made: what it took, drafting apart."""
        seconds = step.verify_seconds + step.other_seconds
        self._lines.clear()
        means = self._rows.setdefault(step.rows, {})
        mean = means.get(step.nodes)
        if mean is None:
            means[step.nodes] = _Mean(seconds)
        else:
            mean.add(seconds)

    def node_share(self, rows: int = 1) -> float | None:
        """What one node more costs, as a share of a plain step of so many rows: the slope of the
        straight line through all that is known of them. None while too little is."""
        means = self._rows.get(rows, {})
        plain, wide = means.get(rows), [mean.count for nodes, mean in means.items() if nodes > rows]
        if plain is None or plain.count < ENOUGH or sum(wide) < ENOUGH:
            return None
        total = sum(mean.count for mean in means.values())
        middle = sum(mean.count * nodes for nodes, mean in means.items()) / total
        spread = sum(mean.count * (nodes - middle) ** 2 for nodes, mean in means.items())
        rise = sum(mean.count * (nodes - middle) * mean.seconds for nodes, mean in means.items())
        return max(0.0, rise / spread / plain.seconds)


ENOUGH = 8
"""Steps of either kind, plain ones and others, before a table says what a node costs."""


class _Mean:
    """An average that forgets: of the last `MEMORY` values or so. One that is far above it was held
    up by something else and counts as twice the average; one far below says that the first were,
    and begins anew."""

    __slots__ = ("count", "seconds")

    def __init__(self, seconds: float):
        self.count, self.seconds = 1, seconds

    def add(self, seconds: float) -> None:
        mean = self.seconds
        if seconds + seconds < mean:
            self.count, self.seconds = 1, seconds
            return
        if self.count < MEMORY:
            self.count += 1
        self.seconds = mean + (min(seconds, mean + mean) - mean) / self.count


def _last_slope(points: Sequence[tuple[int, float]]) -> float:
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
