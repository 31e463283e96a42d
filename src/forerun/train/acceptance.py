"""Everything that a training of an acceptance head decides before the run begins, and what it leaves when the run has
ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.acceptance import KIND, AcceptanceConfig
from forerun.drafting.acceptance.head import AcceptanceHead
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.registry import method
from forerun.drafting.spec import describe
from forerun.drafting.workshop import Workshop
from forerun.errors import TrainingError
from forerun.model import Model
from forerun.nn.dtype import dtype_of
from forerun.nn.load import load_network
from forerun.nn.network import Network
from forerun.sampling import SamplingParams
from forerun.sources.fingerprint import digest, fingerprint
from forerun.sources.folder import WEIGHTS
from forerun.sources.source import Source
from forerun.train.answers import Answers
from forerun.train.distill import Distilled, read
from forerun.train.drafters import demand_a_law, demand_data, demand_sizes, warn_of_another_target
from forerun.train.events import Events
from forerun.train.objectives.acceptance import AcceptanceObjective, Drafts, Lessons, Pair
from forerun.train.run import Record, Run
from forerun.train.schedule import Schedule
from forerun.train.teacher import Teacher
from forerun.train.thresholds import MOST

MODEL = "small"
"""What a draft model is called in SPECs."""
WARMUP = 0.03
"""Of the steps, the paper's."""


@dataclass(frozen=True)
class AcceptanceRecipe:
    """A training of an acceptance head. drafter: the SPEC of a draft model. architecture: fields of the head's config
    that differ from the paper's. mix, temperature: as of `Pair`."""

    target: str
    drafter: str
    data: Path
    architecture: Mapping[str, Any]
    schedule: Schedule
    mix: float = 0.15
    temperature: float = 1.0
    rows: int = 16
    length: int = 512
    seed: int = 0
    dtype: str = "auto"
    kernels: str = "auto"

    @property
    def drafted_with(self) -> dict[str, Any]:
        """The drafter's description. TrainingError for one that has no states of its own."""
        description = describe(self.drafter)
        kinds = method(description.get("drafter")).kinds
        if "rule" not in kinds.values() or not isinstance(description.get("checkpoint"), str):
            raise TrainingError(
                f"{self.drafter} draws no chains that a rule could end: give --drafter small:PATH, or another that"
                " takes a stopping rule"
            )
        return description


def schedule_for(steps: int, rate: float = 1e-3, **rest: Any) -> Schedule:
    """The paper's: AdamW, a cosine. Its rate is not published; this one is for small draft models."""
    return Schedule(
        steps,
        warmup=min(round(WARMUP * steps), steps // 2),
        muon_rate=0.0,
        adam_rate=rate,
        weight_decay=0.0,
        shape="cosine",
        **rest,
    )


@dataclass(frozen=True)
class AcceptanceTraining:
    """A training that is ready to begin: every input has been read and fits."""

    recipe: AcceptanceRecipe
    objective: AcceptanceObjective
    distilled: Distilled

    @property
    def answers(self) -> Answers:
        return self.objective.answers

    def fit(self, run: Path, out: Path, events: Events | None = None) -> dict[str, float]:
        """Train to the schedule's end, resuming what was interrupted in `run`, and write the head to `out`."""
        schedule = self.recipe.schedule
        figures = Run(self.objective, schedule, run, Record(self.record()), events).finish(out.name)
        module = self.objective.module
        checkpoints.write(module, module.config, self._about(out, figures), torch.float32)
        return figures

    def record(self) -> dict[str, Any]:
        """What the run's weights depend on, but for its schedule."""
        recipe = self.recipe
        return {
            "target": Source.of(recipe.target).fingerprint,
            "drafter": recipe.drafted_with["drafter"],
            "draft_model": self._draft_model(),
            "data": digest([[sample.prompt, sample.answer] for sample in self.answers.samples]),
            "architecture": asdict(self.objective.module.config),
            **self._settings(),
        }

    def _draft_model(self) -> str:
        """Its fingerprint."""
        drafter, checkpoint = (self.recipe.drafted_with[name] for name in ("drafter", "checkpoint"))
        return Source.of(checkpoint).fingerprint if drafter == MODEL else fingerprint([Path(checkpoint) / WEIGHTS])

    def _settings(self) -> dict[str, Any]:
        names = ("mix", "temperature", "rows", "length", "seed")
        return {name: getattr(self.recipe, name) for name in names}

    def _about(self, out: Path, figures: Mapping[str, float]) -> Checkpoint:
        """A head belongs to a draft model and its target, in this order."""
        recipe = self.recipe
        training = {
            "draft_model": Path(recipe.drafted_with["checkpoint"]).name,
            "drafter": recipe.drafted_with["drafter"],
            "data": self.distilled.header,
            "answers": len(self.answers.samples),
            **self._settings(),
            "schedule": asdict(recipe.schedule),
            "figures": {name: round(value, 4) for name, value in figures.items()},
        }
        return Checkpoint(out, KIND, {}, Path(recipe.target).name, training)


def prepare(recipe: AcceptanceRecipe, device: torch.device) -> AcceptanceTraining:
    """Read everything that a training needs. Raises TrainingError, CheckpointError, DrafterError or RequestError for
    what does not fit, before anything is written."""
    if not 0 <= recipe.mix < 1:
        raise TrainingError(f"with --mix {recipe.mix:g} nothing would be learnt: give a share from 0 to less than 1")
    SamplingParams(temperature=recipe.temperature)  # that rows are drafted and judged at, in the end
    description, distilled = recipe.drafted_with, read(recipe.data)

    def load(name: str) -> Network:
        network = load_network(name, dtype_of(recipe.dtype, device), device, recipe.kernels)
        demand_sizes(network, recipe)
        demand_a_law(network, name, "choose another model")
        return network

    target = load(recipe.target)
    answers = Answers(distilled.samples, recipe.rows, recipe.length, recipe.seed)
    demand_data(answers, target, recipe)
    warn_of_another_target(distilled, recipe.data, recipe.target)
    lessons, width = _lessons(recipe, description, Workshop(Model(target, 1), load))
    torch.manual_seed(recipe.seed)
    head = AcceptanceHead(AcceptanceConfig(width, **recipe.architecture)).to(device)
    objective = AcceptanceObjective(head, lessons, answers, recipe.schedule)
    if not objective.is_judged:
        raise TrainingError(
            f"no token of the held-out answers of {recipe.data} is taught with --mix {recipe.mix:g}, so nothing would"
            " tell how good the head is: give a smaller --mix, or more answers"
        )
    return AcceptanceTraining(recipe, objective, distilled)


def _lessons(recipe: AcceptanceRecipe, description: Mapping[str, Any], workshop: Workshop) -> tuple[Lessons, int]:
    """And how wide the drafter's states are."""
    target = workshop.target.network
    if description["drafter"] == MODEL:
        draft = workshop.network(description["checkpoint"], MODEL)
        pair = Pair(Teacher(target), Teacher(draft), recipe.temperature, recipe.mix, recipe.seed)
        return pair, draft.output_shape[1]
    drafter: Any = workshop.build({**description, "stopping": {"rule": "fixed", "most": MOST}})
    return Drafts(target, drafter, recipe.temperature, recipe.seed), target.output_shape[1]
