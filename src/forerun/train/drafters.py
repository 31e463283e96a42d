"""Everything that a training of heads decides before the run begins, and what it leaves when the run has ended."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from forerun.drafting import checkpoint as checkpoints
from forerun.drafting import registry
from forerun.drafting.checkpoint import DEFAULT_TREE, Checkpoint
from forerun.drafting.heads import HeadsModule
from forerun.drafting.trained import Adversary, HeadsConfig, Preset, Weights, narrowed
from forerun.errors import TrainingError
from forerun.nn.dtype import dtype_of
from forerun.nn.foreign.network import Foreign
from forerun.nn.load import load_network
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer
from forerun.sources.fingerprint import digest, fingerprint
from forerun.sources.source import Source
from forerun.train.answers import Answers, Windows
from forerun.train.distill import Distilled, Sample, read
from forerun.train.events import Events
from forerun.train.least_squares import LeastSquares
from forerun.train.objectives.adversarial import Judging, opposed
from forerun.train.objectives.alternating import Alternating
from forerun.train.objectives.heads import HeadsObjective
from forerun.train.run import Objective, Record, Run
from forerun.train.schedule import Schedule
from forerun.train.teacher import Teacher
from forerun.train.temperatures import temperatures_of

WIDEST_START = 12288
"""Inputs of a head above which no least squares are solved: their matrix takes 4 bytes times the square of that."""
LEAST_SAMPLE = 3
"""Tokens of a sample: one that the target has read, one that is the root, and one to learn."""
SHORTEST = 8
"""Tokens of an answer with its prompt from which every head of the papers can learn something."""
FEWEST_TOKENS = 2000
"""Answer tokens below which nothing can be learnt that holds elsewhere."""
SMALLEST_SHARE = 0.02
"""Of the tokens that are read; below it the data is prompts, and something went wrong when it was made."""


NO_TEXT = {"text": None, "text_share": None}
"""What a run's record says where answers alone are read."""
NO_ADVERSARY = {"adversary": None}
"""And where heads have nobody to convince."""


class Reading(Protocol):
    """What a recipe says of the answers that it reads."""

    @property
    def target(self) -> str: ...

    @property
    def data(self) -> Path: ...

    @property
    def rows(self) -> int: ...

    @property
    def length(self) -> int: ...


@dataclass(frozen=True)
class HeadsRecipe:
    """A training of heads. architecture: what differs from the preset's. weights: None: the
    preset's. text: a stream of tokens that text_share of the batches is taken from, learnt under the target's own
    law like answers. init_from: trained heads to go on from, of the same shape or of
    fewer layers. start_batches: without them, batches over which heads are first fitted by least squares (0: they
    start as copies of the target's output projection, as the papers' do). adversary: a discriminator that the heads
    learn against."""

    preset: str
    target: str
    data: Path
    architecture: Mapping[str, object]
    weights: Weights | None
    schedule: Schedule
    rows: int = 16
    length: int = 512
    seed: int = 0
    init_from: str | None = None
    dtype: str = "auto"
    start_batches: int = 64
    kernels: str = "auto"
    text: Path | None = None
    text_share: float = 0.5
    adversary: Adversary | None = None


