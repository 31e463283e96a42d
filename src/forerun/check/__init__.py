"""Is the output really the same? Two questions asked of any model and drafter.

*Greedy*: token ids equal plain decoding's, alone and in a batch. In half precision a forward of
several tokens rounds differently from a forward of one, so a near-tie between two tokens can flip.
A difference is called a tie only where the two tokens' logits lie closer together than the rounding
that was measured here, on these texts; anything else fails.

*Law*: sampled tokens follow plain sampling's law. Both are sampled with different seeds, and their total-variation
distance is held against what relabelling the same samples at random gives (a permutation test).

    report = check(forerun.load(path), forerun.load(path, drafter="lookup"), prompts)
    assert report.passed, report.verdicts()
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from forerun.check.amount import Amount
from forerun.check.greedy import Greedy, check_greedy
from forerun.check.law import Law, check_law
from forerun.check.rounding import rounding_bound
from forerun.check.texts import plain_texts
from forerun.engine.engine import Engine
from forerun.engine.prompts import Prompt
from forerun.errors import RequestError

__all__ = ["Amount", "Greedy", "Law", "Report", "check"]


@dataclass(frozen=True)
class Report:
    """What was found. `passed`: exact, as far as this many tokens and samples can tell; a lossy
    drafter never passes."""

    drafter: str
    dtype: str
    lossy: bool
    greedy: tuple[Greedy, ...]
    sampled: tuple[Law, ...]

    @property
    def passed(self) -> bool:
        return not self.lossy and all(one.passed for one in self.greedy) and all(one.passed for one in self.sampled)

    def verdicts(self) -> list[str]:
        """One line per question, and a last one that says it all."""
        lines = [part.verdict(self.dtype) for part in self.greedy]
        if self.sampled:
            lines.append(Law.verdict_of(self.sampled))
        if self.lossy:
            return [*lines, f"LOSSY: {self.drafter} declares that it changes what the model says"]
        return [*lines, f"{'EXACT' if self.passed else 'NOT EXACT'}: drafter {self.drafter}, {self.dtype}"]

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "drafter": self.drafter,
            "dtype": self.dtype,
            "lossy": self.lossy,
            "greedy": [part.as_dict(self.dtype) for part in self.greedy],
            "sampled": [part.as_dict() for part in self.sampled],
            "verdicts": self.verdicts(),
        }


def check(plain: Engine, drafted: Engine, prompts: Sequence[Prompt], plan: Amount | None = None) -> Report:
    """Compare two engines on the same target, one with and one without a drafter. Both must be idle.

    Raises RequestError for prompts that do not fit the context, or a plan without content.
    """
    plan = plan or Amount()
    tokens = [plain.encode(prompt) for prompt in prompts]
    if not tokens:
        raise RequestError("there are no prompts to check on: give at least one")
    greedy: list[Greedy] = []
    lossy = False
    if plan.tokens:
        texts = plain_texts(plain, tokens, plan.tokens, plan.greedy_length)
        bound = rounding_bound(plain.target, texts, drafted.drafter.max_nodes + 1, max(plan.rows))
        for rows in plan.rows:
            part, exact = check_greedy(drafted, texts, rows, bound)
            greedy.append(part)
            lossy |= not exact
    sampled: tuple[Law, ...] = ()
    if plan.samples:
        sampled, exact = check_law(plain, drafted, tokens, plan)
        lossy |= not exact
    network = plain.target.network
    dtype = str(network.dtype).removeprefix("torch.") + (", int8 weights" if network.weights == torch.int8 else "")
    return Report(drafted.drafter.name, dtype, lossy, tuple(greedy), sampled)
