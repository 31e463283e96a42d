"""`forerun train small`: a draft model out of its target, pruned to a shape and taught on the target's answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forerun.cli import options
from forerun.cli.heads import LOSS, SCHEDULE, Every, Length, Parts, Rows, Run, compute_with, events_in, run_of

if TYPE_CHECKING:
    from forerun.train.small import SmallTraining

EXAMPLES = """
forerun distill MODEL --prompts prompts.jsonl --out answers.jsonl
forerun train small --from MODEL --shape 2x256 --data answers.jsonl --out draft
forerun generate MODEL --drafter small:draft "def main():"
"""
PRUNING = "Pruning"

From = Annotated[
    str, typer.Option("--from", "--target", metavar="MODEL", help="The target that it is made from; it stays as it is.")
]
ShapeOption = Annotated[
    str | None,
    typer.Option(
        "--shape",
        metavar="LxW[xMLP[xHEADS]]",
        help="Layers, width, units of the perceptron, heads[/key heads]; what is left out is the target's.",
    ),
]
Data = Annotated[
    list[Path],
    typer.Option(
        metavar="FILE", help="Its answers, from forerun distill; of several files the hard ones come more often."
    ),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the model; an older one in it is replaced.")]
Calibration = Annotated[int, typer.Option(min=1, help="Tokens that say which parts stay.", rich_help_panel=PRUNING)]
Pick = Annotated[
    str, typer.Option(metavar="influence|even", help="Layers that stay: by what they do.", rich_help_panel=PRUNING)
]
ShearSteps = Annotated[
    int,
    typer.Option(
        min=0, help="Learn what stays, with masks, in so many steps (L0 pruning).", rich_help_panel=options.ADVANCED
    ),
]
InitFrom = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Prune nothing: teach this draft model.", rich_help_panel=options.ADVANCED),
]
Tied = Annotated[
    bool, typer.Option("--tied", help="The embedding is the head, too: half the memory.", rich_help_panel=PRUNING)
]
TextWeight = Annotated[float, typer.Option(min=0.0, help="Of the next token's log-probability.", rich_help_panel=LOSS)]
TeacherWeight = Annotated[float, typer.Option(min=0.0, help="Of the target's whole law there.", rich_help_panel=LOSS)]
DistanceWeight = Annotated[float, typer.Option(min=0.0, help="Of the L1 distance to it.", rich_help_panel=LOSS)]
Steps = Annotated[
    int, typer.Option(min=0, help="Of the optimiser; 0 saves what pruning leaves.", rich_help_panel=SCHEDULE)
]
Rate = Annotated[float, typer.Option("--rate", "--lr", min=0.0, help="Peak learning rate.", rich_help_panel=SCHEDULE)]
Seed = Annotated[int, typer.Option(help="Of the order of answers.", rich_help_panel=options.ADVANCED)]


def small(
    from_: From,
    data: Data,
    out: Out,
    shape: ShapeOption = None,
    run: Run = None,
    calibration: Calibration = 50_000,
    pick: Pick = "influence",
    shear_steps: ShearSteps = 0,
    init_from: InitFrom = None,
    tied: Tied = False,
    text_weight: TextWeight = 0.1,
    teacher_weight: TeacherWeight = 0.9,
    distance_weight: DistanceWeight = 0.0,
    steps: Steps = 1000,
    rows: Rows = 8,
    length: Length = 512,
    parts: Parts = 1,
    rate: Rate = 4e-3,
    validate_every: Every = 200,
    save_every: Every = 100,
    seed: Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    tensorboard: options.TensorBoard = None,
) -> None:
    """Prune a target to a small shape, and teach what is left to say what the target would.

    The parts that do most stay: layers, dimensions, heads and units. Then the draft model learns the target's law at
    every token of its answers. The result is an ordinary model folder with the target's tokenizer, for small:DIR.
    """
    compute_with(threads)

    from forerun.cli import engines
    from forerun.drafting.trained import Weights
    from forerun.errors import TrainingError
    from forerun.nn.dtype import device_of
    from forerun.train import small as training
    from forerun.train.pruning.shape import Shape
    from forerun.train.schedule import Schedule

    weights = Weights(text=text_weight, teacher=teacher_weight, distance=distance_weight)
    if not (weights.text or weights.asks_target):
        raise TrainingError("nothing would be learnt: give --text-weight or --teacher-weight a number above 0")
    if (shape is None) == (init_from is None):
        raise TrainingError(
            "a draft model begins as a part of its target, or as another draft: give --shape, or --init-from"
        )
    _demand_place(out)
    engines.quiet()
    schedule = Schedule(steps, parts, min(50, steps // 2), muon_rate=rate, adam_rate=rate / 2)
    schedule = replace(schedule, validate_every=validate_every, save_every=save_every)
    what = (from_, Shape.read(shape) if shape else None, data, schedule, weights, rows, length, seed, calibration, pick)
    last = (shear_steps, init_from, tied, dtype)
    ready = training.prepare(training.SmallRecipe(*what, *last), device_of(device))
    folder = run or run_of(out)
    with events_in(tensorboard) as events:
        figures = ready.fit(folder, out, events)
    _report(ready, figures, folder, out)


def _demand_place(out: Path) -> None:
    """Refuse a folder whose content is something else, before the target is read."""
    from forerun.errors import TrainingError
    from forerun.sources.folder import CONFIG
    from forerun.train.small import PRUNING

    if out.name in ("", "..") or next(place for place in (out, *out.parents) if place.exists()).is_file():
        raise TrainingError(f"--out {out} cannot be a folder: name one, new or with an older draft model")
    if (out / CONFIG).exists() and not (out / PRUNING).exists():
        raise TrainingError(f"{out} holds another model, which would be overwritten: choose another --out")


def _report(training: SmallTraining, figures: dict[str, float], run: Path, out: Path) -> None:
    from forerun.cli.narration import on_stdout
    from forerun.cli.pictures import picture
    from forerun.train.objectives.imitation import LOOKAHEAD

    module, schedule = training.objective.module, training.recipe.schedule
    on_stdout().print(
        f"{out}: {sum(p.numel() for p in module.parameters()):,} parameters; on held-out answers"
        f" {figures['loss']:.3f} nats per token, {figures['tokens_per_step']:.2f} tokens per step with greedy drafts of"
        f" {LOOKAHEAD}, {figures['accepted']:.0%} of drawn tokens accepted",
        highlight=False,
        soft_wrap=True,
    )
    facts = f"{schedule.steps:,} steps on {len(training.answers.training):,} answers"
    picture(run, f"{out.name}, a draft model for {Path(training.recipe.target).name}", facts, module.device)
