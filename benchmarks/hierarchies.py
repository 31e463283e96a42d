"""Predicted against measured: what hierarchies of models and a store cost per token, and which one the planner chooses.

    python benchmarks/hierarchies.py models/target --model models/small --model models/wide \\
        --temperature 0 --temperature 0.8 \\
        --json benchmarks/records/hierarchies.json

Acceptance rates come from the target's own answers, costs from timing whole operations
(`forerun.plan.measure`); the predictions are those of `forerun.plan.hierarchy.at_least`. Then all
hierarchies generate, taking turns prompt by prompt. Seconds per token count what follows the
prompt; the drafters' own reading of it, which happens in the first step, is in both.

The answers are to the very prompts that are measured on, as a planner is given its user's; --others
learns from as many others, and then the difference between texts is added to that between formula
and machine. Rounds over a lookup are measured as a whole, at one length of the level's buffer, so a
lookup alone is no prediction; it stands in the table for comparison.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table as Printed

import forerun
from forerun.bench import suites
from forerun.bench.run import measure
from forerun.cost import Table
from forerun.drafting.workshop import Workshop, build
from forerun.engine import load as assembly
from forerun.engine.engine import Engine
from forerun.nn.load import load_network
from forerun.nn.network import Network
from forerun.plan import measure as look
from forerun.plan.hierarchy import Chain, Draft, Round, Verifier, at_least
from forerun.plan.selection import Family, Plan, Start, best, lower_bound, polished

TARGET = "target"
MOST = 12
"""Tokens that a level may gather, in the plan."""


@dataclass(frozen=True)
class Known:
    """What was measured. Models by name, the cheapest first, the target last."""

    names: list[str]
    paths: dict[str, str]
    rates: dict[tuple[str, str], float]
    verifying: dict[str, Table]
    writing: dict[str, Table]
    reading: dict[str, float]
    rounds: dict[str, Round]


@dataclass(frozen=True)
class Hierarchy:
    """From below: a store's or a model's name and how many tokens it hands up, then models that
    verify. The target is above."""

    bottom: str
    size: int
    levels: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        first = self.bottom if self.bottom == "lookup" else f"{self.bottom} {self.size}"
        return " < ".join([first, *(f"{model} {size}" for model, size in self.levels)])

    def description(self, paths: Mapping[str, str]) -> dict[str, Any]:
        made: dict[str, Any] = {"drafter": "lookup"}
        if self.bottom != "lookup":
            made = {"drafter": "small", "checkpoint": paths[self.bottom], "length": self.size}
        for model, size in self.levels:
            made = {"drafter": "verified", "checkpoint": paths[model], "inner": made, "length": size}
        return made

    def predicted(self, known: Known, tokens: int) -> float:
        """Seconds per token, the drafters' reading of the prompt dealt to so many."""
        models = [model for model, _ in self.levels]
        bottom: Draft | Round
        if self.bottom == "lookup":
            bottom, above = known.rounds[models[0] if models else TARGET], [*models, TARGET]
        else:
            bottom = Draft.exactly(self.size, known.writing[self.bottom](self.size))
            above, models = [self.bottom, *models, TARGET], [self.bottom, *models]
        verifiers = tuple(Verifier(known.verifying[high], known.rates[low, high]) for low, high in pairwise(above))
        round = at_least(Chain(bottom, verifiers), [size for _, size in self.levels]) if verifiers else bottom
        assert isinstance(round, Round)
        return round.latency + sum(known.reading[model] for model in models) / tokens


def standard(models: Sequence[str]) -> Iterator[Hierarchy]:
    """One model alone, a store below a model, a model below a model, and the store alone."""
    yield Hierarchy("lookup", 1)
    for model in models:
        yield from (Hierarchy(model, size) for size in (1, 2, 3, 5, 8))
        yield from (Hierarchy("lookup", 1, ((model, size),)) for size in (2, 4, 7))
    for low, high in pairwise(models):
        yield from (Hierarchy(low, size, ((high, 2 * size),)) for size in (2, 3))


def learn(engine: Engine, paths: dict[str, str], prompts: list[list[int]], params: forerun.SamplingParams) -> Known:
    """Everything that predictions need, from prompts that are not measured on."""
    networks: dict[str, Network] = {
        name: load_network(path, engine.target.network.dtype, engine.target.device, "auto", "auto")
        for name, path in paths.items()
    }
    texts = look.texts_of(engine, prompts, params)
    text = replace(texts[0])
    writing = {
        name: look.writer_cost(network, text, params, engine.target.network) for name, network in networks.items()
    }
    names = [*sorted(networks, key=lambda name: writing[name](1)), TARGET]
    networks[TARGET] = engine.target.network
    found = look.agreement([networks[name] for name in names], texts, params)
    rates = {
        (low, high): float(found.rates[i, j]) for i, low in enumerate(names) for j, high in enumerate(names) if i < j
    }
    for pair, rate in rates.items():
        print(f"{pair[1]} accepts {rate:.3f} of {pair[0]} ({found.positions} tokens)")
    verifying = {name: look.verifier_cost(networks[name], text, params, engine.target.network) for name in names[:-1]}
    verifying[TARGET] = look.target_cost(engine, text, params)
    reading = {name: median(look.reading_seconds(networks[name], one) for one in texts) for name in names[:-1]}
    lookup = [build("lookup", Workshop(engine.target, lambda path: networks[path])) for _ in names]
    rounds = {
        name: look.measured_round(engine, None if name == TARGET else networks[name], store, prompts, params)
        for name, store in zip(names, lookup, strict=True)
    }
    return Known(names, paths, rates, verifying, writing, reading, rounds)


