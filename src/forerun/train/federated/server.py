"""The party that everybody hears: a model of both modalities, learnt on the public set and from what clients say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from forerun.train.federated.aggregation import gca_aggregate, weights_of
from forerun.train.federated.client import Lesson
from forerun.train.federated.learner import Adams, Learner
from forerun.train.federated.losses import kd_loss
from forerun.train.federated.public import OTHER, Ids, Message
from forerun.train.objectives.descent import load_memories, memories


@dataclass(frozen=True)
class Aggregate:
    """By modality: rows [N, D] of these ids, which of them somebody sent [N], and what each client counted [C, N] for,
    in the order of `clients`. A modality that nobody sent is not here."""

    ids: Ids
    rows: Mapping[str, Tensor]
    sent: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    clients: Mapping[str, Sequence[str]]

    def trust(self) -> dict[str, float]:
        """What each client counted for on the mean, over items and modalities."""
        shares: dict[str, list[float]] = {}
        for name, weights_CN in self.weights.items():
            for client, share in zip(self.clients[name], weights_CN.mean(1).tolist(), strict=True):
                shares.setdefault(client, []).append(share)
        return {client: sum(found) / len(found) for client, found in sorted(shares.items())}


@dataclass(frozen=True)
class Gathering:
    """How clients' rows become one (see `weights_of`)."""

    way: str = "gca"
    include_positive: bool = True
    tau: float = 1.0
    top: int = 10


def aggregate(answers: Mapping[str, Message], said: Message, how: Gathering) -> Aggregate:
    """What clients say of the items that the server spoke of, as one. A client that sent nothing sound of an item does
    not count there. answers: by the client's name. said: the server's own rows; without them all count alike."""
    about = {client: answers[client].about(said.ids) for client in sorted(answers)}
    own = {name: rows for name, (rows, _) in said.about(said.ids).items()}
    rows, sent, weights, clients = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor](), dict[str, list[str]]()
    for name in OTHER:
        clients[name] = [client for client in about if name in about[client]]
        if not clients[name]:
            continue
        rows_CND = torch.stack([about[client][name][0] for client in clients[name]])
        sent_CN = torch.stack([about[client][name][1] for client in clients[name]])
        way, other_ND = (how.way, own[OTHER[name]]) if OTHER[name] in own else ("mean", rows_CND[0])
        weights[name] = weights_of(way, rows_CND, sent_CN, other_ND, how.include_positive, how.tau, how.top)
        rows[name], sent[name] = gca_aggregate(rows_CND, weights[name]), weights[name].sum(0) > 0
    return Aggregate(said.ids, rows, sent, weights, clients)


@dataclass
class Server(Learner):
    """Its optimisers stay from round to round. kd: the weight of distillation; kd_kind: its loss."""

    kd: float = 0.3
    kd_kind: str = "mse"
    adams: Adams = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adams = self.optimisers()

    def train_public(self, rng: np.random.Generator, share: float = 1.0) -> float:
        """One pass over the public set with the retrieval loss; the mean loss of a pair."""
        return self.learn_task(self.adams[0], rng, share)

    def message(self, ids: Ids, lesson: Lesson) -> Message:
        """What it says of these items, in both modalities."""
        rows = {name: lesson.packed(z) for name, z in self.represent(ids).items()}
        return Message(self.public.version, ids, rows)

    def distill(self, aggregate: Aggregate, rng: np.random.Generator, share: float = 1.0) -> dict[str, float]:
        """One pass over the public set towards the aggregate; the mean loss by modality, 0 where nobody sent one."""
        places = torch.from_numpy(self.public.places(aggregate.ids))
        losses = dict.fromkeys(OTHER, 0.0)
        batches = -(-len(places) // self.pace.batch)

        def loss(index_B: Tensor) -> Tensor:
            total = torch.zeros(())
            for name, rows_ND in aggregate.rows.items():
                kept_B = index_B[aggregate.sent[name][index_B]]
                if len(kept_B):
                    own = kd_loss(self.seen(name, places[kept_B]), rows_ND[kept_B], self.kd_kind)
                    losses[name] += own.item() / batches
                    total = total + own
            return total

        self.learn_public(loss, len(places), self.adams, rng, share, self.kd)
        return losses

    def state(self) -> dict[str, Tensor]:
        return super().state() | memories(self._own_adams)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        load_memories(self._own_adams, state)

    @property
    def _own_adams(self) -> list[torch.optim.Optimizer]:
        """Each once, for one may be both."""
        return list(dict.fromkeys(self.adams))
