"""`forerun train PRESET`: draft heads on a target of your own, from its own answers; a command for every preset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import fields, options
from forerun.drafting import registry
from forerun.drafting.trained import Adversary, Weights

if TYPE_CHECKING:
    from forerun.train.acceptance import AcceptanceTraining
    from forerun.train.drafters import HeadsRecipe, HeadsTraining
    from forerun.train.events import Events

SHAPE, LOSS, SCHEDULE = "Shape", "Loss", "Schedule"
PAPER = "the paper's"
SHOWN_TOKENS = 48

Target = Annotated[str, typer.Option(metavar="MODEL", help="The model that the heads are for; it stays as it is.")]
Data = Annotated[Path, typer.Option(metavar="FILE", help="Its answers, as forerun distill leaves them.")]
Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text to learn from beside the answers: a corpus's train.bin.",
        rich_help_panel=options.ADVANCED,
    ),
]
TextShare = Annotated[
    float,
    typer.Option(min=0.0, max=0.99, help="Of the batches, how many are that text.", rich_help_panel=options.ADVANCED),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the heads; older ones in it are replaced.")]
Run = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="DIR",
        help="Folder for checkpoints; an interrupted run in it goes on.",
        show_default="OUT.run",
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Of the optimiser.", rich_help_panel=SCHEDULE)]
Rows = Annotated[
    int,
    typer.Option("--rows", "--batch-size", min=1, help="Answers per part of a step.", rich_help_panel=SCHEDULE),
]
Length = Annotated[
    int,
    typer.Option(
        help="Tokens of an answer with its prompt; longer prompts lose their beginning.",
        rich_help_panel=options.ADVANCED,
    ),
]
Parts = Annotated[
    int,
    typer.Option(min=1, help="Parts of a step (gradient accumulation).", rich_help_panel=options.ADVANCED),
]
Rate = Annotated[
    float | None,
    typer.Option("--rate", "--lr", min=0.0, help="Peak learning rate.", rich_help_panel=SCHEDULE, show_default=PAPER),
]
Floor = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, help="Share of the rate at the end.", rich_help_panel=options.ADVANCED, show_default=PAPER
    ),
]
Every = Annotated[int, typer.Option(min=1, help="In steps.", rich_help_panel=options.ADVANCED)]
Seed = Annotated[
    int, typer.Option(help="Of the order of answers and of random first weights.", rich_help_panel=options.ADVANCED)
]
StartBatches = Annotated[
    int,
    typer.Option(
        min=0,
        help="Batches of a first fit by least squares; 0 starts as the papers do.",
        rich_help_panel=SCHEDULE,
    ),
]
InitFrom = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Go on from trained heads, of the same shape or of fewer layers.",
        rich_help_panel=options.ADVANCED,
    ),
]


def command(preset: str) -> Callable[..., None]:
    """The command that trains heads of this kind."""
    _, method, chosen = registry.preset(preset)
    shapes = fields.parameters(method.config, SHAPE)

    def train(
        target: Target,
        data: Data,
        out: Out,
        run: Run = None,
        text: Text = None,
        shape: None = None,
        loss: None = None,
        adversary: None = None,
        steps: Steps = 1000,
        rows: Rows = 16,
        length: Length = 512,
        parts: Parts = 1,
        rate: Rate = None,
        floor: Floor = None,
        validate_every: Every = 200,
        save_every: Every = 100,
        seed: Seed = 0,
        start_batches: StartBatches = 64,
        init_from: InitFrom = None,
        text_share: TextShare = 0.5,
        dtype: options.Dtype = "auto",
        device: options.Device = "auto",
        kernels: options.Kernels = "auto",
        threads: options.Threads = None,
        tensorboard: options.TensorBoard = None,
        **given: Any,
    ) -> None:
        compute_with(threads)
        loss_weights = replace(chosen.weights, **given_of(Weights, given))
        _demand_sense(out, loss_weights)
        architecture = given_of(method.config, given)
        against = _adversary(given)

        from forerun.train import drafters

        rest = {"parts": parts, "validate_every": validate_every, "save_every": save_every}
        schedule = drafters.schedule_for(chosen, steps, rate, floor, **rest)
        what = (preset, target, data, architecture, loss_weights, schedule)
        recipe = drafters.HeadsRecipe(
            *what, rows, length, seed, init_from, dtype, start_batches, kernels, text, text_share, against
        )
        _fit(recipe, run or run_of(out), out, device, tensorboard)

    train.__doc__ = f"""{chosen.sense}

    The target is frozen; its states are computed on the fly. First one answer is shown with the trained
    tokens marked; in the end, how often each head is right, and the tokens per step that this promises. The
    run's folder has a log of the figures on the way.
    """
    of_loss = {"loss": fields.parameters(Weights, LOSS), "adversary": fields.parameters(Adversary, LOSS)}
    return fields.replacing(train, shape=shapes, **of_loss)


def compute_with(threads: int | None) -> None:
    """As `forerun.load` does, for trainings that load no engine."""
    from forerun.engine.threads import use_threads, warn_if_busy

    warn_if_busy(use_threads(threads))


@contextmanager
def events_in(folder: Path | None) -> Iterator[Events | None]:
    """Where TensorBoard looks, if it is to."""
    if folder is None:
        yield None
        return
    from forerun.train.events import Events

    with closing(Events(folder)) as events:
        yield events


def _fit(recipe: HeadsRecipe, run: Path, out: Path, device: str, tensorboard: Path | None) -> None:
    from forerun.cli import engines
    from forerun.nn.dtype import device_of
    from forerun.train import drafters

    engines.quiet()
    training = drafters.prepare(recipe, device_of(device))
    introduce(training)
    with events_in(tensorboard) as events:
        report(training, training.fit(run, out, events), out)
    draw(training, run, f"{recipe.preset} heads for {Path(recipe.target).name}")


def run_of(out: Path) -> Path:
    """Where checkpoints go if nobody says."""
    return out.with_name(f"{out.name}.run")


def given_of(record: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record that were given as options."""
    return {name: given[option] for option, name in fields.flags(record).items() if given.get(option) is not None}


