"""`forerun demo`: plain decoding and every drafter at hand on held-out source files, side by side."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import options

if TYPE_CHECKING:
    from forerun.bench.run import Measurement, Summary
    from forerun.cli.engines import Machine
    from forerun.engine.engine import Engine
    from forerun.sampling import SamplingParams

REFERENCE = Path("models/target")
ROUNDS, PATIENCE_SECONDS = 3, 120.0
FLIPPED = "A near-tie between two tokens can flip in half precision: `forerun check` tells a tie from a mistake."
WRONG = "Here this should not happen: see what `forerun check` says."
SHOWN_TOKENS = 96
"""New tokens of the text that is streamed for every drafter; the measurement generates more."""

Model = Annotated[
    str, typer.Option("--model", help="The target; the reference family's without it.", show_default=False)
]
Drafters = Annotated[
    list[str] | None,
    typer.Option(
        "--drafter",
        "--drafters",
        metavar="SPEC",
        help="A drafter to compare with plain decoding; may be repeated, or list several with commas. Without it:"
        " lookup, hierarchy, and what lies beside the target: models, heads, and *.yaml.",
    ),
]
Prompts = Annotated[int, typer.Option(min=1, help="Prompts of the built-in suite to measure on.")]
Rounds = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default=False,
        help="Rounds; figures are medians over them. Without it: 3, or fewer where they would take longer than two"
        " minutes.",
    ),
]
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
    prompts: Prompts = 4,
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
    folder = model or str(reference())
    specs = {"none": "none"} | (_given(drafters) if drafters else _beside(Path(folder)))
    engines = _engines(folder, specs, machine, acceptance, strict=bool(drafters))
    _compare(engines, params, prompts, rounds, json_file, plot)


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
            print(f"without {spec}: {error}", file=sys.stderr)
    return engines


def _compare(
    engines: dict[str, Engine],
    params: SamplingParams,
    prompts: int,
    rounds: int | None,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    from rich.console import Console

    from forerun.bench import suites
    from forerun.cli.engines import fitted
    from forerun.cli.narration import on_stdout

    console = Console(stderr=True) if str(json_file) == "-" else on_stdout()
    plain = engines["none"]
    network = plain.target.network
    machine = f"{str(network.dtype).removeprefix('torch.')} on {network.device.type}"
    chosen = suites.spread(suites.load())[:prompts]
    texts = [fitted(plain, prompt.prompt, params) for prompt in chosen]
    _stream(console, engines, chosen[0].source, chosen[0].prompt, texts[0], params)
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
    source: str,
    prompt: str,
    tokens: list[int],
    params: SamplingParams,
) -> None:
    """The first prompt's continuation by every drafter, as it comes."""
    from dataclasses import replace

    from forerun.cli.narration import DRAFTED, Scribe, summary

    short = replace(params, max_new_tokens=min(SHOWN_TOKENS, params.max_new_tokens or SHOWN_TOKENS))
    console.print(f"The model continues {source}, which it has never seen. Its last lines:\n", highlight=False)
    console.print("\n".join(prompt.splitlines()[-6:]), style="dim", highlight=False, markup=False, soft_wrap=True)
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
        table.add_row(row.drafter, speed, f"{row.speedup:.2f}x", f"{row.tokens_per_step:.2f}", *seconds, same(row))
    console.print(table)


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
