"""Medusa-2: heads and their target trained together (Cai et al. 2024, arXiv 2401.10774, section 2.2.2).

    loss = keep + head_weight * ramp(step) * sum_k decay^k CE_k        (the paper's eq. 2; k from 1)

The target moves through low-rank adapters (train/lora.py), which are merged in the end: what is written is another model, and
heads for that. keep holds it to what it was. "original" is self-distillation, KL(original || current) of the law of every answer
token (section 2.3.2), where the original is the same network with its adapters off; "text" is cross-entropy with the answer
tokens themselves. Either is a mean over the tokens trained on. The published code divides the divergence, and it alone, by all
tokens, prompts included, so its weight there depends on how long prompts are.

The target's term and the first head's see the same tokens: all of an answer (but the first, if the prompt has one token only).
Heads may be warmed up by the ramp, or by a training of their own before this one (`init_from`).
"""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from forerun.drafting import checkpoint as checkpoints
from forerun.drafting import registry
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.trained import Joint, JointMethod
from forerun.errors import ForerunError, TrainingError
from forerun.nn.save import save_pretrained
from forerun.nn.transformer import Transformer
from forerun.nn.translate import published_config, translate
from forerun.sources.folder import CONFIG, DOWNLOADED, INDEX, checkpoint_folder, read_config, stored, weight_files
from forerun.train import drafters
from forerun.train.heads import CHUNK_NUMBERS, Batch, HeadsObjective, Lesson, Teacher, logits_of
from forerun.train.lora import Adapters
from forerun.train.run import Schedule, fit

MODEL, HEADS = "model", "heads"
"""What the result's folder holds."""
FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Ramp:
    """How much of the heads' weight counts at a share of the steps: "constant", "linear", "sine", or "sine:R", which has risen
    after the first R of them."""

    kind: str
    share: float = 1.0

    @staticmethod
    def named(word: str) -> Ramp:
        kind, colon, share = word.partition(":")
        try:
            ramp = Ramp(kind, float(share) if colon else 1.0)
        except ValueError:
            ramp = Ramp("")
        known = ramp.kind == "sine" or (ramp.kind in ("constant", "linear") and not colon)
        if not (known and 0 < ramp.share <= 1):
            raise TrainingError(f"there is no ramp {word!r}: write constant, linear, sine, or sine:R with R up to 1")
        return ramp

    def at(self, progress: float) -> float:
        if self.kind == "constant":
            return 1.0
        if self.kind == "linear":
            return progress
        return math.sin(math.pi / 2 * min(1.0, progress / self.share))


class Pupil(Teacher):
    """The target as it stands: its states and its output projection carry gradients to the adapters."""

    def states(self, tokens_BN: Tensor) -> Tensor:
        assert isinstance(self.network, Transformer) and isinstance(self.network.output_head, Tensor)
        self.head_VD = self.network.output_head
        return self.network.features(tokens_BN)


class Moved(nn.Module):
    """Everything that learns. The names of its parameters begin with `backbone.` or `heads.`."""

    def __init__(self, backbone: Adapters, heads: nn.Module):
        super().__init__()
        self.backbone, self.heads = backbone, heads


@dataclass(frozen=True)
class Terms:
    """Of a batch's loss, in nats. text: mean -log p of the answer tokens; divergence: mean KL(original || current) of their laws,
    0 where it was not asked for; heads: the heads' cross-entropies, each a mean over the tokens it has, weighted and added."""

    text: Tensor
    divergence: Tensor
    heads: Tensor


