"""What heads are taught on a batch, and what they answer.

Every answer token teaches: at place t the heads see the target's state there (and, if they see
tokens, the true tokens t + 1, t + 2, ... as teacher forcing has it), and head i learns token t + i
+ 2. States and laws of the target are computed on the fly, and logits for a chunk of places at a
time, so that no [places, vocabulary] table of a whole batch ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from forerun.drafting.heads import HeadsModule, Places
from forerun.train.answers import Batch
from forerun.train.teacher import Teacher

CHUNK_NUMBERS = 1 << 25
"""Logits of all heads that exist at a time."""


@dataclass(frozen=True)
class Lesson:
    """Everything the heads need to know of P places, gathered: contexts [P, ...] (see `HeadsModule.seen`), the target's
    state there [P, D], the K + 1 tokens behind each place [P, K + 1] (root first), the target's states at the K places
    behind it [P, K, D] (where the laws of the tokens to learn come from), and which of the K tokens to learn are there
    [K, P]."""

    context_PD: Tensor
    here_PD: Tensor
    tokens_PK: Tensor
    states_PKD: Tensor
    valid_KP: Tensor

    @staticmethod
    def of(module: HeadsModule, teacher: Teacher, batch: Batch, chosen: Tensor | None = None) -> Lesson:
        """chosen: which of the batch's places teach (None: all)."""
        tokens, layers = batch.tokens_BN.to(teacher.device), module.reads(teacher.top)
        known = teacher.states(tokens, {*layers, teacher.top})
        states = known[teacher.top]
        rows, places = (index.to(teacher.device) for index in batch.places())
        if chosen is not None:
            rows, places = rows[chosen], places[chosen]
        embedded = F.embedding(tokens, teacher.embedding_VD)
        context = module.seen(
            {layer: known[layer] for layer in layers}, Places(rows, places, embedded, teacher.embedding_VD)
        )
        behind = places[:, None] + torch.arange(1, module.count + 2, device=teacher.device)
        ends = torch.from_numpy(batch.ends).to(teacher.device)[rows, None]
        inside = behind.clamp(max=tokens.shape[1] - 1)
        return Lesson(
            context_PD=context,
            here_PD=states[rows, places],
            tokens_PK=tokens[rows[:, None], inside],
            states_PKD=states[rows[:, None], inside[:, :-1]],
            valid_KP=(behind[:, 1:] < ends).T,
        )

    def chunks(self, size: int) -> Iterator[Lesson]:
        parts = (self.context_PD, self.here_PD, self.tokens_PK, self.states_PKD, self.valid_KP.T)
        for context, here, tokens, states, valid in zip(*(torch.split(part, size) for part in parts), strict=True):
            yield Lesson(context, here, tokens, states, valid.T)

    @property
    def labels_KP(self) -> Tensor:
        return self.tokens_PK[:, 1:].T


def logits_of(module: HeadsModule, teacher: Teacher, lesson: Lesson) -> Tensor:
    """[K, P, V], or of the tokens that the module knows."""
    embedded = F.embedding(lesson.tokens_PK[:, : module.count], module.table(teacher.embedding_VD))
    return module.logits(lesson.context_PD, embedded, module.of_known(teacher.head_VD))


def among(known: Tensor | None, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The places of tokens among the known ones (any place where they are not known), and which are."""
    if known is None:
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
    places = torch.searchsorted(known, tokens.contiguous()).clamp(max=len(known) - 1)
    return places, known[places] == tokens


def chunk(module: HeadsModule, teacher: Teacher) -> int:
    """Places whose logits exist at a time."""
    return max(1, CHUNK_NUMBERS // (module.count * len(teacher.head_VD)))
