"""How many tokens an iteration settles: as somebody says, as replayed answers have it, or as a fit to models that were
trained predicts it for shapes that nobody has trained.

Tokens per step are the tokens that survive and the target's own next one. A rate is the chance of a drafted token to
survive where all before it have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from math import exp, log
from typing import Protocol

import numpy as np
import torch

from forerun.cost import Floats
from forerun.errors import DrafterError
from forerun.model import Model
from forerun.nn.network import Network
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.train.distill import Sample
from forerun.train.replay import Hits, emitted
from forerun.tree import TokenTree

CHUNK = 64
"""Tokens of an answer that are scored at a time."""
FAR = 16
"""Tokens of the drafts that rates are counted on."""
CERTAIN = 1 - 1e-6
"""No rate is higher."""
RIDGE, FEWEST, WORST = 1e-3, 4, 0.05
"""Of a fit: what keeps its slopes small, the trained models that it needs, and the error of a rate that it may make."""


class Acceptance(Protocol):
    """What is known or believed of one draft model."""

    @property
    def rate(self) -> float: ...

    def tokens(self, length: int) -> float:
        """Tokens per step with drafts of so many tokens, from 0."""

    def shifted(self, by: float) -> Acceptance:
        """The same with a rate that is higher by so much."""


@dataclass(frozen=True)
class Given:
    """survival: how often the first j drafted tokens all survive, j from 1; behind the last, as often as there once
    more. The rate of every token on its own, if it is the only number."""

    survival: tuple[float, ...]

    def __post_init__(self) -> None:
        steps = (1.0, *self.survival)
        if len(steps) < 2 or not all(0 <= later <= before for before, later in pairwise(steps)):
            raise DrafterError(
                f"{list(self.survival)} is no survival of drafted tokens: give numbers from 0 to 1 that never rise"
            )

    @property
    def rate(self) -> float:
        return self.survival[0]

    def survives(self, j: int) -> float:
        known = self.survival
        if j <= len(known):
            return known[j - 1]
        before = (1.0, *known)[-2]
        return float(known[-1] * (known[-1] / before if before else 0.0) ** (j - len(known)))

    def tokens(self, length: int) -> float:
        return 1 + sum(self.survives(j) for j in range(1, length + 1))

    def shifted(self, by: float) -> Given:
        """Every token on its way is more likely by as much as the first."""
        rate = min(max(self.rate + by, 0.0), CERTAIN)
        factor = rate / self.rate if self.rate else 0.0
        found, before = [], 1.0
        for j, survival in enumerate(self.survival, 1):
            before = min(before, survival * factor**j)
            found.append(before)
        return Given(tuple(found)) if self.rate else Given((rate,))


@dataclass(frozen=True)
class Replayed:
    """What the answers of a target have shown of a draft model (`train/replay.py`)."""

    answers: tuple[Hits, ...]

    @cached_property
    def rate(self) -> float:
        """Of all drafted tokens whose fate was settled, those that survived."""
        kept = missed = 0
        for hits in self.answers:
            place = 0
            for settled in emitted(hits, FAR):
                survived = int(hits[place : place + min(settled, FAR)].cumprod().sum())
                kept, missed = kept + survived, missed + (survived < min(settled, FAR))
                place += settled
        return kept / max(1, kept + missed)

    def tokens(self, length: int) -> float:
        return self._mean(length, range(len(self.answers)))

    def _mean(self, length: int, picks: Sequence[int]) -> float:
        each = self._emitted(length)
        return float(each[picks, 0].sum() / max(1.0, each[picks, 1].sum())) if len(each) else 1.0

    def _emitted(self, length: int) -> Floats:
        """Tokens and iterations of every answer, [A, 2]."""
        if length not in self._known:
            counts = [(len(hits), len(emitted(hits, length))) for hits in self.answers]
            self._known[length] = np.array(counts, dtype=np.float64)
        return self._known[length]

    @cached_property
    def _known(self) -> dict[int, Floats]:
        return {}

    def survival(self, length: int) -> tuple[float, ...]:
        """How often the first j tokens of a draft all survive, of the drafts that an end of an answer did not cut."""
        counts, whole = np.zeros(length), 0
        for hits in self.answers:
            place = 0
            for settled in emitted(hits, length):
                if place + length <= len(hits):
                    counts += hits[place : place + length].cumprod()
                    whole += 1
                place += settled
        return tuple((counts / max(1, whole)).tolist())

    def interval(self, length: int, draws: int = 400, seed: int = 0) -> tuple[float, float]:
        """Where 95 % of the means lie when as many answers are drawn anew from these."""
        random = np.random.default_rng(seed)
        picks = random.integers(len(self.answers), size=(draws, len(self.answers)))
        low, high = np.quantile([self._mean(length, pick) for pick in picks], (0.025, 0.975))
        return float(low), float(high)

    def shifted(self, by: float) -> Acceptance:
        return Given(self.survival(FAR)).shifted(by) if self.rate else Given((max(by, 0.0),))


@torch.inference_mode()
def replayed(network: Network, samples: Sequence[Sample]) -> Replayed:
    """Of greedy answers of a target, read by a draft model. The target is not needed."""
    greedy = [sample for sample in samples if sample.temperature == 0 and sample.answer]
    if not greedy:
        raise DrafterError("there are no greedy answers to replay: distil some with --temperature 0")
    return Replayed(tuple(_hits(network, sample) for sample in greedy))


def _hits(network: Network, sample: Sample) -> Hits:
    tokens, first = [*sample.prompt, *sample.answer], len(sample.prompt)
    model, right = Model(network, CHUNK), list[bool]()
    row = Row(tokens[:first], first, SamplingParams(), 0, len(tokens))
    model.admit(len(tokens))
    while len(row.tokens) < len(tokens):
        begin = len(row.tokens) - 1
        size = min(CHUNK, len(tokens) - 1 - begin)
        best = model.score(TokenTree.chain([tokens[begin : begin + size]], network.device), [row]).best[0]
        coming = tokens[begin + 1 : begin + 1 + size]
        right += [ours == theirs for ours, theirs in zip(best.tolist(), coming, strict=True)]
        model.keep([range(size)])
        row.tokens += coming
    return np.array(right)


# ---- shapes that nobody has trained


@dataclass(frozen=True)
class Trained:
    """A draft model that was measured: parameters that are not of the vocabulary, layers, and the tokens that it was
    trained on."""

    parameters: float
    layers: int
    tokens: float
    rate: float

    @property
    def features(self) -> tuple[float, float, float]:
        return log(self.parameters), log(self.layers), log(self.tokens)


@dataclass(frozen=True)
class Fit:
    """logit(rate) = base + slopes . (log parameters, log layers, log tokens trained on); no slope is negative. error:
    the mean one of the rates when each model is predicted from the others."""

    base: float
    slopes: tuple[float, float, float]
    error: float

    def rate(self, parameters: float, layers: int, tokens: float) -> float:
        features = log(parameters), log(layers), log(tokens)
        return 1 / (1 + exp(-self.base - sum(b * x for b, x in zip(self.slopes, features, strict=True))))


def fit(trained: Sequence[Trained]) -> Fit:
    """DrafterError where that would be guesswork: with too few models, or if it misses those that there are."""
    if len(trained) < FEWEST:
        raise DrafterError(
            f"{len(trained)} trained draft models are too few to predict others from: measure {FEWEST}, or give a rate"
        )
    misses = []
    for out in range(len(trained)):
        base, slopes = _solved([*trained[:out], *trained[out + 1 :]])
        one = trained[out]
        misses.append(abs(Fit(base, slopes, 0).rate(one.parameters, one.layers, one.tokens) - one.rate))
    error = sum(misses) / len(misses)
    if error > WORST:
        raise DrafterError(
            f"rates of trained draft models are missed by {error:.3f} when each is predicted from the others: give a"
            " rate instead"
        )
    return Fit(*_solved(trained), error)


def _solved(trained: Sequence[Trained]) -> tuple[float, tuple[float, float, float]]:
    """Least squares with a ridge on the slopes: of all sets of slopes that may differ from zero, the best solution
    without negative ones."""
    x = np.array([one.features for one in trained])
    rates = np.clip([one.rate for one in trained], 1 - CERTAIN, CERTAIN)
    y = np.log(rates / (1 - rates))
    centre, mean = x.mean(0), y.mean()
    best, least = np.zeros(3), float(((y - mean) ** 2).sum())
    for free in (list(some) for count in (1, 2, 3) for some in combinations(range(3), count)):
        part = (x - centre)[:, free]
        slopes = np.linalg.solve(part.T @ part + RIDGE * np.eye(len(free)), part.T @ (y - mean))
        miss = float(((y - mean - part @ slopes) ** 2).sum() + RIDGE * (slopes**2).sum())
        if (slopes >= 0).all() and miss < least:
            least, best = miss, np.zeros(3)
            best[free] = slopes
    first, second, third = best.tolist()
    return float(mean - centre @ best), (first, second, third)
