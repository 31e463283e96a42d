"""`forerun demo`: plain decoding and the fastest drafter side by side, and a table of what every drafter gives."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import openings, options
from forerun.cli.openings import Opening

if TYPE_CHECKING:
    from rich.console import Console

    from forerun.bench.run import Measurement, Summary
    from forerun.cli.engines import Machine
    from forerun.cli.race import Lane
    from forerun.engine.engine import Engine
    from forerun.sampling import SamplingParams

log = logging.getLogger(__name__)

REFERENCE = Path("models/target")
ROUNDS, PATIENCE_SECONDS = 3, 120.0
FLIPPED = "A near-tie between two tokens can flip in half precision: `forerun check` tells a tie from a mistake."
WRONG = "Here this should not happen: see what `forerun check` says."
TRIED_TOKENS = 48
"""New tokens by which the drafter is chosen that is shown beside plain decoding."""
PROMPT_LINES = 4
"""Of the prompt, before the text that is shown."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder in Hugging Face format, or a hub id.",
        show_default="models/target",
    ),
]
Drafters = Annotated[
    list[str] | None,
    typer.Option(
        "--drafter",
        "--drafters",
        metavar="SPEC",
        help="What to compare with plain; several with commas.",
        show_default="what fits the model",
    ),
]
Show = Annotated[
    str | None,
    typer.Option(metavar="SPEC", show_default="the fastest", help="The one to show beside plain."),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        "--prompt-file",
        metavar="FILE",
        show_default="built in",
        help="Prompts of your own (.txt, .jsonl).",
        rich_help_panel=options.PROMPTS,
    ),
]
Limit = Annotated[int, typer.Option(min=1, help="Measure on so many of the prompts.", rich_help_panel=options.PROMPTS)]
Rounds = Annotated[
    int | None,
    typer.Option(
        min=0,
        show_default="3, or what two minutes allow",
        help="Medians over them count; 0: once, without a clock.",
    ),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the table there; - is stdout.", rich_help_panel=options.OUTPUT),
]
PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw the table (.png, .svg, .pdf).", rich_help_panel=options.OUTPUT),
]
PictureFile = Annotated[
    Path | None,
    typer.Option(
        "--picture",
        metavar="FILE",
        help="Draw the text in the colours of who thought of what (.svg).",
        rich_help_panel=options.OUTPUT,
    ),
]


EXAMPLES = """
forerun demo
forerun demo MODEL --drafters lookup,small:DRAFT_MODEL --prompts mine.jsonl
forerun demo MODEL --show hierarchy --picture drafted.svg
"""


@dataclass(frozen=True)
class Wish:
    """What to compare, and where the results go. specs: drafters by the names that the table has for them."""

    model: str
    specs: Mapping[str, str]
    params: SamplingParams
    prompts: Sequence[Opening]
    rounds: int | None
    show: str | None
    json_file: Path | None
    plot: Path | None
    picture: Path | None

    @property
    def title(self) -> str:
        """What the model is called: as it was asked for, but not where it lies on this machine."""
        return Path(self.model).name if Path(self.model).is_absolute() else self.model


def demo(
    model: Model = "",
    drafters: Drafters = None,
    show: Show = None,
    prompts: Prompts = None,
    limit: Limit = 4,
    rounds: Rounds = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: options.Seed = 0,
    acceptance: options.Acceptance = "exact",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    weights: options.Weights = "auto",
    threads: options.Threads = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    picture: PictureFile = None,
) -> None:
    """Plain decoding and the fastest drafter side by side, then a table of what every drafter gives.

    Works on any model: without --drafter it takes what fits. `identical` compares token ids with
    plain decoding. With native kernels (see `forerun inspect`) and in fp32 every drafter is
    identical. On torch in bf16 a near-tie can flip, because a forward of several tokens rounds
    differently from one of a single token; then the table says how many tokens were equal before,
    and `forerun check` tells a tie from a mistake.
    """
    from forerun.cli.engines import Machine
    from forerun.cli.fitting import beside, given
    from forerun.sampling import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        ignore_eos=prompts is None,  # the suite's prompts break off within a file
    )
    _demand_places(json_file, plot, picture)
    folder = model or str(reference())
    asked = given([*(drafters or []), *([show] if show else [])])
    fitting = {} if drafters else beside(Path(folder))
    specs = {**asked, **fitting}
    wish = Wish(folder, specs, params, _prompts(prompts, limit), rounds, show, json_file, plot, picture)
    _compare(_engines(folder, asked, fitting, Machine(dtype, device, kernels, weights, threads), acceptance), wish)


def _demand_places(json_file: Path | None, plot: Path | None, picture: Path | None) -> None:
    """Refuse what could not be written before anything is measured."""
    from forerun.cli.files import demand_place
    from forerun.errors import RequestError

    for path in (json_file, plot, picture):
        demand_place(path)
    if plot:
        from forerun.plots.style import demand_matplotlib

        demand_matplotlib()
    if picture and picture.suffix != ".svg":
        raise RequestError(f"a drafted text is drawn as SVG, not as {picture.name}: name the file .svg")


