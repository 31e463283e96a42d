"""Seconds to the first token of a prompt whose beginning was read before, beside those of one that nobody knows.

    python benchmarks/prefixes.py models/target --json benchmarks/records/prefixes.json

A round makes up a beginning of `--tokens` tokens, which no round had before. It is asked about
three times, each time with other words behind it: first as it comes, then while it is known, then
by an engine that remembers nothing, which shows what remembering costs the first time. Rounds
change the order of the two engines. Ratios are taken round by round; the table shows medians, with
their range. All three say the same, or there are no figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import forerun
from forerun.cli.engines import machine_of
from forerun.engine.engine import Engine

BEHIND = 16
"""Tokens of a prompt behind its beginning."""


@dataclass(frozen=True)
class Round:
    """Seconds to the first token: by an engine that remembers nothing, by one that has yet to read the beginning,
    and by one that knows it; how many tokens that knew."""

    without: float
    unknown: float
    known: float
    cached_tokens: int


def main(
    model: str,
    drafter: str = "none",
    tokens: Annotated[int, typer.Option(help="of the common beginning")] = 1000,
    rounds: int = 9,
    dtype: str = "auto",
    kernels: str = "auto",
    threads: int | None = None,
    records: Annotated[Path | None, typer.Option("--json", help="where the raw rows go")] = None,
) -> None:
    """Time the first token."""
    remembering = forerun.load(model, drafter, dtype=dtype, kernels=kernels, threads=threads)
    forgetful = forerun.load(model, drafter, dtype=dtype, kernels=kernels, threads=threads, prefix_cache=0)
    luck = Random(0)
    found = [timed(forgetful, remembering, luck, tokens, number) for number in range(rounds + 1)][1:]  # one warms up
    show(found, f"{model}, {drafter}, {tokens} tokens, {machine_of(remembering.target.network)}")
    if records:
        records.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


def timed(forgetful: Engine, remembering: Engine, luck: Random, tokens: int, number: int) -> Round:
    beginning, first, second = (luck.choices(range(3, 1000), k=count) for count in (tokens, BEHIND, BEHIND))

    def alone() -> float:
        return first_token(forgetful, beginning + second)[0]

    without = alone() if number % 2 else 0.0
    unknown, _, nothing = first_token(remembering, beginning + first)
    known, said, cached = first_token(remembering, beginning + second)
    without = without or alone()
    if nothing or said != first_token(forgetful, beginning + second)[1]:
        raise SystemExit("what is known changes what is said, or was known too soon: this is a mistake")
    return Round(without, unknown, known, cached)


def first_token(engine: Engine, prompt: Sequence[int]) -> tuple[float, list[int], int]:
    """Seconds, the first few tokens, and how many of the prompt were known."""
    begun = time.perf_counter()
    session = engine.stream([list(prompt)], max_new_tokens=8, ignore_eos=True, text=False)
    pieces = [next(session)]
    seconds = time.perf_counter() - begun
    pieces += session
    assert pieces[-1].output is not None
    return seconds, pieces[-1].output.token_ids, pieces[-1].output.stats.cached_tokens


def show(found: Sequence[Round], title: str) -> None:
    table = Table("first token", "ms", "of an engine that remembers nothing", title=title)
    for name, seconds in (
        ("remembers nothing", lambda one: one.without),
        ("not known yet", lambda one: one.unknown),
        (f"{found[0].cached_tokens} tokens known", lambda one: one.known),
    ):
        table.add_row(name, *columns(found, seconds))
    Console().print(table)


def columns(found: Sequence[Round], seconds: Callable[[Round], float]) -> tuple[str, str]:
    ratios = sorted(seconds(one) / one.without for one in found)
    times = f"{median(seconds(one) for one in found) * 1e3:.1f}"
    return times, f"{median(ratios):.1%} ({ratios[0]:.1%} .. {ratios[-1]:.1%})"


if __name__ == "__main__":
    typer.run(main)
