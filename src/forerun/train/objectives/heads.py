"""Draft heads on a frozen target.

Losses are summed over chunks of places and computed again in the backward pass, so that the logits
of a whole batch never exist.
"""

from __future__ import annotations

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
from forerun.train.lesson import Lesson, chunk, logits_of
from forerun.train.objectives.descent import Descent
from forerun.train.ranks import Ranks, projected, ranks_of
from forerun.train.run import Watch, unwatched
from forerun.train.schedule import Schedule
from forerun.train.teacher import Teacher

SHOWN_TOP = (1, 2, 3, 4, 5)


@dataclass
class HeadsObjective(Descent):
    """The loss of heads on a frozen target, and their figures on held-out answers."""

    module: HeadsModule
    teacher: Teacher
    answers: Answers
    weights: Weights
    tree: RankTree
    schedule: Schedule
    most_validated: int = 64

    def loss(self, number: int) -> Tensor:
        """The weighted sum over heads, in nats: each head's mean over the places that have its token."""
        self.module.train()
        torch.manual_seed(self.answers.seed + number)  # the luck of dropout belongs to the batch, for runs that go on
        return self.loss_on(self.answers.batch(number))

    def loss_on(self, batch: Batch) -> Tensor:
        return self._total(self.losses_on(batch))

    def _total(self, losses_K: Tensor) -> Tensor:
        """Heads count by their weights."""
        total: Tensor = (
            losses_K * self.weights.decay ** torch.arange(1, len(losses_K) + 1, device=losses_K.device)
        ).sum()
        return total

    def losses_on(self, batch: Batch) -> Tensor:
        """The loss of every head, [K]."""
        with self.teacher.precision():
            lesson = Lesson.of(self.module, self.teacher, batch)
            counts_K = lesson.valid_KP.sum(1).clamp(min=1)
            parts = list(lesson.chunks(chunk(self.module, self.teacher)))
            if len(parts) == 1:  # nothing to save
                sums = [self._sums(lesson)]
            else:
                sums = [checkpoint(self._sums, part, use_reentrant=False) for part in parts]
        return torch.stack(sums).sum(0) / counts_K

    def _sums(self, lesson: Lesson) -> Tensor:
        """Per head, the loss summed over the places of a chunk, [K]."""
        log_probs = logits_of(self.module, self.teacher, lesson).float().log_softmax(-1)
        loss = log_probs.new_zeros(lesson.valid_KP.shape)
        if self.weights.text:
            loss = loss - self.weights.text * log_probs.gather(-1, lesson.labels_KP[..., None])[..., 0]
        if self.weights.teacher:
            with torch.no_grad():
                laws = F.linear(lesson.states_PKD, self.teacher.head_VD).float().softmax(-1)
            loss = loss - self.weights.teacher * (laws.transpose(0, 1) * log_probs).sum(-1)
        return (loss * lesson.valid_KP).sum(1)

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        """`loss`, `head1_loss` .. `headK_loss` (each alone, in nats), `head1_top1` .. `headK_top5` (shares of answer
        tokens), and `tokens_per_step` as projected for the tree."""
        samples = self.answers.heldout[: self.most_validated] or self.answers.training[: self.most_validated]
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
        figures["tokens_per_step"] = projected(ranks, self.tree)
        return figures
