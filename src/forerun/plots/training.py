"""A training as a picture: how the loss fell, and how much more was accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from forerun.plots.style import Sheet, Theme

Row = Mapping[str, float]
"""Figures after a step, as a run's log has them."""
JUDGED = "discriminator_accuracy"


SHARES = {"given": "Right where all heads before are", "top1": "Best token is right, by head"}


def drawing(rows: Sequence[Row], title: str, under: str) -> Callable[[Theme], Sheet]:
    """The picture of a log that has at least one row with a held-out `loss`. A language model has
    a loss alone; heads have losses and accuracies of their own, and tokens per step; a discriminator
    that they learn against is right or wrong about them."""
    last = _checked(rows)[-1]
    count = sum(name.startswith("head") and name.endswith("_loss") for name in last)
    is_opposed = JUDGED in last
    share = "given" if "head1_given" in last else "top1"  # which older logs have alone

    def draw(theme: Theme) -> Sheet:
        from matplotlib.ticker import PercentFormatter

        panels = ["Loss, nats"]
        if count:
            panels += ["Loss of every head, nats", SHARES[share], "Tokens per step, projected"]
        if is_opposed:
            panels.append("Discriminator is right")
        sheet = Sheet(theme, title, under, panels)
        _losses(sheet, sheet.panels[0], rows)
        if count:
            _heads(sheet, sheet.panels[1], rows, "head{}_loss", "loss", count)
            _heads(sheet, sheet.panels[2], rows, f"head{{}}_{share}", "accepted", count)
            sheet.panels[2].yaxis.set_major_formatter(PercentFormatter(1))  # with as many decimals as it takes
            _steps(sheet, sheet.panels[3], rows)
        if is_opposed:
            _judged(sheet, sheet.panels[-1], rows)
        for axes in sheet.panels:
            _steps_below(axes, rows, theme)
        return sheet

    return draw


def _checked(rows: Sequence[Row]) -> list[Row]:
    """Those with figures on held-out text."""
    return [row for row in rows if "loss" in row]


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def _losses(sheet: Sheet, axes: Any, rows: Sequence[Row]) -> None:
    theme, seen, held = sheet.theme, _points(rows, "train_loss"), _points(rows, "loss")
    sheet.line(axes, seen, theme["plain"], linewidth=1, alpha=0.8)
    sheet.line(axes, held, theme["loss"])
    axes.set_ylim(bottom=min(0.98 * min(y for _, y in (*seen, *held)), axes.get_ylim()[0]))
    sheet.name(axes, [("training", seen[-1][1], theme["plain"]), ("held out", held[-1][1], theme["loss"])])


def _heads(sheet: Sheet, axes: Any, rows: Sequence[Row], name: str, meaning: str, count: int) -> None:
    ends = []
    for head, shade in enumerate(sheet.theme.shades(meaning, count), 1):
        points = _points(rows, name.format(head))
        sheet.line(axes, points, shade)
        ends.append((f"head {head}", points[-1][1], sheet.theme.quiet))  # the lightest shades are hard to read
    sheet.name(axes, ends)


def _steps(sheet: Sheet, axes: Any, rows: Sequence[Row]) -> None:
    theme, points = sheet.theme, _points(rows, "tokens_per_step")
    axes.axhline(1, color=theme["plain"], linewidth=1, linestyle=(0, (4, 3)))
    sheet.line(axes, points, theme["accepted"])
    axes.set_ylim(0.9, max(1.5, 1.08 * max(y for _, y in points)))
    sheet.name(axes, [("plain", 1.0, theme["plain"]), (f"{points[-1][1]:.2f}", points[-1][1], theme["accepted"])])


def _judged(sheet: Sheet, axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import PercentFormatter

    theme, points = sheet.theme, _points(rows, JUDGED)
    axes.axhline(0.5, color=theme["plain"], linewidth=1, linestyle=(0, (4, 3)))
    sheet.line(axes, points, theme["loss"])
    axes.set_ylim(min(0.4, *(y for _, y in points)), 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    sheet.name(axes, [("no idea", 0.5, theme["plain"]), ("held out", points[-1][1], theme["loss"])])


def _steps_below(axes: Any, rows: Sequence[Row], theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    last = max(row["step"] for row in rows)
    axes.set_xlim(0, 1.02 * last)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    axes.set_xlabel("steps", color=theme.quiet, size=8, loc="right", labelpad=1)
