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
from forerun.drafting.spec import describe
from forerun.errors import TrainingError
from forerun.nn.dtype import dtype_of
from forerun.nn.load import load_network
from forerun.nn.network import Network
from forerun.sources.fingerprint import digest
from forerun.sources.source import Source
from forerun.train.answers import Answers
from forerun.train.distill import Distilled, read
from forerun.train.drafters import demand_a_law, demand_data, demand_sizes, warn_of_another_target
from forerun.train.events import Events
from forerun.train.objectives.acceptance import AcceptanceObjective, Pair
from forerun.train.run import Record, Run
from forerun.train.schedule import Schedule
from forerun.train.teacher import Teacher

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
    def draft_model(self) -> str:
        """TrainingError for anything but a draft model."""
        description = describe(self.drafter)
        if description.get("drafter") != "small" or not isinstance(description.get("checkpoint"), str):
            raise TrainingError(
                f"{self.drafter} has no states of its own that an acceptance head could read: give --drafter small:PATH"
            )
        return str(description["checkpoint"])


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
            "draft_model": Source.of(recipe.draft_model).fingerprint,
            "data": digest([[sample.prompt, sample.answer] for sample in self.answers.samples]),
            "architecture": asdict(self.objective.module.config),
            **self._settings(),
        }

    def _settings(self) -> dict[str, Any]:
        names = ("mix", "temperature", "rows", "length", "seed")
        return {name: getattr(self.recipe, name) for name in names}

    def _about(self, out: Path, figures: Mapping[str, float]) -> Checkpoint:
        """A head belongs to a draft model and its target, in this order."""
        recipe = self.recipe
        training = {
            "draft_model": Path(recipe.draft_model).name,
            "data": self.distilled.header,
            "answers": len(self.answers.samples),
            **self._settings(),
            "schedule": asdict(recipe.schedule),
            "figures": {name: round(value, 4) for name, value in figures.items()},
        }
        return Checkpoint(out, KIND, {}, Path(recipe.target).name, training)


def prepare(recipe: AcceptanceRecipe, device: torch.device) -> AcceptanceTraining:
    """Read everything that a training needs. Raises TrainingError, CheckpointError or DrafterError for what does not
    fit, before anything is written."""
    distilled, names = read(recipe.data), (recipe.target, recipe.draft_model)
    target, draft = (load_network(name, dtype_of(recipe.dtype, device), device, recipe.kernels) for name in names)
    answers = Answers(distilled.samples, recipe.rows, recipe.length, recipe.seed)
    for name, network in zip(names, (target, draft), strict=True):
        demand_sizes(network, recipe)
        demand_a_law(network, name, "choose another model")
    demand_data(answers, target, recipe)
    warn_of_another_target(distilled, recipe)
    _demand_pair(target, draft, recipe)
    torch.manual_seed(recipe.seed)
    head = AcceptanceHead(AcceptanceConfig(draft.output_shape[1], **recipe.architecture))
    pair = Pair(Teacher(target), Teacher(draft), recipe.temperature, recipe.mix, recipe.seed)
    return AcceptanceTraining(recipe, AcceptanceObjective(head.to(device), pair, answers, recipe.schedule), distilled)


def _demand_pair(target: Network, draft: Network, recipe: AcceptanceRecipe) -> None:
    if target.vocab_size != draft.vocab_size:
        raise TrainingError(
            f"{recipe.draft_model} has a vocabulary of {draft.vocab_size} tokens and the target one of"
            f" {target.vocab_size}: use a draft model that shares the target's tokenizer"
        )
    if not 0 <= recipe.mix < 1:
        raise TrainingError(f"with --mix {recipe.mix:g} nothing would be learnt: give a share from 0 to less than 1")