def _adversary(given: Mapping[str, Any]) -> Adversary | None:
    """TrainingError for the settings of a discriminator that nobody asked for."""
    from forerun.errors import TrainingError

    settings = given_of(Adversary, given)
    if settings and "weight" not in settings:
        raise TrainingError("heads that learn against no discriminator have no options of one: give --adversarial too")
    return Adversary(**settings) if settings else None


def _demand_sense(out: Path, weights: Weights) -> None:
    """Refuse what could not be followed to the end, before the target is read."""
    from forerun.errors import TrainingError

    if not weights.decay:
        raise TrainingError("nothing would be learnt: give --head-decay a number above 0")
    if not (weights.text or weights.asks_target or weights.state):
        raise TrainingError("nothing would be learnt: give --text-weight or --teacher-weight a number above 0")
    demand_place(out)


def demand_place(out: Path) -> None:
    """Refuse folders that heads cannot be written to."""
    from forerun.errors import TrainingError

    if out.name in ("", ".."):
        raise TrainingError(f"--out {out} has no name of its own: name a folder, new or with older heads")
    above = next(place for place in (out, *out.parents) if place.exists())
    if not above.is_dir():
        raise TrainingError(f"--out {out} cannot be a folder, for {above} is a file: choose another")
    if (out / "config.json").exists() and not _is_ours(out / "config.json"):
        raise TrainingError(f"{out} holds another model, which would be overwritten: choose another --out")


def _is_ours(config: Path) -> bool:
    """A checkpoint of draft heads, which may be replaced."""
    import json

    try:
        return "drafter" in json.loads(config.read_text())
    except (OSError, ValueError):
        return False


def introduce(training: HeadsTraining | AcceptanceTraining, whose: str = "The heads have") -> None:
    """One sample with what is trained on marked, and the size of everything. whose: the parameters."""
    from forerun.cli.narration import on_stderr
    from forerun.cli.samples import marked
    from forerun.sources.source import Source
    from forerun.train.drafters import example

    console, sample = on_stderr(), example(training.answers)
    tokenizer = Source.of(training.recipe.target).tokenizer
    prompt, answer = sample.prompt[-SHOWN_TOKENS:], sample.answer[:SHOWN_TOKENS]
    text = marked(tokenizer, prompt, answer, console.is_terminal, SHOWN_TOKENS)
    console.print(text, highlight=False, soft_wrap=True)
    answers = training.answers
    tokens = sum(len(one.answer) for one in answers.training)
    numbers = sum(p.numel() for p in training.objective.module.parameters())
    console.print(
        f"\nMarked tokens are trained on: {answers.trained_share:.0%} of what is read, {tokens:,} tokens in"
        f" {len(answers.training):,} answers; {len(answers.heldout):,} answers are held out. {whose} {numbers:,}"
        " parameters.",
        highlight=False,
        soft_wrap=True,
    )


def report(training: HeadsTraining, figures: dict[str, float], out: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from forerun.cli.narration import on_stdout

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("head", "loss", "top 1", "top 2", "top 3", "top 4", "top 5", "given", "temperature"):
        table.add_column(heading, justify="right")
    head = 1
    while f"head{head}_top1" in figures:
        loss = f"{figures[f'head{head}_loss']:.2f}"
        shares = [figures[f"head{head}_{name}"] for name in (*(f"top{k}" for k in range(1, 6)), "given")]
        temperature = figures.get(f"head{head}_temperature")  # heads that are trained with their target have none
        fitted = "" if temperature is None else f"{temperature:.2f}"
        table.add_row(str(head), loss, *(f"{share:.1%}" for share in shares), fitted)
        head += 1
    console = on_stdout()
    console.print(table)
    if training.judging is not None:
        console.print(
            f"The discriminator was right {figures['discriminator_accuracy']:.0%} of the time; against a perfect"
            " drafter it would be 50%",
            highlight=False,
            soft_wrap=True,
        )
    nodes, where = training.objective.tree.size, "held-out" if training.answers.heldout else "the training"
    console.print(
        f"{out}: {figures['tokens_per_step']:.2f} tokens per step projected on {where} answers (a tree of {nodes}"
        " nodes);"
        " forerun calibrate fits the tree to this machine",
        highlight=False,
        soft_wrap=True,
    )


def draw(training: HeadsTraining, run: Path, title: str) -> None:
    from forerun.cli.pictures import picture

    facts = f"{training.recipe.schedule.steps:,} steps on {len(training.answers.training):,} answers"
    picture(run, title, facts, training.objective.teacher.device)
