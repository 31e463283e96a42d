"""Where heads begin: a linear map from what they see to what the target will be, fitted before the first step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from forerun.drafting.heads import HeadsModule
from forerun.train.answers import Answers
from forerun.train.lesson import Lesson
from forerun.train.run import Watch
from forerun.train.teacher import Teacher

RIDGE = 1e-3
"""Damping of the least squares, as a share of the inputs' own size."""


@torch.no_grad()
def least_squares(
    module: HeadsModule, teacher: Teacher, answers: Answers, batches: int, watch: Watch = lambda done, total: None
) -> list[Tensor]:
    """Per head, [D, M]: the linear map from what it sees (the context, and the embeddings behind it
    if heads see tokens) to the target's state one token before the one that it proposes, fitted
    over so many batches (ridge regression).

    A head that starts there is a fair predictor at once. One that starts as a copy of the target's
    output projection first has to unlearn a sharp opinion about another token (our addition; the
    papers start from the copy). watch: told of batches and heads.
    """
    module.eval()
    total = batches + module.count
    width = teacher.head_VD.shape[1]
    sizes = [width * (head + 2 if module.sees_tokens else 1) for head in range(module.count)]
    squares = [torch.zeros(size, size, device=teacher.device) for size in sizes]
    products = [torch.zeros(size, width, device=teacher.device) for size in sizes]
    watch(0, total)
    for number in range(batches):
        with teacher.precision():
            lesson = Lesson.of(module, teacher, answers.batch(number))
        embedded = F.embedding(lesson.tokens_PK[:, : module.count], teacher.embedding_VD)
        inputs = torch.cat((lesson.context_PD[:, None], embedded), 1).flatten(1).float()
        for head, size in enumerate(sizes):
            there = lesson.valid_KP[head]
            seen = inputs[there, :size]
            squares[head] += seen.T @ seen
            products[head] += seen.T @ lesson.states_PKD[there, head].float()
        watch(number + 1, total)
    maps = []
    for square, product in zip(squares, products, strict=True):
        maps.append(_ridge(square, product))
        watch(batches + len(maps), total)
    return maps


def _ridge(square: Tensor, product: Tensor) -> Tensor:
    scale = square.diagonal().mean()
    damped = square + torch.diag(RIDGE * (square.diagonal() + scale))
    solved: Tensor = torch.linalg.solve(damped, product)
    return solved.T.contiguous()
