"""Which of its best tokens a head's true one was, and the tokens per step that this promises.

Walking a tree along the ranks of an answer is what the engine does when it generates that answer,
so the projected tokens per step are the measured ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forerun.drafting.heads import HeadsModule
from forerun.ranktree import RankTree
from forerun.train.answers import Answers
from forerun.train.distill import Sample
from forerun.train.lesson import Lesson, among, chunk, logits_of
from forerun.train.teacher import Teacher

RANKS = 16
"""Ranks are told apart up to here; everything behind is `RANKS`."""

Ranks = NDArray[np.int64]


@torch.no_grad()
def ranks_of(module: HeadsModule, teacher: Teacher, samples: Sequence[Sample], answers: Answers) -> list[Ranks]:
    """Per sample, [A, K]: at place a of its A places (a = 0: before the first answer token), which best token of
    every head the true one is; -1 beyond the answer's end. Equal logits: the lower token id is the better."""
    module.eval()
    tables: list[Ranks] = []
    for batch in answers.batches_of(samples):
        with teacher.precision():
            lesson = Lesson.of(module, teacher, batch)
            parts = lesson.chunks(chunk(module, teacher))
            found = torch.cat([_ranks(logits_of(module, teacher, part), part, module.known) for part in parts], 1)
        counts = [max(0, end - max(2, begin)) for begin, end in zip(batch.begins, batch.ends, strict=True)]
        found_here = [table.T.cpu().numpy() for table in torch.split(found, counts, 1)]
        tables += [_from_the_first(table, begin) for table, begin in zip(found_here, batch.begins, strict=True)]
    return tables


def _from_the_first(table: Ranks, begin: int) -> Ranks:
    """A prompt of one token leaves the heads nothing to see before the first answer token."""
    return np.concatenate((np.full((max(0, 2 - begin), table.shape[1]), -1), table))


def _ranks(logits_KPV: Tensor, lesson: Lesson, known: Tensor | None) -> Tensor:
    """Tokens that are not known have no rank."""
    places, is_known = among(known, lesson.labels_KP)
    places = places[..., None]
    own = logits_KPV.gather(-1, places)
    ids = torch.arange(logits_KPV.shape[-1], device=places.device)
    better = (logits_KPV > own) | ((logits_KPV == own) & (ids < places))
    ranks = torch.where(is_known, better.sum(-1).clamp(max=RANKS), RANKS)
    return torch.where(lesson.valid_KP, ranks, -1)


def conditional(ranks: Sequence[Ranks]) -> list[float]:
    """Per head, how often its best token is the true one where those of all heads before it are."""
    table = np.concatenate(list(ranks))
    shares, here = [], np.ones(len(table), np.bool_)
    for head in table.T:
        here &= head >= 0
        right = here & (head == 0)
        shares.append(float(right.sum() / max(1, here.sum())))
        here = right
    return shares


def steps_of(ranks: Ranks, tree: RankTree) -> int:
    """Steps the engine needs for an answer whose places have these ranks: each goes as deep as the tree follows, and
    one more."""
    place = steps = 0
    while place < len(ranks):
        row = ranks[place]
        known = row[: int((row >= 0).sum())].tolist()
        place += 1 + tree.followed(known)
        steps += 1
    return steps


def projected(ranks: Sequence[Ranks], tree: RankTree) -> float:
    """Tokens per step that this tree gives on these answers."""
    return sum(map(len, ranks)) / max(1, sum(steps_of(table, tree) for table in ranks))
