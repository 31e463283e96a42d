"""The law of sampled text: does a drafter sample from the same one as plain decoding?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from forerun.check.amount import Amount
from forerun.check.statistics import Ints, Outcome, compare, distance, places
from forerun.check.texts import finished, with_rows
from forerun.engine.engine import Engine

ROWS = 32
"""Samples that run side by side: many short texts, so that they are cheap."""
PROMPT = 12
"""Tokens of a prompt: every sample reads it anew."""


@dataclass(frozen=True)
class Law:
    """One comparison: the tokens `first` to `last` (counted from 1) behind one prompt, taken together.

    distance: total variation between the two arms, the rarest outcomes pooled. noise: the same
    between two plain runs. p: how often relabelling the samples by chance gives as striking a
    difference anywhere in the whole check. detectable: a true distance that would have failed here
    in about five checks of six.
    """

    prompt: int
    first: int
    last: int
    samples: int
    distance: float
    noise: float
    p: float
    detectable: float
    passed: bool

    @property
    def place(self) -> str:
        tokens = f"token {self.first}" if self.first == self.last else f"tokens {self.first}-{self.last}"
        return f"prompt {self.prompt + 1}, {tokens}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def verdict_of(laws: Sequence[Law]) -> str:
        """One line for all comparisons: the most striking one."""
        worst = min(laws, key=lambda law: (law.p, -law.distance))
        prompts = len({law.prompt for law in laws})
        head = "law: no difference found" if worst.passed else "law: DIFFERENT"
        return (
            f"{head}, {worst.samples} samples of each of {prompts} prompts; most striking: {worst.place}, a distance of"
            f" {worst.distance:.3f} where plain differs from itself by {worst.noise:.3f} (p = {worst.p:.2g});"
            f" {worst.detectable:.3f} would have been found there"
        )


def check_law(
    plain: Engine, drafted: Engine, prompts: Sequence[Sequence[int]], plan: Amount
) -> tuple[tuple[Law, ...], bool]:
    """Sample both engines with different seeds and compare. Also says whether the drafter calls itself exact.

    Different seeds, because with equal ones a deterministic drafter gives the very same text, which
    is another property.
    """
    chosen = short_prompts(prompts, plan.prompts, min(PROMPT, plain.target.max_length - plan.positions))
    arms = [_samples(engine, chosen, plan, arm) for arm, engine in enumerate((plain, plain, drafted))]
    mine, again, theirs = (samples for samples, _ in arms)
    outcomes = compare(list(zip(mine, theirs, strict=True)), plan.level, np.random.default_rng(plan.seed))
    spans = places(mine[0].shape[1])
    laws = [
        _law(index, outcome, (mine[index], again[index]), span, plan)
        for index, group in enumerate(outcomes)
        for span, outcome in zip(spans, group, strict=True)
    ]
    return tuple(laws), arms[-1][1]


def _law(prompt: int, outcome: Outcome, plain: tuple[Ints, Ints], span: slice, plan: Amount) -> Law:
    return Law(
        prompt=prompt,
        first=span.start + 1,
        last=span.stop,
        samples=plan.samples,
        distance=outcome.distance,
        noise=distance(plain[0][:, span], plain[1][:, span]),
        p=outcome.p,
        detectable=outcome.detectable,
        passed=outcome.p >= plan.level,
    )


def _samples(engine: Engine, prompts: Sequence[Sequence[int]], plan: Amount, arm: int) -> tuple[list[Ints], bool]:
    """Per prompt the new tokens [samples, positions]; and whether all were drawn by an exact rule."""
    drawn, exact = [], True
    for index, prompt in enumerate(prompts):
        params = replace(
            plan.params,
            max_new_tokens=plan.positions,
            n=plan.samples,
            seed=(plan.seed * len(prompts) + index) * 3 + arm,
            ignore_eos=True,
            stop=(),
            stop_token_ids=(),
            logprobs=None,
        )
        with with_rows(engine, ROWS):
            outputs = finished(engine, [prompt], [params])
        drawn.append(np.asarray([output.token_ids for output in outputs], dtype=np.int64))
        exact &= all(output.stats.exact for output in outputs)
    return drawn, exact


def short_prompts(prompts: Sequence[Sequence[int]], count: int, length: int) -> list[list[int]]:
    """Beginnings of the given prompts; every other one says the same twice, so that lookups have something to find."""
    chosen = []
    for index in range(count):
        tokens = list(prompts[index % len(prompts)])
        start = (index // len(prompts)) * length % max(1, len(tokens) - length)
        body = tokens[start : start + length]
        if index % 2 and len(body) > 2:
            half = body[1 : 1 + (length - 1) // 2]
            body = [body[0], *half, *half]
        chosen.append(body)
    return chosen
