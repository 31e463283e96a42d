"""`forerun federated run`: one image-text model, learnt together by parties that keep their data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import options
from forerun.cli.command import NAMES, Commands, add

if TYPE_CHECKING:
    from forerun.train.federated.settings import Settings

EXAMPLES = """
forerun federated run quick
forerun federated run shapes --method server-only --run runs/server
forerun federated run federation.yaml --run runs/mine
"""

app = typer.Typer(
    cls=Commands,
    help="An image-text model that parties learn together, each with data of its own (CreamFL).",
    context_settings=NAMES,
    add_completion=False,
    epilog=EXAMPLES.strip(),
)

Config = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help="A YAML file, or a preset: quick, shapes, equal, digits, paper."),
]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        "--run",
        metavar="DIR",
        help="Folder for checkpoints, log and towers; an interrupted run in it goes on.",
        show_default="CONFIG.run",
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help="creamfl, or no-inter, no-intra, no-contrast, mean, server-only, local-only, fedavg, fediot, fedmd, fedet,"
        " fedgems.",
        show_default="as CONFIG says",
    ),
]
Rounds = Annotated[int | None, typer.Option(min=1, help="How many.", show_default="as CONFIG says")]
Seed = Annotated[
    int | None,
    typer.Option(help="Of data, weights and everything drawn.", show_default="as CONFIG says"),
]


@app.callback()
def _federated() -> None: ...


def run(
    config: Config,
    run: RunFolder = None,
    method: MethodName = None,
    rounds: Rounds = None,
    seed: Seed = None,
    as_json: options.Json = False,
    threads: options.Threads = None,
    tensorboard: options.TensorBoard = None,
) -> None:
    """Let all parties learn, round after round, in this process.

    Clients with images, with texts, or with both exchange representations of a public set with a server. Raw data and
    weights stay where they are; that is no proof of privacy. The same command goes on after an interruption, with the
    same bits.
    """
    from forerun.cli.heads import compute_with, events_in

    compute_with(threads)

    from forerun.train.federated import recipe
    from forerun.train.federated.settings import read

    given = {"method": method, "rounds": rounds, "seed": seed}
    settings = read(config, {name: value for name, value in given.items() if value is not None})
    folder = run or Path(f"{config.removesuffix('.yaml').removesuffix('.yml')}.run")
    ready = recipe.prepare(settings)
    with events_in(tensorboard) as events:
        figures = ready.fit(folder, f"{Path(config).stem} {settings.method}", events)
    _report(settings, figures, folder, as_json)


def _report(settings: Settings, figures: Mapping[str, float], folder: Path, as_json: bool) -> None:
    from forerun.cli.files import print_json

    if as_json:
        print_json({"settings": settings.as_json(), "run": str(folder), "figures": dict(figures)})
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from forerun.cli.narration import on_stdout
    from forerun.train.federated.methods import method_of

    console = on_stdout()
    if "r1_sum" in figures:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in ("the server, %", "R@1", "R@5", "R@10", f"R@1 in {settings.folds} folds"):
            table.add_column(heading, justify="left" if heading == "the server, %" else "right")
        for way, name in (("i2t", "images to texts"), ("t2i", "texts to images")):
            found = [figures[f"{way}_{what}"] for what in ("r1", "r5", "r10", "r1_fold")]
            table.add_row(name, *(f"{value:.1f}" for value in found))
        console.print(table)
        console.print(f"R@1 sum of these four: {figures['r1_sum']:.1f}", highlight=False)
    for line in _of_clients(figures):
        console.print(line, highlight=False)
    sense = method_of(settings.method).sense
    rounds = f"{settings.rounds:,} rounds of {settings.method}: {sense}"
    moved = f"{figures['down_bytes'] / 2**20:.2f} MiB down and {figures['up_bytes'] / 2**20:.2f} MiB up in the last one"
    console.print(f"{folder}: {rounds}; {moved}", highlight=False, soft_wrap=True)


def _of_clients(figures: Mapping[str, float]) -> list[str]:
    """What clients can do by themselves, on the mean of each kind: they may lose what the server gains."""
    names: dict[str, Any] = {
        "client_image_accuracy": "image clients: {:.1f} % right on their task",
        "client_text_accuracy": "text clients: {:.1f} % right on their task",
        "client_both_r1_sum": "clients of both: R@1 sum {:.1f}",
    }
    return [text.format(figures[name]) for name, text in names.items() if name in figures]


RUN = """
forerun federated run quick
forerun federated run federation.yaml --run runs/mine --json
"""
add(app, "run", run, RUN)
