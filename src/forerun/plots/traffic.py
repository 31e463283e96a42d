"""Servers under load: what they say a second, and how long one waits, by how much is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from forerun.plots.style import Sheet, Theme

PANELS = {
    "tokens_per_second": ("Tokens per second", 1.0),
    "goodput": ("Requests per second within the promise", 1.0),
    "wait_95": ("Milliseconds to the first text, 95th percentile", 1e3),
    "pace_95": ("Milliseconds per token, 95th percentile", 1e3),
}
COLOURS = ("accepted", "draft", "loss", "loser", "plain")

Figures = Mapping[str, float]


def drawing(servers: Mapping[str, Sequence[tuple[float, Figures]]], title: str, under: str) -> Callable[[Theme], Sheet]:
    """servers: by name, (size of the load, its figures), ascending."""

    def draw(theme: Theme) -> Sheet:
        sheet = Sheet(theme, title, under, [name for name, _ in PANELS.values()])
        for axes, (figure, (_, scale)) in zip(sheet.panels, PANELS.items(), strict=True):
            ends = []
            for place, (name, rows) in enumerate(servers.items()):
                colour = theme[COLOURS[place % len(COLOURS)]]
                points = [(size, scale * figures[figure]) for size, figures in rows]
                sheet.line(axes, points, colour)
                ends.append((name, points[-1][1], colour))
            sheet.name(axes, ends)
        return sheet

    return draw
