"""When a drafter stops growing a chain.

A rule is asked after every level and may look only at what has been drawn so far: it decides
whether the *next* token will be drawn, never whether the last one is dropped (dropping a token
after seeing it changes the law of what is left).

A rule may have learnt to tell from the drafter's states whether the target will agree (SpecDec++,
arXiv 2405.19715): it states the layers it `reads`. The state of a token is there once the next one
is drawn, so such a rule speaks about all tokens but the newest. That costs no forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from forerun.cost import Lately, Table
from forerun.drafting.acceptance.head import AcceptanceHead, corrected, head_on
from forerun.drafting.settings import demand_count
from forerun.errors import DrafterError
from forerun.row import Row

LAST = -1
"""Of the layers that a rule may read, the one that the output projection sees, whatever its number."""


@dataclass(frozen=True)
class Drafted:
    """What has been drawn so far in some rows: `depth` tokens in each.

    probs_BJ: their draft probabilities, J is `depth` (None for a rule that does not look at them).
    states: per layer that the rule reads, the drafter's states that the newest tokens were drawn
    behind, [B, D]: at depth 1 those of the text, then those of the tokens drafted before.
    notes: what the rule has noted of this draft, at the depths before. costs: as of `Context`.
    """

    depth: int
    rows: Sequence[Row]
    probs_BJ: Tensor | None = None
    states: Mapping[int, Tensor] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)
    costs: Table | None = None


class Stopping(Protocol):
    """A rule. `most`: no chain is longer. `looks`: it wants to know the probabilities. `reads`: the
    layers of the drafter whose states it wants, numbered as transformers does, or LAST.

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


AUTO = "auto"
UNMEASURED = 0.4
"""An automatic threshold where nothing has been measured, or where the clock must have no say."""
LOWEST, HIGHEST = 0.02, 0.95


@dataclass(frozen=True, eq=False)
class Acceptance:
    """Go on while the head sees a chance of at most `threshold` that some token will be rejected (SpecDec++).

    The head knows nothing of the newest token yet, so that one is drafted whatever becomes of it.
    threshold: None measures it (`fair_threshold`), and then the head's words are taken as
    probabilities; a number is held against what the head says, as in the paper. least: tokens that
    are always drawn.
    """

    looks: ClassVar[bool] = False
    reads: ClassVar[frozenset[int]] = frozenset({LAST})

    head: AcceptanceHead
    threshold: float | None = 0.7
    least: int = 2
    most: int = 20

    def goes_on(self, drafted: Drafted) -> Tensor:
        survival_B = self._survival(drafted)
        if drafted.depth < self.least:
            return torch.ones_like(survival_B, dtype=torch.bool)
        return (1 - survival_B <= self._thresholds(drafted)) & (drafted.depth < self.most)

    def _survival(self, drafted: Drafted) -> Tensor:
        """How probably all tokens but the newest are accepted, [B]."""
        states_BD = drafted.states[LAST]
        if drafted.depth == 1:
            survival_B = states_BD.new_ones(len(states_BD), dtype=torch.float32)
        else:
            said_B = self.head.probability(states_BD)
            means_B = corrected(said_B, self.head.config.weight) if self.threshold is None else said_B
            survival_B = drafted.notes["survival"] * means_B
        drafted.notes["survival"] = survival_B
        return survival_B

    def _thresholds(self, drafted: Drafted) -> Tensor | float:
        """[B], or one for all."""
        if self.threshold is not None:
            return self.threshold
        fair = UNMEASURED if drafted.costs is None else fair_threshold(drafted.costs.lately)
        repeated = [row.params.seed is not None and not row.params.is_greedy for row in drafted.rows]
        if not any(repeated):
            return fair
        return torch.tensor([UNMEASURED if is_one else fair for is_one in repeated], device=drafted.states[LAST].device)


def fair_threshold(lately: Lately) -> float:
    """The probability of a rejection at which drawing one token more neither gains nor loses time.

    Where every token survives with the same probability, that is 1 - seconds of a drafted token
    times tokens per second (specs of SpecDec++, section 3). The square of the acceptance is ours:
    the newest token, and the one that may be drawn, may be rejected too, and the head says nothing
    of either.
    """
    if not lately.drafted or not lately.seconds:
        return UNMEASURED
    share = lately.draft_seconds / lately.drafted * lately.tokens / lately.seconds
    return min(max(1 - share / max(lately.acceptance, LOWEST) ** 2, LOWEST), HIGHEST)


@dataclass(frozen=True)
class Learnt:
    """The settings of an `Acceptance`, until there is a drafter whose states it reads (`prepared`)."""

    checkpoint: str = ""
    threshold: float | str = 0.7
    least: int = 2
    most: int = 20

    def prepared(self, width: int, device: torch.device) -> Acceptance:
        threshold = None if isinstance(self.threshold, str) else self.threshold
        return Acceptance(head_on(self.checkpoint, width, device), threshold, self.least, self.most)


Rule = Stopping | Learnt
"""As settings name it."""


def prepared(rule: Rule, width: int, device: torch.device) -> Stopping:
    """The rule, ready to be asked about a drafter whose last states are so wide."""
    return rule.prepared(width, device) if isinstance(rule, Learnt) else rule


RULES: dict[str, type[Fixed | Confidence | CumulativeConfidence | Learnt]] = {
    "fixed": Fixed,
    "confidence": Confidence,
    "cumulative": CumulativeConfidence,
    "acceptance": Learnt,
}


def stopping(rule: str = "fixed", **settings: Any) -> Rule:
    """A rule by name, as drafter files give it: {"rule": "confidence", "threshold": 0.5, "most": 8}."""
    if not isinstance(rule, str) or rule not in RULES:
        raise DrafterError(f"unknown stopping rule {rule!r}: there are {', '.join(RULES)}")
    kind = RULES[rule]
    known = [one.name for one in fields(kind)]
    odd = next((name for name in settings if name not in known), None)
    if odd is not None:
        raise DrafterError(f"stopping rule {rule!r} has no setting {odd!r}: it takes {', '.join(known)}")
    made = kind(**settings)
    threshold = getattr(made, "threshold", 0)
    if isinstance(made, Learnt):
        if not isinstance(made.checkpoint, str) or not made.checkpoint:
            raise DrafterError(f"stopping rule {rule!r} needs the folder of a trained head: write {rule}:PATH")
        demand_count(f"stopping rule {rule!r}", "least", made.least)
        threshold = 0 if threshold == AUTO else threshold
    demand_count(f"stopping rule {rule!r}", "most", made.most)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise DrafterError(f"stopping rule {rule!r} with threshold={threshold!r}: give a probability, from 0 to 1")
    if isinstance(made, Learnt) and made.least > made.most:
        raise DrafterError(
            f"stopping rule {rule!r} draws at least {made.least} tokens and at most {made.most}: least is no more than"
            " most"
        )
    return made


def rule_of(description: str | Mapping[str, Any]) -> Rule:
    """The rule of a setting: {"rule": NAME, ...}, NAME, or NAME:CHECKPOINT."""
    if isinstance(description, str):
        name, colon, checkpoint = description.partition(":")
        return stopping(name, **({"checkpoint": checkpoint} if colon else {}))
    if "rule" not in description:
        raise DrafterError(f'a stopping rule has a name, one of {", ".join(RULES)}: write it under "rule"')
    return stopping(**description)
