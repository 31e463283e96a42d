"""Measuring: several drafters over the same prompts, interleaved, several rounds, medians.

One request runs at a time. Tokens are counted the same way for plain decoding and for every
drafter: what the user gets, divided by the seconds after the prompt was read. Interleaving (prompt
by prompt, drafter by drafter) lets a machine that slows down for a while slow all of them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from forerun.engine.engine import Engine
from forerun.engine.prompts import Prompt
from forerun.engine.requests import Stats
from forerun.errors import RequestError
from forerun.sampling import SamplingParams


@dataclass(frozen=True)
class Timing:
    """One prompt, generated once: a raw row."""

    drafter: str
    round: int
    prompt: int
    token_ids: tuple[int, ...]
    stats: Stats

    def as_dict(self) -> dict[str, Any]:
        return {"drafter": self.drafter, "round": self.round, "prompt": self.prompt} | self.stats.as_dict()


@dataclass(frozen=True)
class Summary:
    """What a drafter cost over all prompts. Seconds are totals of one round; every figure is the median over rounds.

    speedup: tokens_per_second over the baseline's. tokens_per_step counts the target's own token of
    every step, accepted does not. identical: every token id equals the baseline's; None where the
    drafter may say something else by luck (sampling). equal_tokens: how many come before the first
    difference of their text, of new_tokens in all. spread: the slowest and the fastest round,
    tokens per second.
    """

    drafter: str
    tokens_per_second: float
    speedup: float
    tokens_per_step: float
    accepted: float
    draft_seconds: float
    verify_seconds: float
    other_seconds: float
    identical: bool | None
    equal_tokens: int
    new_tokens: int
    spread: tuple[float, float]
    rule: str
    exact: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"spread": list(self.spread)}


@dataclass(frozen=True)
class Measurement:
    """A row per drafter, in the order given, and the runs behind them."""

    rows: tuple[Summary, ...]
    runs: tuple[Timing, ...]

    @property
    def rounds(self) -> int:
        return 1 + max(run.round for run in self.runs)


def measure(
    engines: Mapping[str, Engine],
    prompts: Sequence[Prompt],
    params: SamplingParams,
    rounds: int = 3,
    watch: Callable[[Timing], None] | None = None,
    seconds: float = math.inf,
) -> Measurement:
    """Timing every engine over every prompt, `rounds` times. The first engine is the baseline.

    watch: called after every run. seconds: no round is begun that would end later than that. Raises RequestError when
    there is nothing to measure.
    """
    if not engines or not prompts or rounds < 1:
        raise RequestError("there is nothing to measure: give at least one drafter, one prompt and one round")
    runs = []
    for run in _runs(engines, prompts, params, rounds, seconds):
        runs.append(run)
        if watch:
            watch(run)
    return Measurement(table(runs, params.is_greedy), tuple(runs))


def _runs(
    engines: Mapping[str, Engine], prompts: Sequence[Prompt], params: SamplingParams, rounds: int, seconds: float
) -> Iterator[Timing]:
    started = time.perf_counter()
    for number in range(rounds):
        spent = time.perf_counter() - started
        if number and spent * (number + 1) / number > seconds:
            return
        for engine in engines.values():
            engine.drafter.reset()  # what an earlier round said is the very answer that is asked for again
            engine.prefixes.clear()
        for index, prompt in enumerate(prompts):
            for name, engine in engines.items():
                (output,) = engine.generate([prompt], params)
                if output.finish_reason == "interrupted":  # the engine answers Ctrl-C with half a text; half a
                    raise KeyboardInterrupt  # measurement is of no use
                yield Timing(name, number, index, tuple(output.token_ids), output.stats)


def table(runs: Sequence[Timing], greedy: bool = True) -> tuple[Summary, ...]:
    """One row per drafter, in order of appearance; the first is the baseline. greedy: equal tokens
    are to be expected."""
    names = list(dict.fromkeys(run.drafter for run in runs))
    texts = {run.prompt: run.token_ids for run in reversed(runs) if run.drafter == names[0]}
    rows: list[Summary] = []
    for name in names:
        own = [run for run in runs if run.drafter == name]
        rows.append(_row(own, texts, rows[0].tokens_per_second if rows else None, greedy))
    return tuple(rows)


def _row(runs: Sequence[Timing], texts: Mapping[int, Sequence[int]], baseline: float | None, greedy: bool) -> Summary:
    rounds = [_Total([run.stats for run in runs if run.round == number]) for number in {run.round for run in runs}]
    speeds = [total.tokens_per_second for total in rounds]
    first = [run for run in runs if run.round == runs[0].round]
    return Summary(
        drafter=runs[0].drafter,
        tokens_per_second=median(speeds),
        speedup=median(speeds) / baseline if baseline else 1.0,
        tokens_per_step=median(total.tokens_per_step for total in rounds),
        accepted=median(total.accepted for total in rounds),
        draft_seconds=median(total.sum_of("draft_seconds") for total in rounds),
        verify_seconds=median(total.sum_of("verify_seconds") for total in rounds),
        other_seconds=median(total.sum_of("other_seconds") for total in rounds),
        identical=all(run.token_ids == texts[run.prompt] for run in runs) if greedy else None,
        equal_tokens=sum(common(run.token_ids, texts[run.prompt]) for run in first),
        new_tokens=sum(len(run.token_ids) for run in first),
        spread=(min(speeds), max(speeds)),
        rule=next((run.stats.rule for run in runs if run.stats.drafted_tokens), runs[0].stats.rule),
        exact=all(run.stats.exact for run in runs),
    )


@dataclass(frozen=True)
class _Total:
    """One drafter's round."""

    stats: Sequence[Stats]

    def sum_of(self, field: str) -> float:
        return float(sum(getattr(one, field) for one in self.stats))

    @property
    def tokens_per_second(self) -> float:
        decoding = self.sum_of("seconds") - self.sum_of("prefill_seconds")
        return self.sum_of("new_tokens") / decoding if decoding > 0 else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.sum_of("new_tokens") / max(1.0, self.sum_of("steps"))

    @property
    def accepted(self) -> float:
        return self.sum_of("accepted_tokens") / max(1.0, self.sum_of("steps"))


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
