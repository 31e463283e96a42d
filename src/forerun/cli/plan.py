"""`forerun plan`: which drafter is fastest for a model here, predicted and then measured."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forerun.cli import openings, options

if TYPE_CHECKING:
    from rich.table import Table

    from forerun.drafting.planned import Planned
    from forerun.drafting.workshop import Workshop
    from forerun.engine.engine import Engine
    from forerun.plan.candidates import AtHand
    from forerun.plan.costs import Costs as StepCosts
    from forerun.plan.planner import Elsewhere, Rank, Ranking, Result, Wishes

log = logging.getLogger(__name__)

Drafters = Annotated[
    list[str] | None,
    typer.Option(
        "--drafter",
        metavar="SPEC",
        help="What to choose from; may be repeated.",
        show_default="all that lies beside the model",
        rich_help_panel=options.DRAFTING,
    ),
]
All = Annotated[
    bool, typer.Option("--all", help="That, and what lies beside the model.", rich_help_panel=options.DRAFTING)
]
Batches = Annotated[
    str,
    typer.Option(
        "--batch",
        "--batch-size",
        metavar="N,N,...",
        help="Requests side by side: a plan for each.",
        rich_help_panel=options.DRAFTING,
    ),
]
Temperatures = Annotated[
    list[float] | None,
    typer.Option(
        "--temperature",
        help="0 is greedy; may be repeated.",
        show_default="0",
        rich_help_panel=options.SAMPLING,
    ),
]
Costs = Annotated[
    Path | None,
    typer.Option(
        "--costs",
        metavar="FILE",
        help="A plan from another machine: plan for that one.",
        rich_help_panel=options.DRAFTING,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Where the plan goes.",
        show_default="forerun-plan.json in the model's folder, where auto finds it",
        rich_help_panel=options.OUTPUT,
    ),
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A picture (.png) of it.", rich_help_panel=options.OUTPUT)
]
Seconds = Annotated[
    float,
    typer.Option(min=1, help="About so long may searching and measuring take.", rich_help_panel=options.DRAFTING),
]

EXAMPLES = """
forerun plan MODEL
forerun plan MODEL --prompts mine.jsonl --batch 1,8 --temperature 0 --temperature 0.8
forerun plan MODEL --drafter lookup --drafter small:SMALL --out plan.json --plot plan.png
"""
BUILTIN = 16
"""Prompts of the built-in suite that are answered at least; as many as run side by side, if there are so many."""
MOST_ROWS = 1024
SHOWN = 6
"""Candidates of a ranking that are printed."""


def plan(
    model: options.Model,
    drafter: Drafters = None,
    every: All = False,
    batch: Batches = "1,8,32",
    seconds: Seconds = 120,
    costs: Costs = None,
    prompts: options.PromptFile = None,
    max_new_tokens: options.MaxNewTokens = 96,
    temperature: Temperatures = None,
    seed: options.Seed = 0,
    out: Out = None,
    plot: Plot = None,
    as_json: options.Json = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    weights: options.Weights = "auto",
    revision: options.Revision = None,
    threads: options.Threads = None,
) -> None:
    """Find the fastest way to draft: measure costs and acceptance, predict, then measure the best.

    The model answers the prompts once, and drafters are replayed on these answers. The best three and plain decoding
    then generate in turn; what is fastest is the plan, also where that is not to draft. Nothing changes what the
    model says.
    """
    from forerun.cli import engines
    from forerun.drafting.planned import place_of_plan
    from forerun.engine.load import workshop_for
    from forerun.nn.machine import record
    from forerun.plan.candidates import AtHand
    from forerun.plan.outcome import elsewhere, planned
    from forerun.plan.planner import Wishes
    from forerun.sampling import SamplingParams
    from forerun.sources.source import Source

    batches, heats = _batches(batch), temperature or [0.0]
    named, asked = AtHand.of(drafter or ()), openings.read(prompts) if prompts else []
    source = Source.of(options.at(model, revision))
    target = out or place_of_plan(source.path)
    _demand_places(target, plot)
    there, machine = elsewhere(costs, source) if costs else (None, None)
    engine = engines.load(
        options.at(model, revision), "none", engines.Machine(dtype, device, kernels, weights, threads), max(batches)
    )
    job = _Job(engine, workshop_for(engine.target.network, kernels, weights, engine.tokenizer), there)
    beside = AtHand.beside(source.path) if every or not drafter else None
    results: dict[float, Result] = {}
    for heat in heats:
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=heat, seed=seed)
        results[heat] = job.search(named, beside, asked, Wishes(batches, params, seconds / len(heats)))
    about = {"prompts": str(prompts or "the built-in suite"), "answers": job.answers, "max_new_tokens": max_new_tokens}
    found = planned(source, machine or record(engine.target.network), results, about)
    _write(found, target)
    _report(results, target, found_there=out is None, as_json=as_json)
    if plot:
        _picture(found, source.name, plot)


@dataclass
class _Job:
    """What all temperatures have in common. answers: how many prompts were answered."""

    engine: Engine
    workshop: Workshop
    there: Elsewhere | None
    costs: StepCosts | None = None
    answers: int = 0

    def search(self, named: AtHand, beside: AtHand | None, asked: list[openings.Opening], wishes: Wishes) -> Result:
        from forerun.plan.planner import Planner

        texts = _prompts(self.engine, asked, wishes)
        heat, sizes = wishes.params.temperature, ", ".join(map(str, wishes.batches))
        log.info(
            f"{len(texts)} prompts at temperature {heat:g}, {sizes} side by side: after the answers about"
            f" {wishes.seconds:.0f} s"
        )
        if 0 < len(texts) < max(wishes.batches):
            log.warning(
                f"{len(texts)} prompts are fewer than {max(wishes.batches)} side by side: some run several times, which"
                " flatters stores that remember them"
            )
        planner = Planner(self.engine, self.workshop, wishes, self.there, log.info, self.costs)
        found = planner.plan(named, texts, beside)
        self.costs, self.answers = found.costs, len(planner.record.texts)
        return found


def _batches(given: str) -> list[int]:
    from forerun.errors import RequestError

    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= MOST_ROWS for part in parts):
        raise RequestError(f"--batch is a list of numbers from 1 to {MOST_ROWS} such as 1,8,32, not {given!r}")
    return sorted({int(part) for part in parts})


def _demand_places(target: Path, plot: Path | None) -> None:
    from forerun.cli.files import demand_place
    from forerun.errors import ForerunError
    from forerun.plots.style import demand_matplotlib

    if plot:
        demand_matplotlib()
    demand_place(target)
    demand_place(plot)
    if target.is_dir():
        raise ForerunError(f"cannot write {target}, for it is a folder: name a file in it")
    if not os.access(target.parent, os.W_OK):
        raise ForerunError(
            f"cannot write into {target.parent}: name another place with --out, and draft with auto:FILE"
        )


def _prompts(engine: Engine, asked: list[openings.Opening], wishes: Wishes) -> list[list[int]]:
    """The user's, or some of the built-in suite."""
    from forerun.bench import suites
    from forerun.cli.engines import fitted
    from forerun.errors import RequestError

    if asked:
        reader = openings.Reader(engine, openings.Manner())
        return [fitted(engine, reader.ids(one), wishes.params) for one in asked]
    if engine.tokenizer is None:
        raise RequestError("this model has no tokenizer for the built-in prompts: give prompt_ids with --prompts")
    return [
        fitted(engine, one.prompt, wishes.params)
        for one in suites.spread(suites.load())[: max(BUILTIN, *wishes.batches)]
    ]


