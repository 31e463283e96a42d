"""A machine and drafters that are only numbers, to try the controller on: seconds are computed, so nothing drifts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from forerun.cost import Step, Table
from forerun.drafting.pace import PLAIN, Choice, Outcome, Pace, Wish

Quality = Callable[[int, int], float]
"""How likely a draft's next token survives, by row and step."""
Choose = Callable[[Table, list[Wish]], list[Choice]]


@dataclass(frozen=True)
class Part:
    """A drafter of chains. most: their length; hits: how often it has one at all; draft: seconds by rows."""

    quality: Quality
    most: int = 8
    hits: float = 1.0
    draft: Callable[[int], float] = lambda rows: 0.1


@dataclass
class Machine:
    """verify: seconds of a step by nodes and rows. jitter: how much single steps differ."""

    verify: Callable[[int, int], float]
    parts: Sequence[Part]
    jitter: float = 0.0
    seed: int = 0
    seconds: float = 0.0
    tokens: int = 0
    choices: list[list[Choice]] = field(default_factory=list)

    def run(self, steps: int, rows: int, choose: Choose, pace: Pace | None, costs: Table | None = None) -> float:
        """Tokens per second over so many steps."""
        luck, costs = np.random.default_rng(self.seed), costs or Table()
        everybody = frozenset(range(len(self.parts)))
        for step in range(steps):
            choices = choose(costs, [Wish(64, everybody)] * rows)
            self.choices.append(choices)
            outcomes, drafting = [], 0.0
            for number, part in enumerate(self.parts):
                asked = sum(choice.part == number for choice in choices)
                if asked:
                    seconds = part.draft(asked) * self._noise(luck)
                    drafting += seconds
                    if pace:
                        pace.drafted(number, asked, seconds)
            for row, choice in enumerate(choices):
                outcomes.append(self._outcome(luck, row, step, choice))
            nodes = rows + sum(outcome.drafted for outcome in outcomes)
            kept = sum(len(outcome.path) for outcome in outcomes)
            verifying = self.verify(nodes, rows) * self._noise(luck)
            if pace:
                pace.learn(outcomes)
            costs.learn(Step(rows, nodes, 100 * rows, kept, drafting, verifying, 0.0))
            self.seconds += drafting + verifying
            self.tokens += kept
        return self.tokens / self.seconds

    def _noise(self, luck: np.random.Generator) -> float:
        return float(np.exp(self.jitter * luck.standard_normal()))

    def _outcome(self, luck: np.random.Generator, row: int, step: int, choice: Choice) -> Outcome:
        if choice == PLAIN:
            return Outcome(0, [0])
        part = self.parts[choice.part]
        drafted = min(choice.budget, part.most) if luck.random() < part.hits else 0
        survived = luck.random(drafted) < part.quality(row, step)
        kept = drafted if survived.all() else int(np.argmin(survived))
        return Outcome(drafted, range(kept + 1))


def controlled(machine: Machine, steps: int, rows: int) -> float:
    pace = Pace([part.most for part in machine.parts])
    for _ in range(rows):
        pace.admit()
    return machine.run(steps, rows, pace.choose, pace)


def fixed(machine: Machine, steps: int, rows: int, choice: Choice) -> float:
    return machine.run(steps, rows, lambda costs, wishes: [choice] * rows, None)
