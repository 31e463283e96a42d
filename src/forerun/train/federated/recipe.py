"""Everything that `forerun federated run` decides before the first round, and what it leaves after the last one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from forerun.errors import TrainingError
from forerun.files import put
from forerun.train.events import Events
from forerun.train.federated.averaging import Averaging
from forerun.train.federated.client import Client, Lesson
from forerun.train.federated.engine import LocalEngine
from forerun.train.federated.federation import Federation, Plan
from forerun.train.federated.learner import Pace
from forerun.train.federated.methods import method_of
from forerun.train.federated.networks import Towers, Words
from forerun.train.federated.public import IMAGE, TEXT
from forerun.train.federated.server import Gathering, Server
from forerun.train.federated.settings import Settings
from forerun.train.federated.tasks import Classify, Labelled, Pairs, Retrieve, Task
from forerun.train.federated.world import Folders, Shares, World, drawn, of_digits, of_folders, split
from forerun.train.run import Record, Run
from forerun.train.schedule import Schedule

TOWERS, FIGURES = "towers", "figures.json"


@dataclass(frozen=True)
class Federating:
    """A federation that is ready to begin."""

    settings: Settings
    federation: Federation
    record: Record

    def fit(self, run: Path, title: str = "", events: Events | None = None) -> dict[str, float]:
        """Go to the last round, resuming what was interrupted in `run`; the last figures, which stay there as
        figures.json, beside the server's towers."""
        running = Run(self.federation, self.federation.plan.schedule, run, self.record, events)
        figures = running.finish(title or self.settings.method)
        try:
            if self.federation.plan.method.server:
                self.federation.server.towers.save(run / TOWERS)
            put(run / FIGURES, f"{json.dumps(figures, indent=1)}\n".encode())
        except OSError as error:
            raise TrainingError(
                f"{run} cannot be written ({error.strerror}): make room, and the same command goes on"
            ) from None
        return figures


def world_of(settings: Settings) -> World:
    """The data that the settings name. TrainingError where it cannot be read."""
    data = settings.data
    sizes = (data.public, data.test, data.own, data.paired, settings.seed)
    if data.kind != "folders":
        return drawn(*sizes) if data.kind == "shapes" else of_digits(*sizes)
    missing = [name for name in ("pairs", "images", "texts") if not getattr(data, name)]
    if missing:
        raise TrainingError(f"data.{missing[0]} is not said: with kind: folders, name the folder that it lies in")
    private = Path(data.private_pairs) if data.private_pairs else None
    return of_folders(Folders(Path(data.pairs), private, Path(data.images), Path(data.texts), data.size), *sizes)


def prepare(settings: Settings) -> Federating:
    """Read the data and build all parties. Raises TrainingError for what does not fit, before anything is written."""
    world = world_of(settings)
    words = Words.of(world.public.texts)
    federation = federate(settings, world, LocalEngine(clients_of(settings, world, words)), words)
    record = Record({"settings": settings.as_json(), "public": world.public.version}, name="configuration")
    return Federating(settings, federation, record)


def federate(settings: Settings, world: World, engine: Any, words: Words) -> Federation:
    """The server and its rounds, whoever carries the messages."""
    server = server_of(settings, world, words)
    method = method_of(settings.method)
    made = Averaging if method.averages else Federation
    return made(server, engine, plan_of(settings))


def plan_of(settings: Settings) -> Plan:
    method = method_of(settings.method)
    lesson = Lesson(
        method.inter,
        method.intra,
        method.regress,
        settings.local_epochs,
        settings.gamma,
        settings.tau,
        settings.upload_clip,
        settings.upload_noise,
        settings.half,
    )
    gathering = Gathering(method.way or "mean", settings.include_positive, settings.tau_agg, settings.top_rank)
    schedule = Schedule(
        settings.rounds,
        warmup=0,
        decay=settings.decay,
        muon_rate=0,
        adam_rate=settings.rate,
        clip=settings.clip,
        validate_every=1,
        save_every=1,
    )
    clients = settings.clients_per_round or sum(counts_of(settings).values())
    rows = settings.rows_per_round
    return Plan(method, lesson, gathering, schedule, clients, rows, settings.dropout, settings.late, settings.seed)


def counts_of(settings: Settings) -> dict[str, int]:
    return {"image": settings.clients.image, "text": settings.clients.text, "both": settings.clients.both}


def pace_of(settings: Settings) -> Pace:
    return Pace(settings.rate, settings.batch, settings.clip, settings.shared_adam)


def server_of(settings: Settings, world: World, words: Words) -> Server:
    architectures = {IMAGE: settings.server_image, TEXT: settings.server_text}
    towers = Towers(architectures, settings.width, words, settings.seed)
    pairs = Pairs(world.public.images, world.public.texts, np.arange(len(world.public.ids)))
    task = Retrieve(pairs, world.test, towers, settings.folds)
    return Server("the server", towers, task, world.public, pace_of(settings), settings.kd, settings.kd_loss)


def clients_of(settings: Settings, world: World, words: Words) -> list[Client]:
    """Names are kind and number; architectures are dealt out in turn, within each kind."""
    who = settings.clients
    shares = Shares(who.alpha, who.least, who.shards, who.most)
    parts = split(world, counts_of(settings), shares, settings.seed)
    clients: list[Client] = []
    for number, (name, own) in enumerate(parts.items()):
        turn, seed = int(name.lstrip("imagetxboh")), 1000 * (settings.seed + 1) + number
        both = {
            IMAGE: who.image_architectures[turn % len(who.image_architectures)],
            TEXT: who.text_architectures[turn % len(who.text_architectures)],
        }
        used = both if isinstance(own, Pairs) else {own.modality: both[own.modality]}
        towers = Towers(used, settings.width, words, seed)
        task = _task(own, world, towers, settings, seed)
        clients.append(Client(name, towers, task, world.public, pace_of(settings), number, settings.seed))
    return clients


def _task(own: Labelled | Pairs, world: World, towers: Towers, settings: Settings, seed: int) -> Task:
    if isinstance(own, Pairs):
        return Retrieve(own, world.test, towers, settings.folds)
    test = world.images[1] if own.modality == IMAGE else world.texts[1]
    return Classify(own, test, towers, settings.margin, seed)