def plan(known: Known) -> tuple[Plan, float, Hierarchy | None]:
    """The planner's choice, its lower bound, and the choice as something that can be run."""
    names = known.names
    rates = tuple(tuple(known.rates.get((low, high), 0.0) for high in names) for low in names)
    costs = tuple(_price(known, name) for name in names)
    starts = tuple(Start(names.index(name), round, "lookup") for name, round in known.rounds.items())
    family = Family(costs, rates, starts)
    chosen = polished(family, best(family, MOST), MOST)
    bound = lower_bound(family, MOST)
    if not chosen.speculates:
        return chosen, bound, None
    models = [(names[model], size) for model, size in zip(chosen.drafters, chosen.sizes, strict=True)]
    if chosen.start:
        return chosen, bound, Hierarchy("lookup", 1, tuple(models))
    return chosen, bound, Hierarchy(*models[0], tuple(models[1:]))


def _price(known: Known, name: str) -> Table:
    """A forward's cost; at one token the cheaper of verifying nothing and writing one of several."""
    points = dict(known.verifying[name].points)
    if name in known.writing:
        points[1] = min(points[1], known.writing[name](5) / 5)
    return Table(tuple(sorted(points.items())))


@dataclass(frozen=True)
class Setting:
    """What is generated, and how often."""

    prompts: list[list[int]]
    params: forerun.SamplingParams
    rounds: int


def compare(plain: Engine, paths: dict[str, str], known: Known, setting: Setting) -> list[dict[str, Any]]:
    """Predict, measure, print."""
    chosen, bound, planned = plan(known)
    hierarchies = list(dict.fromkeys([*standard(known.names[:-1]), *([planned] if planned else [])]))
    engines = {"none": plain}
    for one in hierarchies:
        drafter = assembly.drafter_for(plain.target.network, one.description(paths))
        engines[one.name] = plain.beside(drafter)
    found = measure(engines, setting.prompts, setting.params, setting.rounds)
    rows = {row.drafter: row for row in found.rows}
    tokens = setting.params.max_new_tokens or 1
    records: list[dict[str, Any]] = [
        {
            "hierarchy": one.name,
            "predicted": one.predicted(known, tokens),
            "planned": one == planned,
            **rows[one.name].as_dict(),
        }
        for one in hierarchies
    ]
    show(
        records, f"temperature {setting.params.temperature:g}, {len(setting.prompts)} prompts, {setting.rounds} rounds"
    )
    fastest = max(hierarchies, key=lambda one: rows[one.name].tokens_per_second)
    theory = f"{1e3 * chosen.latency:.3f} ms per token in theory, and none below {1e3 * bound:.3f}"
    print(f"planned (*): {theory}; fastest: {fastest.name}")
    about = {
        "rates": {" -> ".join(pair): rate for pair, rate in known.rates.items()},
        "verifying": {name: cost.points for name, cost in known.verifying.items()},
        "writing": {name: cost.points for name, cost in known.writing.items()},
        "bound": bound,
    }
    return [*records, about]


def show(records: Sequence[Mapping[str, Any]], title: str) -> None:
    table = Printed(title=title)
    for heading in ("hierarchy", "predicted ms/token", "measured", "slowest and fastest round", "predicted / measured"):
        table.add_column(heading, justify="right")
    for heading in ("tokens/step", "over plain"):
        table.add_column(heading, justify="right")
    for one in records:
        measured = 1 / one["tokens_per_second"]
        ends = "-".join(f"{1e3 / speed:.3f}" for speed in one["spread"])
        table.add_row(
            one["hierarchy"] + (" *" if one["planned"] else ""),
            f"{1e3 * one['predicted']:.3f}",
            f"{1e3 * measured:.3f}",
            ends,
            f"{one['predicted'] / measured:.3f}",
            f"{one['tokens_per_step']:.2f}",
            f"{one['speedup']:.2f}",
        )
    Console(width=140).print(table)


def main(
    target: Path,
    model: Annotated[list[Path], typer.Option(help="draft models")],
    prompts: Annotated[int, typer.Option(help="prompts of the suite")] = 12,
    tokens: int = 192,
    rounds: int = 3,
    temperature: Annotated[list[float] | None, typer.Option(help="0 is greedy; may be repeated")] = None,
    others: Annotated[bool, typer.Option("--others", help="learn from other prompts than are measured on")] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Learn, predict, measure."""
    plain = forerun.load(target)
    suite = [plain.encode(prompt.prompt) for prompt in suites.spread(suites.load())]
    paths = {path.name: str(path) for path in model}
    records: list[dict[str, Any]] = []
    for heat in temperature or [0.0]:
        params = forerun.SamplingParams(max_new_tokens=tokens, temperature=heat, seed=0, ignore_eos=True)
        setting = Setting(suite[:prompts], params, rounds)
        known = learn(plain, paths, suite[-prompts:] if others else setting.prompts, params)
        records += [{"temperature": heat, **record} for record in compare(plain, paths, known, setting)]
    if json_file:
        about = {
            "threads": torch.get_num_threads(),
            "tokens": tokens,
            "rounds": rounds,
            "prompts": prompts,
            "others": others,
        }
        json_file.write_text(json.dumps(about | {"rows": records}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
