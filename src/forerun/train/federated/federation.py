"""The rounds, as an objective that `train/run.py` runs: a step is a round.

server   one epoch of its own loss on the public set
server   what it says of the public items goes to the clients of this round
clients  learn on their own data and from what they heard, and say what the items look like from there
server   makes one of what they said, and learns from it
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from forerun.errors import TrainingError
from forerun.train.federated.client import Lesson
from forerun.train.federated.engine import Engine, within
from forerun.train.federated.learner import luck
from forerun.train.federated.methods import Method
from forerun.train.federated.public import OTHER, Ids, Message
from forerun.train.federated.server import Aggregate, Gathering, Server, aggregate
from forerun.train.run import Watch, unwatched
from forerun.train.schedule import Schedule

log = logging.getLogger(__name__)
SERVER, CLIENT, LATE, CONSENSUS, COUNTS = "server.", "client.", "late.", "consensus.", "counts"
COUNTED = ("down_bytes", "up_bytes", "asked", "answered", "failed", "late")


@dataclass(frozen=True)
class Plan:
    """Of all rounds. clients: of a round. rows: public items of a round, the same for all; 0: all. dropout, late: how
    likely a client gives no answer, or one that comes a round later, when it counts for the items it speaks of."""

    method: Method
    lesson: Lesson
    gathering: Gathering
    schedule: Schedule
    clients: int
    rows: int = 0
    dropout: float = 0.0
    late: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Opening:
    """What a round begins with."""

    round: int
    names: Sequence[str]
    message: Message
    loss: float


@dataclass
class Federation:
    """See `Objective` in train/run.py. aggregate: of the last round, if there was one."""

    server: Server
    engine: Engine
    plan: Plan
    aggregate: Aggregate | None = None
    _late: dict[str, Message] = field(default_factory=dict)
    _consensus: Message | None = None
    _counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0.0))

    def update(self, step: int) -> float:
        """The mean loss of a pair on the public set, or without a server of a sample at the clients."""
        opening = self.open(step)
        lesson = self.plan.lesson
        answers: dict[str, Message] = {}
        if opening.names:
            answers = self.engine.ask(opening.names, opening.message, lesson, step, self.plan.schedule.rate(step))
        return self.close(opening, answers)

    def open(self, round: int) -> Opening:
        """The server learns by itself, and says who is asked, and what they hear."""
        plan, rng = self.plan, luck(self.plan.seed, 0, round)
        ids = np.sort(self.server.public.ids)
        if plan.rows:
            ids = np.sort(rng.choice(ids, min(plan.rows, len(ids)), replace=False))
        names = list(self.engine.names) if plan.method.clients else []
        count = min(plan.clients, len(names))
        chosen = [names[number] for number in np.sort(rng.permutation(len(names))[:count])]
        there = [name for name in chosen if rng.random() >= plan.dropout]
        loss = 0.0
        if plan.method.server:
            loss = self.server.train_public(luck(plan.seed, 3, round), plan.schedule.rate(round))
        message = self._said(ids)
        down = message.bytes * len(chosen) if self._speaks else 0
        self._counts |= {"asked": len(chosen), "failed": len(chosen) - len(there), "down_bytes": down}
        return Opening(round, there, message, loss)

    @property
    def _speaks(self) -> bool:
        return self.plan.method.way is not None

    def _said(self, ids: Ids) -> Message:
        """What clients hear: the server; without one the consensus; of items without consensus nothing."""
        lesson, version = self.plan.lesson, self.server.public.version
        if self.plan.method.server:
            return self.server.message(ids, lesson)
        if self._consensus is None:
            return Message(version, ids, {})
        rows = {}
        for name, (about, sent) in self._consensus.about(ids).items():
            rows[name] = lesson.packed(torch.where(sent[:, None], about, torch.nan))
        return Message(version, ids, rows)

    def close(self, opening: Opening, answers: Mapping[str, Message]) -> float:
        """The server takes what came, and learns from it."""
        plan, rng = self.plan, luck(self.plan.seed, 2, opening.round)
        losses = [one.figures["loss"] for one in answers.values() if "loss" in one.figures]
        taken = self._taken(opening, answers, rng) if self._speaks else {}
        self.aggregate = aggregate(taken, opening.message, plan.gathering) if taken else None
        if self.aggregate is not None and plan.method.distils:
            self.server.distill(self.aggregate, rng, plan.schedule.rate(opening.round))
        elif self.aggregate is not None:
            self._agree(self.aggregate)
        return opening.loss if plan.method.server else sum(losses) / max(1, len(losses))

    def _taken(self, opening: Opening, answers: Mapping[str, Message], rng: np.random.Generator) -> dict[str, Message]:
        """Sound answers of this round that came in time, and those of the round before that did not."""
        sound: dict[str, Message] = {}
        for name, answer in answers.items():
            try:
                answer.demand(self.server.public.version, self.server.towers.width)
                sound[name] = answer
            except TrainingError as error:
                log.warning("the answer of %s counts for nothing: %s", name, error)
        late = [name for name in sorted(sound) if rng.random() < self.plan.late]
        taken = self._late | {name: answer for name, answer in sound.items() if name not in late}
        self._late = {name: sound[name] for name in late}
        self._counts["failed"] += len(opening.names) - len(sound)
        self._counts |= {"answered": len(sound) - len(late), "late": len(late)}
        self._counts["up_bytes"] = sum(answer.bytes for answer in answers.values())
        return taken

    def _agree(self, found: Aggregate) -> None:
        """What clients agree on, beside what they agreed on before of other items."""
        everything = np.sort(self.server.public.ids)
        places = np.searchsorted(everything, found.ids)
        before = self._consensus.about(everything) if self._consensus is not None else {}
        rows = {}
        for name in OTHER:
            blank = torch.full((len(everything), self.server.towers.width), torch.nan)
            table = torch.where(before[name][1][:, None], before[name][0], torch.nan) if name in before else blank
            if name in found.rows:
                sent = found.sent[name]
                table[places[sent.numpy()]] = found.rows[name][sent]
            rows[name] = table.numpy()
        self._consensus = Message(self.server.public.version, everything, rows)

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        """The server's recalls, the clients' means, and what the last round took."""
        clients = self.engine.figures()
        told = {f"client_{name}": value for name, value in means(clients).items()}
        if self.plan.method.server and self.server.task is not None:
            found = self.server.task.figures(self.server.towers)
        else:
            found = {"loss": told.get("client_loss", 0.0)}
        trust = self.aggregate.trust() if self.aggregate is not None else {}
        told.pop("client_loss", None)
        return found | told | {f"weight_{name}": share for name, share in trust.items()} | self._counts

    def state(self) -> dict[str, Tensor]:
        state = {SERVER + name: value for name, value in self.server.state().items()}
        state |= {CLIENT + name: value for name, value in self.engine.state().items()}
        for name, message in self._late.items():
            state |= _tensors(message, f"{LATE}{name}.")
        if self._consensus is not None:
            state |= _tensors(self._consensus, CONSENSUS)
        return state | {COUNTS: torch.tensor([self._counts[name] for name in COUNTED], dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.server.load_state(within(state, SERVER))
        self.engine.load_state(within(state, CLIENT))
        late = within(state, LATE)
        names = sorted({name.rpartition(".")[0] for name in late})
        self._late = {name: self._message(within(late, f"{name}.")) for name in names}
        consensus = within(state, CONSENSUS)
        self._consensus = self._message(consensus) if consensus else None
        self._counts = dict(zip(COUNTED, state[COUNTS].tolist(), strict=True))

    def _message(self, tensors: Mapping[str, Tensor]) -> Message:
        rows = {name: tensors[name].numpy() for name in OTHER if name in tensors}
        return Message(self.server.public.version, tensors["ids"].numpy(), rows)


def means(clients: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of clients of a kind: a client is called after its kind, with a number."""
    found: dict[str, list[float]] = {}
    for client, figures in clients.items():
        kind = client.rstrip("0123456789")
        for name, value in figures.items():
            if name in ("accuracy", "loss", "r1_sum"):
                found.setdefault(name if name == "loss" else f"{kind}_{name}", []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _tensors(message: Message, prefix: str) -> dict[str, Tensor]:
    rows = {prefix + name: torch.from_numpy(rows) for name, rows in message.rows.items()}
    return {prefix + "ids": torch.from_numpy(message.ids).clone(), **rows}  # ids may be shared, which files cannot
