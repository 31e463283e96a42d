"""Everything that `forerun train small` decides before the run begins, and what it leaves when the run has ended: a
draft model that is a part of its target, taught on the target's answers.

A run begins with the pruning, which is a start like any other (train/run.py): it is interrupted and gone on with, and
what stays is kept in the run's folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from forerun.drafting.trained import Weights
from forerun.errors import ForerunError, TrainingError
from forerun.files import put, whole_folder
from forerun.nn.dtype import dtype_of
from forerun.nn.load import load_network
from forerun.nn.save import save_beside
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.sources.fingerprint import digest
from forerun.sources.source import Source
from forerun.train.answers import Answers
from forerun.train.distill import Distilled, Sample, read
from forerun.train.domains import Domains
from forerun.train.drafters import demand_enough, demand_known, warn_of_another_target
from forerun.train.events import Events
from forerun.train.objectives.imitation import Imitation
from forerun.train.pruning.importance import Importance
from forerun.train.pruning.masks import named
from forerun.train.pruning.shape import Shape
from forerun.train.pruning.shearing import Shear, shear, sheared
from forerun.train.pruning.slicing import PICKS, Kept, kept, sliced
from forerun.train.run import Record, Run, Start
from forerun.train.schedule import Schedule
from forerun.train.teacher import Teacher

PRUNING = "pruning.json"
"""Beside a run's checkpoints and beside the model: which parts of the target stay."""
MASKS = "masks.safetensors"
"""Of a run whose parts were picked by masks."""
LOSS = Weights(text=0.1, teacher=0.9)
LEAST_SAMPLE = 2
"""Tokens of a sample: one to read, and one to learn."""


@dataclass(frozen=True)
class SmallRecipe:
    """A draft model out of `target`. shape: None: nothing is pruned, and `init_from`, a draft model of the same
    vocabulary, is taught further.

    data: files of its answers; of several each is a kind of its own, and the mixture follows the draft model's
    weaknesses (`train/domains.py`). weights: of the terms of the loss. calibration: tokens that say which parts stay.
    pick: how layers are picked (`slicing.PICKS`). shear_steps: instead of that, so many steps in which masks learn what
    stays (`pruning/shearing.py`). tied: the draft's embedding is its head, too, even if the target's is not."""

    target: str
    shape: Shape | None
    data: Sequence[Path]
    schedule: Schedule
    weights: Weights = LOSS
    rows: int = 8
    length: int = 512
    seed: int = 0
    calibration: int = 50_000
    pick: str = PICKS[0]
    shear_steps: int = 0
    init_from: str | None = None
    tied: bool = False
    dtype: str = "auto"


@dataclass(frozen=True)
class SmallTraining:
    """A training that is ready to begin: every input has been read and fits."""

    recipe: SmallRecipe
    objective: Imitation
    answers: Answers
    distilled: Sequence[Distilled]

    def fit(self, run: Path, out: Path, events: Events | None = None) -> dict[str, float]:
        """Prune and train to the schedule's end, resuming what was interrupted in `run`, and write the model."""
        schedule = self.recipe.schedule
        running = Run(self.objective, schedule, run, Record(self.record()), events)
        figures = running.finish(out.name, self._start(run))
        self._write(run, out, figures)
        return figures

    def _start(self, run: Path) -> Start | None:
        if self.recipe.shape is None:
            return None
        return Shearing(self, run) if self.recipe.shear_steps else Pruning(self, run)

    def record(self) -> dict[str, Any]:
        """What the run's weights depend on, but for its schedule."""
        recipe = self.recipe
        return {
            "target": Source.of(recipe.target).fingerprint,
            "data": digest([[sample.prompt, sample.answer] for sample in self.answers.samples]),
            "shape": str(Shape.of(self.objective.module.config)),
            "weights": asdict(recipe.weights),
            **{
                name: getattr(recipe, name)
                for name in ("rows", "length", "seed", "calibration", "pick", "tied", "shear_steps")
            },
            "init_from": Source.of(recipe.init_from).fingerprint if recipe.init_from else None,
        }

    def _write(self, run: Path, out: Path, figures: Mapping[str, float]) -> None:
        """A folder that appears complete: the model as others read it, and what is to be known about it."""
        try:
            with whole_folder(out) as beside:
                save_beside(self.objective.module, Source.of(self.recipe.target), beside)
                parts = json.loads((run / PRUNING).read_text()) if self.recipe.shape else None
                put(beside / PRUNING, f"{json.dumps(self._about(figures) | {'kept': parts})}\n".encode())
        except OSError as error:
            raise TrainingError(
                f"{out} cannot be written ({error.strerror}): make room, or choose another folder"
            ) from None
        except ForerunError as error:
            raise TrainingError(str(error).replace(str(beside), str(out))) from None

    def _about(self, figures: Mapping[str, float]) -> dict[str, Any]:
        own = self.record()
        return {
            "forerun": "pruned",
            "target": {"name": Path(self.recipe.target).name, "fingerprint": own.pop("target")},
            **own,
            "data": [one.header for one in self.distilled],
            "answers": len(self.answers.samples),
            "schedule": self.recipe.schedule.as_json(),
            "figures": {name: round(value, 4) for name, value in figures.items()},
        }


