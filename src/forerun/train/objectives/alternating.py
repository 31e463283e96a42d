"""Objectives that take turns, as a discriminator and its generator do."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from forerun.train.run import Objective, Watch, unwatched


class Alternating:
    """A step is one of each objective, in their order: whoever comes later sees what the others have become.

    The last is what all is done for: its loss is the loss, and its figures keep their names. Those of the others, and
    all states, are told apart by the objectives' names.
    """

    def __init__(self, **objectives: Objective):
        self.objectives = objectives

    def update(self, step: int) -> float:
        *_, last = [objective.update(step) for objective in self.objectives.values()]
        return last

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        *others, last = self.objectives.items()
        figures = {f"{name}_{key}": value for name, other in others for key, value in other.validate().items()}
        return last[1].validate(watch) | figures

    def state(self) -> dict[str, Tensor]:
        each = ((name, objective.state()) for name, objective in self.objectives.items())
        return {f"{name}.{key}": tensor for name, own in each for key, tensor in own.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, objective in self.objectives.items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
            objective.load_state(own)
