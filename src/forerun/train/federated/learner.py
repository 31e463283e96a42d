"""What clients and the server have in common: towers, a task, the public set, and steps down a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from forerun.errors import TrainingError
from forerun.train.federated.networks import Towers
from forerun.train.federated.public import IMAGE, TEXT, Ids, Images, PublicSet
from forerun.train.federated.tasks import Task, inputs_of


@dataclass(frozen=True)
class Pace:
    """How a learner goes through data. rate: of Adam; batch: samples of a step; clip: the longest gradient.

    shared: one Adam takes all steps, as in the authors' code. Else those on the public set have an Adam of their own,
    and the weight of their loss is one of the rate: Adam would not notice that of a loss.
    """

    rate: float = 1e-3
    batch: int = 64
    clip: float = 2.0
    shared: bool = False


Adams = tuple[torch.optim.Adam, torch.optim.Adam]


@dataclass
class Learner:
    """towers and task learn; the public set's inputs are encoded once."""

    name: str
    towers: Towers
    task: Task | None
    public: PublicSet
    pace: Pace
    inputs: Mapping[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        whole: dict[str, Images | Sequence[str]] = {IMAGE: self.public.images, TEXT: self.public.texts}
        words, known = self.towers.words, self.public.encoded
        for name in self.modalities:
            if (name, words.known) not in known:
                known[name, words.known] = inputs_of(whole[name], words)
        self.inputs = {name: known[name, words.known] for name in self.modalities}

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.towers.architectures)

    @property
    def modules(self) -> nn.ModuleDict:
        """All that learns."""
        own: dict[str, nn.Module] = {"towers": self.towers}
        if isinstance(self.task, nn.Module):
            own["task"] = self.task
        return nn.ModuleDict(own)

    @property
    def size(self) -> int:
        """Samples of its own."""
        return self.task.size if self.task is not None else 0

    def optimisers(self) -> Adams:
        """For its task, and for what others say of the public set: one and the same where it is shared."""
        own = torch.optim.Adam(self.modules.parameters(), lr=self.pace.rate)
        return own, own if self.pace.shared else torch.optim.Adam(self.towers.parameters(), lr=self.pace.rate)

    def represent(self, ids: Ids) -> dict[str, Tensor]:
        """Unit rows [N, D] of these public items, for the modalities it has."""
        places = torch.from_numpy(self.public.places(ids))
        return {name: self.towers.embed(name, inputs[places]) for name, inputs in self.inputs.items()}

    def seen(self, name: str, places_B: Tensor) -> Tensor:
        """Rows of public items, by their places, with gradients."""
        rows_BD: Tensor = self.towers(name, self.inputs[name][places_B])
        return rows_BD

    def learn_public(
        self,
        loss: Callable[[Tensor], Tensor],
        size: int,
        adams: Adams,
        rng: np.random.Generator,
        share: float = 1.0,
        weight: float = 1.0,
    ) -> float:
        """One pass over so many public items with a loss of this weight; the sum of all losses."""
        if self.pace.shared:
            return self.learn(lambda index_B: weight * loss(index_B), size, adams[1], rng, share)
        return self.learn(loss, size, adams[1], rng, share * weight)

    def learn_task(self, optimiser: torch.optim.Optimizer, rng: np.random.Generator, share: float = 1.0) -> float:
        """One pass over its own data; the mean loss of a sample."""
        if self.task is None:
            return 0.0
        task = self.task
        total = self.learn(lambda index_B: task.loss(self.towers, index_B), task.size, optimiser, rng, share)
        return total / max(1, task.size)

    def learn(
        self,
        loss: Callable[[Tensor], Tensor],
        size: int,
        optimiser: torch.optim.Optimizer,
        rng: np.random.Generator,
        share: float = 1.0,
    ) -> float:
        """One pass over so many samples in random order; the sum of all losses. share: of the learning rate.

        Raises TrainingError where a loss is not finite."""
        total = 0.0
        for group in optimiser.param_groups:
            group["lr"] = self.pace.rate * share
        for index_B in shuffled(size, self.pace.batch, rng):
            found = loss(index_B)
            if not found.requires_grad:
                continue
            optimiser.zero_grad(set_to_none=True)
            found.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.modules.parameters(), self.pace.clip)
            if not torch.isfinite(found):
                raise TrainingError(f"the loss of {self.name} became {found.item()}: lower the rate")
            optimiser.step()
            total += found.item()
        return total

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.modules.state_dict().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """ValueError if it is that of a learner of another shape."""
        own = self.modules.state_dict()
        wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
        if wrong:
            raise ValueError(f"the state of {self.name} does not fit {wrong[0]}")
        self.modules.load_state_dict({name: state[name] for name in own})


def shuffled(size: int, batch: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """All numbers below `size` in random order, in batches; the last one may be smaller."""
    order = torch.from_numpy(rng.permutation(size))
    yield from (order[first : first + batch] for first in range(0, size, batch))


def luck(*words: int) -> np.random.Generator:
    """Random numbers of their own for every purpose: equal words, equal numbers, whatever else was drawn."""
    return np.random.default_rng(words)
