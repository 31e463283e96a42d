"""Do more layers and a discriminator pay? Heads of one, two and three layers, under each of three losses, all trained
for equally many seconds (KOALA-style: a reconstruction).

    python benchmarks/koala.py models/target answers.jsonl koala --method medusa --minutes 20
    python benchmarks/drafters.py models/target --drafter medusa:koala/medusa-1-supervised ... --temperature 0.8

supervised: the preset's loss; divergence: and the cross-entropy with the target's law; adversarial: the preset's, and
a discriminator. A step of each kind is timed first, and as many are made as fit into the time. What the layers cost in
drafting, and whether they win it back, the second command says. A run that was interrupted goes on.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from forerun.drafting import registry
from forerun.drafting.trained import Adversary
from forerun.train.drafters import HeadsRecipe, prepare, schedule_for

LOSSES = ("supervised", "divergence", "adversarial")
TIMED = 40
"""Steps that a kind of training is timed over, two looks at the discriminator among them."""


@dataclass(frozen=True)
class Case:
    """One of the trainings that are compared."""

    base: HeadsRecipe
    layers: int
    loss: str

    @property
    def name(self) -> str:
        return f"{self.base.preset}-{self.layers}-{self.loss}"

    def recipe(self, steps: int) -> HeadsRecipe:
        preset = registry.preset(self.base.preset)[2]
        weights = replace(preset.weights, teacher=preset.weights.teacher + (self.loss == "divergence"))
        return replace(
            self.base,
            architecture={"layers": self.layers, "tied_layers": False},
            weights=weights,
            schedule=schedule_for(preset, steps, self.base.schedule.adam_rate, validate_every=max(1, steps // 8)),
            adversary=Adversary() if self.loss == "adversarial" else None,
        )

    def seconds_per_step(self, device: torch.device) -> float:
        recipe = self.recipe(TIMED)
        if recipe.adversary:
            recipe = replace(recipe, adversary=replace(recipe.adversary, warmup=0.0))
        learning = prepare(recipe, device).learning
        learning.update(0)
        started = time.perf_counter()
        for step in range(1, TIMED):
            learning.update(step)
        return (time.perf_counter() - started) / (TIMED - 1)


def main(
    target: str,
    data: Path,
    out: Path,
    method: Annotated[str, typer.Option(help="a preset of forerun train")] = "medusa",
    minutes: Annotated[float, typer.Option(help="of every training, its start and its figures aside")] = 20.0,
    layers: Annotated[list[int] | None, typer.Option(help="may be repeated")] = None,
    loss: Annotated[list[str] | None, typer.Option(help=" or ".join(LOSSES) + "; may be repeated")] = None,
    rate: float | None = None,
    rows: int = 8,
    length: int = 512,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Train every case, or what is left of it, and say what came of them."""
    schedule = schedule_for(registry.preset(method)[2], 1, rate)
    base = HeadsRecipe(method, target, data, {}, None, schedule, rows, length, seed)
    cases = [Case(base, count, one) for count in layers or (1, 2, 3) for one in loss or LOSSES]
    out.mkdir(parents=True, exist_ok=True)
    table = Table(title=f"{method}, {minutes:g} minutes each, seed {seed}")
    for heading in ("heads", "steps", "ms per step", "own loss", "tokens per step", "right where those before are"):
        table.add_column(heading, justify="right")
    for case in cases:
        table.add_row(*told(case, trained(case, out, 60 * minutes, torch.device(device))))
    Console().print(table)


def trained(case: Case, out: Path, seconds: float, device: torch.device) -> dict[str, Any]:
    """The figures of a case, with its steps and what they cost; they are kept beside the heads."""
    plan = out / f"{case.name}.json"
    if not plan.is_file():
        step = case.seconds_per_step(device)
        plan.write_text(json.dumps({"steps": max(TIMED, round(seconds / step)), "ms": 1000 * step}))
    known: dict[str, Any] = json.loads(plan.read_text())
    training = prepare(case.recipe(known["steps"]), device)
    known |= training.fit(out / f"{case.name}.run", out / case.name)
    plan.write_text(json.dumps(known, indent=1) + "\n")
    return known


def told(case: Case, known: dict[str, Any]) -> list[str]:
    given = [f"{known[name]:.0%}" for name in known if name.startswith("head") and name.endswith("_given")]
    figures = (f"{known['steps']:,}", f"{known['ms']:.0f}", f"{known['loss']:.3f}", f"{known['tokens_per_step']:.3f}")
    return [case.name, *figures, " ".join(given)]


if __name__ == "__main__":
    typer.run(main)
