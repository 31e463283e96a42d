"""What a forward costs, by the number of tokens that it reads.

Nothing here looks at a clock: the numbers come from a measurement, or are units of the target's cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forerun.errors import DrafterError

Floats = NDArray[np.float64]
Cost = Callable[[int], float]
"""Seconds of one forward that reads so many new tokens (1 or more). Verifying S drafts reads S + 1: the newest committed token
has not been read yet."""
Price = float | Cost
"""A Cost, or plain seconds that hold for every number of tokens."""


@dataclass(frozen=True)
class Affine:
    """A fitted law: seconds + per_token * tokens."""

    seconds: float
    per_token: float = 0.0

    def __call__(self, tokens: int) -> float:
        return self.seconds + self.per_token * tokens


@dataclass(frozen=True)
class Table:
    """Medians as they were measured: (tokens, seconds), tokens ascending. Straight lines between the points; past the last
    one the last slope goes on, because a flat end would make long drafts look free. Before the first, the first."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        tokens = [tokens for tokens, _ in self.points]
        if not tokens or tokens != sorted(set(tokens)):
            raise DrafterError(f"a table of costs at {tokens} tokens: give one or more numbers of tokens, ascending")

    def __call__(self, tokens: int) -> float:
        known = [tokens for tokens, _ in self.points]
        within = float(np.interp(tokens, known, [seconds for _, seconds in self.points]))
        return within + max(0, tokens - known[-1]) * self._last_slope

    @property
    def _last_slope(self) -> float:
        if len(self.points) < 2:
            return 0.0
        (before, faster), (last, slower) = self.points[-2:]
        return max((slower - faster) / (last - before), 0.0)


def cost_of(price: Price) -> Cost:
    return price if callable(price) else Affine(price)
