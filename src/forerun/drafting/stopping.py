"""When a drafter stops growing a chain.

A rule is asked after every level and may look only at what has been drawn so far: it decides whether the *next* token will
be drawn, never whether the last one is dropped (dropping a token after seeing it changes the law of what is left).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from forerun.errors import DrafterError


class Stopping(Protocol):
    """A rule. `most`: no chain is longer. `looks`: it depends on what was drawn, and must be asked."""

    looks: ClassVar[bool]

    @property
    def most(self) -> int: ...

    def goes_on(self, probs_BJ: Tensor) -> Tensor:
        """Given the draft probabilities of the tokens drawn so far (J >= 1): shall another be drawn? bool [B]."""


@dataclass(frozen=True)
class Fixed:
    """Always `most` tokens."""

    looks: ClassVar[bool] = False

    most: int = 5

    def goes_on(self, probs_BJ: Tensor) -> Tensor:
        return torch.full(probs_BJ.shape[:1], probs_BJ.shape[1] < self.most)


@dataclass(frozen=True)
class Confidence:
    """Go on while the last token had at least this draft probability (transformers' assistant_confidence_threshold)."""

    looks: ClassVar[bool] = True

    threshold: float = 0.4
    most: int = 20

    def goes_on(self, probs_BJ: Tensor) -> Tensor:
        return (probs_BJ[:, -1] >= self.threshold) & (probs_BJ.shape[1] < self.most)


@dataclass(frozen=True)
class CumulativeConfidence:
    """Go on while the whole chain so far has at least this draft probability: an estimate that all of it survives."""

    looks: ClassVar[bool] = True

    threshold: float = 0.3
    most: int = 20

    def goes_on(self, probs_BJ: Tensor) -> Tensor:
        return (probs_BJ.prod(-1) >= self.threshold) & (probs_BJ.shape[1] < self.most)


RULES: dict[str, Callable[..., Stopping]] = {
    "fixed": Fixed,
    "confidence": Confidence,
    "cumulative": CumulativeConfidence,
}


def stopping(rule: str = "fixed", **settings: float) -> Stopping:
    """A rule by name, as drafter files give it: {"rule": "confidence", "threshold": 0.5, "most": 8}."""
    if rule not in RULES:
        raise DrafterError(f"unknown stopping rule {rule!r}: there are {', '.join(RULES)}")
    try:
        made = RULES[rule](**settings)
    except TypeError as error:
        raise DrafterError(f"stopping rule {rule!r} does not take these settings: {error}") from None
    threshold = settings.get("threshold", 0)
    if not isinstance(made.most, int) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise DrafterError(f"stopping rule {rule!r} with {given}: most is a whole number, threshold a probability")
    if made.most < 1:
        raise DrafterError(
            f"a stopping rule with most={made.most} drafts nothing: give 1 or more, or use the drafter none"
        )
    return made
