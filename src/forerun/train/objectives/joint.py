"""Medusa-2: heads and their target trained together (Cai et al. 2024, arXiv 2401.10774, section 2.2.2).

    loss = keep + head_weight * ramp(step) * sum_k decay^k CE_k        (the paper's eq. 2; k from 1)

The target moves through low-rank adapters (train/lora.py), which are merged in the end: what is
written is another model, and heads for that. keep holds it to what it was. "original" is
self-distillation, KL(original || current) of the law of every answer token (section 2.3.2), where
the original is the same network with its adapters off; "text" is cross-entropy with the answer
tokens themselves. Either is a mean over the tokens trained on. The published code divides the
divergence, and it alone, by all tokens, prompts included, so its weight there depends on how long
prompts are.

The target's term and the first head's see the same tokens: all of an answer (but the first, if the
prompt has one token only). Heads may be warmed up by the ramp, or by a training of their own before
this one (`init_from`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from forerun.errors import TrainingError
from forerun.nn.transformer import Transformer
from forerun.train.answers import Batch
from forerun.train.lesson import CHUNK_NUMBERS, Lesson, among, logits_of
from forerun.train.lora import Adapters
from forerun.train.objectives.descent import Descent
from forerun.train.objectives.heads import HeadsObjective
from forerun.train.run import Watch, unwatched
from forerun.train.schedule import Schedule


@dataclass(frozen=True)
class Ramp:
    """How much of the heads' weight counts at a share of the steps: "constant", "linear", "sine",
    or "sine:R", which has risen after the first R of them."""

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


@dataclass(frozen=True)
class Balance:
    """Of the loss's two terms: what keeps the target ("original" or "text"), and what the heads count beside it."""

    keep: str
    head_weight: float
    ramp: Ramp


class Moved(nn.Module):
    """Everything that learns. The names of its parameters begin with `backbone.` or `heads.`."""

    def __init__(self, backbone: Adapters, heads: nn.Module):
        super().__init__()
        self.backbone, self.heads = backbone, heads


@dataclass(frozen=True)
class Terms:
    """Of a batch's loss, in nats. text: mean -log p of the answer tokens; original: the same under
    the original's law; divergence: mean KL(original || current) of their laws; both are 0 where the
    original was not asked. heads: the heads' cross-entropies, each a mean over the tokens it has,
    weighted and added."""

    text: Tensor
    original: Tensor
    divergence: Tensor
    heads: Tensor


@dataclass
class JointObjective(Descent):
    """The loss of heads and target together. heads: on a `Pupil`; it lends its loss, its answers and its figures."""

    module: Moved
    heads: HeadsObjective
    balance: Balance
    schedule: Schedule

    @property
    def network(self) -> Transformer:
        assert isinstance(self.heads.teacher.network, Transformer)
        return self.heads.teacher.network

    def loss(self, number: int) -> Tensor:
        self.module.train()
        ramp = self.balance.ramp.at(number // self.schedule.parts / self.schedule.steps)
        terms = self.terms(self.heads.answers.batch(number), compare=self.balance.keep == "original")
        return self._kept(terms) + self.balance.head_weight * ramp * terms.heads

    def _kept(self, terms: Terms) -> Tensor:
        return terms.divergence if self.balance.keep == "original" else terms.text

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
        text, original, divergence, *heads = torch.stack(sums).sum(0).unbind()
        counts_K = (lesson.valid_KP & among(module.known, lesson.labels_KP)[1]).sum(1).clamp(min=1)
        scale = self.heads.weights.decay ** torch.arange(1, module.count + 1, device=counts_K.device)
        return Terms(text / seen, original / seen, divergence / seen, (torch.stack(heads) / counts_K * scale).sum())

    @torch.no_grad()
    def _original(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The original's states where the answers' tokens are predicted, [P, D], and its output projection."""
        rows, places = batch.places()
        tokens = batch.tokens_BN.to(self.network.device)
        with self.module.backbone.off():
            return self.network.features(tokens)[rows, places + 1], self.network.output_head

    def _sums(self, lesson: Lesson, original_PD: Tensor | None, original_head_VD: Tensor | None) -> Tensor:
        """Over the places of a chunk: the text's terms, the divergence, and every head's cross-entropy, [3 + K]."""
        pupil = self.heads.teacher
        log_probs = F.linear(lesson.states_PKD[:, 0], pupil.head_VD).float().log_softmax(-1)
        text = F.nll_loss(log_probs, lesson.labels_KP[0], reduction="sum")
        original_text = divergence = torch.zeros_like(text)
        if original_PD is not None and original_head_VD is not None:
            with torch.no_grad():
                original = F.linear(original_PD, original_head_VD).float().log_softmax(-1)
            divergence = (original.exp() * (original - log_probs)).sum()
            original_text = F.nll_loss(original, lesson.labels_KP[0], reduction="sum")
        logits = logits_of(self.heads.module, pupil, lesson).float()
        labels_KP, is_known = among(self.heads.module.known, lesson.labels_KP)
        each = F.cross_entropy(logits.flatten(0, 1), labels_KP.flatten(), reduction="none")
        heads_K = (each.view(lesson.valid_KP.shape) * (lesson.valid_KP & is_known)).sum(1)
        return torch.cat((torch.stack((text, original_text, divergence)), heads_K))

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        """The heads' figures on held-out answers, `text`, `original_text` and `divergence` of the
        target (see `Terms`), and the whole `loss` without its ramp.

        The answers are the original's, so `tokens_per_step` is what the heads promise on what the target used to say.
        """
        figures = self.heads.validate(lambda done, total: watch(done, 2 * total))
        answers, most = self.heads.answers, self.heads.most_validated
        batches = list(answers.batches_of(answers.heldout[:most] or answers.training[:most]))
        terms = []
        for number, batch in enumerate(batches, len(batches)):
            watch(number, 2 * len(batches))
            with torch.no_grad():
                terms.append(self.terms(batch, compare=True))
        text, original, divergence = (
            torch.stack(each).mean() for each in zip(*((t.text, t.original, t.divergence) for t in terms), strict=True)
        )
        kept = divergence if self.balance.keep == "original" else text
        loss = kept.item() + self.balance.head_weight * figures["loss"]
        target = {"text": text, "original_text": original, "divergence": divergence}
        return figures | {"loss": loss} | {name: value.item() for name, value in target.items()}
