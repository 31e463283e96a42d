"""`forerun train acceptance`: a head that ends drafts where they will be rejected (SpecDec++)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import fields, heads, options
from forerun.drafting.acceptance import AcceptanceConfig

if TYPE_CHECKING:
    from forerun.train.acceptance import AcceptanceTraining
    from forerun.train.events import Events

EXAMPLES = """
forerun distill MODEL --prompts prompts.jsonl --temperature 1 --out answers.jsonl
forerun train acceptance --target MODEL --drafter small:SMALL --data answers.jsonl --out head
"""

Target = Annotated[str, typer.Option(metavar="MODEL", help="The model that verifies; it stays as it is.")]
Drafter = Annotated[
    str,
    typer.Option(metavar="SPEC", help="What drafts: small:PATH, or another with stopping rules; it stays as it is."),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the head; an older one in it is replaced.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="That drafts will be verified at; 0 is greedy.", rich_help_panel=heads.LOSS)
]
Mix = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=0.99,
        help="Share of the target's own tokens in what the draft model reads.",
        rich_help_panel=heads.LOSS,
    ),
]
Rate = Annotated[
    float, typer.Option("--rate", "--lr", min=0.0, help="Peak learning rate.", rich_help_panel=heads.SCHEDULE)
]


def train(
    target: Target,
    drafter: Drafter,
    data: heads.Data,
    out: Out,
    run: heads.Run = None,
    shape: None = None,
    temperature: Temperature = 1.0,
    mix: Mix = 0.15,
    steps: heads.Steps = 1000,
    rows: heads.Rows = 16,
    length: heads.Length = 512,
    parts: heads.Parts = 1,
    rate: Rate = 1e-3,
    validate_every: heads.Every = 200,
    save_every: heads.Every = 100,
    seed: heads.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    threads: options.Threads = None,
    tensorboard: options.TensorBoard = None,
    **given: Any,
) -> None:
    """Train a head that tells where the target will reject a draft, to end drafts there (SpecDec++).

    Target and draft model are frozen; what the head learns is computed on the fly. In the end: how reliable
    it is on held-out answers, and what drafts it would end at several thresholds.
    """
    from forerun.train import acceptance

    heads.demand_place(out)
    heads.compute_with(threads)
    rest = {"parts": parts, "validate_every": validate_every, "save_every": save_every}
    schedule = acceptance.schedule_for(steps, rate, **rest)
    what = (target, drafter, data, heads.given_of(AcceptanceConfig, given), schedule)
    recipe = acceptance.AcceptanceRecipe(*what, mix, temperature, rows, length, seed, dtype, kernels)
    with heads.events_in(tensorboard) as events:
        _fit(recipe, run or heads.run_of(out), out, device, events)


command = fields.replacing(train, shape=fields.parameters(AcceptanceConfig, heads.SHAPE))


def _fit(recipe: Any, run: Path, out: Path, device: str, events: Events | None) -> None:
    from forerun.cli import engines
    from forerun.cli.pictures import picture
    from forerun.nn.dtype import device_of
    from forerun.train import acceptance

    engines.quiet()
    training = acceptance.prepare(recipe, device_of(device))
    heads.introduce(training, "The head has")
    report(training, training.fit(run, out, events), out)
    facts = f"{recipe.schedule.steps:,} steps on {len(training.answers.training):,} answers"
    picture(run, f"acceptance head for {Path(recipe.target).name}", facts, device_of(device))


def report(training: AcceptanceTraining, figures: dict[str, float], out: Path) -> None:
    """How reliable the head is, and what its thresholds are worth where a draft costs what its weights do."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from forerun.cli.narration import on_stdout
    from forerun.train.objectives.acceptance import BINS
    from forerun.train.thresholds import THRESHOLDS

    console, objective = on_stdout(), training.objective
    bins = Table("it means", "of drafts", "accepted", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number in range(1, BINS + 1):
        share, said, true = (figures[f"bin{number}_{name}"] for name in ("share", "said", "true"))
        if share:
            bins.add_row(f"{said:.0%}", f"{share:.0%}", f"{true:.0%}")
    console.print(bins)
    draft, replayed = objective.lessons.draft_share, objective.chains.heard(objective.module)
    best = replayed.best_fixed(draft, 1.0)
    ways = {f"always {best}": replayed.fixed(best)} | {f"{one:g}": replayed.at(one) for one in THRESHOLDS}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("threshold", "drafted", "accepted", "discard rate", "verification rate", "passes per token"):
        table.add_column(heading, justify="right")
    for name, rates in ways.items():
        numbers = (rates.drafted, rates.accepted, rates.discard, rates.verification, rates.seconds(draft, 1.0))
        table.add_row(name, *(f"{one:.3f}" for one in numbers))
    console.print(table)
    drafter = {name: training.recipe.drafted_with[name] for name in ("drafter", "checkpoint")}
    console.print(
        f"Passes of the target's, where a draft takes {draft:.3f} of one, as by the memory of its weights.\n"
        f"{out}: {figures['kl_corrected']:.4f} nats from the labels, and the best constant"
        f" {figures['kl_constant']:.4f};"
        f" draft with {json.dumps({**drafter, 'stopping': f'acceptance:{out}'})}",
        highlight=False,
        soft_wrap=True,
    )
