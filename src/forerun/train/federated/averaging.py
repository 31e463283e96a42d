"""FedAvg for towers: weights travel, and only between towers of one shape.

Every tower of a round's clients begins as the mean of those of its shape, learns on its client's own task, and goes
into the next mean, weighted by samples. Where the shape is the server's, the mean becomes the server's tower, which
then learns an epoch of the public set. FedIoT is the same with clients of both modalities counting more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from forerun.errors import TrainingError
from forerun.train.federated.client import Client
from forerun.train.federated.engine import LocalEngine, within
from forerun.train.federated.federation import Federation
from forerun.train.federated.learner import luck

MEAN = "mean."
Weights = dict[str, Tensor]


@dataclass
class Averaging(Federation):
    """A federation whose clients send weights. It knows the clients: weights are in no message."""

    _means: dict[str, Weights] = field(default_factory=dict)
    """By architecture, but for the server's."""

    def __post_init__(self) -> None:
        """TrainingError if no client has a tower of the server's shape."""
        if not isinstance(self.engine, LocalEngine):
            raise TrainingError("weights are averaged in this process alone: use the local engine")
        self._clients = self.engine.clients
        shapes = {one for client in self._clients.values() for one in client.towers.architectures.values()}
        wanted = self.server.towers.architectures.values()
        if not shapes & set(wanted):
            raise TrainingError(
                "weights can be averaged into the server only where clients have towers of its shape, and these have"
                f" {', '.join(sorted(shapes))}: give some of them {' or '.join(wanted)}"
            )

    def update(self, step: int) -> float:
        opening = self.open(step)
        share, gathered = self.plan.schedule.rate(step), dict[str, list[tuple[float, Weights]]]()
        moved = 0
        for name in opening.names:
            client = self._clients[name]
            moved += self._give(client)
            rng, adams = luck(self.plan.seed, 1, client.number, step), client.optimisers()
            for _ in range(self.plan.lesson.epochs):
                client.learn_task(adams[0], rng, share)
            weight = client.size * (self.plan.method.multimodal if len(client.modalities) > 1 else 1)
            for modality, architecture in client.towers.architectures.items():
                gathered.setdefault(architecture, []).append((weight, _copy(client.towers.encoders[modality])))
        for architecture, weighted in sorted(gathered.items()):
            self._means[architecture] = mean(weighted)
        for modality, architecture in self.server.towers.architectures.items():
            if architecture in gathered:
                self.server.towers.encoders[modality].load_state_dict(self._means.pop(architecture))
        self._counts |= {"down_bytes": moved, "up_bytes": moved, "answered": len(opening.names), "late": 0}
        return opening.loss

    def _give(self, client: Client) -> int:
        """The client's towers become the means of their shapes; the bytes of that."""
        of_server = {one: modality for modality, one in self.server.towers.architectures.items()}
        moved = 0
        for modality, architecture in client.towers.architectures.items():
            weights = self._means.get(architecture)
            if architecture in of_server:
                weights = _copy(self.server.towers.encoders[of_server[architecture]])
            if weights is not None:
                client.towers.encoders[modality].load_state_dict(weights)
            moved += sum(one.numel() * one.element_size() for one in client.towers.encoders[modality].parameters())
        return moved

    def state(self) -> Weights:
        means = {f"{MEAN}{a}.{name}": value for a, weights in self._means.items() for name, value in weights.items()}
        return super().state() | means

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        means = within(state, MEAN)
        architectures = {name.split(".", 1)[0] for name in means}
        self._means = {one: within(means, f"{one}.") for one in sorted(architectures)}


def mean(weighted: list[tuple[float, Weights]]) -> Weights:
    """Of weights, each counting so much."""
    total = sum(weight for weight, _ in weighted)
    parts = [{name: value * (weight / total) for name, value in weights.items()} for weight, weights in weighted]
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def _copy(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
