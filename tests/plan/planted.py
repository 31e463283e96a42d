"""What formulas are held against: the plain recursion, a simulator that plants acceptance,
independent at every level, and one that draws tokens from models that do not look at their context.
None of them knows forerun.plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

Yields = tuple[float, ...]
Generator = np.random.Generator
Array = np.ndarray[Any, Any]
Ready = Callable[[int, int, Array], Array]
"""(size, rounds made, tokens there) -> which rows have enough."""


@cache
def yields_of(rate: float, drafts: int) -> Yields:
    """The probabilities that a round emits 0, 1, ... tokens."""
    return (0.0, *((1 - rate) * rate ** (k - 1) for k in range(1, drafts + 1)), rate**drafts)


@cache
def rounds_by_recursion(yields: Yields, tokens: int) -> float:
    """r(T) = 1 + sum over the first round's yield k of P(k) r(T - k)."""
    if tokens <= 0:
        return 0.0
    return 1 + sum(share * rounds_by_recursion(yields, tokens - k) for k, share in enumerate(yields) if k)


def mean(yields: Yields) -> float:
    return sum(k * share for k, share in enumerate(yields))


def at_least(size: int, made: int, there: Array) -> Array:
    return there >= size


def fixed_rounds(size: int, made: int, there: Array) -> Array:
    return np.full(len(there), made >= size)


@dataclass(frozen=True)
class Ratio:
    """Seconds per token over outer rounds, with its standard error (delta method)."""

    value: float
    error: float

    @staticmethod
    def of(seconds: Array, tokens: Array) -> Ratio:
        value = seconds.mean() / tokens.mean()
        return Ratio(float(value), float((seconds - value * tokens).std() / tokens.mean() / len(tokens) ** 0.5))

    def is_near(self, expected: float, sigmas: float = 3) -> bool:
        return abs(self.value - expected) <= sigmas * self.error


@dataclass(frozen=True)
class Planted:
    """Only lengths exist. bottom(rows) -> lengths and seconds of drafts; costs and rates of those
    that verify, from below; cost is a function of the tokens read. cut: whether a surplus is
    dropped."""

    bottom: Callable[[int], tuple[Array, Array]]
    costs: Sequence[Callable[[Array], Array]]
    rates: Sequence[float]
    sizes: Sequence[int]
    ready: Ready = at_least
    cut: bool = False

    def latency(self, rng: Generator, rows: int) -> Ratio:
        tokens, seconds = self.verify(rng, len(self.rates) - 1, rows)
        return Ratio.of(seconds, tokens)

    def verify(self, rng: Generator, level: int, rows: int) -> tuple[Array, Array]:
        lengths, seconds = self.bottom(rows) if level == 0 else self.gather(rng, level - 1, rows)
        right = rng.geometric(1 - self.rates[level], rows) - 1 if self.rates[level] < 1 else lengths
        return np.minimum(right, lengths) + 1, seconds + self.costs[level](lengths + 1)

    def gather(self, rng: Generator, level: int, rows: int) -> tuple[Array, Array]:
        there, spent, made = np.zeros(rows, int), np.zeros(rows), 0
        going = np.arange(rows)
        while len(going):
            tokens, seconds = self.verify(rng, level, len(going))
            there[going] += tokens
            spent[going] += seconds
            made += 1
            going = going[~self.ready(self.sizes[level], made, there[going])]
        return np.minimum(there, self.sizes[level]) if self.cut else there, spent


@dataclass(frozen=True)
class ContextFree:
    """Three models over a few symbols, each with one law for every context. Tokens are drawn,
    tested and replaced as in the algorithm; every emitted token is handed up with the law of the
    model that verified it."""

    laws: Array
    costs: Sequence[float]

    @property
    def rates(self) -> list[float]:
        return [float(np.minimum(low, high).sum()) for low, high in pairwise(self.laws)]

    def latency(self, rng: Generator, sizes: Sequence[int], rows: int, ready: Ready, cut: bool) -> Ratio:
        bottom, middle, _ = self.costs
        tokens, lengths, rounds = self.middle_draft(rng, sizes, rows, ready)
        if cut:
            lengths = np.minimum(lengths, sizes[1])
        _, emitted = verified(rng, self.laws[2], self.laws[1], tokens, lengths)
        return Ratio.of(self.costs[2] + rounds * (middle + sizes[0] * bottom), emitted)

    def middle_draft(self, rng: Generator, sizes: Sequence[int], rows: int, ready: Ready) -> tuple[Array, Array, Array]:
        """The tokens that the middle model hands up, how many, and its rounds."""
        first, second = sizes
        tokens = np.zeros((rows, (second + 1) * (first + 1)), int)
        lengths, rounds, made = np.zeros(rows, int), np.zeros(rows, int), 0
        going = np.arange(rows)
        while len(going):
            drafts = drawn(rng, self.laws[0], (len(going), first))
            out, emitted = verified(rng, self.laws[1], self.laws[0], drafts, np.full(len(going), first))
            for place in range(first + 1):
                has = emitted > place
                tokens[going[has], lengths[going[has]] + place] = out[has, place]
            lengths[going] += emitted
            rounds[going] += 1
            made += 1
            going = going[~ready(second, made, lengths[going])]
        return tokens, lengths, rounds


def drawn(rng: Generator, law: Array, shape: tuple[int, ...] | int) -> Array:
    return np.searchsorted(np.cumsum(law)[:-1], rng.random(shape), side="right")


def verified(rng: Generator, target: Array, draft: Array, tokens: Array, lengths: Array) -> tuple[Array, Array]:
    """Accept with min(1, p/q), replace the first that fails from what p has over q, add one where none fails."""
    rows, width = tokens.shape
    passes = rng.random(tokens.shape) < target[tokens] / draft[tokens]
    passes &= np.arange(width) < lengths[:, None]
    accepted = np.cumprod(passes, axis=1).sum(1)
    over = np.maximum(target - draft, 0)
    extra = np.where(accepted < lengths, drawn(rng, over / over.sum(), rows), drawn(rng, target, rows))
    out = np.concatenate([tokens, np.zeros((rows, 1), int)], axis=1)
    out[np.arange(rows), accepted] = extra
    return out, accepted + 1
