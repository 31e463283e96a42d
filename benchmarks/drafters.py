"""Drafters beside plain decoding on the held-out suite: tokens per step, speed, seconds per step
and where they go, by category.

    python benchmarks/drafters.py models/target --drafter lookup --drafter hydra:models/hydra++ \\
        --temperature 0 --temperature 0.8 --json benchmarks/records/drafters.json

One request at a time; drafters take turns prompt by prompt (`forerun.bench.run.measure`), and what
a drafter remembers across requests is forgotten before every round. Speed counts the seconds after
the prompt was read, on both sides. Shards are every third prompt of the suite, so each has all of
its categories; tables show the median shard and the range over shards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import forerun
from forerun.bench.run import Measurement, Summary, measure, table
from forerun.bench.suites import CATEGORIES, Prompt
from forerun.bench.suites import load as load_suite
from forerun.engine import load as assembly


@dataclass(frozen=True)
class Shard:
    """Prompts, and what was measured on them."""

    prompts: Sequence[Prompt]
    found: Measurement

    def rows(self, category: str | None = None) -> dict[str, Summary]:
        """By drafter; of one category alone."""
        runs = [run for run in self.found.runs if category in (None, self.prompts[run.prompt].category)]
        return {row.drafter: row for row in table(runs, self.found.rows[0].identical is not None)}


def main(
    target: Path,
    drafter: Annotated[list[str], typer.Option(help="drafters to time beside none")],
    shards: int = 3,
    prompts: Annotated[int, typer.Option(help="prompts of every shard")] = 16,
    tokens: int = 256,
    rounds: int = 3,
    temperature: Annotated[list[float] | None, typer.Option(help="0 is greedy; may be repeated")] = None,
    weights: str = "auto",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure every drafter on every shard at every temperature; keep the raw rows."""
    plain = forerun.load(target, weights=weights, prefix_cache=0)
    engines = {"none": plain}
    for spec in drafter:
        made = assembly.drafter_for(plain.target.network, spec, weights=weights, tokenizer=plain.tokenizer)
        engines[spec] = plain.beside(made)
    suite = load_suite()
    records: list[dict[str, Any]] = []
    for heat in temperature or [0.0]:
        params = forerun.SamplingParams(max_new_tokens=tokens, temperature=heat, seed=0, ignore_eos=True)
        found = []
        for shard in range(shards):
            chosen = _chosen(suite[shard::shards], prompts)
            texts = [plain.encode(prompt.prompt) for prompt in chosen]
            found.append(Shard(chosen, measure(engines, texts, params, rounds)))
        title = f"temperature {heat:g}, {shards} shards of {len(found[0].prompts)} prompts, {tokens} new tokens"
        show(found, list(engines), title)
        show_categories(found, list(engines), title)
        records += [
            {"temperature": heat, "shard": number, "category": category or "all", **row.as_dict()}
            for number, shard in enumerate(found)
            for category in (None, *CATEGORIES)
            for row in shard.rows(category).values()
        ]
    if json_file:
        network = plain.target.network
        note = {
            "threads": torch.get_num_threads(),
            "dtype": str(network.dtype),
            "kernels": network.backend.name,
            "tokens": tokens,
            "rounds": rounds,
            "nodes": {name: engine.drafter.max_nodes for name, engine in engines.items()},
        }
        json_file.write_text(json.dumps({**note, "rows": records}, indent=1) + "\n")


def _chosen(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """As many of every category as there is room for."""
    each = -(-count // len(CATEGORIES))
    return [one for name in CATEGORIES for one in [p for p in prompts if p.category == name][:each]][:count]


def show(shards: Sequence[Shard], drafters: Sequence[str], title: str) -> None:
    shown = Table(title=title)
    for heading in ("drafter", "tokens/step", "over plain", "draft ms", "verify ms", "other ms", "identical"):
        shown.add_column(heading, justify="right", overflow="fold")
    each = [shard.rows() for shard in shards]
    for drafter in drafters:
        rows = [one[drafter] for one in each]
        steps = [row.new_tokens / row.tokens_per_step for row in rows]
        parts = [
            [1e3 * getattr(row, f"{part}_seconds") / count for row, count in zip(rows, steps, strict=True)]
            for part in ("draft", "verify", "other")
        ]
        same = None if rows[0].identical is None else all(row.identical for row in rows)
        shown.add_row(
            drafter,
            _range([row.tokens_per_step for row in rows]),
            _range([row.speedup for row in rows]),
            *(f"{median(values):.3f}" for values in parts),
            {True: "yes", False: "no", None: "-"}[same],
        )
    Console(width=140).print(shown)


def show_categories(shards: Sequence[Shard], drafters: Sequence[str], title: str) -> None:
    """Tokens per step and speed over plain, by category; of those that no shard lacks."""
    shown = Table(title=title)
    shown.add_column("drafter", overflow="fold")
    by_category = {category: [shard.rows(category) for shard in shards] for category in CATEGORIES}
    by_category = {category: each for category, each in by_category.items() if all(each)}
    for category in by_category:
        shown.add_column(category, justify="right")
    for drafter in drafters:
        cells = []
        for each in by_category.values():
            rows = [one[drafter] for one in each]
            speed = _range([row.speedup for row in rows])
            cells.append(f"{median(row.tokens_per_step for row in rows):.2f}; {speed}")
        shown.add_row(drafter, *cells)
    Console(width=140).print(shown)


def _range(values: Sequence[float]) -> str:
    """Median and range over shards."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    typer.run(main)
