"""Heads and their target trained together, for methods that say how. The target becomes another model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import fields, heads, options
from forerun.drafting.trained import JointMethod, Trained, Weights

if TYPE_CHECKING:
    from forerun.train.joint import JointRecipe, JointTraining

Target = Annotated[
    str,
    typer.Option(metavar="MODEL", help="The model to begin with; its folder stays as it is. A Llama, Mistral or Qwen."),
]
Out = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Folder for the result: DIR/model, the new target, and DIR/heads, its heads."),
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
        rich_help_panel=options.ADVANCED,
        show_default="sine with original, constant with text",
    ),
]
Rank = Annotated[int, typer.Option(min=1, help="Of the target's low-rank adapters.", rich_help_panel=options.ADVANCED)]
Alpha = Annotated[float, typer.Option(help="Adapters count ALPHA / RANK.", rich_help_panel=options.ADVANCED)]
Rate = Annotated[
    float | None,
    typer.Option(
        "--rate",
        "--lr",
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


def command(method: Trained) -> Callable[..., None]:
    """The command that trains heads of this method and their target together."""
    assert method.joint is not None
    joined: JointMethod = method.joint

    def train(
        target: Target,
        data: heads.Data,
        out: Out,
        run: heads.Run = None,
        init_from: str | None = None,
        shape: None = None,
        keep: Keep = "original",
        head_weight: HeadWeight = None,
        ramp: Ramp = None,
        loss: None = None,
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
        threads: options.Threads = None,
        tensorboard: options.TensorBoard = None,
        **given: Any,
    ) -> None:
        from forerun.train import drafters, joint

        _demand_place(out)
        heads.compute_with(threads)
        preset = joint.preset_of(joined, keep)
        rest = {"parts": parts, "validate_every": validate_every, "save_every": save_every}
        schedule = joint.schedule_for(preset, steps, rate, head_rate, **rest)
        loss_weights = replace(preset.heads.weights, **heads.given_of(Weights, given))
        architecture = heads.given_of(method.config, given)
        what = (joined.preset, target, data, architecture, loss_weights, schedule)
        own = drafters.HeadsRecipe(*what, rows, length, seed, init_from, dtype)
        weight = preset.head_weight if head_weight is None else head_weight
        recipe = joint.JointRecipe(own, keep, weight, ramp or preset.ramp, rank, alpha)
        _fit(recipe, run or heads.run_of(out), out, device, tensorboard)

    train.__doc__ = f"""{joined.sense}

    The target moves through low-rank adapters, merged into DIR/model in the end. That is a new model, close to the old
    one; what it says with DIR/heads is exactly what it says without, which need not be what MODEL says.
    """
    decay = [one for one in fields.parameters(Weights, heads.LOSS) if one.name == "head_decay"]
    begin = f"Begin with heads that forerun train {joined.preset} has trained: the paper's two stages."
    start, shapes = fields.one("init_from", str, begin, metavar="DIR"), fields.parameters(method.config, heads.SHAPE)
    return fields.replacing(train, init_from=[start], shape=shapes, loss=decay)


def _fit(recipe: JointRecipe, run: Path, out: Path, device: str, tensorboard: Path | None) -> None:
    from forerun.nn.dtype import device_of
    from forerun.train import joint

    training = joint.prepare(recipe, device_of(device))
    heads.introduce(training.heads)
    _warn(training, out)
    with heads.events_in(tensorboard) as events:
        figures, target = training.fit(run, out, events), recipe.heads.target
    heads.report(training.heads, figures, out / joint.HEADS)
    report(figures, target, out)
    heads.draw(training.heads, run, f"{joint.method_of(recipe)[1].name}: {Path(target).name} and its heads")


def _demand_place(out: Path) -> None:
    """Refuse a result's folder that could not be written in the end."""
    from forerun.errors import TrainingError

    above = next(place for place in (out, *out.parents) if place.exists())
    if out.name in ("", "..") or not above.is_dir():
        raise TrainingError(f"--out {out} cannot be a folder: name one, new or with an older result")
    if (out / "config.json").exists():
        raise TrainingError(f"{out} is a model's folder: name another, into which model and heads go")


def _warn(training: JointTraining, out: Path) -> None:
    from forerun.cli.narration import on_stderr

    numbers = sum(p.numel() for p in training.objective.module.backbone.parameters())
    on_stderr().print(
        f"This changes the target, through adapters of {numbers / 1e6:.1f} M parameters: {out / 'model'} will be a"
        " new one.",
        highlight=False,
        soft_wrap=True,
    )


def report(figures: dict[str, Any], target: str, out: Path) -> None:
    from forerun.cli.narration import on_stdout

    on_stdout().print(
        f"{out / 'model'}: a new target, {figures['divergence']:.4f} nats per held-out token away from {target}"
        f" (KL divergence); its loss on the held-out answers is {figures['text']:.4f} where {target} has"
        f" {figures['original_text']:.4f}. Speculation with"
        f" {out / 'heads'} says exactly what {out / 'model'} says, and that is not always what {target} says",
        highlight=False,
        soft_wrap=True,
    )
