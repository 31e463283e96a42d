"""`forerun train lm`: a language model from a corpus, from a shallower model, or from a teacher. The heads are in
`cli/heads.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from forerun.cli import acceptance, heads, joint, options, small
from forerun.cli.command import NAMES, Commands, add
from forerun.cli.heads import compute_with, events_in
from forerun.drafting import registry

PRESETS = [preset for method in registry.trained().values() for preset in method.presets]
EXAMPLES = f"""
forerun distill MODEL --prompts prompts.jsonl --out answers.jsonl
forerun train {PRESETS[-1]} --target MODEL --data answers.jsonl --out heads
"""

app = typer.Typer(
    cls=Commands,
    help="Train draft heads for a model of yours, or a model.",
    context_settings=NAMES,
    add_completion=False,
    epilog=EXAMPLES.strip(),
)

SHAPE, START, SCHEDULE = "Shape", "Where to start from", "Schedule"

Corpus = Annotated[Path, typer.Option(metavar="DIR", help="Folder with train.bin, heldout.bin and tokenizer/.")]
Build = Annotated[
    bool,
    typer.Option("--build-corpus", help="First build it there, from the Python source on this machine."),
]
Vocabulary = Annotated[int, typer.Option(help="With --build-corpus: tokens of the vocabulary.")]
Run = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="Folder for checkpoints; an interrupted run in it goes on.")
]
Out = Annotated[Path | None, typer.Option(metavar="MODEL", help="Folder for the finished model (Hugging Face format).")]
Size = Annotated[int | None, typer.Option(rich_help_panel=SHAPE, show_default=False)]
HeadDim = Annotated[
    int | None, typer.Option(help="Width of one head; without it, width / heads.", rich_help_panel=options.ADVANCED)
]
Source = Annotated[
    str | None,
    typer.Option(metavar="RUN|MODEL", help="Stack this shallower model's layers.", rich_help_panel=START),
]
InitFrom = Annotated[
    str | None, typer.Option(metavar="RUN|MODEL", help="Take some layers of this model.", rich_help_panel=START)
]
InitLayers = Annotated[str | None, typer.Option(metavar="0,7", help="With --init-from: which.", rich_help_panel=START)]
Teacher = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Learn this model's law instead of the text's.", rich_help_panel=START),
]
Count = Annotated[int, typer.Option(rich_help_panel=SCHEDULE)]
Rows = Annotated[int, typer.Option("--rows", "--batch-size", rich_help_panel=SCHEDULE)]
Every = Annotated[int, typer.Option(help="In steps.", rich_help_panel=options.ADVANCED)]
Rate = Annotated[float, typer.Option(rich_help_panel=SCHEDULE)]
Decay = Annotated[
    float, typer.Option(help="Share of the steps in which the rates fall to 0.", rich_help_panel=SCHEDULE)
]
First = Annotated[
    int, typer.Option(help="Batches to skip: those that an earlier run has seen.", rich_help_panel=options.ADVANCED)
]
Seed = Annotated[int, typer.Option(help="Of random first weights.", rich_help_panel=options.ADVANCED)]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="torch.compile: a slow start, then faster steps.", rich_help_panel=options.ADVANCED),
]


@app.callback()
def _train() -> None: ...


def lm(
    corpus: Corpus,
    run: Run = None,
    out: Out = None,
    build_corpus: Build = False,
    vocabulary: Vocabulary = 4096,
    width: Size = None,
    layers: Size = None,
    heads: Size = None,
    kv_heads: Size = None,
    head_dim: HeadDim = None,
    mlp_width: Size = None,
    max_length: Size = None,
    grow_from: Source = None,
    init_from: InitFrom = None,
    init_layers: InitLayers = None,
    teacher: Teacher = None,
    steps: Count = 1500,
    rows: Rows = 8,
    length: Count = 512,
    first: First = 0,
    warmup: Count = 40,
    decay: Decay = 0.4,
    muon_rate: Rate = 4e-3,
    adam_rate: Rate = 2e-3,
    validate_every: Every = 250,
    save_every: Every = 50,
    seed: Seed = 0,
    device: options.Device = "auto",
    threads: options.Threads = None,
    tensorboard: options.TensorBoard = None,
    compile_: Compile = False,
) -> None:
    """Train a language model on a corpus, or prepare the corpus, or both.

    Checkpoints go to --run, and the same command goes on from the last one. The finished model and its tokenizer go to
    --out, all at once at the end. Sizes that are not given are those of the model to start from, else those of the
    reference target. The validation loss is in nats per token of held-out text.
    """
    _demand_sense(build_corpus, run, out, init_from, init_layers, grow_from)
    compute_with(threads)

    from forerun.cli.narration import bar
    from forerun.cli.pictures import picture
    from forerun.nn.dtype import device_of
    from forerun.train import recipe
    from forerun.train.schedule import Schedule

    if build_corpus:
        with bar("the corpus") as watch:
            built = recipe.build_corpus(corpus, vocabulary, watch)
        print(built)
    if run is None:
        return
    sizes = recipe.Sizes(width, layers, heads, kv_heads, head_dim, mlp_width, max_length)
    start = recipe.Start(init_from or grow_from, _numbers(init_layers))
    schedule = Schedule(steps, 1, warmup, decay, muon_rate, adam_rate)
    schedule = replace(schedule, validate_every=validate_every, save_every=save_every)
    wish = recipe.ModelRecipe(corpus, sizes, start, teacher, schedule, rows, length, first, seed, compile_)
    where = device_of(device)
    with events_in(tensorboard) as events:
        print(recipe.train(wish, run, out, where, events))
    picture(run, (out or run).name, f"{steps:,} steps of {rows} x {length} tokens", where)


def _demand_sense(
    build_corpus: bool,
    run: Path | None,
    out: Path | None,
    init_from: str | None,
    init_layers: str | None,
    grow_from: str | None,
) -> None:
    """Refuse options that contradict one another."""
    from forerun.errors import TrainingError

    if not build_corpus and run is None:
        raise TrainingError("there is nothing to do: give --run DIR to train, or --build-corpus")
    if out is not None and run is None:
        raise TrainingError("--out needs --run DIR, where the checkpoints of its training go")
    if init_layers is not None and init_from is None:
        raise TrainingError("--init-layers needs --init-from: the model whose layers they are")
    if init_from is not None and grow_from is not None:
        raise TrainingError("--grow-from and --init-from exclude each other: a model has one start")


def _numbers(text: str | None) -> tuple[int, ...]:
    from forerun.errors import TrainingError

    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise TrainingError(f"--init-layers {text!r} is not a list of layers: write 0,7") from None


LM = """
forerun train lm --corpus corpus --build-corpus --run run --out models/mine
forerun train lm --corpus corpus --run run --out models/small --layers 2 --teacher models/mine
"""
HEADS = """
forerun distill MODEL --prompts prompts.jsonl --out answers.jsonl
forerun train {name} --target MODEL --data answers.jsonl --out heads
forerun train {name} --target MODEL --data answers.jsonl --out heads --steps 3000 --lr 1e-3
"""
JOINT = """
forerun train {name} --target MODEL --data answers.jsonl --out result
"""

add(app, "lm", lm, LM)
add(app, "small", small.small, small.EXAMPLES)
for preset in PRESETS:
    add(app, preset, heads.command(preset), HEADS.format(name=preset))
add(app, "acceptance", acceptance.command, acceptance.EXAMPLES)
for method in registry.trained().values():
    if method.joint:
        add(app, method.joint.name, joint.command(method), JOINT.format(name=method.joint.name))
