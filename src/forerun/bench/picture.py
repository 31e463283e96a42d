"""A measurement as a picture: how fast every drafter is, and where its time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from forerun.bench.run import Summary
from forerun.plots.style import Sheet, Theme

PARTS = ("draft", "verify", "other")
INCH_PER_ROW, INCH_PER_LETTER, MOST_LETTERS = 0.36, 0.075, 36


def drawing(rows: Sequence[Summary], title: str, under: str) -> Callable[[Theme], Sheet]:
    """Left: tokens per second, with the range over rounds, and how many times plain that is; right:
    milliseconds per token. Plain decoding is the first row."""
    names = [_short(row.drafter) for row in rows]

    def draw(theme: Theme) -> Sheet:
        left = 0.3 + INCH_PER_LETTER * max(map(len, names))
        size = (max(3.0, INCH_PER_ROW * len(rows) + 1.4), left)
        sheet = Sheet(theme, title, under, ["Tokens per second", "Time per token, ms"], *size)
        for axes in sheet.panels:
            axes.grid(visible=False, axis="y")
            axes.grid(axis="x", color=theme.faint, linewidth=0.8)
            axes.spines["bottom"].set_visible(False)
            axes.set_yticks(range(len(rows)), names if axes is sheet.panels[0] else [""] * len(rows))
            axes.set_ylim(len(rows) - 0.5, -0.5)
        _speeds(sheet.panels[0], rows, theme)
        _costs(sheet.panels[1], rows, theme)
        return sheet

    return draw


def _short(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else name[: MOST_LETTERS - 3] + "..."


def _speeds(axes: Any, rows: Sequence[Summary], theme: Theme) -> None:
    for place, row in enumerate(rows):
        colour = theme["plain"] if place == 0 else theme["accepted"] if row.speedup >= 1 else theme["loser"]
        axes.barh(place, row.tokens_per_second, 0.62, color=colour)
        axes.plot(row.spread, [place, place], color=theme.ink, linewidth=1, solid_capstyle="butt")
        axes.annotate(f"{row.speedup:.2f}x", (row.spread[1], place), (6, 0), **_word(theme))
    axes.set_xlim(0, 1.18 * max(row.spread[1] for row in rows))


def _costs(axes: Any, rows: Sequence[Summary], theme: Theme) -> None:
    ends = [0.0] * len(rows)
    for name in PARTS:
        widths = [1e3 * getattr(row, f"{name}_seconds") / max(1, row.new_tokens) for row in rows]
        axes.barh(range(len(rows)), widths, 0.62, left=ends, color=theme[name], label=name)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for place, (row, end) in enumerate(zip(rows, ends, strict=True)):
        axes.annotate(f"{row.tokens_per_step:.2f} tokens per step", (end, place), (6, 0), **_word(theme))
    axes.set_xlim(0, 1.5 * max(ends))
    legend = axes.legend(loc="lower right", bbox_to_anchor=(1.12, 1.0), ncols=len(PARTS), frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_color(theme.quiet)


def _word(theme: Theme) -> dict[str, Any]:
    return {"textcoords": "offset points", "va": "center", "size": 8, "color": theme.quiet}
