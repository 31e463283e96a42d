"""Tokens per second by the number of rows: plain, drafters as they are, and the controller that chooses among them.

    python benchmarks/controlled.py models/target --drafter hierarchy --drafter small:models/small \\
        --json benchmarks/records/controlled.json --plot controlled.png

Every arm answers the same held-out prompts, at least three for every row: where rows end one by one and nobody takes
their places, a drafter that serves some faster than others looks slow. One round gives every arm one turn, in
changing order. `controlled` is a `switch` of the others. It begins every turn knowing nothing, as all drafters do:
what it loses until it has learnt is in its figure. --plan: one arm more, `auto` with a plan of `forerun plan`, where
every turn begins with what that promises. Ratios to plain decoding are taken round by round; the table shows their
median and range. --noise: random prompts at temperature 5, where nothing can be looked up (a draft model's law is
nearly the target's there).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import forerun
from forerun.bench.suites import load as load_suite
from forerun.bench.suites import spread
from forerun.engine.load import drafter_for
from forerun.nn.machine import processor
from forerun.plots.style import Sheet, Theme, write

PLAIN, CONTROLLED, PLANNED = "none", "controlled", "planned"
COLOURS = {PLAIN: "plain", CONTROLLED: "accepted", PLANNED: "verify"}
NOISE = 5.0
WAVES = 3
"""Requests for every row, at least."""


@dataclass
class Arm:
    """One arm at one number of rows and one temperature: tokens per second of every round."""

    name: str
    rows: int
    temperature: float
    tokens_per_second: list[float] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0

    def ratios(self, plain: Arm) -> list[float]:
        return sorted(a / b for a, b in zip(self.tokens_per_second, plain.tokens_per_second, strict=True))


class Race:
    """Engines on one target, an arm each."""

    def __init__(self, target: Path, drafters: Sequence[str], dtype: str, plan: Path | None = None):
        self.plain = forerun.load(target, dtype=dtype, prefix_cache=0)
        controlled = {"drafter": "switch", "parts": list(drafters)}
        specs: dict[str, Any] = {PLAIN: PLAIN, **{name: name for name in drafters}, CONTROLLED: controlled}
        if plan is not None:
            specs[PLANNED] = {"drafter": "auto", "checkpoint": str(plan)}
        words = self.plain.tokenizer
        self.drafters = {
            name: drafter_for(self.plain.target.network, spec, tokenizer=words) for name, spec in specs.items()
        }

    def turn(self, name: str, prompts: Sequence[list[int]], rows: int, params: forerun.SamplingParams) -> Any:
        """(outputs, seconds) of a drafter that knows nothing yet, on an engine that knows nothing."""
        drafter = self.drafters[name]
        drafter.reset()
        with self.plain.beside(drafter, rows) as engine:
            begun = time.perf_counter()
            outputs = engine.generate(prompts, params)
            return outputs, time.perf_counter() - begun

    def run(
        self, prompts: Sequence[list[int]], rows: int, temperature: float, tokens: int, rounds: int
    ) -> dict[str, Arm]:
        arms = {name: Arm(name, rows, temperature) for name in self.drafters}
        params = forerun.SamplingParams(max_new_tokens=tokens, temperature=temperature, ignore_eos=True)
        names = list(arms)
        for number in track(range(rounds + 1), f"{rows} rows, T={temperature:g}"):  # the first one does not count
            for name in names[number % len(names) :] + names[: number % len(names)]:
                outputs, seconds = self.turn(name, prompts, rows, params)
                if number:
                    arm, said = arms[name], sum(len(output.token_ids) for output in outputs)
                    arm.tokens_per_second.append(said / seconds)
                    arm.tokens += said
                    arm.steps += sum(output.stats.steps for output in outputs)
        return arms


def show(arms: Mapping[str, Arm], console: Console) -> None:
    some = next(iter(arms.values()))
    table = Table(title=f"{some.rows} rows, temperature {some.temperature:g}")
    for heading in ("arm", "tokens/s", "x plain", "tokens/step"):
        table.add_column(heading, justify="right")
    for arm in arms.values():
        ratios = arm.ratios(arms[PLAIN])
        ratio = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        speed, per_step = statistics.median(arm.tokens_per_second), arm.tokens / max(1, arm.steps)
        table.add_row(arm.name, f"{speed:.0f}", ratio, f"{per_step:.2f}")
    console.print(table)


def picture(results: Sequence[Mapping[str, Arm]], under: str, path: Path) -> None:
    """Times plain decoding by rows, a panel per temperature."""
    temperatures = sorted({next(iter(arms.values())).temperature for arms in results})

    def sheet_of(theme: Theme) -> Sheet:
        sheet = Sheet(
            theme, "Speed by the number of rows, times plain decoding", under, [f"T={t:g}" for t in temperatures]
        )
        for axes, temperature in zip(sheet.panels, temperatures, strict=True):
            there = [arms for arms in results if arms[PLAIN].temperature == temperature]
            sizes = [arms[PLAIN].rows for arms in there]
            ends = []
            for name in there[0]:
                ratios = [statistics.median(arms[name].ratios(arms[PLAIN])) for arms in there]
                colour = theme[COLOURS.get(name, "draft")]
                sheet.line(axes, list(zip(sizes, ratios, strict=True)), colour, marker="o", markersize=3)
                ends.append((name, ratios[-1], colour))
            sheet.name(axes, ends)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
        return sheet

    write(sheet_of, path)


def main(
    target: Path,
    drafter: Annotated[list[str] | None, typer.Option(help="what is timed as it is, and chosen from")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="requests side by side")] = None,
    temperature: Annotated[list[float] | None, typer.Option()] = None,
    prompts: int = 16,
    tokens: int = 128,
    rounds: int = 3,
    dtype: str = "bf16",
    plan: Annotated[Path | None, typer.Option(help="a plan that auto drafts by")] = None,
    noise: Annotated[bool, typer.Option("--noise", help="random prompts at temperature 5")] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    plot: Annotated[Path | None, typer.Option(help="a picture of the ratios, as PNG")] = None,
) -> None:
    """Time every arm at every number of rows; keep the raw rows."""
    race = Race(target, drafter or ["hierarchy"], dtype, plan)
    texts = [race.plain.encode(item.prompt) for item in spread(load_suite())[:prompts]]
    if noise:
        luck = torch.Generator().manual_seed(0)
        texts = [
            torch.randint(3, race.plain.target.vocab_size, (len(text),), generator=luck).tolist() for text in texts
        ]
    results = []
    for warmth in [NOISE] if noise else temperature or [0.0, 0.8]:
        for size in rows or [1, 8, 32]:
            count = max(WAVES * size, len(texts))
            several = (texts * -(-count // len(texts)))[:count]
            results.append(race.run(several, size, warmth, tokens, rounds))
            show(results[-1], Console(width=120))
    network = race.plain.target.network
    note = {
        "processor": processor(network.device),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "tokens": tokens,
    }
    if json_file:
        raw = [asdict(arm) for arms in results for arm in arms.values()]
        json_file.write_text(json.dumps({**note, "noise": noise, "rows": raw}, indent=1) + "\n")
    if plot:
        picture(results, f"{target}, {note['processor']}, {note['threads']} threads, {dtype}", plot)


if __name__ == "__main__":
    typer.run(main)
