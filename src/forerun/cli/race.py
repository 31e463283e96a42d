"""Several engines continue one prompt side by side, each with a clock of its own, in panes or as plain text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from forerun.cli.ink import Ink
from forerun.engine.engine import Engine
from forerun.engine.requests import Piece
from forerun.sampling import SamplingParams

SECONDS = 8.0
"""How long the slowest of the panes should take to fill, where the machine would be too fast to follow."""
FRAME_SECONDS = 0.04
NARROW, LOW, HIGH = 80, 6, 18
"""Columns from which panes stand side by side; lines of a pane, at least and at most."""


@dataclass(frozen=True)
class Moment:
    """A piece of one engine, and what that engine's own clock says: seconds since its first piece."""

    name: str
    seconds: float
    piece: Piece


def race(engines: Mapping[str, Engine], tokens: Sequence[int], params: SamplingParams) -> Iterator[Moment]:
    """The pieces of all engines in the order of their clocks.

    The engines take turns: whoever is behind makes the next step, so each clock runs only while its
    engine does. The clocks start when the prompt has been read and the first words are there.
    """
    for engine in engines.values():
        engine.drafter.reset()  # an earlier run may have left the very answer
    sessions = {name: engine.stream([list(tokens)], params) for name, engine in engines.items()}
    clocks = dict.fromkeys(engines, -1.0)
    while sessions:
        name = min(sessions, key=clocks.__getitem__)
        begun = time.perf_counter()
        piece = next(sessions[name])
        clocks[name] = clocks[name] + time.perf_counter() - begun if clocks[name] >= 0 else 0.0
        if piece.finish_reason:
            del sessions[name]
        yield Moment(name, clocks[name], piece)


@dataclass
class Lane:
    """What one engine has said so far."""

    title: str
    words: list[tuple[str, str]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    is_over: bool = False

    def add(self, moment: Moment) -> None:
        piece = moment.piece
        self.words += zip(piece.texts, piece.origins, strict=True)
        self.steps += 1
        self.seconds = moment.seconds
        self.is_over = piece.finish_reason is not None

    @property
    def text(self) -> str:
        return "".join(word for word, _ in self.words)

    @property
    def account(self) -> str:
        return f"{len(self.words)} tokens, {self.steps} steps, {self.seconds:.2f} s"


def show(
    console: Console,
    engines: Mapping[str, Engine],
    tokens: Sequence[int],
    params: SamplingParams,
    tokens_per_second: float,
) -> list[Lane]:
    """Race, and show it as it happens: in panes on a terminal, afterwards as text elsewhere.

    tokens_per_second: about what the slowest makes; what is too fast to follow is slowed down. Returns the lanes, in
    the engines' order.
    """
    lanes = {name: Lane("plain" if name == "none" else name) for name in engines}
    moments = race(engines, tokens, params)
    if not console.is_terminal:
        for moment in moments:
            lanes[moment.name].add(moment)
        _print(console, list(lanes.values()))
        return list(lanes.values())
    ink, length = Ink(), params.max_new_tokens or 0
    slowed = max(1.0, SECONDS * tokens_per_second / max(1, length))
    with Live(console=console, auto_refresh=False) as live:
        begun = drawn = time.perf_counter()
        for moment in moments:
            time.sleep(max(0.0, begun + slowed * moment.seconds - time.perf_counter()))
            lanes[moment.name].add(moment)
            if time.perf_counter() - drawn >= FRAME_SECONDS:
                live.update(frame(console, list(lanes.values()), ink, slowed), refresh=True)
                drawn = time.perf_counter()
        live.update(frame(console, list(lanes.values()), ink, slowed), refresh=True)
    console.print()
    return list(lanes.values())


def frame(console: Console, lanes: Sequence[Lane], ink: Ink, slowed: float) -> RenderableType:
    """The panes as they stand, side by side where there is room, and the legend below."""
    is_wide = console.width >= NARROW
    across = len(lanes) if is_wide else 1
    down = 1 if is_wide else len(lanes)
    height = max(LOW, min(HIGH, (console.height - 6) // down))
    panes = [_pane(console, lane, ink, console.width // across, height) for lane in lanes]
    table = Table.grid(expand=True)
    for _ in range(across):
        table.add_column(ratio=1)
    for start in range(0, len(panes), across):
        table.add_row(*panes[start : start + across])
    pace = f"Slowed down {slowed:.0f} times. " if slowed > 1.5 else ""
    turns = "They take turns on this machine, and each clock counts its own time only." if len(lanes) > 1 else ""
    return Group(table, ink.legend_text(), Text(f"{pace}{turns}", style="dim"))


def _pane(console: Console, lane: Lane, ink: Ink, width: int, height: int) -> Panel:
    text = Text.assemble(*((word, ink.style(origin)) for word, origin in lane.words))
    lines = text.wrap(console, max(1, width - 4), tab_size=4)
    tail = Text("\n").join(lines[-(height - 2) :])
    style = "green" if lane.is_over else "dim"
    return Panel(tail, title=Text(lane.title), subtitle=lane.account, height=height, border_style=style)


def _print(console: Console, lanes: Sequence[Lane]) -> None:
    """Each text once, and below it who said it at what cost."""
    for text in dict.fromkeys(lane.text for lane in lanes):
        console.print(text + "\n", highlight=False, markup=False, soft_wrap=True)
        for lane in lanes:
            if lane.text == text:
                console.print(f"  {lane.title}: {lane.account}", highlight=False, markup=False, soft_wrap=True)
        console.print()
