"""One run for everything that is trained here: language models, draft heads, both together, and what is made of these.

An objective learns; the run makes it take its steps, and does the rest: checkpoints that resume to
the same step, a record of what the run is made of, figures, a display, and Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from forerun.errors import TrainingError
from forerun.files import beside, claim, put
from forerun.train.display import Display
from forerun.train.events import Events
from forerun.train.interrupt import held_back
from forerun.train.schedule import Schedule

STATE = "state.safetensors"
"""The checkpoint in a run's folder: what the objective has become, and how far the run has come."""
START = "start.safetensors"
"""What was done of the start when it was interrupted, until there is a checkpoint."""
RECIPE = "recipe.json"
LOG = "log.jsonl"
LOG_EVERY = 20
"""Steps between two rows of the log that have nothing but the loss."""

Watch = Callable[[int, int], None]
"""Told how much of how much is done."""


def unwatched(done: int, total: int) -> None:
    """Nobody wants to know."""


class Stateful(Protocol):
    """What changes step by step, and can be taken up again."""

    def state(self) -> dict[str, Tensor]:
        """Everything that `load_state` needs to go on as if nothing had happened."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Become what `state` was taken from. ValueError if that was something else."""


class Start(Stateful, Protocol):
    """What is done before the first step, in `steps` steps of its own."""

    @property
    def steps(self) -> int: ...

    def update(self, step: int) -> None:
        """Take this step (from 0)."""

    def finish(self) -> None:
        """All steps are taken: hand the objective what came of them."""


class Objective(Stateful, Protocol):
    """What learns. It owns everything that changes: parameters, and the state of what moves them."""

    def update(self, step: int) -> float:
        """Take this step (from 0), and return its loss in nats. The same state and step give the
        same state, bit for bit."""

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        """Figures on held-out text; `loss` is among them. Changes nothing."""


@dataclass(frozen=True)
class Record:
    """What a run is made of, kept in its folder: a run goes on with the same alone.

    name: what another run differs in; without it, the first field that differs. older: what fields
    had that are younger than some records.
    """

    fields: Mapping[str, Any]
    file: str = RECIPE
    name: str = ""
    older: Mapping[str, Any] = field(default_factory=dict)

    def demand_same(self, run: Path) -> None:
        """Leave it in a new run's folder. TrainingError for the folder of another run."""
        path, ours = run / self.file, _as_json(self.fields)
        if not path.is_file():
            _make(run)
            try:
                put(path, f"{json.dumps(ours, indent=1)}\n".encode())
            except OSError as error:
                raise TrainingError(_no_place(run, error)) from None
            return
        try:
            theirs = _with_older(dict(json.loads(path.read_text())), _as_json(self.older))
        except (OSError, ValueError, TypeError) as error:
            raise TrainingError(f"{path} cannot be read ({error}): remove the run, or repair the file") from None
        other = next((name for name in ours if theirs.get(name) != ours[name]), None)
        if other:
            raise TrainingError(
                f"{run} belongs to a run with another {self.name or other}: remove it, or name another --run"
            )


