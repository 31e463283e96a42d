"""Draft heads on a frozen target.

Losses are summed over chunks of places and computed again in the backward pass, so that the logits
of a whole batch never exist.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from forerun.drafting.heads import HeadsModule
from forerun.drafting.trained import Weights
from forerun.ranktree import RankTree
from forerun.train.answers import Answers, Batch
from forerun.train.distill import Sample
from forerun.train.lesson import Lesson, among, chunk, logits_of
from forerun.train.objectives.descent import Descent, Group, by_kind
from forerun.train.objectives.losses import losses, paced
from forerun.train.ranks import Ranks, conditional, projected, ranks_of
from forerun.train.run import Watch, unwatched
from forerun.train.schedule import Schedule
from forerun.train.teacher import Teacher

SHOWN_TOP = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Said:
    """What heads and target say of the K tokens behind each place, as logits over the tokens that the heads know, and
    which of these tokens teach. target_logits_KPV: None where nobody asks for the target's law."""

    lesson: Lesson
    logits_KPV: Tensor
    target_logits_KPV: Tensor | None
    labels_KP: Tensor
    learn_KP: Tensor
    is_known_KP: Tensor


@dataclass
class HeadsObjective(Descent):
    """The loss of heads on a frozen target, and their figures on held-out answers. share: of a batch's places, how
    many teach."""

    module: HeadsModule
    teacher: Teacher
    answers: Answers
    weights: Weights
    tree: RankTree
    schedule: Schedule
    share: float = 1.0
    most_validated: int = 64

    def groups(self) -> list[Group]:
        """Muon for matrices, if the schedule has a rate for it; AdamW for all else."""
        return by_kind(self.module, self.schedule, self.module.tables)

    def loss(self, number: int) -> Tensor:
        """The weighted sum over heads, in nats: each head's mean over the places that have its token."""
        return self.loss_on(*self.drawn(number))

    def drawn(self, number: int) -> tuple[Batch, Tensor | None]:
        """Batch `number` and the places of it that teach, for a module that is in training now."""
        self.module.train()
        torch.manual_seed(self.answers.seed + number)  # the luck of dropout belongs to the batch, for runs that go on
        batch = self.answers.batch(number)
        return batch, self._chosen(batch)

    def loss_on(self, batch: Batch, chosen: Tensor | None = None) -> Tensor:
        return self._total(self.losses_on(batch, chosen))

    def _chosen(self, batch: Batch) -> Tensor | None:
        """Places that teach, drawn from torch's own luck."""
        if self.share == 1:
            return None
        count = len(batch.places()[0])
        return torch.randperm(count)[: max(1, round(self.share * count))].sort().values

    def _total(self, losses_K: Tensor) -> Tensor:
        """Heads that are taught count by their weights."""
        taught = losses_K[: self.module.taught]
        total: Tensor = (taught * self.weights.decay ** torch.arange(1, len(taught) + 1, device=taught.device)).sum()
        return total

    def losses_on(self, batch: Batch, chosen: Tensor | None = None) -> Tensor:
        """The loss of every head, [K]. chosen: the places that teach (None: all)."""
        with self.teacher.precision():
            lesson = Lesson.of(self.module, self.teacher, batch, chosen)
            parts = list(lesson.chunks(chunk(self.module, self.teacher)))
            if len(parts) == 1:  # nothing to save
                sums = [self._sums(lesson)]
            else:
                sums = [checkpoint(self._sums, part, use_reentrant=False) for part in parts]
        total_K, count_K = torch.stack(sums).sum(0)
        found: Tensor = total_K / count_K.clamp(min=1)
        return found

    def _sums(self, lesson: Lesson) -> Tensor:
        """Per head, the loss summed over the places of a chunk, and how many they are, [2, K]."""
        said = self.said(lesson)
        theirs, learn = said.target_logits_KPV, said.learn_KP
        flat = said.logits_KPV.flatten(0, 1), None if theirs is None else theirs.flatten(0, 1)
        each, likely = (part.view(learn.shape) for part in losses(*flat, said.labels_KP.flatten(), self.weights))
        if (beside := self._beside(said)) is not None:
            each = each + beside
        likely = likely.masked_fill(~said.is_known_KP, -math.inf)  # a token that is not known is never right
        counts = paced(likely, learn) if self.weights.pace else learn
        return torch.stack(((each * counts).sum(1), learn.sum(1)))

    def said(self, lesson: Lesson, law: bool = False) -> Said:
        """Of a chunk of places. law: the target's is asked for, whether or not the loss does."""
        logits, labels, learn = logits_of(self.module, self.teacher, lesson), lesson.labels_KP, lesson.valid_KP
        theirs = self._target_logits(lesson) if law or self.weights.asks_target else None
        labels, is_known = among(self.module.known, labels)
        if (known := self.module.known) is not None:
            if theirs is not None:
                learn = learn & among(known, theirs.argmax(-1))[1]
                theirs = theirs[..., known]
            if theirs is None or self.weights.text:
                learn = learn & is_known
        return Said(lesson, logits, theirs, labels, learn, is_known)

    def _beside(self, said: Said) -> Tensor | None:
        """What the loss has beside the terms of the laws, [K, P]."""
        return self.weights.state * self._apart(said.lesson) if self.weights.state else None

    def _apart(self, lesson: Lesson) -> Tensor:
        """How far the foreseen states are from the target's, [K, P]."""
        foreseen, states = self.module.foreseen(lesson.context_PD), lesson.states_PKD.transpose(0, 1)
        return F.smooth_l1_loss(foreseen.float(), states.float(), reduction="none").mean(-1)

    @torch.no_grad()
    def _target_logits(self, lesson: Lesson) -> Tensor:
        """[K, P, V]."""
        logits = F.linear(lesson.states_PKD.transpose(0, 1).flatten(0, 1), self.teacher.head_VD)
        return logits.view(*lesson.valid_KP.shape, -1)

    @property
    def judged(self) -> Sequence[Sample]:
        """The answers that figures are of."""
        return self.answers.heldout[: self.most_validated] or self.answers.training[: self.most_validated]

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        """`loss`, `head1_loss` .. `headK_loss` (each alone, in nats), `head1_top1` .. `headK_top5` (shares of answer
        tokens), `head1_given` .. (the share of top 1 where all heads before were right), and `tokens_per_step` as
        projected for the tree."""
        samples = self.judged
        self.module.eval()
        batches, losses, ranks = list(self.answers.batches_of(samples)), list[Tensor](), list[Ranks]()
        for number, batch in enumerate(batches):
            watch(number, len(batches))
            with torch.no_grad():
                losses.append(self.losses_on(batch))
            own = samples[number * self.answers.rows : (number + 1) * self.answers.rows]
            ranks += ranks_of(self.module, self.teacher, own, self.answers)
        figures = {"loss": sum(self._total(each).item() for each in losses) / len(losses)}
        figures |= {f"head{k}_loss": one for k, one in enumerate(torch.stack(losses).mean(0).tolist(), 1)}
        for head in range(self.module.count):
            known = np.concatenate([table[table[:, head] >= 0, head] for table in ranks])
            figures |= {f"head{head + 1}_top{k}": float((known < k).mean()) if known.size else 0.0 for k in SHOWN_TOP}
        figures |= {f"head{k}_given": one for k, one in enumerate(conditional(ranks), 1)}
        figures["tokens_per_step"] = projected(ranks, self.tree)
        return figures
