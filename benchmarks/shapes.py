"""Deep and narrow, or shallow and wide? Draft models of equal size in several shapes, and two larger ones, all made out
of one target and taught with the same tokens; which drafts best, and what tells beforehand?

    python benchmarks/shapes.py train models/target answers.jsonl shapes
    python benchmarks/deeper.py models/target at-200m --parameters 200e6
    python benchmarks/shapes.py report models/target answers.jsonl shapes --at at-200m --also models/small \\
        --json benchmarks/records/shapes.json

The paper ("Decoding Speculative Decoding", arXiv 2402.01528) finds that speed follows the latency of a draft model, and
that how good a language model it is does not predict it. `report` puts both beside each other: nats per token, tokens
per step by replay, seconds of a draft step, tokens per second as they were measured, and rank correlations. Every model
is trained as `forerun train small` does it; a training that was interrupted goes on. The target's states are kept in
the folder while trainings need them, so that it reads every batch once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table as Printed
from safetensors.torch import load_file, save_file
from torch import Tensor

import forerun
from forerun.bench.run import measure as race
from forerun.cost import Table
from forerun.engine.engine import Engine
from forerun.engine.load import drafter_for
from forerun.files import beside
from forerun.nn.load import load_network
from forerun.nn.machine import described
from forerun.nn.transformer import Transformer
from forerun.plan import drafts
from forerun.plan.design import Measured, best_pace, pace
from forerun.plan.latency import step_of
from forerun.plan.measure import target_cost, texts_of, writer_cost
from forerun.plots.style import Sheet, Theme, write
from forerun.sources.folder import CONFIG
from forerun.train.answers import Answers
from forerun.train.distill import Sample, read
from forerun.train.objectives.imitation import Imitation
from forerun.train.pruning.shape import Shape
from forerun.train.schedule import Schedule
from forerun.train.small import LOSS, PRUNING, SmallRecipe, prepare
from forerun.train.teacher import Teacher

EQUAL = ("8x128x384", "6x192x192", "4x192x576", "3x256x448", "2x256x960", "1x320x1536")
"""Of the reference target: 3.2 to 3.3 million parameters each, from deep and narrow to shallow and wide."""
LARGER = ("1x512x1536", "2x512x1536")
STATES = "states"
TOKENS = 128
"""Of every answer that is replayed, and generated."""

app = typer.Typer(add_completion=False)


class Remembering(Teacher):
    """A teacher that keeps what it said of a batch."""

    def __init__(self, teacher: Teacher, folder: Path):
        super().__init__(teacher.network)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def states(self, tokens_BN: Tensor, layers: Collection[int]) -> dict[int, Tensor]:
        key = hashlib.sha256(tokens_BN.numpy().tobytes()).hexdigest()[:24]
        path = self.folder / f"{'-'.join(map(str, sorted(layers)))}-{key}.safetensors"
        if not path.exists():
            found = {str(layer): state.contiguous() for layer, state in super().states(tokens_BN, layers).items()}
            with beside(path) as partial:
                save_file(found, partial)
        return {int(layer): state for layer, state in load_file(path).items()}


@app.command()
def train(
    target: str,
    data: Path,
    out: Path,
    shape: Annotated[list[str] | None, typer.Option(help="may be repeated; without it, all eight")] = None,
    steps: int = 300,
    rows: int = 4,
    length: int = 512,
    rate: float = 4e-3,
    threads: int = 1,
) -> None:
    """Train one model after the other."""
    torch.set_num_threads(threads)
    schedule = Schedule(
        steps,
        warmup=steps // 20,
        muon_rate=rate,
        adam_rate=rate / 2,
        validate_every=max(1, steps // 2),
        save_every=max(1, steps // 20),
    )
    for written in shape or (*EQUAL, *LARGER):
        folder = out / written
        if folder.is_dir():
            continue
        recipe = SmallRecipe(
            target, Shape.read(written), [data], schedule, rows=rows, length=length, calibration=20_000
        )
        training = prepare(recipe, torch.device("cpu"))
        teacher = Remembering(training.objective.teacher, out / STATES)
        training = replace(training, objective=replace(training.objective, teacher=teacher))
        figures = training.fit(out / f"{written}.run", folder)
        print(written, {name: round(value, 4) for name, value in figures.items()}, flush=True)
    shutil.rmtree(out / STATES, ignore_errors=True)


# ---- what came of them


@dataclass(frozen=True)
class Known:
    """A draft model: its replay, its figures on held-out answers, and seconds of a proposal and of a step of it."""

    path: str
    draft: drafts.Draft
    figures: Mapping[str, float]
    overhead: float
    step: float

    @property
    def name(self) -> str:
        return self.draft.name


def known(path: str, answers: Answers, teacher: Teacher, engine: Engine, judged: Sequence[Sample]) -> Known:
    module = load_network(path, torch.float32, torch.device("cpu"))
    assert isinstance(module, Transformer)
    figures = Imitation(module, teacher, answers, LOSS, Schedule(0), most_validated=24).validate()
    network = load_network(path, engine.target.network.dtype, engine.target.device, "auto")
    params = forerun.SamplingParams(max_new_tokens=32, ignore_eos=True)
    (text,) = texts_of(engine, [judged[0].prompt], params)
    overhead, step = step_of(writer_cost(network, text, params, engine.target.network))
    return Known(path, drafts.measure(path, engine.target.network, judged), figures, overhead, step)


def compared(target: str, models: Sequence[Known], judged: Sequence[Sample], rounds: int) -> list[dict[str, Any]]:
    """On one target: every draft as far ahead as the model of throughput has it, predicted and measured."""
    engine = forerun.load(target, drafter="none", max_rows=1)
    params = forerun.SamplingParams(max_new_tokens=TOKENS, ignore_eos=True)
    prompts = [list(sample.prompt) for sample in judged]
    (text,) = texts_of(engine, prompts[:1], replace(params, max_new_tokens=32))
    verifying = Table([(int(tokens), seconds) for tokens, seconds in target_cost(engine, text, params).points])
    engines, rows = {"none": engine}, dict[str, dict[str, Any]]()
    for one in models:
        here = Measured({}, {}, [(n, verifying(n)) for n in range(1, 18)], max(0.0, one.overhead))
        wanted = best_pace(one.draft.accepted, one.step, here)
        length = max(1, wanted.length)
        found = pace(one.draft.accepted, one.step, here, length)
        spec = {"drafter": "small", "checkpoint": one.path, "length": length}
        engines[one.name] = engine.beside(drafter_for(engine.target.network, spec), max_rows=1)
        rows[one.name] = {
            "target": Path(target).name,
            "name": one.name,
            "shape": str(Shape.of(one.draft.config)),
            "parameters": one.draft.config.parameters,
            **one.figures,
            "rate": one.draft.accepted.rate,
            "replayed": one.draft.accepted.tokens(3),
            "step_seconds": one.step,
            "verify_seconds": verifying(1),
            "advised": wanted.length,
            "length": length,
            "predicted_per_step": found.tokens,
            "predicted": found.throughput,
        }
    measured = {row.drafter: row for row in race(engines, prompts, params, rounds).rows}
    return [row | {"measured": measured[name].as_dict()} for name, row in rows.items()]


def correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of ranks, with the tokens per second that were measured: 1 means the same order."""
    speed = [row["measured"]["tokens_per_second"] for row in rows]
    senses = {"draft step": "step_seconds", "loss": "loss", "tokens per step": "replayed", "accepted": "accepted"}
    found = {name: spearman([row[key] for row in rows], speed) for name, key in senses.items()}
    return found | {
        "loss with tokens per step": spearman(*([row[key] for row in rows] for key in ("loss", "replayed")))
    }


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Printed(title=f"{rows[0]['target']}: {1e3 * rows[0]['verify_seconds']:.2f} ms per plain step")
    for heading in ("shape", "M", "nats", "accepted", "replay, 3 ahead", "draft ms", "ahead", "per step", "replayed"):
        table.add_column(heading, justify="right")
    for heading in ("over plain", "slowest to fastest", "predicted / measured"):
        table.add_column(heading, justify="right")
    for row in rows:
        found = row["measured"]
        speed, plain = found["tokens_per_second"], found["tokens_per_second"] / found["speedup"]
        cells = [row["name"], f"{row['parameters'] / 1e6:.1f}", f"{row['loss']:.3f}", f"{row['accepted']:.3f}"]
        cells += [f"{row['replayed']:.3f}", f"{1e3 * row['step_seconds']:.3f}", f"{row['length']} ({row['advised']})"]
        cells += [f"{found['tokens_per_step']:.3f}", f"{row['predicted_per_step']:.3f}", f"{found['speedup']:.2f}"]
        cells += [" to ".join(f"{end / plain:.2f}" for end in found["spread"]), f"{row['predicted'] / speed:.3f}"]
        table.add_row(*cells)
    Console(width=160).print(table)
    print({name: round(value, 2) for name, value in correlations(rows).items()})


def picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Speed against the draft step, and against the loss."""

    def draw(theme: Theme) -> Sheet:
        sheet = Sheet(
            theme,
            "What predicts how fast a draft model makes its target?",
            f"draft models of {rows[0]['target']}, greedy  ·  {described(torch.device('cpu'))}",
            ["Times plain decoding, by ms of a draft step", "Times plain decoding, by loss in nats per token"],
        )
        for axes, values in zip(
            sheet.panels, ([1e3 * r["step_seconds"] for r in rows], [r["loss"] for r in rows]), strict=True
        ):
            speeds = [row["measured"]["speedup"] for row in rows]
            axes.scatter(values, speeds, color=theme["accepted"], s=22, zorder=3)
            for row, x, y in zip(rows, values, speeds, strict=True):
                axes.annotate(row["name"], (x, y), (4, 4), textcoords="offset points", size=6.5, color=theme.quiet)
        return sheet

    write(draw, path)


@app.command()
def report(
    target: str,
    data: Path,
    out: Path,
    at: Annotated[
        list[str] | None, typer.Option(help="the same law at the cost of a larger model; may be repeated")
    ] = None,
    also: Annotated[list[str] | None, typer.Option(help="other draft models; may be repeated")] = None,
    prompts: Annotated[int, typer.Option(help="held-out greedy answers to replay, and prompts to measure on")] = 12,
    rounds: int = 3,
    threads: int = 1,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    png: Annotated[Path | None, typer.Option("--picture")] = None,
) -> None:
    """Loss, replay, latency and speed of what has been trained, and what goes with what."""
    torch.set_num_threads(threads)
    answers = Answers(read(data).samples, rows=4, length=1024)
    greedy = [one for one in answers.heldout if one.temperature == 0 and len(one.answer) >= TOKENS]
    judged = [Sample(one.prompt, one.answer[:TOKENS]) for one in greedy[:prompts]]
    engine = forerun.load(target, drafter="none", max_rows=1)
    teacher = Teacher(load_network(target, torch.bfloat16, torch.device("cpu")))
    whole = [path.name for path in out.iterdir() if (path / PRUNING).is_file() and (path / CONFIG).is_file()]
    made = sorted(whole, key=lambda name: (-Shape.read(name).layers, name))
    paths = [str(out / name) for name in made]
    models = [known(path, answers, teacher, engine, judged) for path in [*paths, *(also or [])]]
    rows = [row for one in (target, *(at or [])) for row in compared(one, models, judged, rounds)]
    for name in dict.fromkeys(row["target"] for row in rows):
        show([row for row in rows if row["target"] == name])
    trained = [row for row in rows if row["target"] == Path(target).name and row["name"] in made]
    if json_file:
        about = {
            "threads": threads,
            "prompts": len(judged),
            "rounds": rounds,
            "machine": described(torch.device("cpu")),
        }
        json_file.write_text(json.dumps(about | {"correlations": correlations(trained), "rows": rows}, indent=1) + "\n")
    if png and trained:
        picture(trained, png)


if __name__ == "__main__":
    app()
