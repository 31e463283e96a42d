"""The loop: which batches a run sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from forerun.train.loop import Schedule, fit


class Counting:
    """An objective that notes the batches it was asked for."""

    def __init__(self) -> None:
        self.module = nn.Linear(2, 2)
        self.numbers: list[int] = []

    def loss(self, number: int) -> Tensor:
        self.numbers.append(number)
        return self.module(torch.ones(2)).square().sum()

    def validate(self) -> dict[str, float]:
        return {"loss": 0.0}


def test_accumulated_parts_see_every_batch_once(tmp_path: Path) -> None:
    objective = Counting()
    fit(objective, Schedule(steps=3, parts=2), tmp_path, "counting")
    assert objective.numbers == [0, 1, 2, 3, 4, 5]


def test_a_resumed_run_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    schedule = Schedule(steps=4, save_every=1)

    class Interrupted(Counting):
        def loss(self, number: int) -> Tensor:
            if number == 2:
                raise KeyboardInterrupt
            return super().loss(number)

    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted(), schedule, tmp_path, "interrupted")
    resumed = Counting()
    fit(resumed, schedule, tmp_path, "resumed")
    assert resumed.numbers == [2, 3]
