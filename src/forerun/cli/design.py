"""`forerun design`: which draft model to train for a target on this machine."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forerun.cli import options

if TYPE_CHECKING:
    from forerun.engine.engine import Engine
    from forerun.nn.transformer import TransformerConfig
    from forerun.plan.acceptance import Acceptance
    from forerun.plan.design import Believed, Constraints, Design, Measured
    from forerun.plan.drafts import Draft

log = logging.getLogger(__name__)
LIMITS, BELIEFS = "Limits", "What a draft is worth"

EXAMPLES = """
forerun design MODEL --survival 0.7 --max-parameters 4e6
forerun design MODEL --draft one --draft two --draft three --draft four --data answers.jsonl --out design.json
"""

Drafts = Annotated[
    list[str] | None,
    typer.Option("--draft", metavar="MODEL", help="A trained draft; may be repeated.", rich_help_panel=BELIEFS),
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The target's answers, to replay drafts on.", rich_help_panel=BELIEFS),
]
Survival = Annotated[
    str | None,
    typer.Option(
        metavar="S1,S2,...",
        help="How often the first, the first two, ... tokens survive; one number: each on its own.",
        rich_help_panel=BELIEFS,
    ),
]
Answers = Annotated[int, typer.Option(min=1, help="So many answers are replayed.", rich_help_panel=options.ADVANCED)]
TrainedOn = Annotated[
    float | None,
    typer.Option(
        min=1, help="Tokens that a new draft would see.", rich_help_panel=BELIEFS, show_default="as the drafts given"
    ),
]
MaxParameters = Annotated[float | None, typer.Option(min=1, help="In all.", rich_help_panel=LIMITS)]
MaxMemory = Annotated[float | None, typer.Option(min=0, help="In MB, with its cache.", rich_help_panel=LIMITS)]
MaxStep = Annotated[float | None, typer.Option("--max-step-ms", min=0, help="Of a draft step.", rich_help_panel=LIMITS)]
Context = Annotated[int, typer.Option(min=1, help="Tokens of a row, for its cache.", rich_help_panel=LIMITS)]
Rows = Annotated[int, typer.Option("--rows", "--batch-size", min=1, help="Rows of the cache.", rich_help_panel=LIMITS)]
Tied = Annotated[bool, typer.Option("--tied", help="The embedding is the head, too.", rich_help_panel=LIMITS)]
Costs = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Costs from an earlier --out, of this machine or another; nothing is timed."),
]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Plans and costs as JSON.")]
Top = Annotated[int, typer.Option(min=1, help="Plans to show.", rich_help_panel=options.OUTPUT)]


def design(
    model: options.Model,
    draft: Drafts = None,
    data: Data = None,
    survival: Survival = None,
    answers: Answers = 100,
    trained_on: TrainedOn = None,
    max_parameters: MaxParameters = None,
    max_memory: MaxMemory = None,
    max_step_ms: MaxStep = None,
    context: Context = 2048,
    rows: Rows = 1,
    tied: Tied = False,
    costs: Costs = None,
    out: Out = None,
    top: Top = 10,
    as_json: options.Json = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    revision: options.Revision = None,
    threads: options.Threads = None,
) -> None:
    """Time layers of many shapes here, and say which draft model would make the target fastest.

    What a draft model brings is taken from drafts that were trained (four or more predict others), or from --survival.
    Nothing is trained: forerun train small --shape takes the shapes as they stand here.
    """
    from forerun.cli import engines
    from forerun.cli.files import demand_place, print_json, write_whole
    from forerun.plan import design as designing

    demand_place(out)
    engine = engines.load(options.at(model, revision), "none", engines.Machine(dtype, device, kernels, "auto", threads))
    target = _demand_ours(engine, model)
    limits = _limits(max_parameters, max_memory, max_step_ms, context, rows, tied)
    drafts = _drafts(draft, data, answers, engine)
    believed = _believed(drafts, survival, trained_on)
    shapes = designing.distinct([*(one.config for one in drafts), *designing.configs(target, tied)])
    known = _costs(costs, engine, shapes)
    incumbent = max((one.speed(known) for one in drafts), default=None)
    found = designing.design(target, known, believed, limits, shapes, incumbent)
    content = found.as_dict() | {"drafts": [one.as_dict(known) for one in drafts], "costs": known.as_dict()}
    if out is not None:
        write_whole(out, f"{json.dumps(content, indent=1)}\n".encode())
    if as_json:
        print_json(content)
    else:
        _report(model, found, drafts, known, top)


def _demand_ours(engine: Engine, model: str) -> TransformerConfig:
    from forerun.errors import CheckpointError

    config = getattr(engine.target.network, "config", None)
    if config is None or not hasattr(config, "layer_parameters"):
        raise CheckpointError(f"{model} is not a Llama, Mistral or Qwen: draft models are made out of these alone")
    found: TransformerConfig = config
    return found


def _limits(
    parameters: float | None, megabytes: float | None, step_ms: float | None, context: int, rows: int, tied: bool
) -> Constraints:
    from math import inf

    from forerun.plan.design import Constraints

    memory, step = (inf if limit is None else limit for limit in (megabytes, step_ms))
    return Constraints(inf if parameters is None else parameters, memory * 1e6, step / 1e3, context, rows, tied=tied)


def _drafts(paths: list[str] | None, data: Path | None, count: int, engine: Engine) -> list[Draft]:
    from forerun.errors import RequestError
    from forerun.plan.drafts import measure
    from forerun.train.answers import Answers as Parted
    from forerun.train.distill import read

    if not paths:
        return []
    if data is None:
        raise RequestError("drafts are measured on the target's answers: give --data, from forerun distill")
    parted = Parted(read(data).samples)
    greedy = [one for one in (*parted.heldout, *parted.training) if one.temperature == 0][:count]
    return [measure(path, engine.target.network, greedy) for path in paths]


def _believed(drafts: list[Draft], survival: str | None, trained_on: float | None) -> Believed:
    from forerun.errors import DrafterError, RequestError
    from forerun.plan.drafts import believing, predicted

    given = _given(survival)
    if given is None and not drafts:
        raise RequestError("nobody knows what a draft model is worth: give trained ones with --draft, or --survival")
    try:
        return believing(drafts, predicted(drafts, trained_on))
    except DrafterError as refusal:
        if given is None:
            given = _mean(drafts)
            log.warning(f"{refusal}; until then others are taken for as good as these on the mean: {given.rate:.2f}")
        rate = given
        return believing(drafts, lambda config: rate)


def _given(survival: str | None) -> Acceptance | None:
    from forerun.errors import RequestError
    from forerun.plan.acceptance import Given

    if survival is None:
        return None
    try:
        numbers = tuple(float(part) for part in survival.split(","))
    except ValueError:
        raise RequestError(f"--survival {survival!r} is no list of shares: write 0.7, or 0.7,0.55,0.4") from None
    return Given(numbers)


def _mean(drafts: list[Draft]) -> Acceptance:
    from forerun.plan.acceptance import Given

    return Given((sum(one.accepted.rate for one in drafts) / len(drafts),))


def _costs(path: Path | None, engine: Engine, shapes: list[TransformerConfig]) -> Measured:
    from forerun.cli.narration import bar
    from forerun.errors import RequestError
    from forerun.plan.design import Measured
    from forerun.plan.drafts import text_for
    from forerun.plan.latency import measured
    from forerun.sampling import SamplingParams

    if path is None:
        params = SamplingParams(max_new_tokens=32, ignore_eos=True)
        with bar("timing layers") as watch:
            return measured(engine, shapes, text_for(engine, params), params, watch=watch)
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read ({error}): name a file of forerun design --out") from None
    return Measured.of(fields.get("costs", fields) if isinstance(fields, dict) else {})


def _report(model: str, found: Design, drafts: list[Draft], known: Measured, top: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from forerun.cli.narration import on_stdout
    from forerun.train.pruning.shape import Shape

    console = on_stdout()
    if drafts:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in ("draft", "rate", "draft\nms", "length", "tokens\nper step", "over\nplain"):
            table.add_column(heading, justify="left" if heading == "draft" else "right")
        for one in drafts:
            table.add_row(*one.row(known))
        console.print(table)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("shape", "M", "draft\nms", "rate", "length", "over\nplain", "worst", "needs\nrate", "rank"):
        table.add_column(heading, justify="left" if heading == "shape" else "right")
    for plan in found.plans[:top]:
        needed = "never" if plan.rate_needed is None else f"{plan.rate_needed:.2f}"
        figures = [f"{plan.parameters / 1e6:.1f}", f"{1e3 * plan.step_seconds:.3f}", f"{plan.rate:.2f}"]
        figures += [str(plan.length), f"{plan.speedup:.2f}x", f"{plan.worst_speedup:.2f}x", needed]
        table.add_row(plan.shape, *figures, "firm" if plan.is_stable else "open")
    console.print(table)
    names = {str(Shape.of(one.config)): one.name for one in drafts}
    console.print(_sentence(model, found, names), highlight=False, soft_wrap=True)


def _sentence(model: str, found: Design, trained: dict[str, str]) -> str:
    """trained: names of drafts by their shapes."""
    best = found.best
    if best is None:
        return "No draft model within these limits would be faster than plain decoding: do not speculate with one"
    if best.shape in trained:
        return (
            f"{trained[best.shape]} is what you have: {best.speedup:.2f}x plain decoding with drafts of {best.length},"
            " and no other shape is predicted to be faster"
        )
    notes = "".join(f"; {note}" for note in best.notes)
    return (
        f"{best.shape}: {best.speedup:.2f}x plain decoding is predicted with drafts of {best.length}"
        f" ({best.worst_speedup:.2f}x if it is worse than believed){notes}. It is trained with"
        f" forerun train small --from {model} --shape {best.shape} --data answers.jsonl --out draft"
    )
