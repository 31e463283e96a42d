"""Thresholds of an acceptance head, tried without decoding: chains are drafted once behind cut answers, as long as any
rule would have them, and the target says once how probably each token is accepted. What every threshold, and every
fixed length, would have brought is then arithmetic.

Rounds begin at places drawn evenly from the answers. Those of an engine begin a little more often at hard ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from forerun.drafting.acceptance.head import AcceptanceHead
from forerun.drafting.drafter import Context
from forerun.drafting.growth import Chain, Form
from forerun.drafting.stopping import LAST, Drafted
from forerun.errors import TrainingError
from forerun.model import Model
from forerun.nn.network import Network
from forerun.row import Row
from forerun.sampling import SamplingParams, laws
from forerun.train.distill import Sample
from forerun.tree import TokenTree

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Those of the paper."""
LEAST, MOST = 2, 20
AT_ONCE = 16
"""Chains: a target's memory of more texts is large."""


@dataclass(frozen=True)
class Rates:
    """Of a way of stopping. Per round: tokens that are drafted, and of these accepted."""

    drafted: float
    accepted: float

    @property
    def discard(self) -> float:
        """Drafted tokens that are not kept, per new token."""
        return (self.drafted - self.accepted) / (1 + self.accepted)

    @property
    def verification(self) -> float:
        """Rounds per new token."""
        return 1 / (1 + self.accepted)

    def seconds(self, draft: float, target: float) -> float:
        """Per new token, where a drafted token and a verification take so long."""
        return draft * (1 + self.discard) + self.verification * (target - draft)


@dataclass(frozen=True)
class Replay:
    """R chains of J tokens: how probably each is accepted where those before it were, and what the head says of all
    but the last two, [R, J - 2]: nobody asks about these."""

    accepted_RJ: Tensor
    said_RJ: Tensor

    @property
    def kept_RJ(self) -> Tensor:
        """How many tokens are accepted of chains of 1, 2, ... tokens."""
        return self.accepted_RJ.cumprod(1).cumsum(1)

    def fixed(self, length: int) -> Rates:
        return Rates(length, float(self.kept_RJ[:, length - 1].mean()))

    def best_fixed(self, draft: float, target: float) -> int:
        """The length that takes the fewest seconds per token."""
        return min(range(1, self.accepted_RJ.shape[1] + 1), key=lambda one: self.fixed(one).seconds(draft, target))

    def at(self, threshold: float, least: int = LEAST) -> Rates:
        """With this threshold. The token behind the one at which it is passed is drafted too."""
        most = self.accepted_RJ.shape[1]
        passed_RJ = 1 - self.said_RJ.cumprod(1) > threshold
        passed_RJ[:, : max(0, least - 2)] = False
        sizes_R = torch.where(passed_RJ.any(1), passed_RJ.int().argmax(1) + 2, most)
        kept_R = self.kept_RJ.gather(1, sizes_R[:, None] - 1)
        return Rates(float(sizes_R.double().mean()), float(kept_R.mean()))

    def figures(self, thresholds: Sequence[float]) -> dict[str, float]:
        """By name, as a log has them: h30_drafted is that of the threshold 0.3."""
        rates = {f"h{round(100 * one)}": self.at(one) for one in thresholds}
        return {f"{name}_{what}": getattr(one, what) for name, one in rates.items() for what in ("drafted", "accepted")}


@dataclass(frozen=True)
class Chains:
    """R chains of J tokens: how probably each is accepted, and the draft model's states at all but the last
    two, [R, J - 2, D]. They do not depend on a head."""

    accepted_RJ: Tensor
    states_RJD: Tensor

    @torch.no_grad()
    def heard(self, head: AcceptanceHead) -> Replay:
        return Replay(self.accepted_RJ, head.probability(self.states_RJD))


@dataclass
class _Noting:
    """A rule that never ends a chain and keeps the states."""

    most: int = MOST
    looks: bool = False
    reads: frozenset[int] = frozenset({LAST})
    seen: list[Tensor] = field(default_factory=list)

    def goes_on(self, drafted: Drafted) -> Tensor:
        self.seen.append(drafted.states[LAST].float())
        return torch.ones(len(drafted.rows), dtype=torch.bool)


class Growing(Protocol):
    """A drafter that grows what its form says."""

    form: Form

    @property
    def bytes_per_token(self) -> float: ...

    @property
    def reads(self) -> frozenset[int]: ...

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None: ...

    def release(self, slot: int) -> None: ...

    def propose(self, context: Context) -> TokenTree: ...


@torch.no_grad()
def chains_of(target: Network, drafter: Growing, rows: Sequence[Row], most: int = MOST) -> Chains:
    """A chain of so many tokens behind each of these texts. The drafter grows such chains from now on."""
    groups = [_chains(target, drafter, rows[at : at + AT_ONCE], most) for at in range(0, len(rows), AT_ONCE)]
    return Chains(*(torch.cat([getattr(one, name) for one in groups]) for name in ("accepted_RJ", "states_RJD")))


def _chains(target: Network, drafter: Growing, rows: Sequence[Row], most: int) -> Chains:
    rule, judge = _Noting(most), Model(target, most + 1)
    drafter.form = Chain(rule)
    for row in rows:
        drafter.admit(row, judge.prefill_all(row, judge.admit(row.limit), drafter.reads))
    try:
        tree = drafter.propose(Context(rows, [most] * len(rows), [most] * len(rows), target.device))
    finally:
        for slot in reversed(range(len(rows))):
            drafter.release(slot)
    law_RJV = laws(judge.score(tree, rows).logits_BNV.float(), [row.params for row in rows])
    tokens_RJ = tree.tokens_BN[:, 1:, None]
    theirs_RJ = law_RJV[:, :-1].gather(-1, tokens_RJ)[..., 0]
    ours_RJ = 1.0 if tree.laws_BNV is None else tree.laws_BNV[:, :-1].gather(-1, tokens_RJ)[..., 0]
    states = rule.seen[1:]  # the first are of the text
    if not states:
        raise TrainingError("drafts of fewer than three tokens end themselves: nothing is left to decide for a head")
    return Chains((theirs_RJ / ours_RJ).clamp(max=1).float(), torch.stack(states, 1))


def cut(samples: Sequence[Sample], longest: int, temperature: float, luck: np.random.Generator) -> list[Row]:
    """Rows of answers that end at some token of theirs, with room for a chain in a context of so many tokens."""
    rows = []
    for number, sample in enumerate(samples):
        text = [*sample.prompt, *sample.answer[: luck.integers(1, len(sample.answer) + 1)]][-(longest - MOST - 2) :]
        key = int(luck.integers(1 << 60))
        params = SamplingParams(temperature=temperature)
        rows.append(Row(text, len(text), params, key=key + number, limit=len(text) + MOST + 2))
    return rows
