"""How far a run has come: a bar for every phase on a terminal, and in a log a line now and then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Of a run, and of what comes before its first step and between steps. Shown within `with`."""

    def __init__(self, title: str, steps: int, done: int):
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        quiet = logging.getLogger("forerun").level > logging.INFO
        self._console, self._title, self._total = Console(stderr=True, quiet=quiet), title, steps
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._steps = self._bars.add_task(title, total=steps, completed=done, note="")

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Something beside the steps, with a bar of its own while it lasts. Yields what is told how
        much of how much is done."""
        task = self._bars.add_task(f"{self._title}: {name}", total=None, note="")

        def watch(done: int, total: int) -> None:
            self._bars.update(task, completed=done, total=total)

        try:
            yield watch
        finally:
            self._bars.remove_task(task)

    def step(self, done: int, note: str, is_said: bool) -> None:
        """is_said: this is one of the steps that a log has a line for."""
        self._bars.update(self._steps, completed=done, note=note)
        if is_said:
            self.say(f"step {done}/{self._total}  {note}")

    def say(self, line: str) -> None:
        """In a log."""
        if not self._console.is_terminal:
            self._console.print(f"{self._title}: {line}", highlight=False, soft_wrap=True)
