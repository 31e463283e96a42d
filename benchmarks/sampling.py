"""What a sampled step costs outside the forwards: drafting's own work, laws, filters, draws, acceptance, bookkeeping.

    python benchmarks/sampling.py models/target models/small --json benchmarks/records/sampling.json

What happens in a step but the forwards of the target and of draft models, as processor time of one
thread, so that a busy machine shows less. Every drafter answers the same requests with the same
seeds, by turns with the kernels of sampling and with the torch forms that say what they mean.
Figures are medians over the turns of the mean per step, with their range.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.console import Console
from rich.table import Table

import forerun
from forerun.bench.suites import load as load_suite
from forerun.bench.suites import spread
from forerun.engine import load as assembly
from forerun.engine.engine import Engine
from forerun.model import Model
from forerun.native import sampling

WISHES: dict[str, dict[str, Any]] = {
    "T 0.8": {"temperature": 0.8},
    "T 0.8, top-k 50, top-p 0.9, min-p 0.05": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "T 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
}


@dataclass
class Clock:
    """Seconds of steps, those of forwards within, and how many steps there were."""

    steps: int = 0
    whole: float = 0.0
    forwards: float = 0.0

    @property
    def microseconds(self) -> float:
        """Per step, outside the forwards."""
        return (self.whole - self.forwards) / self.steps * 1e6


@dataclass(frozen=True)
class Figure:
    """One drafter under one wish at one number of rows: microseconds per step outside the forwards, turn by turn."""

    drafter: str
    wish: str
    rows: int
    in_torch: list[float]
    native: list[float]


def main(
    target: Path,
    small: Path,
    rows: Annotated[str, typer.Option(help="numbers of rows that run side by side")] = "1,8",
    turns: int = 3,
    tokens: int = 64,
    records: Annotated[Path | None, typer.Option("--json", help="where the raw rows go")] = None,
) -> None:
    """Time the sampled path of every drafter."""
    counts = [int(count) for count in rows.split(",")]
    plain = forerun.load(target, prefix_cache=0)
    torch.set_num_threads(1)
    made = {
        name: assembly.drafter_for(plain.target.network, spec, tokenizer=plain.tokenizer)
        for name, spec in (("none", "none"), ("lookup", "lookup"), ("small", f"small:{small}"))
    }
    prompts = [plain.encode(one.prompt) for one in spread(load_suite())[: max(counts)]]
    found = [
        figure(plain.beside(drafter), name, wish, prompts[:count], turns, tokens)
        for count in counts
        for wish in WISHES
        for name, drafter in made.items()
    ]
    show(found)
    if records:
        records.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")


def figure(engine: Engine, drafter: str, wish: str, prompts: list[list[int]], turns: int, tokens: int) -> Figure:
    """The first turn warms up."""
    found = Figure(drafter, wish, len(prompts), [], [])
    for turn in range(turns + 1):
        for times, quick in ((found.in_torch, False), (found.native, True)):
            engine.drafter.reset()
            with timed() as clock, patch.object(sampling, "is_quick", lambda quick=quick: quick):
                engine.stream(prompts, **WISHES[wish], seed=7, max_new_tokens=tokens, text=False).outputs()
            if turn:
                times.append(clock.microseconds)
    return found


@contextmanager
def timed() -> Iterator[Clock]:
    """Watches the steps of all engines."""
    clock, decode, forward = Clock(), Engine._decode, Model._forward

    def step(engine: Engine) -> None:
        begun = time.thread_time()
        decode(engine)
        clock.whole += time.thread_time() - begun
        clock.steps += 1

    def read(model: Model, *given: Any) -> Any:
        begun = time.thread_time()
        result = forward(model, *given)
        clock.forwards += time.thread_time() - begun
        return result

    def prefill(model: Model, *given: Any) -> Any:
        before = clock.forwards
        result = read_prompt(model, *given)
        clock.forwards = before
        return result

    read_prompt = Model.prefill
    with (
        patch.object(Engine, "_decode", step),
        patch.object(Model, "_forward", read),
        patch.object(Model, "prefill", prefill),
    ):
        yield clock


def show(found: list[Figure]) -> None:
    table = Table("rows", "wish", "drafter", "in torch", "native", "ratio", title="microseconds per step")
    for one in found:
        ratio = median(one.in_torch) / median(one.native)
        table.add_row(str(one.rows), one.wish, one.drafter, shown(one.in_torch), shown(one.native), f"{ratio:.1f}")
    Console(width=120).print(table)


def shown(times: list[float]) -> str:
    return f"{median(times):,.0f} ({min(times):,.0f} to {max(times):,.0f})"


if __name__ == "__main__":
    typer.run(main)
