"""What the target's steps cost, by rows, nodes and context: points that were measured, and straight lines between them.

A table of the engine's (`cost.Table`) learns from the steps that happen to be made. This one is
measured on purpose, so that what was never run can be priced, and kept in a file, so that it can be
priced elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any, NamedTuple

from forerun.cost import Table
from forerun.errors import DrafterError


class Point(NamedTuple):
    """A step of so many rows, each with so many committed tokens and a tree of so many nodes (node 0 counts): seconds
    without drafting, and the standard error of these."""

    rows: int
    context: int
    nodes: int
    seconds: float
    error: float = 0.0


@dataclass(frozen=True)
class Costs:
    """DrafterError without points."""

    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        if not self.points or any(min(p.rows, p.context, p.nodes) < 1 or p.seconds <= 0 for p in self.points):
            raise DrafterError("a table of costs needs points of one row, token and node or more, that took some time")

    @cached_property
    def _lines(self) -> dict[int, dict[int, dict[int, float]]]:
        """Seconds by rows, by context, by nodes, all ascending."""
        lines: dict[int, dict[int, dict[int, float]]] = {}
        for point in sorted(self.points):
            lines.setdefault(point.rows, {}).setdefault(point.context, {})[point.nodes] = point.seconds
        return lines

    def __call__(self, rows: float, nodes: float, context: float) -> float:
        """Seconds of a step; nodes and context are those of each row, on average. Beyond the last
        points the last slopes go on, but nothing costs less than at the first."""

        def of_rows(count: int) -> float:
            lines = self._lines[count]
            return _between(list(lines), context, lambda length: of_line(lines[length]))

        def of_line(line: dict[int, float]) -> float:
            return _between(list(line), nodes, line.__getitem__)

        return _between(list(self._lines), rows, of_rows)

    @property
    def error(self) -> float:
        """Relative standard error of a typical point. What disturbs one disturbs its neighbours too, so it does not
        cancel."""
        return median(point.error / point.seconds for point in self.points)

    @property
    def rows(self) -> list[int]:
        return list(self._lines)

    def known(self, context: float) -> list[tuple[int, float, int]]:
        """(nodes of all rows, seconds, rows) at this context, as a table of the engine's takes them (`Table.add`)."""
        nodes = {rows: sorted({p.nodes for p in self.points if p.rows == rows}) for rows in self.rows}
        return [(rows * each, self(rows, each, context), rows) for rows in self.rows for each in nodes[rows]]

    def table(self, context: float) -> Table:
        table = Table()
        for tokens, seconds, rows in self.known(context):
            table.add(tokens, seconds, rows)
        return table

    def as_list(self) -> list[list[float]]:
        return [list(point) for point in self.points]

    @staticmethod
    def of(points: Sequence[Sequence[Any]]) -> Costs:
        """As a file has them. DrafterError for what is none."""
        try:
            return Costs(tuple(Point(int(r), int(c), int(n), float(s), float(e)) for r, c, n, s, e in points))
        except (TypeError, ValueError):
            raise DrafterError("a table of costs is a list of [rows, context, nodes, seconds, error]") from None


def _between(known: Sequence[int], x: float, value: Callable[[int], float]) -> float:
    """The value at x, from those at the two known places around it, or at the last two."""
    if x <= known[0] or len(known) == 1:
        return value(known[0])
    after = next((place for place, one in enumerate(known) if one >= x), len(known) - 1)
    low, high = known[after - 1], known[after]
    first, last = value(low), value(high)
    slope = (last - first) / (high - low)
    return first + (x - low) * slope if x <= high else last + (x - high) * max(0.0, slope)
