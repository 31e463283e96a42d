"""Text on the screen while it is generated, drafted tokens in the colour of who thought of them."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from forerun.cli.ink import Ink
from forerun.drafting.drafter import Tally
from forerun.engine.requests import Output, Piece

DRAFTED = Ink().style("anyone")
"""What is marked without saying who thought of it."""
WIDTH = 100
"""Columns where no terminal says how wide it is."""
COLUMNS = TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()


class Scribe:
    """Writes the pieces of several requests as if they came one after the other: those of a later request wait.

    titles: what to write above each request; none: nothing. samples: of every prompt. as_ids: write
    token ids, for want of a tokenizer. On a terminal drafted tokens have colours (`ink` has the legend);
    elsewhere the text goes out as it is.
    """

    def __init__(self, console: Console, titles: Sequence[str] = (), samples: int = 1, as_ids: bool = False):
        self._console, self._titles, self._samples, self._as_ids = console, titles, samples, as_ids
        self._waiting: defaultdict[int, list[Piece]] = defaultdict(list)
        self.ink = Ink()
        self._turn = 0
        self._begun = -1

    def show(self, piece: Piece) -> None:
        self._waiting[piece.prompt_index * self._samples + piece.sample].append(piece)
        while pieces := self._waiting.pop(self._turn, []):
            self._write(pieces)
            if pieces[-1].finish_reason is None:
                return
            self._end()

    def close(self) -> None:
        """Nothing more will come: write what still waits, finished or not."""
        for turn in sorted({self._turn, *self._waiting}):
            self._turn = turn
            self._write(self._waiting.pop(turn, []))
            if self._begun == turn:
                self._end()

    def _write(self, pieces: Sequence[Piece]) -> None:
        if not pieces:
            return
        if self._begun != self._turn:
            self._begun = self._turn
            if self._titles:
                self._console.print(f"── {self._titles[self._turn]}", style="bold", highlight=False)
        for piece in pieces:
            self._write_piece(piece)

    def _write_piece(self, piece: Piece) -> None:
        texts = [f"{token} " for token in piece.token_ids] if self._as_ids else piece.texts
        if not self._console.is_terminal:
            self._console.file.write("".join(texts))
        else:
            parts = [(text, self.ink.style(origin)) for text, origin in zip(texts, piece.origins, strict=True)]
            self._console.print(Text.assemble(*parts), end="", soft_wrap=True, highlight=False)
        self._console.file.flush()

    def _end(self) -> None:
        self._console.print()
        self._turn += 1


def summary(outputs: Sequence[Output], seconds: float) -> str:
    """One line about what a run cost. `seconds`: what the user waited, prompts included."""
    stats = [output.stats for output in outputs]
    tokens, steps = sum(one.new_tokens for one in stats), sum(one.steps for one in stats)
    parts = [f"{tokens} tokens in {seconds:.2f} s"]
    if len(stats) == 1:
        parts.append(f"{stats[0].tokens_per_second:.0f} tokens/s after the prompt")
    else:
        parts.append(f"{tokens / max(seconds, 1e-9):.0f} tokens/s, prompts included")
    parts.append(f"{tokens / max(steps, 1):.2f} tokens per step")
    rules = sorted({one.rule for one in stats if one.rule})
    exact = "exact" if all(one.exact for one in stats) else "lossy"
    drafters = " and ".join(dict.fromkeys(one.drafter for one in stats))
    parts.append(f"drafter {drafters}, {' and '.join(rules) or 'nothing to accept'}, {exact}")
    return " · ".join(parts)


def parts(tallies: Sequence[Tally]) -> list[str]:
    """One line about each part of a drafter: a level of a hierarchy, a store, a source."""
    lines = []
    for tally in tallies:
        kept = "" if tally.accepted is None else f", {sum(tally.accepted):,} kept"
        words = [f"asked {tally.asked:,} times, {tally.hits:,} with an answer", f"{tally.drafted:,} tokens{kept}"]
        if tally.asked:
            words.append(f"{1e6 * tally.seconds / tally.asked:,.0f} us each")
        if tally.passes:
            words.append(f"{tally.passes:,} passes")
        lines.append(f"  {tally.name}: {'; '.join(words)}")
    return lines


@contextmanager
def bar(what: str, total: int, done: int = 0) -> Iterator[Callable[[], None]]:
    """A bar on stderr, if that is a terminal and anybody wants one; what it gives advances it by one."""
    console = on_stderr()
    with Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total, completed=done)
        yield lambda: progress.advance(task)


def on_stderr() -> Console:
    """Where bars and examples go; nothing of it with --quiet."""
    return Console(stderr=True, highlight=False, quiet=not logging.getLogger("forerun").isEnabledFor(logging.INFO))


def on_stdout() -> Console:
    """Where generated text goes."""
    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
