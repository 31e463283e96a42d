"""`forerun calibrate`: the static tree that is fastest for trained heads on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import openings, options
from forerun.drafting.registry import calibrated

if TYPE_CHECKING:
    from forerun.drafting.heads import HeadsModule
    from forerun.engine.engine import Engine
    from forerun.plan.calibrate import Calibration, Candidate, Stopwatch
    from forerun.sampling import SamplingParams
    from forerun.train.distill import Sample

log = logging.getLogger(__name__)

Heads = Annotated[
    str,
    typer.Option(
        "--drafter",
        metavar="SPEC",
        help=f"Trained heads: {', '.join(f'{name}:DIR' for name in calibrated())}, or a file that describes them.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Where the tree goes.", show_default="tree.json beside the heads, where they find it"
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The target's answers, from forerun distill.",
        show_default="answers to built-in prompts",
    ),
]
Answers = Annotated[int, typer.Option(min=4, help="So many answers are looked at.")]
Rows = Annotated[
    int, typer.Option("--rows", "--batch-size", min=1, help="Requests that run side by side in the timings.")
]
Rounds = Annotated[
    int, typer.Option(min=2, help="Timings of every size, each beside plain decoding; the median counts.")
]

EXAMPLES = "\n".join(
    f"forerun calibrate MODEL --drafter {name}:HEADS{how}"
    for name, how in zip(calibrated(), ("", " --data answers.jsonl --batch-size 8"), strict=False)
)


def calibrate(
    model: options.Model,
    drafter: Heads,
    out: Out = None,
    data: Data = None,
    prompts: options.PromptFile = None,
    answers: Answers = 48,
    rows: Rows = 1,
    rounds: Rounds = 5,
    max_new_tokens: options.MaxNewTokens = 192,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    weights: options.Weights = "auto",
    revision: options.Revision = None,
    threads: options.Threads = None,
) -> None:
    """Count which paths of best tokens the target follows, time trees of every size here, and keep the fastest.

    One half of the answers says which paths a tree has, the other half how far it gets. Nothing but
    the tree changes: what the model says stays the same. A tree is kept only if it was faster than plain
    decoding in every timing; otherwise nothing is written, and the exit code is 1.
    """
    import json

    from forerun.cli import engines
    from forerun.drafting.spec import describe
    from forerun.plan import calibrate as calibration
    from forerun.sampling import SamplingParams

    description = describe(drafter)
    checkpoint = _checkpoint(description, drafter)
    module = calibration.module_of(checkpoint)
    asked = _asked(data, prompts)
    target = out or Path(checkpoint) / "tree.json"
    _demand_place(target)
    spec = json.dumps(description | {"tree": [[0]]})  # whatever tree is there now, even a damaged one, does not matter
    engine = engines.load(
        options.at(model, revision), spec, engines.Machine(dtype, device, kernels, weights, threads), max(rows, 8)
    )
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    samples, note = _samples(engine, data, asked, answers, params)
    found = _watched(engine, module, samples, calibration.Stopwatch(rows, rounds))
    if found.best is not None:
        calibration.write(found, calibration.machine_of(engine) | {"temperature": temperature}, target)
    _report(found, target, found_there=out is None)
    if note:
        log.info(note)
    if found.best is None:
        raise typer.Exit(1)


def _checkpoint(description: dict[str, Any], spec: str) -> str:
    """The folder of the heads that a description is about."""
    from forerun.errors import DrafterError

    checkpoint = description.get("checkpoint")
    if description.get("drafter") not in calibrated() or not isinstance(checkpoint, str):
        wanted = " or ".join(f"{name}:DIR" for name in calibrated())
        raise DrafterError(f"{spec} names no trained heads: write {wanted}")
    return checkpoint


def _demand_place(target: Path) -> None:
    from forerun.cli.files import demand_place
    from forerun.errors import ForerunError

    demand_place(target)
    if target.is_dir():
        raise ForerunError(f"cannot write {target}, for it is a folder: name a file in it")


def _asked(data: Path | None, prompts: Path | None) -> list[openings.Opening]:
    from forerun.errors import RequestError

    if data and prompts:
        raise RequestError("--data are answers and --prompts asks for new ones: give one of them")
    return openings.read(prompts) if prompts else []


def _samples(
    engine: Engine, data: Path | None, asked: list[openings.Opening], count: int, params: SamplingParams
) -> tuple[list[Sample], str]:
    """Answers to look at, and what is to be said about them: those of a file, to prompts of the
    user's, or to the built-in suite's later prompts (the demo measures on the first)."""
    from forerun.bench import suites
    from forerun.cli.engines import fitted
    from forerun.errors import TrainingError
    from forerun.plan.calibrate import answers_of

    if data is not None:
        return _of_file(data, count, params.temperature)
    if asked:
        reader = openings.Reader(engine, openings.Manner())
        ids = [fitted(engine, reader.ids(one), params) for one in asked[:count]]
        return answers_of(engine, ids, params), ""
    if engine.tokenizer is None:
        raise TrainingError("this model has no tokenizer for the built-in prompts: give its answers with --data")
    prompts = [fitted(engine, prompt.prompt, params) for prompt in suites.spread(suites.load())[-count:]]
    return answers_of(engine, prompts, params), ""


def _of_file(data: Path, count: int, temperature: float) -> tuple[list[Sample], str]:
    """Greedy answers, or those that were drawn. First those that training holds out, for heads know
    the others too well."""
    from forerun.errors import TrainingError
    from forerun.train.answers import Answers as Parted
    from forerun.train.distill import read

    parted = Parted(read(data).samples)
    fitting = [
        sample
        for sample in (*parted.heldout, *reversed(parted.training))
        if (sample.temperature == 0) == (temperature == 0) and len(sample.answer) > 1
    ]
    if len(fitting) < 2:
        kind = "greedy answers" if temperature == 0 else "answers at a temperature above 0"
        raise TrainingError(f"{data} has {len(fitting)} {kind}: distil more, or set another --temperature")
    chosen = fitting[:count]
    held = sum(sample in parted.heldout for sample in chosen)
    note = f"only {held} of these answers were held out of training: the figures flatter the heads"
    return chosen, note if held < len(chosen) else ""


def _watched(engine: Engine, module: HeadsModule, samples: list[Sample], stopwatch: Stopwatch) -> Calibration:
    from forerun.cli.narration import bar
    from forerun.plan.calibrate import calibrate as measure

    with bar("timing trees") as watch:
        return measure(engine, module, samples, stopwatch, watch)


def _report(found: Calibration, out: Path, found_there: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from forerun.cli.narration import on_stdout

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("nodes", "tokens\nper step", "ms\nper step", "tokens\nper s", "over\nplain", "slowest to\nfastest"):
        table.add_column(heading, justify="right")
    for one in found.candidates:
        table.add_row(*_row(one), style="bold" if one == found.best else "" if one.is_believed else "dim")
    console = on_stdout()
    console.print(table)
    console.print(_sentence(found, out, found_there), highlight=False, soft_wrap=True)


def _row(one: Candidate) -> list[str]:
    slowest, fastest = one.spread
    return [
        str(one.nodes),
        f"{one.tokens_per_step:.2f}",
        f"{1e3 * one.step_seconds:.2f}",
        f"{one.tokens_per_second:.0f}",
        f"{one.speedup:.2f}x" if one.is_believed else "not believed",
        f"{slowest:.2f}x to {fastest:.2f}x",
    ]


def _sentence(found: Calibration, out: Path, found_there: bool) -> str:
    best = found.best
    if best is None:
        kept = f"; {out} stays as it was" if out.exists() else ""
        return f"No tree is kept: {found.refusal}{kept}"
    slowest, fastest = best.spread
    where = "" if found_there else f'; name it in a description of the drafter: "tree": "{out}"'
    return (
        f"{out}: {best.nodes} nodes, {best.tree.depth} deep; projected {best.speedup:.2f}x plain decoding"
        f" ({slowest:.2f}x to {fastest:.2f}x; {1e3 * found.plain_seconds:.2f} ms per plain step) with {found.rows}"
        f" request(s), from {found.answers} answers{where}"
    )
