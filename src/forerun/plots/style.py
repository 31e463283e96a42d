"""How every picture looks: one colour per meaning, the same in all pictures, light and dark.

A picture says above what is shown, and below that on which model and machine. Lines are named where
they end, so that nobody has to look from a legend to a line and back. matplotlib is asked for only
when something is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forerun.errors import ForerunError
from forerun.files import put

INCH_PER_PANEL = (5.2, 3.1)
GAP = 0.075
"""Between the names of two lines, as a share of a panel's height."""


@dataclass(frozen=True)
class Theme:
    """Colours. ink: words that matter; quiet: the others; faint: the grid. meanings: by what something is."""

    ground: str
    ink: str
    quiet: str
    faint: str
    meanings: Mapping[str, str] = field(repr=False)

    def __getitem__(self, meaning: str) -> str:
        return self.meanings[meaning]

    def shades(self, meaning: str, count: int) -> list[str]:
        """So many of a colour, from its own towards the ground: what is first counts most."""
        own, ground = _channels(self[meaning]), _channels(self.ground)
        shares = [0.5 * place / max(1, count - 1) for place in range(count)]
        mixed = [[round(a + (b - a) * share) for a, b in zip(own, ground, strict=True)] for share in shares]
        return ["#" + "".join(f"{channel:02x}" for channel in each) for each in mixed]


def _channels(colour: str) -> list[int]:
    return [int(colour[at : at + 2], 16) for at in (1, 3, 5)]


LIGHT = Theme(
    "#ffffff",
    "#1c2127",
    "#68717d",
    "#e7eaee",
    {
        "plain": "#8a929c",
        "loss": "#2f6db5",
        "accepted": "#23875a",
        "draft": "#d9822b",
        "verify": "#2f6db5",
        "other": "#c3c9d1",
        "loser": "#c8453b",
    },
)
DARK = Theme(
    "#14181d",
    "#e8ebef",
    "#98a2ae",
    "#2a3139",
    {
        "plain": "#7d8793",
        "loss": "#6ea8e8",
        "accepted": "#56c596",
        "draft": "#f0a35a",
        "verify": "#6ea8e8",
        "other": "#4a545f",
        "loser": "#e5776d",
    },
)
THEMES = {"": LIGHT, "-dark": DARK}
"""What a file's name has behind its stem."""


def demand_matplotlib() -> None:
    """ForerunError where matplotlib is missing; ask before a long work begins."""
    figure_class()


def figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ForerunError("a picture needs matplotlib: install it with pip install 'forerun[plots]'") from None
    return Figure


class Sheet:
    """A picture that is being drawn: a title, a line below it, and panels side by side, two in a row.

    panel_height and left (the room for names beside the first panel) are in inches.
    """

    def __init__(
        self,
        theme: Theme,
        title: str,
        under: str,
        panels: Sequence[str],
        panel_height: float = INCH_PER_PANEL[1],
        left: float = 0.62,
    ):
        self.theme, columns = theme, min(2, len(panels))
        rows = -(-len(panels) // columns)
        width, height = max(6.6, columns * INCH_PER_PANEL[0] + left - 0.62), rows * panel_height + 0.9
        self.figure = figure_class()(figsize=(width, height), facecolor=theme.ground)
        inch_x, inch_y = 1 / width, 1 / height
        self.figure.subplots_adjust(
            left=left * inch_x, right=1 - 0.85 * inch_x, top=1 - 1.25 * inch_y, bottom=0.55 * inch_y
        )
        self.figure.subplots_adjust(wspace=0.34, hspace=0.5)
        self.figure.text(0.62 * inch_x, 1 - 0.38 * inch_y, title, color=theme.ink, size=13, weight="bold")
        self.figure.text(0.62 * inch_x, 1 - 0.64 * inch_y, under, color=theme.quiet, size=8.5)
        self.panels = [self._panel(rows, columns, place, name) for place, name in enumerate(panels, 1)]

    def _panel(self, rows: int, columns: int, place: int, name: str) -> Any:
        theme = self.theme
        axes = self.figure.add_subplot(rows, columns, place, facecolor=theme.ground)
        axes.set_title(name, loc="left", color=theme.ink, size=9.5, pad=9)
        axes.grid(axis="y", color=theme.faint, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.locator_params(axis="y", nbins=5)
        axes.tick_params(colors=theme.quiet, labelsize=8, length=0, pad=5)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(theme.faint)
        return axes

    def line(self, axes: Any, points: Sequence[tuple[float, float]], colour: str, **how: Any) -> None:
        """Few points are marked, for a line may be short of them."""
        xs, ys = [x for x, _ in points], [y for _, y in points]
        marker = {"marker": "o", "markersize": 3.5} if len(points) <= 40 and how.get("linewidth", 2) > 1 else {}
        axes.plot(xs, ys, color=colour, solid_capstyle="round", **({"linewidth": 2} | marker | how))

    def name(self, axes: Any, ends: Sequence[tuple[str, float, str]]) -> None:
        """Names of lines (name, height of the end, colour), right of the panel, none upon another."""
        low, high = axes.get_ylim()
        heights = apart([(height - low) / (high - low) for _, height, _ in ends], GAP)
        for (name, _, colour), height in zip(ends, heights, strict=True):
            axes.text(1.02, height, name, color=colour, size=8, va="center", transform=axes.transAxes)

    def content(self, kind: str = "png") -> bytes:
        """The picture's file (png, svg or pdf)."""
        file = io.BytesIO()
        try:
            self.figure.savefig(file, format=kind, dpi=160, facecolor=self.theme.ground)
        except ValueError:
            raise ForerunError(f"a picture cannot be written as {kind!r}: name the file .png, .svg or .pdf") from None
        return file.getvalue()


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Moved as little as may be so that none is nearer than `gap` to the next; order stays."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    groups: list[list[int]] = [[place] for place in order]

    def middle(group: list[int]) -> float:
        return sum(heights[place] for place in group) / len(group)

    at = 0
    while at + 1 < len(groups):
        below, above = groups[at], groups[at + 1]
        if middle(above) - middle(below) < gap * (len(above) + len(below)) / 2 - 1e-12:
            groups[at : at + 2] = [below + above]
            at = max(0, at - 1)
        else:
            at += 1
    moved = list(heights)
    for group in groups:
        for place, number in enumerate(group):
            moved[number] = middle(group) + gap * (place - (len(group) - 1) / 2)
    return moved


def write(draw: Callable[[Theme], Sheet], path: Path) -> list[Path]:
    """The picture in both themes: PATH, and beside it the dark one. ForerunError without
    matplotlib, or if it cannot be written."""
    kind = path.suffix.removeprefix(".") or "png"
    paths = []
    for ending, theme in THEMES.items():
        place = path.with_name(f"{path.stem}{ending}.{kind}")
        content = draw(theme).content(kind)
        try:
            put(place, content)
        except OSError as error:
            raise ForerunError(f"{place} cannot be written ({error.strerror}): make room, or name another") from None
        paths.append(place)
    return paths