class Pruning:
    """The start of such a run (see `Start` in train/run.py): the target reads answers until enough tokens have said
    what its parts do; then the draft model's weights are those of the parts that stay."""

    def __init__(self, training: SmallTraining, run: Path):
        self.module, self.recipe, self.answers = training.objective.module, training.recipe, training.answers
        self.run = run

    @property
    def steps(self) -> int:
        """Batches; the last ones may find that enough has been read."""
        mean = sum(min(sample.size, self.answers.length) for sample in self.answers.training)
        each = mean / len(self.answers.training) * self.answers.rows
        return max(1, round(self.recipe.calibration / each))

    @cached_property
    def importance(self) -> Importance:
        """Read when it is needed: a run that goes on needs none."""
        return Importance(source_of(self.recipe).to(self.module.device))

    def update(self, step: int) -> None:
        batch = self.answers.batch(step)
        ends = torch.from_numpy(batch.ends)
        valid_BN = torch.arange(batch.tokens_BN.shape[1]) < ends[:, None]
        device = self.module.device
        with torch.autocast(device.type, torch.bfloat16, enabled=_in_bf16(self.recipe, device)):
            self.importance.read(batch.tokens_BN.to(device), valid_BN.to(device))

    def finish(self) -> None:
        source = self.importance
        parts = kept(source.sums, source.config, self.module.config, self.recipe.pick)
        fill(self.module, sliced(source, parts))
        put(self.run / PRUNING, f"{json.dumps(asdict(parts))}\n".encode())
        del self.importance

    def state(self) -> dict[str, Tensor]:
        return self.importance.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.importance.load_state(state)


class Shearing:
    """The other start: masks learn which parts stay, on answers, while the weights learn to do without the rest."""

    def __init__(self, training: SmallTraining, run: Path):
        self.training, self.run = training, run
        self.steps = training.recipe.shear_steps

    @cached_property
    def _source(self) -> Transformer:
        return source_of(self.training.recipe).to(self.training.objective.module.device)

    @cached_property
    def _shear(self) -> Shear:
        return shear(self._source, self.training.objective, self.steps)

    def update(self, step: int) -> None:
        self._shear.update(step)

    def finish(self) -> None:
        """The masks stay beside the run's checkpoints."""
        module = self.training.objective.module
        found = sheared(self._source, self._shear.gates, module.config)
        fill(module, found.module)
        save_file({name: mask.contiguous().cpu() for name, mask in named(found.masks).items()}, self.run / MASKS)
        put(self.run / PRUNING, f"{json.dumps(asdict(found.parts))}\n".encode())
        del self._shear, self._source

    def state(self) -> dict[str, Tensor]:
        return self._shear.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._shear.load_state(state)


def _in_bf16(recipe: SmallRecipe, device: torch.device) -> bool:
    return dtype_of(recipe.dtype, device) != torch.float32


