"""A party with data of its own. It hears what the server says of the public set, learns, and answers in kind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forerun.train.federated.learner import Learner, luck
from forerun.train.federated.losses import contrast, kd_loss
from forerun.train.federated.public import Ids, Message, guarded


@dataclass(frozen=True)
class Lesson:
    """What a round asks of a client. inter, intra: which contrasts count; regress: it moves towards what it hears
    instead, as in FedMD. gamma weighs either. clip, noise: see `guarded`. half: rows travel as fp16."""

    inter: bool = True
    intra: bool = True
    regress: bool = False
    epochs: int = 2
    gamma: float = 0.5
    tau: float = 0.5
    clip: float = 0.0
    noise: float = 0.0
    half: bool = False

    def packed(self, rows_ND: Tensor) -> np.ndarray:
        """As rows travel."""
        return rows_ND.numpy().astype(np.float16 if self.half else np.float32)


@dataclass
class Client(Learner):
    """seed, number: of its random numbers. Its optimiser begins anew in every round, so that all it has to remember is
    its model."""

    number: int = 0
    seed: int = 0

    def answer(self, heard: Message, lesson: Lesson, round: int, share: float = 1.0) -> Message:
        """Learn, and say what public items look like from here. Raises TrainingError for another public set."""
        heard.demand(self.public.version, self.towers.width)
        rng = luck(self.seed, 1, self.number, round)
        loss = self.fit(heard, lesson, rng, share)
        rows = {name: guarded(z, lesson.clip, lesson.noise, rng) for name, z in self.represent(heard.ids).items()}
        packed = {name: lesson.packed(z) for name, z in rows.items()}
        return Message(self.public.version, heard.ids, packed, {"loss": loss})

    def fit(self, heard: Message, lesson: Lesson, rng: np.random.Generator, share: float = 1.0) -> float:
        """Epochs of its task, each followed by one of the public set; the last mean loss of the task."""
        ids, g_all = _sound(heard)
        before = self.represent(ids)  # the frozen copy of the model is asked for nothing else
        adams, loss = self.optimisers(), 0.0
        places = torch.from_numpy(self.public.places(ids))

        def public_loss(index_B: Tensor) -> Tensor:
            z = {name: self.seen(name, places[index_B]) for name in self.modalities if name in g_all}
            if lesson.regress:
                return sum((kd_loss(z[n], g_all[n][index_B], "l2") for n in z), torch.zeros(()))
            o = {name: before[name][index_B] for name in z}
            return contrast(z, g_all, o, index_B, (lesson.inter, lesson.intra), lesson.tau)

        for _ in range(lesson.epochs):
            loss = self.learn_task(adams[0], rng, share)
            if g_all and (lesson.inter or lesson.intra or lesson.regress):
                self.learn_public(public_loss, len(ids), adams, rng, share, lesson.gamma)
        return loss


def _sound(heard: Message) -> tuple[Ids, dict[str, Tensor]]:
    """Items of which something sound is said in every modality, and what."""
    about = heard.about(heard.ids)
    if not about:
        return heard.ids, {}
    is_there = torch.stack([sent for _, sent in about.values()]).all(0)
    return heard.ids[is_there.numpy()], {name: rows[is_there] for name, (rows, _) in about.items()}
