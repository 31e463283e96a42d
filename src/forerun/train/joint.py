"""Everything that `forerun train medusa2` decides before the run begins, and what it leaves when
the run has ended: a model, and heads for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from forerun.drafting import checkpoint as checkpoints
from forerun.drafting import registry
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.trained import Joint, JointMethod
from forerun.errors import ForerunError, TrainingError
from forerun.files import whole_folder
from forerun.nn.save import save_beside
from forerun.nn.transformer import Transformer
from forerun.nn.translate import translate
from forerun.sources.source import Source
from forerun.train import drafters
from forerun.train.events import Events
from forerun.train.lora import Adapters
from forerun.train.objectives.joint import Balance, JointObjective, Moved, Ramp
from forerun.train.run import Record, Run
from forerun.train.schedule import Schedule, demand_numbers
from forerun.train.teacher import Pupil

MODEL, HEADS = "model", "heads"
"""What the result's folder holds."""


@dataclass(frozen=True)
class JointRecipe:
    """A joint training. heads: theirs, and with it target, data and schedule. The rest: see `Joint`
    in drafting/trained.py."""

    heads: drafters.HeadsRecipe
    keep: str = "original"
    head_weight: float = 0.01
    ramp: str = "sine"
    rank: int = 32
    alpha: float = 16.0

    def __post_init__(self) -> None:
        """TrainingError for numbers that make no sense."""
        demand_numbers({"head_weight": self.head_weight, "alpha": self.alpha}, 0)
        demand_numbers({"rank": self.rank}, 1)
        if self.heads.adversary:
            raise TrainingError("heads cannot learn to be taken for a target that moves: leave the adversary out")


def preset_of(method: JointMethod, keep: str) -> Joint:
    """The paper's settings for what keeps the target."""
    if keep not in method.presets:
        raise TrainingError(f"nothing keeps a target by {keep!r}: choose {' or '.join(method.presets)}")
    return method.presets[keep]


def method_of(recipe: JointRecipe) -> tuple[str, JointMethod]:
    """The drafter that the heads are for, and what its method says of joint training."""
    drafter, trained, _ = registry.preset(recipe.heads.preset)
    assert trained.joint is not None
    return drafter, trained.joint


def schedule_for(preset: Joint, steps: int, rate: float | None, head_rate: float | None, **rest: Any) -> Schedule:
    """The preset's schedule over so many steps. rate: the backbone's; head_rate: the heads', in multiples of that."""
    factor = preset.head_rate if head_rate is None else head_rate
    return drafters.schedule_for(preset.heads, steps, rate, scales=(("heads.", factor),), **rest)


@dataclass(frozen=True)
class JointTraining:
    """A joint training that is ready to begin: every input has been read and fits. heads: what it is for the heads."""

    recipe: JointRecipe
    objective: JointObjective
    heads: drafters.HeadsTraining

    def fit(self, run: Path, out: Path, events: Events | None = None) -> dict[str, float]:
        """Train to the schedule's end, resuming what was interrupted in `run`; merge, and write
        model and heads to `out`.

        Can be called once: the adapters are gone afterwards.
        """
        own = {name: getattr(self.recipe, name) for name in ("keep", "head_weight", "ramp", "rank", "alpha")}
        record = Record(self.heads.record() | own, older=self.heads.older())
        figures = Run(self.objective, self.objective.schedule, run, record, events).finish(out.name)
        self.objective.module.backbone.merge()
        self._write(out, figures)
        return figures

    def _write(self, out: Path, figures: Mapping[str, float]) -> None:
        """Both folders appear complete; older ones are replaced."""
        try:
            with whole_folder(out) as beside:
                save_beside(self.objective.network, Source.of(self.recipe.heads.target), beside / MODEL)
                about = Checkpoint(
                    beside / HEADS, method_of(self.recipe)[0], {}, f"{out.name}/{MODEL}", self._about(figures)
                )
                checkpoints.write(self.objective.heads.module, self.heads.config, about)
        except OSError as error:
            raise TrainingError(
                f"{out} cannot be written ({error.strerror}): make room, or choose another folder"
            ) from None
        except ForerunError as error:
            raise TrainingError(str(error).replace(str(beside), str(out))) from None

    def _about(self, figures: Mapping[str, float]) -> dict[str, Any]:
        recipe, heads = self.recipe, self.recipe.heads
        return {
            "preset": method_of(recipe)[1].name,
            "original": Path(heads.target).name,
            "data": self.heads.distilled.header,
            "answers": len(self.heads.answers.samples),
            "rows": heads.rows,
            "length": heads.length,
            "seed": heads.seed,
            "init_from": heads.init_from,
            "joint": {name: value for name, value in asdict(recipe).items() if name != "heads"},
            "weights": asdict(self.objective.heads.weights),
            "schedule": asdict(heads.schedule),
            "figures": {name: round(value, 4) for name, value in figures.items()},
        }


def prepare(recipe: JointRecipe, device: torch.device) -> JointTraining:
    """Read everything that a joint training needs. Raises TrainingError, CheckpointError or
    DrafterError for what does not fit, before anything is written."""
    ramp, preset = Ramp.named(recipe.ramp), preset_of(method_of(recipe)[1], recipe.keep)
    _demand_ours(recipe.heads)
    wish = replace(
        recipe.heads,
        architecture=_architecture(recipe.heads),
        weights=recipe.heads.weights or preset.heads.weights,
        kernels="torch",  # packed weights cannot be trained
    )
    heads = drafters.prepare(wish, device)
    network = heads.objective.teacher.network
    assert isinstance(network, Transformer)
    adapters = Adapters(network, recipe.rank, recipe.alpha, wish.seed)
    on_pupil = replace(heads.objective, teacher=Pupil(network))
    balance = Balance(recipe.keep, recipe.head_weight, ramp)
    objective = JointObjective(Moved(adapters, on_pupil.module), on_pupil, balance, recipe.heads.schedule)
    return JointTraining(recipe, objective, heads)


def _demand_ours(recipe: drafters.HeadsRecipe) -> None:
    target, source = recipe.target, Source.of(recipe.target)
    if translate(source.config, source.path) is None:
        raise TrainingError(
            f"{target} is not a Llama, Mistral or Qwen, and only those can be changed: leave the target as it is, and"
            " train"
            f" heads with forerun train {recipe.preset}"
        )


def _architecture(recipe: drafters.HeadsRecipe) -> dict[str, object]:
    """Of the heads: the paper's, or that of the heads to start from, and what was asked for."""
    if recipe.init_from is None:
        return dict(recipe.architecture)
    drafter, trained, _ = registry.preset(recipe.preset)
    return asdict(checkpoints.load(recipe.init_from, drafter).config(trained.config)) | dict(recipe.architecture)
