"""How long a training is, how fast things learn at its steps, and when it is looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from forerun.errors import TrainingError


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rates. `muon_rate` moves matrices (0: AdamW moves everything), `adam_rate`
    embeddings and vectors.

    shape "linear": the rate rises linearly over `warmup` steps, stays, and falls linearly to zero
    over the last `decay` share of the steps (warm-up, stable, decay). "cosine": it rises from zero,
    and falls along a cosine to `floor` of itself. scales: parameters whose name begins so learn at
    that many times the rate; the first that fits counts.
    """

    steps: int
    parts: int = 1
    warmup: int = 20
    decay: float = 0.4
    muon_rate: float = 4e-3
    adam_rate: float = 2e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    validate_every: int = 250
    save_every: int = 100
    shape: str = "linear"
    floor: float = 0.0
    scales: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """TrainingError for numbers that make no sense."""
        demand_numbers({"parts": self.parts, "validate_every": self.validate_every, "save_every": self.save_every}, 1)
        rates = {"muon_rate": self.muon_rate, "rate": self.adam_rate, "floor": self.floor, "decay": self.decay}
        scales = {f"the rate of {prefix.strip('.')}": scale for prefix, scale in self.scales}
        demand_numbers({"steps": self.steps, "warmup": self.warmup, "clip": self.clip, **rates, **scales}, 0)

    def rate(self, step: int) -> float:
        """The share of the full learning rate at a step (0 up to `steps` - 1)."""
        if self.shape == "cosine":
            if step < self.warmup:
                return step / self.warmup
            progress = min(1.0, (step - self.warmup) / max(1, self.steps - 1 - self.warmup))
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        falling = (self.steps - step) / max(1.0, self.steps * self.decay)
        return max(0.0, min(rising, falling, 1.0))

    def scale(self, name: str) -> float:
        """The factor of the learning rate for a parameter."""
        return next((scale for prefix, scale in self.scales if name.startswith(prefix)), 1.0)

    def as_json(self) -> dict[str, Any]:
        """The fields as a checkpoint records them: JSON has no tuples."""
        return asdict(self) | {"scales": [list(pair) for pair in self.scales]}


def demand_numbers(named: Mapping[str, float], least: float) -> None:
    """TrainingError unless all of them are finite and at least so much."""
    for name, value in named.items():
        if not (math.isfinite(value) and value >= least):
            raise TrainingError(f"no training can go by {name} = {value}: give a finite number of at least {least}")
