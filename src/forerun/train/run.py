"""One training loop for everything that is trained here: language models now, draft heads and draft models too.

A recipe hands over an objective and batches; the loop does the rest: gradient accumulation, mixed precision, warm-up and
decay, checkpoints that resume to the same step, a guard against NaN, a progress bar, a log of figures.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from forerun.errors import TrainingError

STATE = "state.safetensors"
"""The checkpoint in a run's folder: parameters, optimiser state, and how far the run has come."""


class Objective(Protocol):
    """One loss and the parameters it moves."""

    @property
    def module(self) -> nn.Module: ...

    def loss(self, number: int) -> Tensor:
        """The loss in nats on batch `number` (fp32 scalar). The same number gives the same batch."""

    def validate(self) -> dict[str, float]:
        """Figures on held-out text; `loss` in nats per token is among them."""


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rates. `muon_rate` moves matrices (0: AdamW moves everything), `adam_rate` embeddings and vectors.

    shape "linear": the rate rises linearly over `warmup` steps, stays, and falls linearly to zero over the last `decay` share
    of the steps (warm-up, stable, decay). "cosine": it rises from zero, and falls along a cosine to `floor` of itself.
    scales: parameters whose name begins so learn at that many times the rate; the first that fits counts.
    """

    steps: int
    parts: int = 1
    warmup: int = 20
    decay: float = 0.4
    muon_rate: float = 4e-3
    adam_rate: float = 2e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    validate_every: int = 250
    save_every: int = 100
    shape: str = "linear"
    floor: float = 0.0
    scales: tuple[tuple[str, float], ...] = ()

    def rate(self, step: int) -> float:
        """The share of the full learning rate at a step (0 up to `steps` - 1)."""
        if self.shape == "cosine":
            if step < self.warmup:
                return step / self.warmup
            progress = min(1.0, (step - self.warmup) / max(1, self.steps - 1 - self.warmup))
            return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2
        rising = min(1.0, (step + 1) / max(1, self.warmup))
        falling = (self.steps - step) / max(1.0, self.steps * self.decay)
        return max(0.0, min(rising, falling, 1.0))

    def scale(self, name: str) -> float:
        """The factor of the learning rate for a parameter."""
        return next((scale for prefix, scale in self.scales if name.startswith(prefix)), 1.0)

    def as_json(self) -> dict[str, Any]:
        """The fields as a checkpoint records them: JSON has no tuples."""
        return asdict(self) | {"scales": [list(pair) for pair in self.scales]}


def optimisers(module: nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, heads and vectors (Jordan et al. 2024); or AdamW for all."""
    moved = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if not schedule.muon_rate:
        groups = _by_scale(moved, schedule)
        return [torch.optim.AdamW(groups, lr=schedule.adam_rate, weight_decay=schedule.weight_decay)]
    matrices = [(n, p) for n, p in moved if p.dim() == 2 and _inner(n)]
    known = {id(p) for _, p in matrices}
    others = _by_scale([(n, p) for n, p in moved if id(p) not in known], schedule)
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(
            torch.optim.Muon(
                _by_scale(matrices, schedule),
                lr=schedule.muon_rate,
                weight_decay=schedule.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    made.append(torch.optim.AdamW(others, lr=schedule.adam_rate, betas=(0.9, 0.95), weight_decay=0.0))
    return made


def _by_scale(named: Iterable[tuple[str, Tensor]], schedule: Schedule) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser, one for each factor of the rate."""
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in named:
        groups.setdefault(schedule.scale(name), []).append(parameter)
    return [{"params": parameters, "scale": scale} for scale, parameters in groups.items()]


def _inner(name: str) -> bool:
    return not name.startswith(("embedding.", "head."))


def fit(objective: Objective, schedule: Schedule, folder: Path, title: str) -> dict[str, float]:
    """Train to the schedule's end, resuming from `folder` if a run was interrupted there. Returns the last validation.

    Raises TrainingError when the loss is not finite twice in a row (one bad batch is skipped), or when `folder` holds a
    run with another schedule.
    """
    return _Run(objective, schedule, folder).finish(title)


class _Run:
    def __init__(self, objective: Objective, schedule: Schedule, folder: Path):
        self.objective, self.schedule, self.folder = objective, schedule, folder
        self.optimisers = optimisers(objective.module, schedule)
        self.step, self.bad, self.seconds = 0, 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._resume()

    def finish(self, title: str) -> dict[str, float]:
        figures: dict[str, float] = {}
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        console = Console(stderr=True)
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(title, total=self.schedule.steps, completed=self.step, note="")
            while self.step < self.schedule.steps:
                started = time.perf_counter()
                loss = self._update()
                self.seconds += time.perf_counter() - started
                self.step += 1
                figures = self._report(loss, figures)
                validation = f"  validation {figures['loss']:.3f}" if figures else ""
                note = f"step {self.step}  loss {loss:.3f}{validation}"
                progress.update(task, completed=self.step, note=note)
                if self._validates and not console.is_terminal:  # a log gets a line now and then instead of a bar
                    console.print(f"{title}: {note}", highlight=False, soft_wrap=True)
        return figures

    def _update(self) -> float:
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for part in range(self.schedule.parts):
            loss = self.objective.loss(self.step * self.schedule.parts + part) / self.schedule.parts
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        moved = [p for group in self._groups() for p in group["params"] if p.grad is not None]
        size = nn.utils.clip_grad_norm_(moved, self.schedule.clip)
        if not self._sound(total + 0 * size.item()):  # a finite loss may have gradients that are not
            return total
        rate = self.schedule.rate(self.step)
        for optimiser in self.optimisers:
            full = self.schedule.muon_rate if isinstance(optimiser, torch.optim.Muon) else self.schedule.adam_rate
            for group in optimiser.param_groups:
                group["lr"] = full * rate * group["scale"]
            optimiser.step()
        return total

    def _sound(self, loss: float) -> bool:
        if math.isfinite(loss):
            self.bad = 0
            return True
        self.bad += 1
        if self.bad > 1:
            raise TrainingError(
                f"the loss was {loss} at steps {self.step - 1} and {self.step}:"
                " lower the learning rate, or look at the data there"
            )
        return False

    def _groups(self) -> Iterable[dict[str, list[Tensor]]]:
        return (group for optimiser in self.optimisers for group in optimiser.param_groups)

    def _report(self, loss: float, figures: dict[str, float]) -> dict[str, float]:
        last = self.step == self.schedule.steps
        if self._validates:
            figures = self.objective.validate()
            self._log({"step": self.step, "train_loss": loss, "seconds": self.seconds, **figures})
        elif self.step % 20 == 0:
            self._log({"step": self.step, "train_loss": loss, "seconds": self.seconds})
        if last or self.step % self.schedule.save_every == 0:
            self._save()
        return figures

    @property
    def _validates(self) -> bool:
        return self.step == self.schedule.steps or self.step % self.schedule.validate_every == 0

    def _log(self, row: dict[str, float]) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({key: round(value, 5) for key, value in row.items()}) + "\n")

    def _save(self) -> None:
        state = {name: p.detach() for name, p in self.objective.module.named_parameters()}
        for number, optimiser in enumerate(self.optimisers):
            for index, values in optimiser.state_dict()["state"].items():
                state |= {f"optimiser.{number}.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
        note = {"step": self.step, "seconds": self.seconds, "schedule": self.schedule.as_json()}
        beside = self.folder / "state.tmp"
        try:
            save_file({k: v.contiguous() for k, v in state.items()}, beside, {"run": json.dumps(note)})
            beside.rename(self.folder / STATE)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise TrainingError(
                f"the checkpoint of step {self.step} cannot be written to {self.folder} ({error}): make room there; the run"
                " goes on from the one before"
            ) from None

    def _resume(self) -> None:
        path = self.folder / STATE
        if not path.exists():
            return
        note, state = read_run(path)
        # A field that is younger than the checkpoint had its default then.
        if Schedule(0).as_json() | note["schedule"] != self.schedule.as_json():
            raise TrainingError(
                f"{path} belongs to a run with another schedule: remove it, or train into another folder"
            )
        self.step, self.seconds = int(note["step"]), float(note["seconds"])
        own = dict(self.objective.module.named_parameters())
        if any(name not in state or state[name].shape != parameter.shape for name, parameter in own.items()):
            raise TrainingError(f"{path} belongs to a model of another shape: remove it, or train into another folder")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
        for number, optimiser in enumerate(self.optimisers):
            saved = optimiser.state_dict()
            prefix = f"optimiser.{number}."
            for key in (key for key in state if key.startswith(prefix)):
                index, field = key[len(prefix) :].split(".", 1)
                saved["state"].setdefault(int(index), {})[field] = state[key]
            optimiser.load_state_dict(saved)


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The notes and tensors of a training checkpoint; TrainingError if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["run"])
        return note, load_file(path)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path} is not a training checkpoint that can be resumed ({error}): remove it") from None


def compiled(function: Callable[..., Tensor], wanted: bool) -> Callable[..., Tensor]:
    """`torch.compile` when asked for: on CPUs it needs a C++ compiler and a minute, and trains faster afterwards."""
    return torch.compile(function) if wanted else function
