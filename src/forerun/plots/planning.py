"""A plan as a picture: what the target's steps cost, and how candidates rank, predicted and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forerun.plots.style import Sheet, Theme

SHOWN = 8
"""Candidates of a ranking that are drawn, plain decoding not counted."""
LEFT = 2.2
"""Inches for their names."""


@dataclass(frozen=True)
class Ranked:
    """A panel. candidates: figures as a plan's file has them, the best first."""

    title: str
    candidates: Sequence[Mapping[str, Any]]


def drawing(
    costs: Sequence[Sequence[float]], rankings: Sequence[Ranked], title: str, under: str
) -> Callable[[Theme], Sheet]:
    """costs: [rows, context, nodes, seconds, error], as the file has them."""

    def draw(theme: Theme) -> Sheet:
        panels = ["Milliseconds of a step, by the nodes of each row", *(one.title for one in rankings)]
        sheet = Sheet(theme, title, under, panels, left=LEFT)
        sheet.figure.subplots_adjust(wspace=0.75)
        _curves(sheet, sheet.panels[0], costs)
        for axes, one in zip(sheet.panels[1:], rankings, strict=True):
            _ranks(sheet, axes, one.candidates)
        return sheet

    return draw


def _curves(sheet: Sheet, axes: Any, costs: Sequence[Sequence[float]]) -> None:
    """A line per number of rows, at the shortest context and, thinner, at the longest."""
    counts = sorted({int(point[0]) for point in costs})
    ends = []
    for rows, shade in zip(counts, sheet.theme.shades("verify", len(counts)), strict=True):
        own = [point for point in costs if point[0] == rows]
        contexts = sorted({point[1] for point in own})
        for context in dict.fromkeys((contexts[-1], contexts[0])):
            points = [(point[2], 1e3 * point[3]) for point in own if point[1] == context]
            sheet.line(axes, points, shade, linewidth=2 if context == contexts[0] else 1)
        ends.append((f"{rows} row{'s' * (rows > 1)}", points[-1][1], sheet.theme.quiet))
    _in_plain_numbers(axes)
    axes.set_xlabel("nodes", color=sheet.theme.quiet, size=8, loc="right", labelpad=1)
    _name_on_log(axes, ends)


def _in_plain_numbers(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _name_on_log(axes: Any, ends: Sequence[tuple[str, float, str]]) -> None:
    for name, height, colour in ends:
        axes.annotate(name, (1.02, height), xycoords=("axes fraction", "data"), color=colour, size=8, va="center")


def _ranks(sheet: Sheet, axes: Any, candidates: Sequence[Mapping[str, Any]]) -> None:
    """Tokens per second: predicted with its standard error, measured from the slowest round to the fastest."""
    theme = sheet.theme
    shown = [one for one in candidates if one["name"] != "none"][:SHOWN]
    shown += [one for one in candidates if one["name"] == "none"]
    for place, one in enumerate(shown):
        axes.errorbar(
            one["predicted"],
            place - 0.12,
            xerr=one["error"],
            fmt="o",
            markersize=4,
            color=theme["draft"],
            linewidth=1.2,
        )
        if "measured" in one:
            reach = [[one["measured"] - one["slowest"]], [one["fastest"] - one["measured"]]]
            colour = theme["plain" if one["name"] == "none" else "accepted"]
            axes.errorbar(one["measured"], place + 0.16, xerr=reach, fmt="s", markersize=4, color=colour, linewidth=1.2)
    axes.set_yticks(range(len(shown)), [_short(str(one["name"])) for one in shown])
    axes.set_ylim(len(shown) - 0.5, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel(
        "tokens/s: predicted (round), measured (square)", color=theme.quiet, size=8, loc="right", labelpad=1
    )


def _short(name: str, most: int = 32) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
