"""How far a run has come: a bar on a terminal, and in a log a line now and then."""

from __future__ import annotations

import logging
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Display:
    """Of a run and of what comes before its first step. Shown within `with`."""

    def __init__(self, title: str, steps: int, done: int):
        columns = (TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self._console, self._title = (
            Console(stderr=True, quiet=logging.getLogger("forerun").level > logging.INFO),
            title,
        )
        self._before: TaskID | None = None
        self._bars = Progress(
            *columns, TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal
        )
        self._steps = self._bars.add_task(title, total=steps, completed=done, note="")

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def before(self, done: int, total: int) -> None:
        """How far that has come which is done before the first step."""
        if self._before is None:
            self._before = self._bars.add_task(f"{self._title}: the start", total=total, note="")
        self._bars.update(self._before, completed=done)
        if done == total:
            self._bars.remove_task(self._before)
            self._say("the start is fitted")

    def step(self, done: int, note: str, is_said: bool) -> None:
        """is_said: this is one of the steps that a log has a line for."""
        self._bars.update(self._steps, completed=done, note=note)
        if is_said:
            self._say(note)

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            self._console.print(f"{self._title}: {line}", highlight=False, soft_wrap=True)
