"""What steps cost between the points that were measured."""

from __future__ import annotations

import numpy as np
import pytest

from forerun.errors import DrafterError
from forerun.plan.costs import Costs, Point


def law(rows: float, nodes: float, context: float) -> float:
    """A forward that reads its weights once, then every node, and every row's cache: linear in each of them alone."""
    return 4e-3 + 1e-4 * rows * nodes + 2e-7 * rows * context


def planted(error: float = 0.01) -> Costs:
    grid = [(rows, context, nodes) for rows in (1, 8, 32) for context in (50, 900) for nodes in (1, 2, 5, 17)]
    return Costs(tuple(Point(*each, law(each[0], each[2], each[1]), error * 1e-3) for each in grid))


def test_it_is_exact_where_the_law_is_linear_in_rows_in_nodes_and_in_context() -> None:
    costs, rng = planted(), np.random.default_rng(0)
    for rows, nodes, context in zip(
        rng.uniform(1, 50, 99), rng.uniform(1, 30, 99), rng.uniform(50, 2000, 99), strict=True
    ):
        assert costs(rows, nodes, context) == pytest.approx(law(rows, nodes, context), rel=1e-9)


def test_outside_nothing_is_cheaper_than_the_first_point_and_nothing_falls() -> None:
    costs = Costs((Point(1, 9, 1, 2.0), Point(1, 9, 3, 3.0), Point(1, 9, 5, 2.9)))
    assert costs(1, 0.5, 1) == 2.0 and costs(7, 3, 99) == 3.0
    assert costs(1, 50, 9) == 2.9, "a fall between the last points does not go on"


def test_it_is_the_same_from_a_file_and_as_a_table_of_the_engine() -> None:
    costs = planted()
    assert Costs.of(costs.as_list()) == costs
    table = costs.table(400)
    assert table(40, 8) == pytest.approx(law(8, 5, 400)) and table.knows(32)
    assert costs.error == pytest.approx(np.median([1e-5 / point.seconds for point in costs.points]))


@pytest.mark.parametrize("points", [[], [[1, 1, 0, 1.0, 0]], [[1, 1, 1, -1.0, 0]], [[1, 2]], ["abcde"]])
def test_what_is_no_table_is_refused(points: list[list[float]]) -> None:
    with pytest.raises(DrafterError):
        Costs.of(points)