@dataclass
class JointObjective:
    """The loss of heads and target together (see `Objective` in train/loop.py). heads: on a `Pupil`."""

    module: Moved
    heads: HeadsObjective
    recipe: JointRecipe
    ramp: Ramp

    @property
    def network(self) -> Transformer:
        assert isinstance(self.heads.teacher.network, Transformer)
        return self.heads.teacher.network

    def loss(self, number: int) -> Tensor:
        self.module.train()
        schedule = self.recipe.heads.schedule
        ramp = self.ramp.at(number // schedule.parts / schedule.steps)
        terms = self.terms(self.heads.answers.batch(number), compare=self.recipe.keep == "original")
        return self._kept(terms) + self.recipe.head_weight * ramp * terms.heads

    def _kept(self, terms: Terms) -> Tensor:
        return terms.divergence if self.recipe.keep == "original" else terms.text

    def terms(self, batch: Batch, compare: bool) -> Terms:
        """compare: ask the original too."""
        module, pupil = self.heads.module, self.heads.teacher
        with pupil.precision():
            lesson = Lesson.of(module, pupil, batch)
            parts = lesson.chunks(max(1, CHUNK_NUMBERS // ((module.count + 2) * len(pupil.head_VD))))
            original_PD, head_VD = self._original(batch) if compare else (None, None)
            sums, seen = [], 0
            for part in parts:
                count = len(part.context_PD)
                theirs = None if original_PD is None else original_PD[seen : seen + count]
                sums.append(checkpoint(self._sums, part, theirs, head_VD, use_reentrant=False))
                seen += count
        text, divergence, *heads = torch.stack(sums).sum(0).unbind()
        counts_K = lesson.valid_KP.sum(1).clamp(min=1)
        scale = self.heads.weights.decay ** torch.arange(1, module.count + 1, device=counts_K.device)
        return Terms(text / seen, divergence / seen, (torch.stack(heads) / counts_K * scale).sum())

    @torch.no_grad()
    def _original(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The original's states where the answers' tokens are predicted, [P, D], and its output projection."""
        rows, places = batch.places()
        tokens = batch.tokens_BN.to(self.network.device)
        with self.module.backbone.off():
            return self.network.features(tokens)[rows, places + 1], self.network.output_head

    def _sums(self, lesson: Lesson, original_PD: Tensor | None, original_head_VD: Tensor | None) -> Tensor:
        """Over the places of a chunk: the text's term, the divergence, and every head's cross-entropy, [2 + K]."""
        pupil = self.heads.teacher
        log_probs = F.linear(lesson.states_PKD[:, 0], pupil.head_VD).float().log_softmax(-1)
        text = F.nll_loss(log_probs, lesson.labels_KP[0], reduction="sum")
        divergence = torch.zeros_like(text)
        if original_PD is not None and original_head_VD is not None:
            with torch.no_grad():
                original = F.linear(original_PD, original_head_VD).float().log_softmax(-1)
            divergence = (original.exp() * (original - log_probs)).sum()
        logits = logits_of(self.heads.module, pupil, lesson).float()
        each = F.cross_entropy(logits.flatten(0, 1), lesson.labels_KP.flatten(), reduction="none")
        heads_K = (each.view(lesson.valid_KP.shape) * lesson.valid_KP).sum(1)
        return torch.cat((torch.stack((text, divergence)), heads_K))

    def validate(self) -> dict[str, float]:
        """The heads' figures on held-out answers, `text` and `divergence` of the target, and the whole `loss` without its ramp.

        The answers are the original's, so `tokens_per_step` is what the heads promise on what the target used to say.
        """
        figures = self.heads.validate()
        answers, most = self.heads.answers, self.heads.most_validated
        samples = answers.heldout[:most] or answers.training[:most]
        with torch.no_grad():
            terms = [self.terms(batch, compare=True) for batch in answers.batches_of(samples)]
        text, divergence = (
            torch.stack(each).mean() for each in zip(*((t.text, t.divergence) for t in terms), strict=True)
        )
        kept = divergence if self.recipe.keep == "original" else text
        loss = kept.item() + self.recipe.head_weight * figures["loss"]
        return figures | {"loss": loss, "text": text.item(), "divergence": divergence.item()}


# ---- from a recipe to a folder


@dataclass(frozen=True)
class JointRecipe:
    """A joint training. heads: theirs, and with it target, data and schedule. The rest: see `Joint` in drafting/trained.py."""

    heads: drafters.Recipe
    keep: str = "original"
    head_weight: float = 0.01
    ramp: str = "sine"
    rank: int = 32
    alpha: float = 16.0


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
    heads: drafters.Training

    def fit(self, run: Path, out: Path) -> dict[str, float]:
        """Train to the schedule's end, resuming what was interrupted in `run`; merge, and write model and heads to `out`.

        Can be called once: the adapters are gone afterwards.
        """
        own = {name: getattr(self.recipe, name) for name in ("keep", "head_weight", "ramp", "rank", "alpha")}
        drafters.demand_same_recipe(run, self.heads.record() | own)
        try:
            figures = fit(self.objective, self.recipe.heads.schedule, run, out.name) or self.objective.validate()
        except KeyboardInterrupt:
            print(f"the same command goes on from the last checkpoint in {run}", file=sys.stderr)
            raise
        self.objective.module.backbone.merge()
        self._write(out, figures)
        return figures

    def _write(self, out: Path, figures: Mapping[str, float]) -> None:
        """Both folders appear complete; older ones are replaced."""
        beside = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}"
        try:
            _write_model(self.objective.network, checkpoint_folder(self.recipe.heads.target), beside / MODEL)
            about = Checkpoint(
                beside / HEADS, method_of(self.recipe)[0], {}, f"{out.name}/{MODEL}", self._about(figures)
            )
            checkpoints.write(self.objective.heads.module, self.heads.config, about)
            out.mkdir(exist_ok=True)
            for name in (MODEL, HEADS):
                old = out / f".{name}.old"
                if (out / name).exists():
                    (out / name).rename(old)
                (beside / name).rename(out / name)
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise TrainingError(
                f"{out} cannot be written ({error.strerror}): make room, or choose another folder"
            ) from None
        except ForerunError as error:
            raise TrainingError(str(error).replace(str(beside), str(out))) from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)

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
    """Read everything that a joint training needs. Raises TrainingError, CheckpointError or DrafterError for what does not fit,
    before anything is written."""
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
    return JointTraining(recipe, JointObjective(Moved(adapters, on_pupil.module), on_pupil, recipe, ramp), heads)


def _demand_ours(recipe: drafters.Recipe) -> None:
    target, folder = recipe.target, checkpoint_folder(recipe.target)
    if translate(read_config(folder), folder) is None:
        raise TrainingError(
            f"{target} is not a Llama, Mistral or Qwen, and only those can be changed: leave the target as it is, and train"
            f" heads with forerun train {recipe.preset}"
        )


def _architecture(recipe: drafters.Recipe) -> dict[str, object]:
    """Of the heads: the paper's, or that of the heads to start from, and what was asked for."""
    if recipe.init_from is None:
        return dict(recipe.architecture)
    drafter, trained, _ = registry.preset(recipe.preset)
    return asdict(checkpoints.load(recipe.init_from, drafter).config(trained.config)) | dict(recipe.architecture)


def _write_model(network: Transformer, original: Path, folder: Path) -> None:
    """The merged model, with everything that lies beside the original's weights: tokenizer, end tokens, templates.

    In the original's number format, unless it was trained in less.
    """
    formats = {tensor.dtype for tensor in stored(weight_files(original)).values()}
    format_ = FORMATS.get(formats.pop(), torch.float32) if len(formats) == 1 else torch.float32
    dtype = format_ if network.dtype == torch.float32 else network.dtype
    theirs: dict[str, Any] = json.loads((original / CONFIG).read_text())
    known = {*published_config(network.config, dtype), "dtype"}
    save_pretrained(network, folder, {name: value for name, value in theirs.items() if name not in known}, dtype)
    for path in sorted(original.iterdir()):
        if path.is_file() and _travels(path.name):
            shutil.copyfile(path, folder / path.name)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone


def _travels(name: str) -> bool:
    wanted = any(fnmatch.fnmatch(name, pattern) for pattern in DOWNLOADED)
    return wanted and name not in (CONFIG, INDEX) and not name.endswith(".safetensors")
