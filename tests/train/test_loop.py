"""The loop: which batches a run sees, and at what rates."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from forerun.train.run import Schedule, fit


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


# ---- rates


@pytest.mark.parametrize(("warmup", "steps", "floor"), [(100, 1000, 0.33), (10, 11, 0.5), (1, 2, 0.0), (7, 300, 0.0)])
def test_a_cosine_begins_at_zero_is_whole_after_warming_up_and_ends_at_its_floor(
    warmup: int, steps: int, floor: float
) -> None:
    """Hydra++'s schedule: 0 at step 0, 1 at the end of 100 steps, 0.33 at the last one."""
    schedule = Schedule(steps, warmup=warmup, shape="cosine", floor=floor)
    rates = [schedule.rate(step) for step in range(steps)]
    assert rates[0] == 0 and rates[warmup] == 1
    assert rates[:warmup] == pytest.approx([step / warmup for step in range(warmup)])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if steps > warmup + 1:
        assert rates[-1] == pytest.approx(floor)
        middle = (rates[warmup + (steps - 1 - warmup) // 2] + rates[steps - 1 - (steps - 1 - warmup) // 2]) / 2
        assert middle == pytest.approx((1 + floor) / 2), "halfway down at half the way"


def test_a_cosine_without_warm_up_begins_whole() -> None:
    schedule = Schedule(5, warmup=0, shape="cosine", floor=0.2)
    assert [schedule.rate(0), schedule.rate(4)] == pytest.approx([1, 0.2])
    assert Schedule(1, warmup=0, shape="cosine").rate(0) == 1


def test_the_rate_of_a_step_is_the_share_of_the_full_one(tmp_path: Path) -> None:
    """With a muon rate of zero, AdamW moves everything; steps of Adam are as long as its rate."""
    objective = Counting()
    schedule = Schedule(
        6, warmup=2, shape="cosine", floor=0.5, muon_rate=0.0, adam_rate=0.01, weight_decay=0.0, validate_every=1
    )
    weights = [objective.module.weight.detach().clone()]
    objective.validate = lambda: weights.append(objective.module.weight.detach().clone()) or {"loss": 0.0}  # type: ignore
    fit(objective, schedule, tmp_path, "rates")
    moved = [float((after - before).abs().max()) for before, after in pairwise(weights)]
    assert moved == pytest.approx([0.01 * schedule.rate(step) for step in range(6)], rel=0.05)