def _write(found: Planned, target: Path) -> None:
    from forerun.errors import ForerunError

    try:
        found.write(target)
    except OSError as error:
        raise ForerunError(f"cannot write {target} ({error.strerror}): make room, or name another place") from None


# ---- what it says


def _report(results: Mapping[float, Result], target: Path, found_there: bool, as_json: bool) -> None:
    from forerun.cli.files import print_json
    from forerun.cli.narration import on_stdout

    if as_json:
        print_json(json.loads(target.read_text(encoding="utf-8")))
        return
    console = on_stdout()
    for heat, result in results.items():
        if result.hierarchy is not None:
            console.print(_bound(result), soft_wrap=True)
        for ranking in result.rankings:
            console.print(_table(ranking, heat))
            console.print(_sentence(ranking), soft_wrap=True)
    by = "auto drafts by it" if found_there else f"draft by it with --drafter auto:{target}"
    console.print(f"{target}: the plan; {by}", soft_wrap=True)


def _table(ranking: Ranking, heat: float) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Printed

    title = f"{ranking.rows} side by side, temperature {heat:g}"
    table = Printed(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    table.add_column("drafter", max_width=38)
    for heading in ("tokens\nper step", "predicted\ntokens/s", "measured", "slowest to\nfastest", "x plain", "off"):
        table.add_column(heading, justify="right")
    shown = [one for one in ranking.ranks if one.measured]
    shown += [one for one in ranking.ranks if not one.measured][: max(0, SHOWN - len(shown))]
    for one in shown:
        table.add_row(*_row(ranking, one), style="bold" if one is ranking.winner else "")
    return table


def _row(ranking: Ranking, one: Rank) -> list[str]:
    figures, worth = one.as_dict(), one.worth
    row = [
        one.candidate.name,
        f"{figures['tokens_per_step']:.2f}",
        f"{worth.tokens_per_second:.0f} ± {worth.error:.0f}",
    ]
    times = f"{ranking.over_plain(one):.2f}"
    if not one.measured:
        return [*row, "", "", times, ""]
    ends = f"{min(one.measured):.0f} to {max(one.measured):.0f}"
    return [*row, f"{one.speed:.0f}", ends, times, f"{100 * one.off:+.0f} %"]


def _sentence(ranking: Ranking) -> str:
    """Who won, and how far off predictions were."""
    winner, measured = ranking.winner, [one for one in ranking.measured if one is not ranking.plain]
    name, times = winner.candidate.name, ranking.over_plain(winner)
    if not ranking.measured:
        return f"{name} is predicted to be {times:.2f}x plain decoding there; nothing was measured."
    offs = [ranking.off(one) for one in measured]
    least, most = min(offs, default=0.0), max(offs, default=0.0)
    won = f"{name} won, {times:.2f}x plain" if winner is not ranking.plain else "plain decoding won"
    return (
        f"{won} in {len(winner.measured)} rounds; times plain were predicted {100 * least:+.0f} to {100 * most:+.0f} %"
        f" off, plain decoding itself {100 * ranking.plain.off:+.0f} %."
    )


def _bound(result: Result) -> str:
    assert result.hierarchy is not None
    plan = result.hierarchy.plan
    return (
        f"By formulas, were acceptance independent of level and place: {1e3 * plan.latency:.2f} ms per token with the"
        f" best hierarchy of models, and none below {1e3 * result.hierarchy.bound:.2f} ms."
    )


def _picture(found: Planned, name: str, path: Path) -> None:
    from forerun.plots.planning import Ranked, drawing
    from forerun.plots.style import write

    rankings = [
        Ranked(f"{one.rows} side by side, temperature {one.temperature:g}", one.figures["candidates"])
        for one in found.choices
    ]
    machine = found.machine
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    under = f"{name}, {machine['processor']}, {threads}, {machine['dtype']}"
    light, dark = write(drawing(found.costs, rankings, "What is fastest", under), path)
    log.info(f"{light}: a picture of the plan; {dark.name} beside it is for dark ground")
