"""`forerun train medusa2`: heads and their target trained together. The target becomes another model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from forerun.cli import heads, options

if TYPE_CHECKING:
    from forerun.train.joint import JointTraining

ADAPTERS = "Adapters"

Target = Annotated[
    str,
    typer.Option(metavar="MODEL", help="The model to begin with; its folder stays as it is. A Llama, Mistral or Qwen."),
]
Out = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Folder for the result: DIR/model, the new target, and DIR/heads, its heads."),
]
InitFrom = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Begin with heads that forerun train medusa has trained: the paper's two stages."),
]
Keep = Annotated[
    str,
    typer.Option(
        metavar="original|text",
        help="What holds the target: the law it had, or the answers themselves. The other defaults follow.",
        rich_help_panel=heads.LOSS,
    ),
]
HeadWeight = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Of all heads' losses together.",
        rich_help_panel=heads.LOSS,
        show_default="0.01 with original, 0.2 with text",
    ),
]
Ramp = Annotated[
    str | None,
    typer.Option(
        metavar="constant|linear|sine|sine:R",
        help="How that weight rises; sine:R has risen after a share R of the steps.",
        rich_help_panel=heads.LOSS,
        show_default="sine with original, constant with text",
    ),
]
Heads = Annotated[
    int | None,
    typer.Option("--heads", min=1, help="How many heads.", rich_help_panel=heads.SHAPE, show_default=heads.PAPER),
]
Vocabulary = Annotated[
    Literal["own", "shared"] | None,
    typer.Option(
        metavar="own|shared",
        help="A projection per head, or the target's for all.",
        rich_help_panel=heads.SHAPE,
        show_default="own",
    ),
]
Rank = Annotated[int, typer.Option(min=1, help="Of the target's low-rank adapters.", rich_help_panel=ADAPTERS)]
Alpha = Annotated[float, typer.Option(help="Adapters count ALPHA / RANK.", rich_help_panel=ADAPTERS)]
Rate = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="Peak learning rate of the target's adapters.",
        rich_help_panel=heads.SCHEDULE,
        show_default="1e-4 with original, 5e-4 with text",
    ),
]
HeadRate = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="The heads' learning rate, in multiples of that.",
        rich_help_panel=heads.SCHEDULE,
        show_default="4",
    ),
]


def medusa2(
    target: Target,
    data: heads.Data,
    out: Out,
    run: heads.Run = None,
    init_from: InitFrom = None,
    count: Heads = None,
    layers: heads.Layers = None,
    tied_layers: heads.Tied = None,
    vocabulary: Vocabulary = None,
    keep: Keep = "original",
    head_weight: HeadWeight = None,
    ramp: Ramp = None,
    head_decay: heads.HeadDecay = None,
    rank: Rank = 32,
    alpha: Alpha = 16.0,
    steps: heads.Steps = 1000,
    rows: heads.Rows = 16,
    length: heads.Length = 512,
    parts: heads.Parts = 1,
    rate: Rate = None,
    head_rate: HeadRate = None,
    validate_every: heads.Every = 200,
    save_every: heads.Every = 100,
    seed: heads.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Train Medusa heads and their target together: more tokens per step, and another target.

    The target moves through low-rank adapters, merged into DIR/model in the end. That is a new model, close to the old one; what
    it says with DIR/heads is exactly what it says without, which need not be what MODEL says.
    """
    from dataclasses import replace

    from forerun.nn.dtype import device_of
    from forerun.train import drafters, joint

    _demand_place(out)
    preset = joint.preset_of(keep)
    shape = {"heads": count, "layers": layers, "tied_layers": tied_layers, "vocabulary": vocabulary}
    rest = {"parts": parts, "validate_every": validate_every, "save_every": save_every}
    own = drafters.HeadsRecipe(
        preset="medusa",
        target=target,
        data=data,
        architecture={name: value for name, value in shape.items() if value is not None},
        weights=preset.heads.weights if head_decay is None else replace(preset.heads.weights, decay=head_decay),
        schedule=joint.schedule_for(preset, steps, rate, head_rate, **rest),
        rows=rows,
        length=length,
        seed=seed,
        init_from=init_from,
        dtype=dtype,
    )
    recipe = joint.JointRecipe(
        heads=own,
        keep=keep,
        head_weight=preset.head_weight if head_weight is None else head_weight,
        ramp=ramp or preset.ramp,
        rank=rank,
        alpha=alpha,
    )
    training = joint.prepare(recipe, device_of(device))
    heads.introduce(training.heads)
    _warn(training, out)
    figures = training.fit(run or out.with_name(out.name + ".run"), out)
    heads.report(training.heads, figures, out / joint.HEADS)
    report(figures, target, out)


def _demand_place(out: Path) -> None:
    """Refuse a result's folder that could not be written in the end."""
    from forerun.errors import TrainingError

    above = next(place for place in (out, *out.parents) if place.exists())
    if out.name in ("", "..") or not above.is_dir():
        raise TrainingError(f"--out {out} cannot be a folder: name one, new or with an older result")
    if (out / "config.json").exists():
        raise TrainingError(f"{out} is a model's folder: name another, into which model and heads go")


def _warn(training: JointTraining, out: Path) -> None:
    from rich.console import Console

    numbers = sum(p.numel() for p in training.objective.module.backbone.parameters())
    Console(stderr=True).print(
        f"This changes the target, through adapters of {numbers / 1e6:.1f} M parameters: {out / 'model'} will be a new one.",
        highlight=False,
        soft_wrap=True,
    )


def report(figures: dict[str, Any], target: str, out: Path) -> None:
    from forerun.cli.narration import on_stdout

    on_stdout().print(
        f"{out / 'model'}: a new target, {figures['divergence']:.4f} nats per held-out token away from {target}. Speculation with"
        f" {out / 'heads'} says exactly what {out / 'model'} says, and that is not always what {target} says",
        highlight=False,
        soft_wrap=True,
    )
