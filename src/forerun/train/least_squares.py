"""Where heads begin: a linear map from what they see to what the target will be, fitted before the first step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from forerun.drafting.heads import HeadsModule
from forerun.train.answers import Answers
from forerun.train.lesson import Lesson
from forerun.train.teacher import Teacher

RIDGE = 1e-3
"""Damping of the least squares, as a share of the inputs' own size."""


class LeastSquares:
    """Fits heads before the first step of their run (see `Start` in train/run.py): a step for every
    batch that is read, then one for every head that is solved.

    Per head, [D, M]: the linear map from what it sees (the context, and the embeddings behind it if
    heads see tokens) to the target's state one token before the one that it proposes, fitted over
    so many batches (ridge regression).

    A head that starts there is a fair predictor at once. One that starts as a copy of the target's
    output projection first has to unlearn a sharp opinion about another token (our addition; the
    papers start from the copy).
    """

    def __init__(self, module: HeadsModule, teacher: Teacher, answers: Answers, batches: int):
        self.module, self.teacher, self.answers, self.batches = module, teacher, answers, batches
        width = teacher.head_VD.shape[1]
        self._sizes = [width * (head + 2 if module.sees_tokens else 1) for head in range(module.count)]
        self._squares = [torch.zeros(size, size, device=teacher.device) for size in self._sizes]
        self._products = [torch.zeros(size, width, device=teacher.device) for size in self._sizes]
        self.maps: list[Tensor] = []

    @property
    def steps(self) -> int:
        return self.batches + len(self._sizes)

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step < self.batches:
            self._read(step)
        else:
            head = step - self.batches
            self.maps.append(_ridge(self._squares[head], self._products[head]))

    def _read(self, number: int) -> None:
        module, teacher = self.module.eval(), self.teacher
        with teacher.precision():
            lesson = Lesson.of(module, teacher, self.answers.batch(number))
        embedded = F.embedding(lesson.tokens_PK[:, : module.count], teacher.embedding_VD)
        context_PD = module.linear_context(lesson.context_PD)
        inputs = torch.cat((context_PD[:, None], embedded), 1).flatten(1).float()
        for head, size in enumerate(self._sizes):
            there = lesson.valid_KP[head]
            seen = inputs[there, :size]
            self._squares[head] += seen.T @ seen
            self._products[head] += seen.T @ lesson.states_PKD[there, head].float()

    def finish(self) -> None:
        self.module.start_from(self.maps, self.teacher.head_VD.float())

    def state(self) -> dict[str, Tensor]:
        parts = {"square": self._squares, "product": self._products, "map": self.maps}
        return {f"{name}.{head}": tensor for name, tensors in parts.items() for head, tensor in enumerate(tensors)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """ValueError if it is that of other heads."""
        for name, tensors in (("square", self._squares), ("product", self._products)):
            for head, tensor in enumerate(tensors):
                found = state.get(f"{name}.{head}")
                if found is None or found.shape != tensor.shape:
                    raise ValueError(f"the state does not fit {name}.{head}")
                tensor.copy_(found)
        solved = sum(name.startswith("map.") for name in state)
        self.maps = [state[f"map.{head}"].to(self.teacher.device) for head in range(solved)]


def _ridge(square: Tensor, product: Tensor) -> Tensor:
    scale = square.diagonal().mean()
    damped = square + torch.diag(RIDGE * (square.diagonal() + scale))
    solved: Tensor = torch.linalg.solve(damped, product)
    return solved.T.contiguous()
