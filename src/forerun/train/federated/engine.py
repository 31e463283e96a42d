"""Who carries messages to clients and back. The round itself (`federation`) does not know."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from forerun.train.federated.client import Client, Lesson
from forerun.train.federated.public import Message

log = logging.getLogger(__name__)


class Engine(Protocol):
    """Clients by name, wherever they are."""

    @property
    def names(self) -> Sequence[str]: ...

    def ask(self, names: Sequence[str], heard: Message, lesson: Lesson, round: int, share: float) -> dict[str, Message]:
        """Let these clients hear a message and learn; the answers of those that gave one. share: of the rate."""

    def figures(self) -> dict[str, dict[str, float]]:
        """What each client can do now, as far as it says."""

    def state(self) -> dict[str, Tensor]:
        """What the clients have become, as far as it is kept here."""

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


class LocalEngine:
    """All clients in this process, one after the other: the same every time, and it resumes to the same bits."""

    def __init__(self, clients: Sequence[Client]):
        self.clients = {client.name: client for client in clients}

    @property
    def names(self) -> Sequence[str]:
        return list(self.clients)

    def ask(self, names: Sequence[str], heard: Message, lesson: Lesson, round: int, share: float) -> dict[str, Message]:
        """A client that fails is as it was before, and a warning."""
        answers = {}
        for name in names:
            client = self.clients[name]
            before = client.state()
            try:
                answers[name] = client.answer(heard, lesson, round, share)
            except Exception as error:  # whatever goes wrong at one party must not end the others' round
                client.load_state(before)
                log.warning("%s gave no answer in round %d: %s: %s", name, round + 1, type(error).__name__, error)
        return answers

    def figures(self) -> dict[str, dict[str, float]]:
        return {name: client.task.figures(client.towers) for name, client in self.clients.items() if client.task}

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value for name, client in self.clients.items() for key, value in client.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """ValueError for that of other clients."""
        for name, client in self.clients.items():
            client.load_state(within(state, f"{name}."))


def within(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What has names that begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
