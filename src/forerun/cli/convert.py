"""`forerun convert`: draft heads from and to the layouts of other engines."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forerun.cli import openings, options
from forerun.drafting.registry import layouts

if TYPE_CHECKING:
    from forerun.engine.engine import Engine
    from forerun.layouts.exchange import Heads
    from forerun.train.distill import Sample

log = logging.getLogger(__name__)

PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 4, 256, 64
"""What the check asks the target: a handful is enough to see a mistake, which shows at every token."""
HARDLY = 1.1
"""Tokens per step below which heads hardly ever agree with the target."""

WRITTEN = [layout for layout in layouts() if layout.pack]
"""Foreign layouts that heads can be brought into."""

COMPACT = "compact"

Source = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help="A folder of heads, in any of the layouts, or a hub id.", show_default=False),
]
To = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="|".join(["ours", *(layout.name for layout in WRITTEN), COMPACT]),
        help=f"The layout to write: our own, that of {', of '.join(layout.sense for layout in WRITTEN)}; {COMPACT}: a"
        " draft model without the columns that are zero everywhere.",
    ),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the result.")]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The model that the heads belong to: some layouts need it, and the result is checked on its answers.",
    ),
]
EXAMPLES = f"""
forerun convert HEADS --to {WRITTEN[0].name} --out converted --target MODEL
forerun convert SOMEBODY/HEADS --to ours --out heads
"""


def convert(
    source: Source,
    to: To,
    out: Out,
    target: Target = None,
    prompts: options.PromptFile = None,
) -> None:
    """Bring draft heads from one layout into another: our own, or those of other code.

    Nothing is lost and nothing is guessed: every tensor is there and of the right shape, or the
    difference is listed. The result is read back and compared bit by bit; with --target also by the
    acceptance that the heads have before and after.
    """
    from forerun.cli.engines import quiet
    from forerun.cli.files import demand_place
    from forerun.errors import DrafterError, RequestError
    from forerun.layouts import acceptance, exchange
    from forerun.layouts.files import config_of, folder_of

    if to == COMPACT:
        if target or prompts:
            raise RequestError(f"--to {COMPACT} compares nothing: leave --target and --prompts out")
        _compact(source, out)
        return
    exchange.demand_layout(to)
    exchange.demand_new(out)
    demand_place(out)
    if prompts and not target:
        raise RequestError("--prompts needs --target: the model that answers them")
    quiet()
    if acceptance.knows(config_of(folder_of(source))):
        return _convert_head(source, to, out, target)
    base = exchange.Base.of(target) if target else None
    heads = exchange.read(source, base)
    if heads.layout == to == "ours":
        raise DrafterError(f"{source} is in our layout already: copy the folder")
    measure = _measure(target, prompts) if target else None
    before = measure(heads) if measure else 0.0
    count = exchange.write(heads, to, out, base)
    print(described(heads, source))
    for note in heads.notes:
        log.info("note: %s", note)
    print(f"{out}: {to}; all {count} tensors are the same bit by bit when read back")
    if measure:
        _compare(before, measure(exchange.read(out, base)))
    else:
        print(f"acceptance was not compared: {f'{target} has no tokenizer' if target else 'that needs --target MODEL'}")


def _compact(source: str, out: Path) -> None:
    """A model whose weights were stored wider than they are."""
    import torch

    from forerun.cli.engines import quiet
    from forerun.cli.files import demand_place
    from forerun.errors import CheckpointError
    from forerun.files import whole_folder
    from forerun.layouts import exchange
    from forerun.nn.load import load_network
    from forerun.nn.save import save_beside
    from forerun.nn.transformer import Transformer
    from forerun.sources.source import Source
    from forerun.train.pruning.slicing import compacted

    exchange.demand_new(out)
    demand_place(out)
    quiet()
    network = load_network(source, torch.float32, torch.device("cpu"))
    if not isinstance(network, Transformer):
        raise CheckpointError(f"{source} is not a Llama, Mistral or Qwen: only those can be made compact")
    made = compacted(network)
    with whole_folder(out) as beside:
        save_beside(made, Source.of(source), beside)
    before, after = network.config, made.config
    print(
        f"{out}: width {after.width:,} instead of {before.width:,}, {after.parameters:,} parameters instead of"
        f" {before.parameters:,}"
    )


def _convert_head(source: str, to: str, out: Path, target: str | None) -> None:
    """An acceptance head, which drafts nothing itself."""
    from forerun.errors import DrafterError
    from forerun.layouts import acceptance
    from forerun.layouts.files import folder_of

    if to != "ours":
        raise DrafterError(f"{source} holds an acceptance head, which is only read: give --to ours")
    head = acceptance.read(folder_of(source))
    count, config = acceptance.write(head, Path(target or "").name, out), head.config
    blocks = f"{config.depth} blocks{' (tied)' if config.tie_blocks else ''} of width {config.width}"
    print(f"{source}: an acceptance head (SpecDec++), {blocks}")
    log.info("note: its file does not say what a rejection counted in training; it is taken to be %g", config.weight)
    print(f"{out}: ours; all {count} tensors are the same bit by bit when read back")


def described(heads: Heads, source: str) -> str:
    """One line about what was read."""
    config = heads.config
    parts = [
        config.brief,
        "the target's vocabulary matrix" if config.vocabulary == "shared" else "vocabulary matrices of their own",
        *(["a prefix layer"] if getattr(config, "prefix", None) else []),
        f"{heads.parameters:,} parameters in {str(heads.dtype).removeprefix('torch.')}",
        f"for {heads.target}",
    ]
    return f"{source}: {heads.drafter} ({heads.layout}), {', '.join(parts)}"


def _measure(target: str, prompts: Path | None) -> Callable[[Heads], float] | None:
    """Tokens per step of heads on the target's own answers; None where nobody can ask it."""
    from forerun.cli import engines
    from forerun.train.exchange_check import tokens_per_step

    engine = engines.load(target, "none", engines.Machine(kernels="torch"), PROMPTS)
    if engine.tokenizer is None:
        return None
    samples = _answers(engine, prompts)
    return lambda heads: tokens_per_step(heads, engine.target.network, samples)


def _compare(before: float, after: float) -> None:
    """Both figures; exit code 1 if they differ."""
    print(f"tokens per step, projected on answers of the target: {before:.3f} before, {after:.3f} after")
    if before < HARDLY:
        log.warning("note: these heads hardly ever agree with the target: do they belong to another?")
    if before != after:
        print("the figures differ, and they must not: do not use the result", file=sys.stderr)
        raise typer.Exit(1)


def _answers(engine: Engine, file: Path | None) -> list[Sample]:
    """What the target says, greedily."""
    from forerun.cli.engines import fitted
    from forerun.plan.calibrate import answers_of
    from forerun.sampling import SamplingParams

    reader = openings.Reader(engine, openings.Manner())
    asked = [reader.ids(one) for one in openings.read(file)[:PROMPTS]] if file else _built_in()
    params = SamplingParams(max_new_tokens=ANSWER_TOKENS)
    ids = [fitted(engine, one, params)[-PROMPT_TOKENS:] for one in asked]
    return answers_of(engine, ids, params)


def _built_in() -> list[str]:
    from forerun.bench import suites

    return [prompt.prompt for prompt in suites.spread(suites.load())[:PROMPTS]]
