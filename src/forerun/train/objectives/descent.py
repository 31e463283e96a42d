"""Going down the gradient of one loss: parts, clipping, rates, and a guard against NaN."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from forerun.errors import TrainingError
from forerun.train.run import Watch, unwatched
from forerun.train.schedule import Schedule

OPTIMISER = "optimiser."
"""How the names of optimisers' tensors begin, in a state; all others are parameters."""


@dataclass(frozen=True)
class Group:
    """Parameters that learn alike, at `rate` times `scale` where the schedule is at its full rate.

    optimiser: adamw, or muon, which moves matrices (Jordan et al. 2024).
    """

    parameters: Sequence[nn.Parameter]
    rate: float
    scale: float = 1.0
    optimiser: str = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)


class Descent(ABC):
    """An objective of one loss (see `Objective` in train/run.py). A subclass says what its loss is,
    and how which parameters learn."""

    module: nn.Module
    schedule: Schedule
    _bad = 0

    @abstractmethod
    def loss(self, number: int) -> Tensor:
        """The loss in nats on batch `number` (fp32 scalar). The same number gives the same batch."""

    @abstractmethod
    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        """See `Objective`."""

    def groups(self) -> list[Group]:
        """AdamW moves everything."""
        schedule = self.schedule
        return by_scale(moved(self.module), schedule, rate=schedule.adam_rate, weight_decay=schedule.weight_decay)

    @cached_property
    def optimisers(self) -> list[torch.optim.Optimizer]:
        """One of each kind, with a parameter group for every group."""
        kinds: dict[str, list[Group]] = {}
        for group in self.groups():
            kinds.setdefault(group.optimiser, []).append(group)
        return [_optimiser(kind, groups) for kind, groups in kinds.items()]

    def update(self, step: int) -> float:
        """Raises TrainingError when the loss is not finite twice in a row; one bad step moves nothing."""
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        total, parts = 0.0, self.schedule.parts
        for part in range(parts):
            loss = self.loss(step * parts + part) / parts
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        learning = [p for group in groups for p in group["params"] if p.grad is not None]
        size = nn.utils.clip_grad_norm_(learning, self.schedule.clip)
        if self._is_sound(total + 0 * size.item(), step):  # a finite loss may have gradients that are not
            rate = self.schedule.rate(step)
            for group in groups:
                group["lr"] = group["rate"] * rate * group["scale"]
            for optimiser in self.optimisers:
                optimiser.step()
        return total

    def _is_sound(self, loss: float, step: int) -> bool:
        self._bad = 0 if math.isfinite(loss) else self._bad + 1
        if self._bad > 1:
            raise TrainingError(
                f"the loss was {loss} at steps {step - 1} and {step}: lower the learning rate, or look at the data"
                " there"
            )
        return not self._bad

    def state(self) -> dict[str, Tensor]:
        """The parameters by their names, and what the optimisers know of them by their numbers."""
        return {name: p.detach() for name, p in self.module.named_parameters()} | memories(self.optimisers)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """ValueError if it is that of a module of another shape."""
        own = dict(self.module.named_parameters())
        wrong = [name for name, p in own.items() if name not in state or state[name].shape != p.shape]
        if wrong:
            raise ValueError(f"the state does not fit {wrong[0]}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
        load_memories(self.optimisers, state)


def memories(optimisers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What optimisers know of their parameters, by their numbers."""
    return {
        f"{OPTIMISER}{number}.{index}.{name}": torch.as_tensor(value)
        for number, optimiser in enumerate(optimisers)
        for index, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_memories(optimisers: Iterable[torch.optim.Optimizer], state: Mapping[str, Tensor]) -> None:
    """Give optimisers of the same parameters what `memories` of others held; what else is there is not looked at."""
    for number, optimiser in enumerate(optimisers):
        saved = optimiser.state_dict()
        prefix = f"{OPTIMISER}{number}."
        saved["state"] = {}
        for key in (key for key in state if key.startswith(prefix)):
            index, field = key[len(prefix) :].split(".", 1)
            saved["state"].setdefault(int(index), {})[field] = state[key]
        optimiser.load_state_dict(saved)


def moved(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that learn, with their names."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def by_kind(module: nn.Module, schedule: Schedule, outside: Sequence[str], **vectors: Any) -> list[Group]:
    """Muon for matrices, AdamW for vectors and for what has a name that begins like one of these; or AdamW for all.
    vectors: what differs in AdamW's groups beside Muon's."""
    named, decay = moved(module), schedule.weight_decay
    if not schedule.muon_rate:
        return by_scale(named, schedule, rate=schedule.adam_rate, weight_decay=decay)
    matrices = [(name, p) for name, p in named if p.dim() == 2 and not name.startswith(tuple(outside))]
    known = {id(p) for _, p in matrices}
    others = [(name, p) for name, p in named if id(p) not in known]
    return [
        *by_scale(matrices, schedule, rate=schedule.muon_rate, optimiser="muon", weight_decay=decay),
        *by_scale(others, schedule, rate=schedule.adam_rate, **vectors),
    ]


def by_scale(named: Iterable[tuple[str, nn.Parameter]], schedule: Schedule, **alike: Any) -> list[Group]:
    """A group for each factor of the rate; they are alike in the rest."""
    scales: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        scales.setdefault(schedule.scale(name), []).append(parameter)
    return [Group(parameters, scale=scale, **alike) for scale, parameters in scales.items()]


def _optimiser(kind: str, groups: Sequence[Group]) -> torch.optim.Optimizer:
    own = [
        {"params": g.parameters, "lr": g.rate, "rate": g.rate, "scale": g.scale, "weight_decay": g.weight_decay}
        for g in groups
    ]
    if kind == "muon":
        return torch.optim.Muon(own, adjust_lr_fn="match_rms_adamw")
    return torch.optim.AdamW([part | {"betas": g.betas} for part, g in zip(own, groups, strict=True)])
