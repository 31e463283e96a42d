"""What CS Drafting's cascades are worth: expected walltime improvement factors, and the reviews that a matrix K causes.

After "Cascade Speculative Drafting for Even Faster LLM Inference" (Chen et al., arXiv 2312.11462)
and its repository; the formula of the vertical cascade is the paper's as quoted by others, the rest
is derived here, as the body of the paper was not available to us. A factor (EWIF) is the speedup
over the target alone; costs are those of a forward in units of the target's. A drafter reviews, in
the paper's words, where `forerun.plan.hierarchy` says that it verifies.

The vertical cascade is `hierarchy.fixed_rounds` with three models. The horizontal cascade drafts
the first positions with the largest drafter, later ones, which are less likely to be kept, with
cheaper ones. K joins the two, see `Cascade`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from forerun.cost import Floats, Price, cost_of
from forerun.errors import DrafterError
from forerun.plan.hierarchy import Draft, Round, at_least_so_many, expected_tokens, renewals

Matrix = Sequence[Sequence[int]]


def review_pgf(rate: float, drafts: int, x: float) -> float:
    """phi(x) = E[x^N] of the tokens N that a review of so many drafts emits.

    1 + (x - 1) (1 - (a x)^(k+1)) / (1 - a x), where the fraction is the sum of (a x)^0 .. (a x)^k."""
    return 1 + (x - 1) * expected_tokens(rate * x, drafts)


def speculative(rate: float, drafts: int, cost: float) -> float:
    """EWIF of plain speculative decoding (Leviathan et al., arXiv 2211.17192, theorem 3.8)."""
    return expected_tokens(rate, drafts) / (1 + drafts * cost)


@dataclass(frozen=True)
class Review:
    """A drafter and how much it does. rate: at which the level above accepts its tokens; cost: of
    one of its forwards; count: its reviews or, where it writes by itself, its tokens."""

    rate: float
    cost: float
    count: int


def vertical(middle: Review, lowest: Review) -> float:
    """EWIF where the target reviews what `middle` emits in `count` reviews, of `lowest.count`
    tokens of the lowest each.

    (1 - a phi^n(a)) / ((1 - a) (1 + n c1 + n k c2)) with a the middle's rate: by the pgf of the
    draft's length at a. As the lowest becomes free, n reviews cost what n drafted tokens cost and
    emit more. At a = 1 the limit, 1 + n E[N]."""
    a, n = middle.rate, middle.count
    longer = review_pgf(lowest.rate, lowest.count, a) ** n
    tokens = (1 - a * longer) / (1 - a) if a < 1 else 1 + n * expected_tokens(lowest.rate, lowest.count)
    return tokens / (1 + n * middle.cost + n * lowest.count * lowest.cost)


def horizontal(segments: Sequence[Review]) -> float:
    """EWIF where the target reviews segments that one drafter after the other writes, in this order. Derived:

    1 + sum over segments of (a_1^k_1 ... a_(d-1)^k_(d-1)) (a_d + ... + a_d^k_d), over 1 + sum of k_d c_d.
    """
    tokens, survival, cost = 1.0, 1.0, 1.0
    for segment in segments:
        tokens += survival * (expected_tokens(segment.rate, segment.count) - 1)
        survival *= segment.rate**segment.count
        cost += segment.count * segment.cost
    return tokens / cost


def best_split(drafters: Sequence[tuple[float, float]], most: int) -> tuple[Review, ...]:
    """The horizontal cascade with the largest EWIF: how many of at most so many positions each
    drafter writes, none too.

    drafters: (rate, cost), in the order of their segments. The higher rate belongs first:
    exchanging two neighbouring positions leaves the survival after both and the cost as they are.
    Tries all splits; equal factors: the shorter draft."""
    splits = (
        tuple(Review(rate, cost, count) for (rate, cost), count in zip(drafters, counts, strict=True))
        for counts in splits_of(most, len(drafters))
    )
    return max(splits, key=horizontal)


def splits_of(most: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All (k1, k2, ...) that sum to `most` or less, the smallest sums first."""
    for total in range(most + 1):
        yield from _splits_of_exactly(total, parts)