@torch.no_grad()
def fill(module: Transformer, made: Transformer) -> None:
    """The weights of one in the other. Where the module's embedding is to be its head, too, it is the head's."""
    theirs: dict[str, Tensor] = dict(made.named_parameters())
    if module.config.tied and not made.config.tied:
        theirs["embedding.weight"] = made.head.weight
    for name, parameter in module.named_parameters():
        parameter.copy_(theirs[name])


def kept_of(folder: Path) -> Kept:
    """Which parts of its target a pruned model is. TrainingError if the folder does not say."""
    try:
        fields = json.loads((folder / PRUNING).read_text())
        return Kept.of(fields.get("kept", fields))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{folder / PRUNING} cannot be read ({error}): train the model again") from None


def source_of(recipe: SmallRecipe) -> Transformer:
    """The target in fp32, to take parts of."""
    return _ours(recipe.target)


def _ours(path: str) -> Transformer:
    network = load_network(path, torch.float32, torch.device("cpu"))
    if not isinstance(network, Transformer):
        raise TrainingError(f"{path} is not a Llama, Mistral or Qwen: only those can be pruned and taught")
    return network


def prepare(recipe: SmallRecipe, device: torch.device) -> SmallTraining:
    """Read everything that a training needs. Raises TrainingError or CheckpointError for what does not fit, before
    anything is written."""
    distilled = [read(path) for path in recipe.data]
    module = _module(recipe, source_of(recipe).config)
    _demand_sizes(module.config, recipe)
    network = load_network(recipe.target, dtype_of(recipe.dtype, device), device)
    kinds = [_answers(one.samples, recipe) for one in distilled]
    answers = _answers([sample for kind in kinds for sample in kind.samples], recipe)
    for path, kind, one in zip(recipe.data, kinds, distilled, strict=True):
        demand_known(kind, module.vocab_size, path, recipe.target)
        warn_of_another_target(one, path, recipe.target)
    demand_enough(answers, ", ".join(map(str, recipe.data)))
    objective = Imitation(module.to(device), Teacher(network), answers, recipe.weights, recipe.schedule)
    if len(kinds) > 1:
        objective.domains = Domains.of(kinds)
    return SmallTraining(recipe, objective, answers, distilled)


def _answers(samples: Sequence[Sample], recipe: SmallRecipe) -> Answers:
    fitting = [sample for sample in samples if sample.size >= LEAST_SAMPLE]
    return Answers(fitting, recipe.rows, recipe.length, recipe.seed)


def _module(recipe: SmallRecipe, target: TransformerConfig) -> Transformer:
    """The draft model before its start: without weights, or the one to go on from."""
    if recipe.shape is not None and recipe.init_from is None:
        return Transformer(_config(recipe, recipe.shape, target))
    if recipe.shape is not None or recipe.init_from is None:
        raise TrainingError("a draft model begins as a part of its target or as another draft: give one of them")
    made = _ours(recipe.init_from)
    if made.vocab_size != target.vocab_size:
        raise TrainingError(
            f"{recipe.init_from} has {made.vocab_size} tokens and {recipe.target} {target.vocab_size}: start from a"
            " draft model of the same vocabulary"
        )
    return made


def _config(recipe: SmallRecipe, shape: Shape, target: TransformerConfig) -> TransformerConfig:
    if recipe.pick not in PICKS:
        raise TrainingError(f"layers cannot be picked by {recipe.pick!r}: choose one of {', '.join(PICKS)}")
    config = shape.within(target)
    windows = target.windows[: config.layers]
    if len(set(target.windows)) > 1:
        raise TrainingError(f"{recipe.target} has layers with and without a window, which cannot be pruned yet")
    return replace(config, windows=windows, tied=target.tied or recipe.tied)


def _demand_sizes(config: TransformerConfig, recipe: SmallRecipe) -> None:
    if not LEAST_SAMPLE <= recipe.length <= config.max_length or recipe.rows < 1:
        raise TrainingError(
            f"batches of {recipe.rows} x {recipe.length} tokens do not fit a context of {config.max_length}:"
            f" give --rows of 1 or more and a --length from {LEAST_SAMPLE} to {config.max_length}"
        )
