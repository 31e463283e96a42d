"""When a drafter stops growing a chain.

A rule is asked after every level and may look only at what has been drawn so far: it decides
whether the *next* token will be drawn, never whether the last one is dropped (dropping a token
after seeing it changes the law of what is left).

A rule may be a module with parameters of its own, trained to tell from the draft model's states
whether the target will agree (SpecDec++, arXiv 2405.19715): it states the layers it `reads`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from forerun.errors import DrafterError
from forerun.row import Row


@dataclass(frozen=True)
class Drafted:
    """What has been drawn so far in some rows: `depth` tokens in each.

    probs_BJ: their draft probabilities, J is `depth` (None for a rule that does not look at them).
    states: per layer that the rule reads, the draft model's states at the newest tokens, [B, D].
    """

    depth: int
    rows: Sequence[Row]
    probs_BJ: Tensor | None = None
    states: Mapping[int, Tensor] = field(default_factory=dict)


class Stopping(Protocol):
    """A rule. `most`: no chain is longer. `looks`: it wants to know the probabilities. `reads`: the
    layers of the draft model whose states it wants, numbered as transformers does; the newest token
    is then read before the rule is asked.

    A rule that neither looks nor reads is not asked: it draws `most`.
    """

    @property
    def looks(self) -> bool: ...

    @property
    def reads(self) -> frozenset[int]: ...

    @property
    def most(self) -> int: ...

    def goes_on(self, drafted: Drafted) -> Tensor:
        """Shall another token be drawn? bool [B]."""


@dataclass(frozen=True)
class Fixed:
    """Always `most` tokens."""

    looks: ClassVar[bool] = False
    reads: ClassVar[frozenset[int]] = frozenset()

    most: int = 5

    def goes_on(self, drafted: Drafted) -> Tensor:
        return torch.full((len(drafted.rows),), drafted.depth < self.most)


@dataclass(frozen=True)
class Confidence:
    """Go on while the last token had at least this draft probability (transformers' assistant_confidence_threshold)."""

    looks: ClassVar[bool] = True
    reads: ClassVar[frozenset[int]] = frozenset()

    threshold: float = 0.4
    most: int = 20

    def goes_on(self, drafted: Drafted) -> Tensor:
        assert drafted.probs_BJ is not None
        return (drafted.probs_BJ[:, -1] >= self.threshold) & (drafted.depth < self.most)


@dataclass(frozen=True)
class CumulativeConfidence:
    """Go on while the whole chain so far has at least this draft probability: an estimate that all of it survives."""

    looks: ClassVar[bool] = True
    reads: ClassVar[frozenset[int]] = frozenset()

    threshold: float = 0.3
    most: int = 20

    def goes_on(self, drafted: Drafted) -> Tensor:
        assert drafted.probs_BJ is not None
        return (drafted.probs_BJ.prod(-1) >= self.threshold) & (drafted.depth < self.most)


RULES: dict[str, Callable[..., Stopping]] = {
    "fixed": Fixed,
    "confidence": Confidence,
    "cumulative": CumulativeConfidence,
}


def stopping(rule: str = "fixed", **settings: float) -> Stopping:
    """A rule by name, as drafter files give it: {"rule": "confidence", "threshold": 0.5, "most": 8}."""
    if not isinstance(rule, str) or rule not in RULES:
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