def schedule_for(
    preset: Preset, steps: int, rate: float | None = None, floor: float | None = None, **rest: Any
) -> Schedule:
    """The preset's schedule over so many steps."""
    warmup = preset.warmup if preset.warmup >= 1 else preset.warmup * steps
    return Schedule(
        steps=steps,
        warmup=min(round(warmup), steps // 2),
        muon_rate=preset.muon,
        adam_rate=preset.rate if rate is None else rate,
        weight_decay=preset.weight_decay,
        shape="cosine",
        floor=preset.floor if floor is None else floor,
        clip=preset.clip,
        **rest,
    )


@dataclass(frozen=True)
class HeadsTraining:
    """A training that is ready to begin: every input has been read and fits. judging: what is learnt beside the heads,
    and left behind."""

    recipe: HeadsRecipe
    objective: HeadsObjective
    config: HeadsConfig
    answers: Answers
    distilled: Distilled
    judging: Judging | None = None

    @property
    def learning(self) -> Objective:
        """All that takes steps."""
        if self.judging is None:
            return self.objective
        return Alternating(discriminator=self.judging, heads=self.objective)

    def fit(self, run: Path, out: Path, events: Events | None = None) -> dict[str, float]:
        """Train to the schedule's end, resuming what was interrupted in `run`, and write the heads to `out`."""
        record = Record(self.record(), older=self.older())
        figures = Run(self.learning, self.recipe.schedule, run, record, events).finish(out.name, self._start())
        config = replace(self.config, temperatures=self._temperatures())
        figures |= {f"head{k}_temperature": one for k, one in enumerate(config.temperatures, 1)}
        checkpoints.write(self.objective.module, config, self._about(out, figures))
        return figures

    def _temperatures(self) -> tuple[float, ...]:
        """Fitted on the answers that figures are of."""
        one = self.objective
        return temperatures_of(one.module, one.teacher, one.judged, self.answers)

    def _start(self) -> LeastSquares | None:
        """A fit of untrained heads by least squares, if that is wanted and not too large."""
        recipe, module, teacher = self.recipe, self.objective.module, self.objective.teacher
        if recipe.init_from is not None or not recipe.start_batches or not module.solvable:
            return None
        widest = teacher.head_VD.shape[1] * (module.count + 1 if module.sees_tokens else 1)
        if widest > WIDEST_START:
            print(
                f"heads with {widest} inputs start as copies: a least-squares fit would be too large", file=sys.stderr
            )
            return None
        return LeastSquares(module, teacher, self.answers, recipe.start_batches)

    def record(self) -> dict[str, Any]:
        """What the run's weights depend on, but for its schedule."""
        recipe = self.recipe
        return {
            "preset": recipe.preset,
            "target": Source.of(recipe.target).fingerprint,
            "data": digest([[sample.prompt, sample.answer] for sample in self.answers.samples]),
            "architecture": asdict(self.config),
            "weights": asdict(self.objective.weights),
            "rows": recipe.rows,
            "length": recipe.length,
            "seed": recipe.seed,
            "init_from": recipe.init_from,
            "start_batches": recipe.start_batches,
            **self._text(),
            **self._adversary(),
        }

    def older(self) -> dict[str, Any]:
        """What fields had that are younger than some records."""
        defaults = {one.name: one.default for one in fields(self.config) if one.default is not MISSING}
        return NO_TEXT | NO_ADVERSARY | {"architecture": defaults}

    def _text(self) -> dict[str, Any]:
        """What is read beside the answers, if anything is."""
        if self.recipe.text is None:
            return NO_TEXT
        return {"text": fingerprint([self.recipe.text]), "text_share": self.recipe.text_share}

    def _adversary(self) -> dict[str, Any]:
        """The discriminator's settings, if there is one."""
        return {"adversary": asdict(self.recipe.adversary)} if self.recipe.adversary else NO_ADVERSARY

    def _about(self, out: Path, figures: Mapping[str, float]) -> Checkpoint:
        recipe = self.recipe
        training = {
            "preset": recipe.preset,
            "data": self.distilled.header,
            "answers": len(self.answers.samples),
            "rows": recipe.rows,
            "length": recipe.length,
            "seed": recipe.seed,
            "start_batches": recipe.start_batches,
            "weights": asdict(self.objective.weights),
            **self._text(),
            **self._adversary(),
            "schedule": asdict(recipe.schedule),
            "figures": {name: round(value, 4) for name, value in figures.items()},
        }
        return Checkpoint(out, registry.preset(recipe.preset)[0], {}, Path(recipe.target).name, training)


def prepare(recipe: HeadsRecipe, device: torch.device) -> HeadsTraining:
    """Read everything that a training needs. Raises TrainingError, CheckpointError or DrafterError for what does not
    fit, before anything is written."""
    _, _, preset = registry.preset(recipe.preset)
    distilled = read(recipe.data)
    network = load_network(recipe.target, dtype_of(recipe.dtype, device), device, recipe.kernels)
    demand_sizes(network, recipe)
    answers = _answers([sample for sample in distilled.samples if sample.size >= LEAST_SAMPLE], recipe)
    demand_data(answers, network, recipe)
    warn_of_another_target(distilled, recipe.data, recipe.target)
    teacher = Teacher(network)
    module, config = _heads(recipe, network, answers)
    module.initialise(teacher.head_VD.float().cpu(), recipe.seed)
    if recipe.init_from is None:
        _borrow(module, recipe)
    else:
        _go_on(checkpoints.read(recipe.init_from), module, config)
    weights = recipe.weights or preset.weights
    if weights.asks_target or recipe.adversary:
        demand_a_law(network, recipe.target, "train on the text alone (--text-weight 1 --teacher-weight 0)")
    _demand_text(network, weights, recipe)
    checkpoints.demand_layers(f"the {recipe.preset} drafter", module.reads(teacher.top), network)
    if weights.state and not module.foresees:
        raise TrainingError(f"{recipe.preset} heads foresee no states of the target: leave --state-weight out")
    tree = DEFAULT_TREE.within(module.count, DEFAULT_TREE.size) or DEFAULT_TREE
    objective = HeadsObjective(module.to(device), teacher, answers, weights, tree, recipe.schedule, preset.share)
    if recipe.adversary is None:
        return HeadsTraining(recipe, objective, config, answers, distilled)
    judging = opposed(objective, recipe.adversary, recipe.seed)
    return HeadsTraining(recipe, judging.opposed, config, answers, distilled, judging)


def _answers(samples: Sequence[Sample], recipe: HeadsRecipe) -> Answers:
    if recipe.text is None:
        return Answers(samples, recipe.rows, recipe.length, recipe.seed)
    text = Answers(Windows(recipe.text, recipe.length), recipe.rows, recipe.length, recipe.seed, holdout=sys.maxsize)
    return Answers(samples, recipe.rows, recipe.length, recipe.seed, text=text, text_share=recipe.text_share)


def _heads(recipe: HeadsRecipe, network: Network, answers: Answers) -> tuple[Any, HeadsConfig]:
    vocab_size, width = network.input_embedding.shape
    drafter, method, preset = registry.preset(recipe.preset)
    start = dict(checkpoints.load(recipe.init_from, drafter).architecture) if recipe.init_from else {}
    start.pop("temperatures", None)  # they are fitted anew
    shape: dict[str, Any] = {**preset.architecture, **start, **recipe.architecture}
    config = method.config(**method.fitted(shape | {"width": width, "vocab_size": vocab_size}, network))
    said = np.concatenate([np.asarray(sample.answer, np.int64) for sample in answers.training])
    config = narrowed(config, np.bincount(said, minlength=vocab_size))
    torch.manual_seed(recipe.seed)
    return method.network(config), config


def _go_on(start: Checkpoint, module: HeadsModule, config: HeadsConfig) -> None:
    """From trained heads, which are grown first if they have fewer layers."""
    _, method = registry.trained_of(config)
    theirs = start.config(method.config)
    if theirs.layers >= config.layers:
        start.fill(module)
        return
    smaller = method.network(replace(config, layers=theirs.layers, tied_layers=theirs.tied_layers))
    start.fill(smaller)
    module.grow_from(smaller)


def _borrow(module: HeadsModule, recipe: HeadsRecipe) -> None:
    """Layers of the heads' own begin as the target's last ones, where it has such."""
    if module.borrows:
        network = load_network(recipe.target, torch.float32, torch.device("cpu"))
        if isinstance(network, Transformer) and len(network.blocks) >= module.borrows:
            module.borrow(list(network.blocks)[-module.borrows :])


def demand_sizes(network: Network, recipe: Reading) -> None:
    if recipe.length > network.max_length or recipe.length < SHORTEST or recipe.rows < 1:
        raise TrainingError(
            f"batches of {recipe.rows} x {recipe.length} tokens do not fit a context of {network.max_length}:"
            f" give --rows of 1 or more and a --length from {SHORTEST} to {network.max_length}"
        )


def _demand_text(network: Network, weights: Weights, recipe: HeadsRecipe) -> None:
    """Refuse text that is no text to this target, and losses that would have heads learn it instead of the target."""
    if recipe.text is None:
        return
    largest = Windows(recipe.text, recipe.length).largest
    if largest >= network.vocab_size:
        raise TrainingError(
            f"{recipe.text} has token {largest} and {recipe.target} knows {network.vocab_size}: name the train.bin of a"
            " corpus that was cut by the target's tokenizer"
        )
    if not weights.asks_target:
        raise TrainingError(
            "text is learnt as the target would go on with it, and no term of the loss asks the target: give"
            " --teacher-weight or --distance-weight a number above 0, or leave --text out"
        )


def demand_data(answers: Answers, network: Network, recipe: Reading) -> None:
    """Refuse data that cannot teach this target."""
    demand_known(answers, network.vocab_size, recipe.data, recipe.target)
    demand_enough(answers, str(recipe.data))


def demand_known(answers: Answers, vocab_size: int, data: Path, target: str) -> None:
    """Refuse tokens that the target does not have."""
    largest = max(max((*s.prompt, *s.answer)) for s in answers.samples)
    if largest >= vocab_size:
        raise TrainingError(f"{data} has token {largest} and {target} knows {vocab_size}: distil from this target")


def demand_enough(answers: Answers, data: str) -> None:
    """Refuse what nothing would be learnt from."""
    tokens = sum(len(s.answer) for s in answers.training)
    if tokens < FEWEST_TOKENS or answers.trained_share < SMALLEST_SHARE:
        raise TrainingError(
            f"{data} has {tokens:,} answer tokens to train on, {answers.trained_share:.1%} of what would be read:"
            " make more or longer answers with forerun distill"
        )


def demand_a_law(network: Network, name: str, mend: str) -> None:
    """A teacher's law is taken from its states and its output matrix; some models do more than
    that to their logits. name: the model's. mend: what to do instead."""
    if not isinstance(network, Foreign):
        return
    outside = network.model.config.get_text_config(decoder=True)
    more = [
        name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(outside, name, None)
    ]
    if getattr(network.model.get_output_embeddings(), "bias", None) is not None:
        more.append("a bias of the output projection")
    if more:
        raise TrainingError(f"{name} has {more[0]}, which the teacher's law would miss: {mend}")


def warn_of_another_target(distilled: Distilled, data: Path, target: str) -> None:
    """A draft learns what the answers' author would say."""
    author = (distilled.header.get("target") or {}).get("fingerprint")
    if author and author != Source.of(target).fingerprint:
        print(
            f"{data} holds the answers of another model than {target}: distil from this one unless you mean it",
            file=sys.stderr,
        )


def example(answers: Answers) -> Sample:
    """The first sample that is trained on, as it will be read."""
    return answers.training[0]
