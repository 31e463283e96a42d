"""`forerun demo`: plain decoding and every drafter at hand on held-out source files, side by side."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import openings, options
from forerun.cli.openings import Opening

if TYPE_CHECKING:
    from forerun.bench.run import Measurement, Summary
    from forerun.cli.engines import Machine
    from forerun.engine.engine import Engine
    from forerun.sampling import SamplingParams

log = logging.getLogger(__name__)

REFERENCE = Path("models/target")
ROUNDS, PATIENCE_SECONDS = 3, 120.0
FLIPPED = "A near-tie between two tokens can flip in half precision: `forerun check` tells a tie from a mistake."
WRONG = "Here this should not happen: see what `forerun check` says."
SHOWN_TOKENS = 96
"""New tokens of the text that is streamed for every drafter; the measurement generates more."""

Model = Annotated[
    str,
    typer.Option("--model", metavar="MODEL", help="The model to speed up.", show_default="the reference family's"),
]
Drafters = Annotated[
    list[str] | None,
    typer.Option(
        "--drafter",
        "--drafters",
        metavar="SPEC",
        help="What to compare with plain decoding; several with commas, or repeated.",
        show_default="lookup, hierarchy, and what lies beside the model",
    ),
]
Limit = Annotated[
    int,
    typer.Option(min=1, help="How many prompts to measure on.", rich_help_panel=options.PROMPTS),
]
PromptFile = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        "--prompt-file",
        metavar="FILE",
        help="Prompts of your own (.txt, .jsonl) instead of the built-in suite's.",
        rich_help_panel=options.PROMPTS,
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="3, or fewer where they would take longer than two minutes",
        help="Figures are medians over them.",
    ),
]

EXAMPLES = """
forerun demo
forerun demo --model MODEL --drafters lookup,small:DRAFT_MODEL --prompts mine.jsonl
"""

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the table there; - is stdout.", rich_help_panel=options.OUTPUT),
]
PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw it (.png, .svg, .pdf).", rich_help_panel=options.OUTPUT),
]


def demo(
    model: Model = "",
    drafters: Drafters = None,
    prompts: PromptFile = None,
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
) -> None:
    """Generate with plain decoding and with each drafter: the text, then a table of what it cost.

    `identical` compares token ids with plain decoding. With native kernels (see `forerun inspect`)
    and in fp32 every drafter is identical. On torch in bf16 a near-tie can flip, because a forward
    of several tokens rounds differently from one of a single token; then the table says how many
    tokens were equal before, and `forerun check` tells a tie from a mistake.
    """
    from forerun.cli.engines import Machine
    from forerun.cli.files import demand_place
    from forerun.sampling import SamplingParams

    machine = Machine(dtype, device, kernels, weights, threads)
    asked = _prompts(prompts, limit)
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        ignore_eos=True,
    )
    demand_place(json_file)
    demand_place(plot)
    if plot:
        from forerun.bench.picture import demand_matplotlib

        demand_matplotlib()
    folder = model or _reference()
    specs = {"none": "none"} | (_given(drafters) if drafters else _beside(Path(folder)))
    engines = _engines(folder, specs, machine, acceptance, strict=bool(drafters))
    _compare(engines, params, asked, rounds, json_file, plot)


def _reference() -> str:
    """The family's target, where it is at hand: a wheel brings no models."""
    from forerun.errors import RequestError

    if not reference().is_dir():
        raise RequestError(
            "the models that come with the source are not here: name one with --model, any model will do"
        )
    return str(reference())


def _prompts(file: str | None, limit: int) -> list[Opening]:
    """The first so many of a file, or a fair selection of the built-in suite."""
    from forerun.bench import suites
    from forerun.errors import RequestError

    if file and file.isdecimal():
        raise RequestError(f"--prompts is a file of prompts; how many of them is --limit {file}")
    if file:
        return openings.read(Path(file))[:limit]
    return [Opening(one.source, one.prompt) for one in suites.spread(suites.load())[:limit]]


def reference() -> Path:
    """The reference target: below the working directory, or in the source tree that this package runs from."""
    beside_source = Path(__file__).parents[3] / REFERENCE
    return beside_source if beside_source.is_dir() and not REFERENCE.is_dir() else REFERENCE


def _given(drafters: list[str]) -> dict[str, str]:
    """The drafters asked for, by the words they were asked with."""
    parts = chain.from_iterable([one] if one.lstrip().startswith("{") else one.split(",") for one in drafters)
    return {part.strip(): part.strip() for part in parts if part.strip() not in ("none", "")}


def _beside(target: Path) -> dict[str, str]:
    """What needs nothing, and what lies beside the target, by name."""
    family = sorted(target.parent.glob("*/config.json"))
    kinds = {path.parent: _kind(path, target) for path in family}
    there = sorted((kind != "small", folder) for folder, kind in kinds.items() if kind)
    return (
        {"lookup": "lookup", "hierarchy": "hierarchy"}
        | {folder.name: f"{kinds[folder]}:{folder}" for _, folder in there}
        | {path.stem: str(path) for path in sorted(target.parent.glob("*.yaml"))}
    )


def _kind(config: Path, target: Path) -> str:
    """The drafter that a folder holds: trained heads, or a smaller model with as many tokens; empty
    if none for this target."""
    from forerun.drafting.registry import names
    from forerun.sources.folder import CONFIG

    found, own = _settings(config), _settings(target / CONFIG)
    if "drafter" in found:
        return str(found["drafter"]) if found["drafter"] in names() else ""
    is_smaller = _bytes(config.parent) < _bytes(target)
    return "small" if is_smaller and found.get("vocab_size") == own.get("vocab_size") else ""