def _splits_of_exactly(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts < 2:
        if parts or not total:
            yield (total,) * parts
        return
    for first in range(total, -1, -1):
        for rest in _splits_of_exactly(total - first, parts - 1):
            yield (first, *rest)


@dataclass(frozen=True)
class Cascade:
    """A target and its drafters, the largest first; models are numbered so, the target is 0.

    costs: of a review, of all that review. last: what the last drafter, which does not review,
    writes at a time, one token or more (Max-Gram: 10 tokens for nothing). rates[r][d]: how often
    model r accepts a token of model d, for d > r; nothing else is read.

    A matrix K (upper triangular, as in the paper's repository: the first row holds increments) has
    a row for every model that reviews. Row r says how model r's draft comes about: model r + 1
    emits until K[r][r] tokens are there, model r + 2 until K[r][r] + K[r][r+1], and so on; then r
    reviews all of them. Lengths are at least these: what is over is kept, and may leave nothing to
    do for the next drafter. Every drafter's emissions are themselves reviews, by its own row.
    """

    costs: tuple[Price, ...]
    last: Draft
    rates: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if self.last.lengths[0] > 0:
            raise DrafterError("the last drafter of a cascade may not propose nothing: a threshold would never be met")
        size = len(self.costs)
        if not size or len(self.rates) < size or any(len(row) <= size for row in self.rates[:size]):
            raise DrafterError(f"the acceptance rates of {size} models that review, by {size + 1}: give {size} rows")


@dataclass(frozen=True, eq=False)
class Step:
    """What one review by one model takes. draft: what it reviews; calls: by model, how often that drafter emits for it;
    round: what it emits, and all that this costs."""

    draft: Draft
    calls: Floats
    round: Round


def steps(cascade: Cascade, matrix: Matrix) -> tuple[Step, ...]:
    """A step of every model that reviews, the target's first. Reconstruction.

    Exact, given that all acceptance is independent, also of what levels below accepted:
    distributions of lengths are carried from segment to segment, not simulated. Real models depart
    from that as `forerun.plan.hierarchy` says."""
    models = len(cascade.costs)
    _demand_matrix(matrix, models)
    done: dict[int, Step] = {}
    for reviewer in range(models - 1, -1, -1):
        emitted = {drafter: done[drafter].round for drafter in range(reviewer + 1, models)}
        emitted[models] = Round(cascade.last.lengths, cascade.last.seconds)
        done[reviewer] = _step(cascade, reviewer, np.cumsum(matrix[reviewer][reviewer:]).tolist(), emitted)
    return tuple(done[reviewer] for reviewer in range(models))


def _step(cascade: Cascade, reviewer: int, thresholds: Sequence[int], emitted: dict[int, Round]) -> Step:
    """lengths[m]: the probability that m tokens are drafted so far; kept[m]: that, and that the
    reviewer accepts them all."""
    longest = max(most + len(emits.yields) for most, emits in zip(thresholds, emitted.values(), strict=True))
    lengths, kept = np.eye(1, longest)[0], np.eye(1, longest)[0]
    calls, yields = np.zeros(len(cascade.costs) + 1), np.zeros(longest + 1)
    for (drafter, emits), threshold in zip(emitted.items(), thresholds, strict=True):
        segments = [_segment(emits, threshold - drafted) for drafted in range(longest)]
        rate = cascade.rates[reviewer][drafter]
        calls[drafter] = sum(share * segment.calls for share, segment in zip(lengths, segments, strict=True))
        yields += _rejected(kept, segments, rate)
        lengths, kept = _appended(lengths, segments, 1.0), _appended(kept, segments, rate)
    yields[1:] += kept
    cost = cost_of(cascade.costs[reviewer])
    forward = sum(share * cost(drafted + 1) for drafted, share in enumerate(lengths.tolist()) if share)
    below = sum(calls[drafter] * emits.seconds for drafter, emits in emitted.items())
    return Step(Draft(lengths, float(below)), calls, Round(yields, float(forward + below)))


@dataclass(frozen=True, eq=False)
class _Segment:
    """What one drafter appends, given how many tokens were missing. calls: how often it emits, on average."""

    lengths: Floats
    calls: float


def _segment(emits: Round, missing: int) -> _Segment:
    if missing < 1:
        return _Segment(np.ones(1), 0.0)
    return _Segment(at_least_so_many(emits, missing).lengths, float(renewals(emits.yields, missing).sum()))


def _appended(before: Floats, segments: Sequence[_Segment], rate: float) -> Floats:
    """Lengths add, and the survival to the end of a segment multiplies."""
    after = np.zeros_like(before)
    for drafted, segment in enumerate(segments):
        if before[drafted]:
            tokens = np.arange(len(segment.lengths))
            after[drafted : drafted + len(tokens)] += before[drafted] * segment.lengths * rate**tokens
    return after


def _rejected(kept: Floats, segments: Sequence[_Segment], rate: float) -> Floats:
    """The pmf of what the review emits, as far as it rejects a token of this segment. len(kept) + 1."""
    yields = np.zeros(len(kept) + 1)
    for drafted, segment in enumerate(segments):
        if kept[drafted]:
            reaches = segment.lengths[::-1].cumsum()[::-1][1:]  # P(the segment has k tokens) for k = 1 ...
            share = (1 - rate) * rate ** np.arange(len(reaches)) * reaches
            yields[drafted + 1 : drafted + 1 + len(share)] += kept[drafted] * share
    return yields


def ewif(cascade: Cascade, matrix: Matrix) -> float:
    """The expected speedup over the target alone."""
    return cost_of(cascade.costs[0])(1) / steps(cascade, matrix)[0].round.latency


def reviews(cascade: Cascade, matrix: Matrix) -> Floats:
    """By model, how often it reviews (the last drafter: writes) during one step of the target, on
    average. Counted costs, such as the paper's standardized walltime, are the product of this with
    the costs. models + 1.

    Steps of a model are independent and alike, so by Wald's identity calls multiply down the levels."""
    counts: Floats = np.eye(1, len(cascade.costs) + 1)[0]
    for reviewer, step in enumerate(steps(cascade, matrix)):
        counts = counts + counts[reviewer] * step.calls
    return counts


def _demand_matrix(matrix: Matrix, models: int) -> None:
    square = len(matrix) == models and all(len(row) == models for row in matrix)
    if not square or any(entry < 0 for row in matrix for entry in row):
        raise DrafterError(
            f"the matrix {[list(row) for row in matrix]} for {models} models that review: "
            f"give {models} rows of {models} numbers from 0 up"
        )