def _prompts(file: Path | None, limit: int) -> list[Opening]:
    """The first so many of the user's own, or of the built-in suite's, spread over its categories."""
    from forerun.bench import suites
    from forerun.errors import RequestError

    if file and str(file).isdecimal():
        raise RequestError(f"--prompts is a file of prompts; how many of them is --limit {file}")
    if file:
        return openings.read(file)[:limit]
    return [Opening(one.source, one.prompt) for one in suites.spread(suites.load())[:limit]]


def reference() -> Path:
    """The reference target: below the working directory, or in the source tree that this package runs from.

    RequestError where there is neither: an installed package has no model of its own.
    """
    from forerun.errors import RequestError

    places = (REFERENCE, Path(__file__).parents[3] / REFERENCE)
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise RequestError("there is no models/target here: name a model, a folder or a hub id, after `forerun demo`")
    return found


def _engines(
    model: str, asked: Mapping[str, str], fitting: Mapping[str, str], machine: Machine, acceptance: str
) -> dict[str, Engine]:
    """Plain decoding and the drafters, on one target. One that fits but cannot be built is left out, and
    said so; one that was asked for is demanded."""
    from forerun.cli.engines import beside, load
    from forerun.drafting.spec import describe
    from forerun.errors import ForerunError

    for spec in asked.values():
        describe(spec)  # a wrong name is cheaper to find before the model is read
    engines = {"none": load(model, "none", machine, acceptance=acceptance)}
    for name, spec in {**asked, **fitting}.items():
        try:
            engines[name] = beside(engines["none"], spec, machine)
        except ForerunError as error:
            if name in asked:
                raise
            log.warning("without %s: %s", spec, error)
    return engines


def _compare(engines: dict[str, Engine], wish: Wish) -> None:
    from rich.console import Console

    from forerun.cli.engines import fitted, machine_of
    from forerun.cli.narration import on_stdout

    console = Console(stderr=True) if str(wish.json_file) == "-" else on_stdout()
    plain, params = engines["none"], wish.params
    reader = openings.Reader(plain, openings.Manner())
    texts = [fitted(plain, reader.ids(one), params) for one in wish.prompts]
    shown, pace = _choose(console, engines, texts[0], wish)
    lanes = _side_by_side(console, shown, texts[0], wish, pace)
    result = _measure(console, engines, texts, params, wish.rounds)
    is_clocked = wish.rounds != 0
    _print_table(console, result.rows, is_clocked)
    _print_verdict(console, result.rows, plain, wish)
    machine, amount = machine_of(plain.target.network), _amount(result, params, is_clocked)
    console.print(f"{amount}\n{wish.title} on {machine}", style="dim", highlight=False, markup=False)
    if wish.json_file:
        dtype = str(plain.target.network.dtype).removeprefix("torch.")
        _write_json(wish.json_file, result, {"dtype": dtype, "title": f"{amount}; {machine}"})
    if wish.plot:
        _write_plot(wish.plot, result.rows, f"{wish.title}, plain and drafted", f"{amount}; {machine}")
    if wish.picture:
        _write_picture(wish, lanes[-1], result.rows, (amount, machine))


def _amount(result: Measurement, params: SamplingParams, is_clocked: bool) -> str:
    """How the figures were measured, in one line."""
    prompts = len({run.prompt for run in result.runs})
    new = max(len(run.token_ids) for run in result.runs)
    how = "greedy" if params.is_greedy else f"temperature {params.temperature:g}"
    lossy = "" if all(row.exact for row in result.rows) else "lossy acceptance"
    rounds = f"{'median of ' if result.rounds > 1 else ''}{_many(result.rounds, 'round')}" if is_clocked else ""
    first = f"{_many(prompts, 'prompt')}, up to {_many(new, 'new token')} each"
    return ", ".join(filter(None, (first, how, rounds, lossy)))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _choose(
    console: Console, engines: Mapping[str, Engine], tokens: list[int], wish: Wish
) -> tuple[dict[str, Engine], float]:
    """Plain and the drafter to show beside it, and how many tokens plain makes per second.

    All continue the first prompt a little way; the fastest is shown, unless the user has named one.
    """
    from dataclasses import replace

    short = replace(wish.params, max_new_tokens=min(TRIED_TOKENS, wish.params.max_new_tokens or TRIED_TOKENS))
    plain, *others = _measure(console, engines, [tokens], short, 1, "trying the drafters").rows
    fastest = max(others, key=lambda row: row.tokens_per_second, default=None)
    beside = wish.show if wish.show in engines else fastest.drafter if fastest else None
    return {name: engines[name] for name in ("none", beside) if name}, plain.tokens_per_second


