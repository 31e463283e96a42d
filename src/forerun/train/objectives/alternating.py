"""Objectives that take turns, as a generator and its discriminator do."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from forerun.train.run import Objective, Watch, unwatched


class Alternating:
    """Step n is taken by objective n modulo their number, as the next of its own steps.

    Names tell their figures and states apart; the loss of the first is the loss of all.
    """

    def __init__(self, **objectives: Objective):
        self.objectives = objectives

    def update(self, step: int) -> float:
        turn, place = divmod(step, len(self.objectives))
        return list(self.objectives.values())[place].update(turn)

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        each = {name: objective.validate(watch) for name, objective in self.objectives.items()}
        figures = {f"{name}.{figure}": value for name, own in each.items() for figure, value in own.items()}
        return {"loss": next(iter(each.values()))["loss"], **figures}

    def state(self) -> dict[str, Tensor]:
        each = ((name, objective.state()) for name, objective in self.objectives.items())
        return {f"{name}.{key}": tensor for name, own in each for key, tensor in own.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, objective in self.objectives.items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
            objective.load_state(own)
