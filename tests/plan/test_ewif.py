"""Cascades: the hand examples, the limits, and a simulator of the recursive step that slices K as
the paper's repository does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest

from forerun.cost import Affine, cost_of
from forerun.errors import DrafterError
from forerun.plan.cascade import (
    Cascade,
    Matrix,
    Review,
    best_split,
    ewif,
    horizontal,
    review_pgf,
    reviews,
    speculative,
    splits_of,
    steps,
    vertical,
)
from forerun.plan.hierarchy import Autoregressive, Chain, Draft, Verifier, at_least, fixed_rounds, round_yields
from plan.planted import Ratio

MAX_GRAM = Draft.exactly(10, 0.0)
FLAGSHIP = ((5, 14, 10), (0, 1, 10), (0, 0, 10))
"""FLAN-T5-XXL with base, small and Max-Gram."""
RATES = ((0, 0.8, 0.7, 0.4), (0, 0, 0.75, 0.45), (0, 0, 0, 0.5))
T5 = Cascade((1.0, 0.04, 0.02), MAX_GRAM, RATES)


def near(value: object) -> object:
    return pytest.approx(value, rel=1e-9, abs=1e-12)


def test_the_hand_examples() -> None:
    assert speculative(0.8, 5, 0.05) == pytest.approx(2.951424, abs=5e-7)
    assert review_pgf(0.5, 1, 0.8) == near(0.72)
    assert vertical(Review(0.8, 0.1, 2), Review(0.5, 0.01, 1)) == near((1 - 0.8 * 0.5184) / 0.2 / 1.22)
    assert vertical(Review(0.8, 0.1, 2), Review(0.5, 0.01, 1)) == pytest.approx(2.398689, abs=5e-7)
    with_second = horizontal([Review(0.8, 0.1, 3), Review(0.5, 0.0, 2)])
    assert with_second == near((2.952 + 0.384) / 1.3) and with_second == pytest.approx(2.566154, abs=5e-7)
    assert horizontal([Review(0.8, 0.1, 3)]) == pytest.approx(2.270769, abs=5e-7)


def test_the_vertical_example_by_listing_lengths() -> None:
    """Two reviews of one token each: drafts of 2, 3, 4 with 1/4, 1/2, 1/4."""
    tokens = sum(share * sum(0.8**k for k in range(n + 1)) for n, share in ((2, 0.25), (3, 0.5), (4, 0.25)))
    assert vertical(Review(0.8, 0.1, 2), Review(0.5, 0.01, 1)) == near(tokens / 1.22)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_the_pgf_is_one(rate: float, drafts: int) -> None:
    law = round_yields(rate, np.eye(1, drafts + 1, drafts)[0])
    points = np.linspace(0, 1, 21)
    values = [review_pgf(rate, drafts, float(x)) for x in points]
    assert values == near([float(law @ x ** np.arange(len(law))) for x in points])
    assert values[0] == near(0) and values[-1] == near(1) and (np.diff(values) >= 0).all()
    slope = (1 - review_pgf(rate, drafts, 1 - 1e-7)) / 1e-7
    assert slope == pytest.approx(sum(rate**k for k in range(drafts + 1)), rel=1e-5)
    for a in (0.1, 0.5, 0.9):
        assert review_pgf(rate, drafts, a) <= a + 1e-12
        assert (review_pgf(rate, drafts, a) == near(a)) == (rate == 0)


def test_limits() -> None:
    assert speculative(0.7, 0, 0.3) == 1
    assert speculative(0.0, 4, 0.05) == near(1 / 1.2)
    assert speculative(1.0, 4, 0.05) == near(5 / 1.2) == near(speculative(1 - 1e-12, 4, 0.05))
    assert horizontal([]) == 1 and horizontal([Review(0.6, 0.2, 0)]) == 1
    assert horizontal([Review(0.8, 0.05, 5)]) == near(speculative(0.8, 5, 0.05))
    middle, lowest = Review(1.0, 0.1, 2), Review(0.5, 0.01, 3)
    assert vertical(middle, lowest) == near((1 + 2 * 1.875) / 1.26)
    assert vertical(Review(1 - 1e-9, 0.1, 2), lowest) == pytest.approx(vertical(middle, lowest), rel=1e-6)
    assert vertical(Review(0.0, 0.1, 2), lowest) == near(1 / 1.26)
    assert vertical(Review(0.8, 0.1, 3), Review(0.0, 0.0, 1)) == near(speculative(0.8, 3, 0.1))


def test_the_vertical_cascade_is_a_hierarchy_of_fixed_rounds() -> None:
    for a, b, n, k in ((0.8, 0.5, 2, 1), (0.9, 0.7, 3, 4), (0.3, 1.0, 1, 6)):
        chain = Chain(Autoregressive(0.01), (Verifier(0.1, b), Verifier(1.0, a)))
        assert vertical(Review(a, 0.1, n), Review(b, 0.01, k)) == near(1 / fixed_rounds(chain, (k, n)).latency)


def test_a_free_statistical_model_below_is_worth_it() -> None:
    for n in range(1, 8):
        assert vertical(Review(0.8, 0.1, n), Review(0.3, 0.0, 4)) > speculative(0.8, n, 0.1)


def test_formulas_against_planted_acceptance() -> None:
    rng, rows = np.random.default_rng(0), 200_000

    def kept(rate: float, drafts: np.ndarray) -> np.ndarray:
        return np.minimum(rng.geometric(1 - rate, rows) - 1, drafts)

    first = kept(0.8, np.full(rows, 3))
    second = np.where(first == 3, kept(0.5, np.full(rows, 2)), 0)
    found = Ratio.of(np.full(rows, 1.3), 1 + first + second)
    assert found.is_near(1 / horizontal([Review(0.8, 0.1, 3), Review(0.5, 0.0, 2)]))
    lengths = sum(1 + kept(0.5, np.full(rows, 4)) for _ in range(3))
    found = Ratio.of(np.full(rows, 1 + 3 * (0.1 + 4 * 0.01)), 1 + kept(0.8, lengths))
    assert found.is_near(1 / vertical(Review(0.8, 0.1, 3), Review(0.5, 0.01, 4)))


def test_all_splits_are_tried() -> None:
    found = list(splits_of(4, 3))
    assert len(found) == len(set(found)) and set(found) == {s for s in product(range(5), repeat=3) if sum(s) <= 4}
    assert [sum(split) for split in found] == sorted(sum(split) for split in found)


def test_the_best_split_drafts_what_pays() -> None:
    """The last position pays if its survival is more than the factor times its cost, and one more does not."""
    split = best_split([(0.8, 0.1), (0.5, 0.01)], 12)
    factor, survival = horizontal(split), 0.8**4
    assert [segment.count for segment in split] == [4, 3]
    assert factor > max(speculative(0.8, k, 0.1) for k in range(13))
    assert survival * 0.5**3 > factor * 0.01 > survival * 0.5**4
    for one, two in product(range(13), repeat=2):
        assert horizontal([Review(0.8, 0.1, one), Review(0.5, 0.01, two)]) <= factor or one + two > 12
    assert [segment.count for segment in best_split([(0.3, 0.5)], 6)] == [0], "nothing pays"


def test_the_higher_rate_belongs_first() -> None:
    high, low = Review(0.8, 0.1, 3), Review(0.5, 0.1, 2)
    assert horizontal([high, low]) > horizontal([low, high])
    one, other = Review(0.8, 0.1, 1), Review(0.5, 0.02, 1)
    difference = (0.8 - 0.5) / 1.12
    assert horizontal([one, other]) - horizontal([other, one]) == near(difference)


@dataclass
class Recursive:
    """Step(drafters, target, ctx, K) of the repository, with planted acceptance: of every token
    only the emitter is known. Counts the reviews of every model."""

    cascade: Cascade
    rng: np.random.Generator
    counts: list[int] = field(default_factory=list)
    reviewed: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def outer(self, matrix: Matrix) -> int:
        """The tokens that one step of the target emits."""
        self.counts, self.seconds = [0] * (len(self.cascade.costs) + 1), 0.0
        return self.step(0, np.array(matrix))

    def step(self, model: int, matrix: np.ndarray) -> int:
        """How many tokens are added."""
        self.counts[model] += 1
        if not len(matrix):
            self.seconds += self.cascade.last.seconds
            return int(self.rng.choice(len(self.cascade.last.lengths), p=self.cascade.last.lengths))
        draft: tuple[int, ...] = ()
        for drafter in range(1, len(matrix) + 1):
            while len(draft) < matrix[0][:drafter].sum():
                added = self.step(model + drafter, matrix[drafter:, drafter:])
                draft += (model + drafter,) * added
        self.seconds += cost_of(self.cascade.costs[model])(len(draft) + 1)
        if model == 0:
            self.reviewed.append(len(draft))
        for place, emitter in enumerate(draft):
            if self.rng.random() >= self.cascade.rates[model][emitter]:
                return place + 1
        return len(draft) + 1


def simulated(cascade: Cascade, matrix: Matrix, times: int, seed: int) -> tuple[Ratio, Recursive, np.ndarray]:
    recursive = Recursive(cascade, np.random.default_rng(seed))
    seconds, tokens, counts = [], [], []
    for _ in range(times):
        tokens.append(recursive.outer(matrix))
        seconds.append(recursive.seconds)
        counts.append(recursive.counts)
    return Ratio.of(np.array(seconds), np.array(tokens)), recursive, np.array(counts)


CASES = [
    (T5, FLAGSHIP),
    (
        Cascade((1.0, 0.1), Draft(np.array([0, 0.3, 0.2, 0, 0.5]), 0.003), ((0, 0.7, 0.5), (0, 0, 0.6))),
        ((4, 3), (0, 5)),
    ),
    (Cascade((Affine(0.9, 0.02), Affine(0.1, 0.01), 0.05), MAX_GRAM, RATES), ((3, 0, 4), (0, 2, 3), (0, 0, 12))),
]


@pytest.mark.parametrize(("cascade", "matrix"), CASES)
def test_steps_against_the_simulated_recursion(cascade: Cascade, matrix: Sequence[Sequence[int]]) -> None:
    times = 6000
    found, recursive, counts = simulated(cascade, matrix, times, 3)
    outer = steps(cascade, matrix)[0]
    assert found.is_near(outer.round.latency) and found.error < 0.012 * found.value
    spread = 3 * counts.std(0) / times**0.5 + 1e-12
    assert (abs(counts.mean(0) - reviews(cascade, matrix)) <= spread).all()
    shares = np.bincount(recursive.reviewed, minlength=len(outer.draft.lengths)) / times
    assert len(shares) == len(outer.draft.lengths)
    assert (abs(shares - outer.draft.lengths) <= 4 * (outer.draft.lengths / times) ** 0.5 + 1e-12).all()


def test_the_flagship_trace() -> None:
    target, base, small = steps(T5, FLAGSHIP)

    def spans(law: np.ndarray) -> list[int]:
        return np.flatnonzero(law).tolist()

    assert spans(small.draft.lengths) == [10] and spans(small.round.yields) == list(range(1, 12))
    assert spans(base.draft.lengths) == list(range(11, 21)) and spans(base.round.yields) == list(range(1, 22))
    assert base.calls[2] == 1 and base.calls[3] == near(1 - 0.5**10), "no Max-Gram if small emitted 11 already"
    assert min(spans(target.draft.lengths)) == 29 and spans(target.round.yields) == list(range(1, 40))
    for step in (target, base, small):
        assert step.round.yields.sum() == near(1) and step.draft.lengths.sum() == near(1)


@pytest.mark.parametrize(
    ("right", "reviewed", "calls", "emitted"), [(1.0, 11, [0, 1, 0], 12), (0.0, 12, [0, 2, 1], None)]
)
def test_scripted_acceptance(right: float, reviewed: int, calls: list[int], emitted: int | None) -> None:
    """With Max-Gram always right, the drafter's one call meets both thresholds; with Max-Gram
    always wrong it is called twice for one token each, then Max-Gram once."""
    cascade = Cascade((1.0, 0.1), MAX_GRAM, ((0, 1.0, right), (0, 0, right)))
    outer = steps(cascade, ((2, 3), (0, 3)))[0]
    assert outer.draft.lengths[reviewed] == near(1) and outer.calls.tolist() == near(calls)
    if emitted:
        assert outer.round.yields[emitted] == near(1) and ewif(cascade, ((2, 3), (0, 3))) == near(12 / 1.1)


def test_counted_costs_are_counts_times_costs() -> None:
    outer = steps(T5, FLAGSHIP)[0]
    assert outer.round.seconds == near(reviews(T5, FLAGSHIP) @ np.array([*T5.costs, 0.0]))
    assert ewif(T5, FLAGSHIP) == near(outer.round.tokens / outer.round.seconds)


def test_a_matrix_of_one_drafter_or_none() -> None:
    """Max-Gram alone is a store below the target; a drafter without Max-Gram's own segment is a hierarchy."""
    alone = Cascade((1.0,), MAX_GRAM, ((0, 0.6),))
    assert 1 / ewif(alone, ((10,),)) == near(at_least(Chain(MAX_GRAM, (Verifier(1.0, 0.6),)), ()).latency)
    top, middle = Affine(0.9, 0.1), Affine(0.05, 0.03)
    pair = Cascade((top, middle), MAX_GRAM, ((0, 0.8, 0.5), (0, 0, 0.6)))
    chain = Chain(MAX_GRAM, (Verifier(middle, 0.6), Verifier(top, 0.8)))
    assert 1 / ewif(pair, ((7, 0), (0, 10))) == near(at_least(chain, (7,)).latency)
    assert ewif(pair, ((0, 0), (0, 0))) == 1, "nothing drafted"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: steps(T5, ((1, 2), (0, 3))), "3 rows of 3"),
        (lambda: steps(T5, ((5, -1, 1), (0, 1, 1), (0, 0, 1))), "from 0 up"),
        (lambda: Cascade((1.0,), Draft(np.array([0.5, 0.5]), 0.0), ((0, 0.5),)), "never be met"),
        (lambda: Cascade((1.0, 0.1), MAX_GRAM, ((0, 0.5),)), "2 rows"),
    ],
)
def test_wrong_inputs_are_named(wrong: object, says: str) -> None:
    with pytest.raises(DrafterError, match=says):
        wrong()  # type: ignore[operator]