def _settings(config: Path) -> dict[str, Any]:
    import json

    try:
        found = json.loads(config.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _engines(
    model: str, specs: Mapping[str, str], machine: Machine, acceptance: str, strict: bool
) -> dict[str, Engine]:
    """Plain decoding and the drafters, on one target. Without `strict`, one that cannot be built is
    left out, and said so."""
    from forerun.cli.engines import beside, load
    from forerun.drafting.spec import describe
    from forerun.errors import ForerunError

    for spec in specs.values():
        describe(spec)  # a wrong name is cheaper to find before the model is read
    engines = {"none": load(model, "none", machine, acceptance=acceptance)}
    for name, spec in list(specs.items())[1:]:
        try:
            engines[name] = beside(engines["none"], spec, machine)
        except ForerunError as error:
            if strict:
                raise
            log.warning("without %s: %s", spec, error)
    return engines


def _compare(
    engines: dict[str, Engine],
    params: SamplingParams,
    asked: list[Opening],
    rounds: int | None,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    from rich.console import Console

    from forerun.cli.engines import fitted
    from forerun.cli.narration import on_stdout

    console = Console(stderr=True) if str(json_file) == "-" else on_stdout()
    plain = engines["none"]
    network = plain.target.network
    machine = f"{str(network.dtype).removeprefix('torch.')} on {network.device.type}"
    reader = openings.Reader(plain, openings.Manner())
    texts = [fitted(plain, reader.ids(one), params) for one in asked]
    _stream(console, engines, asked[0], texts[0], params)
    result = _measure(console, engines, texts, params, rounds)
    amount = f"prompts: {len(texts)}, new tokens each: {params.max_new_tokens}, rounds: {result.rounds}"
    lossy = "" if all(row.exact for row in result.rows) else "; lossy acceptance"
    title = f"{amount}; {machine}{lossy}"
    _print_table(console, result.rows, title)
    if any(row.identical is False for row in result.rows):
        console.print(
            FLIPPED if not network.backend.keeps_bits and network.dtype.itemsize == 2 else WRONG,
            style="dim",
            highlight=False,
        )
    if json_file:
        _write_json(json_file, result, {"dtype": str(network.dtype).removeprefix("torch."), "title": title})
    if plot:
        _write_plot(plot, result.rows, title)


def _stream(
    console: Any,
    engines: dict[str, Engine],
    opening: Opening,
    tokens: list[int],
    params: SamplingParams,
) -> None:
    """The first prompt's continuation by every drafter, as it comes."""
    from dataclasses import replace

    from forerun.cli.narration import DRAFTED, Scribe, summary

    short = replace(params, max_new_tokens=min(SHOWN_TOKENS, params.max_new_tokens or SHOWN_TOKENS))
    console.print(f"The model continues {opening.where}. Its last lines:\n", highlight=False)
    console.print(
        "\n".join(opening.shown.splitlines()[-6:]), style="dim", highlight=False, markup=False, soft_wrap=True
    )
    marked = f"[{DRAFTED}]marked tokens[/] come from the drafter" if console.is_terminal else "on a terminal, tokens"
    console.print(
        f"\n{marked}{'' if console.is_terminal else ' of the drafter are marked'}; the target agreed to each.\n"
    )
    for name, engine in engines.items():
        console.print(f"── {name}", style="bold", highlight=False)
        scribe = Scribe(console, as_ids=engine.tokenizer is None)
        outputs = engine.stream([tokens], short).outputs(scribe.show)
        scribe.close()
        if any(output.finish_reason == "interrupted" for output in outputs):
            raise KeyboardInterrupt
        console.print(summary(outputs, outputs[0].stats.seconds) + "\n", style="dim", highlight=False)


def _measure(
    console: Any, engines: dict[str, Engine], texts: Sequence[list[int]], params: SamplingParams, rounds: int | None
) -> Measurement:
    from rich.progress import Progress

    from forerun.bench.run import measure

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=(rounds or ROUNDS) * len(texts) * len(engines))
        patience = math.inf if rounds else PATIENCE_SECONDS
        return measure(engines, texts, params, rounds or ROUNDS, lambda run: progress.advance(task), patience)


def _print_table(console: Any, rows: Sequence[Summary], title: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("\ndrafter", overflow="fold", min_width=12)
    for heading in (
        "tokens\nper s",
        "\nspeedup",
        "tokens\nper step",
        "draft\ns",
        "verify\ns",
        "other\ns",
        "\nidentical",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        seconds = (f"{value:.2f}" for value in (row.draft_seconds, row.verify_seconds, row.other_seconds))
        speed = f"{row.tokens_per_second:.0f}"
        figures = speed, f"{row.speedup:.2f}x", f"{row.tokens_per_step:.2f}", *seconds, same(row)
        table.add_row(row.drafter, *figures, style=_colour(row, rows))
    console.print(table)


def _colour(row: Summary, rows: Sequence[Summary]) -> str:
    """Green for what is faster than plain decoding, the best of it bold, red for what is slower."""
    if row.speedup == 1:
        return ""
    best = row.speedup == max(one.speedup for one in rows)
    return "red" if row.speedup < 1 else "bold green" if best else "green"


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


def _write_plot(path: Path, rows: Sequence[Summary], title: str) -> None:
    from forerun.bench.picture import draw
    from forerun.cli.files import write_whole

    write_whole(path, draw(rows, title, path.suffix.removeprefix(".") or "png"))