def _side_by_side(
    console: Console, engines: Mapping[str, Engine], tokens: list[int], wish: Wish, pace: float
) -> list[Lane]:
    """The first prompt's continuation, as it comes."""
    from forerun.cli.race import show

    first = wish.prompts[0]
    console.print(f"The model continues {first.where}:\n", highlight=False, markup=False)
    tail = "\n".join(first.shown.splitlines()[-PROMPT_LINES:])
    console.print(tail, style="dim", highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console.print("\n... and goes on:\n")
    return show(console, engines, tokens, wish.params, pace)


def _measure(
    console: Console,
    engines: Mapping[str, Engine],
    texts: Sequence[list[int]],
    params: SamplingParams,
    rounds: int | None,
    what: str = "measuring",
) -> Measurement:
    """rounds: None, as many as there is patience for; 0, one."""
    from rich.progress import Progress

    from forerun.bench.run import measure

    most = ROUNDS if rounds is None else max(1, rounds)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=most * len(texts) * len(engines))
        patience = PATIENCE_SECONDS if rounds is None else math.inf
        return measure(engines, texts, params, most, lambda run: progress.advance(task), patience)


def _print_table(console: Console, rows: Sequence[Summary], is_clocked: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("drafter", overflow="fold", min_width=12)
    for heading in (*(("times plain", "tokens per s") if is_clocked else ()), "tokens per step", "identical"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = max(row.speedup for row in rows)
    for row in rows:
        style, word = _standing(row, rows[0], best) if is_clocked else ("", "")
        clock = (Text(f"{word}{row.speedup:.2f}x", style), f"{row.tokens_per_second:,.0f}") if is_clocked else ()
        equal = Text("-" if row is rows[0] else same(row), "red" if row.identical is False else "")
        table.add_row(Text(name_of(row), style), *clock, f"{row.tokens_per_step:.2f}", equal)
    console.print(table)


def _standing(row: Summary, plain: Summary, best: float) -> tuple[str, str]:
    """A row's colour and, because colours are not everywhere, a word."""
    if row is plain:
        return "", ""
    if row.speedup < 1:
        return "red", "a loss: "
    return ("bold green", "best: ") if row.speedup == best else ("green", "")


def name_of(row: Summary) -> str:
    """What the table calls a drafter."""
    return "plain" if row.drafter == "none" else row.drafter


def _print_verdict(console: Console, rows: Sequence[Summary], plain: Engine, wish: Wish) -> None:
    """What to do with the table, and what to think of texts that differ."""
    from shlex import join

    network, best = plain.target.network, max(rows, key=lambda row: row.speedup)
    has_rivals = wish.rounds != 0 and len(rows) > 1
    if has_rivals and best is rows[0]:
        console.print("Nothing is faster than plain decoding here: use --drafter none.", highlight=False)
    elif has_rivals:
        said = {True: ", every token identical", False: "", None: ""}[best.identical]
        line = f"{best.drafter} is the fastest here: {best.speedup:.2f} times plain{said}. Use it:"
        command = join(["forerun", "generate", wish.model, "...", "--drafter", wish.specs[best.drafter]])
        console.print(f"{line}\n    {command}\n", highlight=False, markup=False, soft_wrap=True)
    if any(row.identical is False for row in rows):
        is_tie = not network.backend.keeps_bits and network.dtype.itemsize == 2
        console.print(FLIPPED if is_tie else WRONG, style="dim", highlight=False)


def same(row: Summary) -> str:
    """The last column: yes, no with the tokens that were equal before the first difference, or a dash for sampling."""
    if row.identical is None:
        return "-"
    return "yes" if row.identical else f"no ({row.equal_tokens} of {row.new_tokens})"


def _write_json(path: Path, result: Measurement, about: dict[str, Any]) -> None:
    import json

    from forerun.cli.files import print_json, write_whole

    value = about | {"rows": [row.as_dict() for row in result.rows], "runs": [run.as_dict() for run in result.runs]}
    if str(path) == "-":
        print_json(value)
    else:
        write_whole(path, json.dumps(value, indent=1).encode() + b"\n")


def _write_plot(path: Path, rows: Sequence[Summary], title: str, under: str) -> None:
    from forerun.bench.picture import drawing
    from forerun.plots.style import write

    write(drawing(rows, title, under), path)


def _write_picture(wish: Wish, lane: Lane, rows: Sequence[Summary], footer: Sequence[str]) -> None:
    from forerun.cli.drafted import Drafted, svg
    from forerun.cli.files import write_whole

    assert wish.picture is not None
    drawn = Drafted(
        title=wish.title if lane.title == "plain" else f"{wish.title} with {lane.title}",
        account=f"{len(lane.words)} tokens in {lane.steps} steps: each in the colour of who thought of it,"
        " and the target agreed to all of them",
        prompt=wish.prompts[0].shown.splitlines()[-PROMPT_LINES:],
        words=lane.words,
        rows=rows,
        is_clocked=wish.rounds != 0,
        footer=footer,
    )
    write_whole(wish.picture, svg(drawn).encode())
