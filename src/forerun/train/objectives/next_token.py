"""Language models.

A model is trained from scratch, grown from a shallow one by stacking, or taught by a larger model of the same tokenizer
(the loss is then the cross-entropy with the teacher's law, which is what acceptance needs).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from forerun.errors import TrainingError
from forerun.nn.transformer import Transformer
from forerun.train.objectives.descent import Descent, Group, by_kind
from forerun.train.run import Watch, unwatched
from forerun.train.schedule import Schedule

VALIDATION_TOKENS = 65536
OUTSIDE = ("embedding.", "head.")
"""Parameters that are in no block."""


@dataclass(frozen=True)
class TokenWindows:
    """Token streams on disk (uint16, documents separated by BOS) and how they are cut into batches.

    Every step takes `rows` windows of `length` + 1 tokens; windows are visited once per pass in an
    order that depends on the seed alone, so a resumed run goes on where it stopped.
    """

    train: Path
    heldout: Path
    rows: int = 8
    length: int = 512
    seed: int = 0
    first: int = 0

    def batch(self, number: int) -> Tensor:
        """Batch `number` as int64 [rows, length + 1]."""
        tokens = np.memmap(self.train, dtype=np.uint16, mode="r")
        windows = (len(tokens) - 1) // self.length
        if windows < self.rows:
            raise TrainingError(
                f"{self.train} holds {len(tokens)} tokens, too few for one batch of {self.rows} x {self.length}"
            )
        drawn = [(self.first + number) * self.rows + row for row in range(self.rows)]
        picks = [int(_order(self.seed, windows, n // windows)[n % windows]) for n in drawn]
        return torch.stack([self._window(tokens, pick) for pick in picks])

    def _window(self, tokens: np.memmap, index: int) -> Tensor:
        start = index * self.length
        return torch.from_numpy(tokens[start : start + self.length + 1].astype(np.int64))

    def validation(self) -> Tensor:
        """The first held-out tokens as int64 [rows, length + 1] windows."""
        tokens = np.memmap(self.heldout, dtype=np.uint16, mode="r")
        rows = max(1, min(VALIDATION_TOKENS, len(tokens) - 1) // self.length)
        return torch.stack([self._window(tokens, row) for row in range(rows)])


@lru_cache(maxsize=2)
def _order(seed: int, windows: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(windows)


class NextToken(Descent):
    """Cross-entropy with the next token or, given a teacher, with the teacher's law for it."""

    module: Transformer

    def __init__(
        self,
        module: Transformer,
        text: TokenWindows,
        schedule: Schedule,
        teacher: Transformer | None = None,
        compile: bool = False,
    ):
        """compile: `torch.compile`; on CPUs it needs a C++ compiler and a minute, and trains faster afterwards."""
        self.module, self.text, self.schedule, self.teacher = module, text, schedule, teacher
        self._features = torch.compile(module.features) if compile else module.features

    def groups(self) -> list[Group]:
        """Muon for the matrices inside the blocks, AdamW for embeddings, heads and vectors; or AdamW for all."""
        return by_kind(self.module, self.schedule, OUTSIDE, betas=(0.9, 0.95))

    def loss(self, number: int) -> Tensor:
        return self._loss(self.text.batch(number), self.teacher)

    def _loss(self, batch: Tensor, teacher: Transformer | None) -> Tensor:
        device = self.module.device
        inputs, labels = batch[:, :-1].to(device), batch[:, 1:].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = F.linear(self._features(inputs), self.module.head.weight).flatten(0, 1)
            if teacher is None:
                return F.cross_entropy(logits.float(), labels.flatten())
            with torch.no_grad():
                law = F.linear(teacher.features(inputs), teacher.head.weight).flatten(0, 1).float().softmax(-1)
        return F.cross_entropy(logits.float(), law)

    @torch.no_grad()
    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        """`loss`: nats per token against held-out text, whatever the training signal."""
        windows, total = self.text.validation(), 0.0
        parts = torch.split(windows, self.text.rows)
        for number, part in enumerate(parts):
            watch(number, len(parts))
            total += self._loss(part, None).item() * len(part)
        return {"loss": total / len(windows)}
