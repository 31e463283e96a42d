"""Answers of several kinds, mixed by how far behind the pupil is on each of them (the dynamic batch loading of Sheared
LLaMA, arXiv 2310.06694, section 2.2).

    w <- softmax(ln w + excess);  w <- (1 - c) w + c / n

The excess of a kind is what the pupil loses on it beyond what it is to reach. That is the target's own loss here, so it
is the divergence from the target's law.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forerun.cost import Floats
from forerun.train.answers import Answers, Batch

LEAST = 1e-4
"""c: what every kind keeps, all kinds together."""


def reweighted(weights: Floats, excess: Floats, least: float = LEAST) -> Floats:
    """Shares of the kinds from now on. excess: nats."""
    raised = np.log(weights) + excess
    shares = np.exp(raised - raised.max())
    found: Floats = (1 - least) * shares / shares.sum() + least / len(shares)
    return found


@dataclass
class Domains:
    """The kinds, and the share of batches that each has now: evenly many to begin with."""

    kinds: Sequence[Answers]
    shares: Floats

    @staticmethod
    def of(kinds: Sequence[Answers]) -> Domains:
        return Domains(kinds, np.full(len(kinds), 1 / len(kinds)))

    def batch(self, number: int) -> Batch:
        """Batch `number`, of a kind that is drawn from the shares as they are now."""
        kinds = self.kinds
        drawn = np.random.default_rng((kinds[0].seed, number)).choice(len(kinds), p=self.shares)
        return kinds[drawn].batch(number)

    def learn(self, excess: Sequence[float]) -> None:
        self.shares = reweighted(self.shares, np.asarray(excess, np.float64))
