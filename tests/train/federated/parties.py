"""A federation that takes a tenth of a second, and its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from forerun.train.federated.client import Lesson
from forerun.train.federated.engine import LocalEngine
from forerun.train.federated.federation import Federation
from forerun.train.federated.networks import Words
from forerun.train.federated.public import Message
from forerun.train.federated.recipe import clients_of, federate
from forerun.train.federated.settings import Settings, settled
from forerun.train.federated.world import World, drawn

TINY: dict[str, Any] = {
    "rounds": 2,
    "clients_per_round": 0,
    "local_epochs": 1,
    "width": 8,
    "server_image": "conv:8",
    "server_text": "gru:8",
    "batch": 12,
    "data": {"public": 24, "test": 10, "own": 24, "paired": 24},
    "clients": {
        "image": 1,
        "text": 1,
        "both": 2,
        "alpha": 10.0,
        "least": 2,
        "shards": 2,
        "image_architectures": ["conv:4", "conv:8"],
        "text_architectures": ["bag:4", "gru:8"],
    },
}


def tiny(**given: Any) -> Settings:
    return settled({**TINY, **given})


@cache
def world() -> World:
    return drawn(24, 10, 24, 24, 0)


def local(settings: Settings) -> LocalEngine:
    return LocalEngine(clients_of(settings, world(), Words.of(world().public.texts)))


def federation(engine: Any = None, **given: Any) -> Federation:
    settings = tiny(**given)
    return federate(settings, world(), engine or local(settings), Words.of(world().public.texts))


class Listening(LocalEngine):
    """Hears all that is said. changed: what becomes of the answers."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(list(local(settings).clients.values()))
        self.messages: list[Message] = []

    def ask(self, names: Sequence[str], heard: Message, lesson: Lesson, round: int, share: float) -> dict[str, Message]:
        answers = self.changed(super().ask(names, heard, lesson, round, share))
        self.messages += [heard, *answers.values()]
        return answers

    def changed(self, answers: dict[str, Message]) -> dict[str, Message]:
        return answers


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=0, atol=0, equal_nan=True) for name in one
    )
