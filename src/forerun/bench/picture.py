"""A measurement as a picture: how fast every drafter is, and where its seconds go."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from forerun.bench.run import Summary
from forerun.errors import ForerunError

PARTS = (("draft", "#8fbf7f"), ("verify", "#4878a8"), ("other", "#b0b0b0"))


def demand_matplotlib() -> None:
    """ForerunError where matplotlib is missing; ask before the measuring begins."""
    _figure_class()


def draw(rows: Sequence[Summary], title: str, kind: str = "png") -> bytes:
    """The picture's file (png, svg or pdf). Left: tokens per second, with the range over rounds;
    right: seconds per token."""
    figure = _figure_class()(figsize=(10, 1.6 + 0.55 * len(rows)), layout="constrained")
    speed, cost = figure.subplots(1, 2, sharey=True)
    _draw_speed(speed, rows)
    _draw_cost(cost, rows)
    figure.suptitle(title, fontsize=10)
    content = io.BytesIO()
    try:
        figure.savefig(content, format=kind, dpi=150)
    except ValueError:
        raise ForerunError(f"a picture cannot be written as {kind!r}: name the file .png, .svg or .pdf") from None
    return content.getvalue()


def _draw_speed(axes: Any, rows: Sequence[Summary]) -> None:
    speeds = [row.tokens_per_second for row in rows]
    reach = [
        [row.tokens_per_second - row.spread[0] for row in rows],
        [row.spread[1] - row.tokens_per_second for row in rows],
    ]
    bars = axes.barh([row.drafter for row in rows], speeds, xerr=reach, color="#4878a8", capsize=3)
    axes.bar_label(bars, [f"{row.speedup:.2f}x" for row in rows], padding=4)
    axes.set_xlim(right=1.2 * max(row.spread[1] for row in rows))
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second: median, slowest and fastest round", fontsize=8)


def _draw_cost(axes: Any, rows: Sequence[Summary]) -> None:
    starts = [0.0] * len(rows)
    for name, colour in PARTS:
        widths = [1e3 * getattr(row, f"{name}_seconds") / max(1, row.new_tokens) for row in rows]
        axes.barh([row.drafter for row in rows], widths, left=starts, color=colour, label=name)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for place, (row, end) in enumerate(zip(rows, starts, strict=True)):
        axes.annotate(f" {row.tokens_per_step:.2f} tokens per step", (end, place), va="center", fontsize=8)
    axes.set_xlim(right=1.6 * max(starts))
    axes.set_xlabel("milliseconds per token", fontsize=8)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(PARTS), frameon=False)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ForerunError("a picture needs matplotlib: install it with pip install 'forerun[plots]'") from None
    return Figure
