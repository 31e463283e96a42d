"""Draft heads beside plain decoding: tokens per step, seconds per step and where they go, on shards of the held-out suite.

    python benchmarks/heads.py models/target --drafter medusa:models/medusa --drafter hydra:models/hydra \\
        --drafter hydra:models/hydra++ --json benchmarks/records/heads.json

One request at a time; drafters take turns prompt by prompt (`forerun.bench.run.measure`). Speed counts the seconds
after the prompt was read, on both sides. Shards are every third prompt of the suite, so each has all of its
categories; the table shows the median shard and the range over shards. """

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import forerun
from forerun import assembly
from forerun.bench.run import Measurement, measure
from forerun.bench.suites import load as load_suite
from forerun.engine import Engine


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
    plain = forerun.load(target, weights=weights)
    engines = {"none": plain}
    for spec in drafter:
        made = assembly.drafter_for(plain.target, spec, weights=weights)
        engines[spec] = Engine(plain.target, made, plain.tokenizer, plain.eos)
    texts = [plain.encode(prompt.prompt) for prompt in load_suite()]
    records: list[dict[str, Any]] = []
    for heat in temperature or [0.0]:
        params = forerun.SamplingParams(max_new_tokens=tokens, temperature=heat, seed=0, ignore_eos=True)
        found = [measure(engines, texts[shard::shards][:prompts], params, rounds) for shard in range(shards)]
        show(
            found,
            f"temperature {heat:g}, {shards} shards of {len(texts[::shards][:prompts])} prompts, {tokens} new tokens",
        )
        records += [
            {"temperature": heat, "shard": shard, **row.as_dict()}
            for shard, one in enumerate(found)
            for row in one.rows
        ]
    if json_file:
        network = plain.target.network
        note = {
            "threads": torch.get_num_threads(),
            "dtype": str(network.dtype),
            "kernels": network.kernels,
            "tokens": tokens,
            "rounds": rounds,
            "trees": {name: _nodes(engine) for name, engine in engines.items()},
        }
        json_file.write_text(json.dumps({**note, "rows": records}, indent=1) + "\n")


def _nodes(engine: Engine) -> int:
    return engine.drafter.max_nodes


def show(shards: Sequence[Measurement], title: str) -> None:
    table = Table(title=title)
    for heading in ("drafter", "tokens/step", "over plain", "draft ms", "verify ms", "other ms", "identical"):
        table.add_column(heading, justify="right")
    for place, first in enumerate(shards[0].rows):
        rows = [one.rows[place] for one in shards]
        steps = [row.new_tokens / row.tokens_per_step for row in rows]
        parts = [
            [1e3 * getattr(row, f"{part}_seconds") / count for row, count in zip(rows, steps, strict=True)]
            for part in ("draft", "verify", "other")
        ]
        table.add_row(
            first.drafter,
            _range([row.tokens_per_step for row in rows]),
            _range([row.speedup for row in rows]),
            *(f"{median(values):.3f}" for values in parts),
            {True: "yes", False: "no", None: "-"}[
                None if first.identical is None else all(row.identical for row in rows)
            ],
        )
    Console().print(table)


def _range(values: Sequence[float]) -> str:
    """Median and range over shards."""
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    typer.run(main)
