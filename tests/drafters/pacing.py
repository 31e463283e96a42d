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


COOLING = 0.4
"""How much of the way to the other temperature a step goes."""


@dataclass(frozen=True)
class Part:
    """A drafter of chains. most: their length; hits: how often it has one at all; draft: seconds by rows; reading: of
    what it has missed, per row and once."""

    quality: Quality
    most: int = 8
    hits: float = 1.0
    draft: Callable[[int], float] = lambda rows: 0.1
    reading: float = 0.0


@dataclass
class Machine:
    """verify: seconds of a step by nodes and rows. jitter: how much single steps differ. heat: by how much steps behind
    wide ones are slower than behind plain ones, as a processor's."""

    verify: Callable[[int, int], float]
    parts: Sequence[Part]
    jitter: float = 0.0
    seed: int = 0
    heat: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    choices: list[list[Choice]] = field(default_factory=list)

    def run(self, steps: int, rows: int, choose: Choose, pace: Pace | None, costs: Table | None = None) -> float:
        """Tokens per second over so many steps."""
        luck, costs = np.random.default_rng(self.seed), costs or Table()
        everybody = frozenset(range(len(self.parts)))
        unread = {(number, row) for number in everybody for row in range(rows)}
        hot = 0.0
        for step in range(steps):
            choices = choose(costs, [Wish(64, everybody)] * rows)
            self.choices.append(choices)
            outcomes, drafting = [], 0.0
            for number, part in enumerate(self.parts):
                asked = sum(choice.part == number for choice in choices)
                if asked:
                    new = unread & {(number, row) for row, choice in enumerate(choices) if choice.part == number}
                    unread -= new
                    seconds = part.draft(asked) * self._noise(luck) + part.reading * len(new)
                    drafting += seconds
                    if pace:
                        pace.drafted(number, asked, seconds)
            for row, choice in enumerate(choices):
                outcomes.append(self._outcome(luck, row, step, choice))
            nodes = rows + sum(outcome.drafted for outcome in outcomes)
            kept = sum(len(outcome.path) for outcome in outcomes)
            verifying = self.verify(nodes, rows) * self._noise(luck) * (1 + self.heat * hot)
            hot += (float(nodes > rows) - hot) * COOLING
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