def _with_older(theirs: dict[str, Any], older: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of fields, too, may be younger than a record."""
    inner = {
        name: value | theirs[name]
        for name, value in older.items()
        if isinstance(value, dict) and isinstance(theirs.get(name), dict)
    }
    return {**older, **theirs, **inner}


def _as_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As they are read again: JSON has no tuples."""
    return dict(json.loads(json.dumps(dict(fields))))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(_no_place(folder, error)) from None


def _no_place(folder: Path, error: OSError) -> str:
    return f"checkpoints cannot be kept in {folder} ({error.strerror}): name another --run, or mend that"


class Run:
    """The steps of an objective, from the first, or from where an earlier run in this folder stopped."""

    def __init__(
        self,
        objective: Objective,
        schedule: Schedule,
        folder: Path,
        record: Record | None = None,
        events: Events | None = None,
    ):
        """events: told every row of the log, too.

        Raises TrainingError if the folder holds a run of something else, or with another schedule."""
        self.objective, self.schedule, self.folder, self._events = objective, schedule, folder, events
        self.step, self.seconds, self.loss = 0, 0.0, 0.0
        self._saved: int | None = None
        self._is_whole = False
        """Nothing is half done: what the objective is now is what it is after `step` steps."""
        if record is not None:
            record.demand_same(folder)
        _make(folder)
        self._resume()

    def finish(self, title: str, start: Start | None = None) -> dict[str, float]:
        """Go to the schedule's end; the last figures. start: what is done before the first step.

        Ctrl-C leaves a checkpoint of the last step, or of what the start has come to. Raises
        TrainingError where checkpoints cannot be written, and what the objective raises.
        """
        with self._alone():
            if self._events is not None:
                self._events.begin(row for row in read_log(self.folder) if row["step"] <= self.step)
            try:
                with Display(title, self.schedule.steps, self.step) as display:
                    if start is not None and self._saved is None:
                        self._begin(start, display)
                    self._is_whole = True
                    return self._go_on(display) or self._validate(display)
            except KeyboardInterrupt:
                self._leave()
                raise

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two runs in one folder would write over one another's checkpoints and log."""
        try:
            claimed = claim(self.folder)
        except BlockingIOError:
            raise TrainingError(f"{self.folder} is in use by another run: wait for it, or name another --run") from None
        except PermissionError:  # Windows opens no folders
            yield
            return
        try:
            yield
        finally:
            claimed.give_up()

    def _begin(self, start: Start, display: Display) -> None:
        """The start, from where an earlier run was interrupted in it; then there is a checkpoint."""
        done, is_whole = self._resume_start(start), True
        try:
            with display.phase("the start") as watch:
                watch(done, start.steps)
                while done < start.steps:
                    with held_back("the end of this step"):
                        is_whole = False
                        start.update(done)
                        done, is_whole = done + 1, True
                    watch(done, start.steps)
        except KeyboardInterrupt:
            if done and is_whole:
                self._write(START, start.state(), {"step": done}, f"step {done} of the start")
            raise
        with held_back("the first checkpoint"):
            start.finish()
            self._save()

    def _go_on(self, display: Display) -> dict[str, float]:
        figures: dict[str, float] = {}
        if self._is_logged and self.step not in {row["step"] for row in read_log(self.folder)}:
            figures = self._look(display)  # an interruption came between the step and this
        while self.step < self.schedule.steps:
            self._update()
            figures = self._look(display) or figures
            if self.step == self.schedule.steps or self.step % self.schedule.save_every == 0:
                self._save()
            display.step(self.step, f"loss {self.loss:.3f}{_told(figures)}", self._is_validated)
        return figures

    def _look(self, display: Display) -> dict[str, float]:
        """After a step: the figures, if there are to be any, and a row of the log."""
        figures = self._validate(display) if self._is_validated else {}
        if self._is_logged:
            row = {"step": self.step, "train_loss": self.loss, "seconds": self.seconds, **figures}
            if self._events is not None:
                self._events.tell(row)
            self._log(json.dumps({key: round(value, 5) for key, value in row.items()}) + "\n")
        return figures

    def _log(self, line: str) -> None:
        try:
            with (self.folder / LOG).open("a") as file:
                file.write(line)
        except OSError as error:
            raise TrainingError(
                f"{self.folder / LOG} cannot be written ({error.strerror}): make room there, or mend its permissions,"
                " and the same command goes on"
            ) from None

    def _validate(self, display: Display) -> dict[str, float]:
        with display.phase("validation") as watch:
            return self.objective.validate(watch)

    def _update(self) -> None:
        started = time.perf_counter()
        with held_back("the end of this step"):
            self._is_whole = False
            self.loss = self.objective.update(self.step)
            self.seconds += time.perf_counter() - started
            self.step += 1
            self._is_whole = True

    @property
    def _is_validated(self) -> bool:
        """The last step was one after which there are figures."""
        return self.step == self.schedule.steps or self.step % self.schedule.validate_every == 0

    @property
    def _is_logged(self) -> bool:
        """The log has a row for the last step."""
        return self.step > 0 and (self._is_validated or self.step % LOG_EVERY == 0)

    def _leave(self) -> None:
        """Keep what there is, and say how to go on if there is a way."""
        if self._is_whole and self._saved != self.step:
            try:
                self._save()
            except TrainingError as error:
                print(error, file=sys.stderr)
        if self._saved is not None or (self.folder / START).exists():
            print(f"the same command goes on from the last checkpoint in {self.folder}", file=sys.stderr)
        else:
            print(f"nothing is kept in {self.folder}: the same command begins anew", file=sys.stderr)

    def _save(self) -> None:
        done = {"step": self.step, "seconds": self.seconds, "loss": self.loss}
        note = done | {"schedule": self.schedule.as_json()}
        self._write(STATE, self.objective.state(), note, f"step {self.step}")
        self._saved = self.step
        (self.folder / START).unlink(missing_ok=True)

    def _write(self, name: str, state: Mapping[str, Tensor], note: Mapping[str, Any], what: str) -> None:
        try:
            with beside(self.folder / name) as path:
                save_file({key: value.contiguous() for key, value in state.items()}, path, {"run": json.dumps(note)})
        except (OSError, SafetensorError) as error:
            before = "" if self._saved is None else "; the run goes on from the one before"
            raise TrainingError(
                f"the checkpoint of {what} cannot be written to {self.folder} ({error}): make room there{before}"
            ) from None

    def _resume_start(self, start: Start) -> int:
        """Steps of it that an earlier run has taken."""
        path = self.folder / START
        if not path.exists():
            return 0
        note, state = read_run(path)
        try:
            start.load_state(state)
        except ValueError:
            raise TrainingError(f"{path} belongs to another start: remove it, or train into another folder") from None
        return int(note["step"])

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
        try:
            self.objective.load_state(state)
        except ValueError:
            raise TrainingError(
                f"{path} belongs to a model of another shape: remove it, or train into another folder"
            ) from None
        self.step, self.seconds, self.loss = int(note["step"]), float(note["seconds"]), float(note.get("loss", 0.0))
        self._saved = self.step


def _told(figures: Mapping[str, float]) -> str:
    """The last figures in a few words: the loss, and that of every head where there are heads."""
    if not figures:
        return ""
    heads = [f"{figures[name]:.2f}" for name in figures if name.startswith("head") and name.endswith("_loss")]
    return f"  validation {figures['loss']:.3f}" + (f"  heads {' '.join(heads)}" if heads else "")


def read_log(folder: Path) -> list[dict[str, float]]:
    """The figures of a run on its way, by ascending steps; [] without any. Steps that were taken
    again after an interruption count once, and half a line at the end does not."""
    try:
        lines = (folder / LOG).read_text().splitlines()
    except OSError:
        return []
    rows: dict[int, dict[str, float]] = {}
    for line in lines:
        try:
            row = json.loads(line)
            rows[int(row["step"])] = {name: float(value) for name, value in row.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return [rows[step] for step in sorted(rows)]


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The notes and tensors of a training checkpoint; TrainingError if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["run"])
        return note, load_file(path)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path} is not a training checkpoint that can be resumed ({error}): remove it") from None
