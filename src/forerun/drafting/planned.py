"""A plan: what was found to be the fastest way to draft for one target on one machine, as a file.

`forerun plan` writes it (docs/planning.md has its schema), and `auto` drafts by it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from forerun.drafting.pace import Expected
from forerun.drafting.spec import anchored, loosened
from forerun.errors import DrafterError
from forerun.files import put

NAME = "forerun-plan.json"
VERSION = 1


def place_of_plan(home: Path) -> Path:
    """Where the plan for the model in a folder is found; or for one in a file, beside which there may be others."""
    return home.with_name(f"{home.stem}.{NAME}") if home.is_file() else home / NAME


@dataclass(frozen=True)
class Choice:
    """What is fastest for so many requests side by side at a temperature. drafter: its description, "none" for plain
    decoding. figures: what was predicted and measured of it, and of the others."""

    rows: int
    temperature: float
    drafter: Mapping[str, Any]
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """target: its name and fingerprint; machine: what the seconds are true of. costs: of the target's steps, as
    [rows, context, nodes, seconds, error]; drafts: seconds of every candidate's proposals, by name and rows. about:
    when and on what it was made."""

    target: Mapping[str, Any]
    machine: Mapping[str, Any]
    choices: Sequence[Choice]
    costs: Sequence[Sequence[float]] = ()
    drafts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def drafters(self) -> list[Mapping[str, Any]]:
        """Those chosen for any number of rows, each once; plain decoding is none."""
        found: list[Mapping[str, Any]] = []
        for choice in self.choices:
            if choice.drafter not in found and choice.drafter.get("drafter") != "none":
                found.append(choice.drafter)
        return found

    @property
    def steps(self) -> list[tuple[int, float, int]]:
        """(nodes of all rows, seconds, rows) of the target's steps, in the shortest context that was measured."""
        shortest: dict[float, float] = {}
        for rows, context, *_ in self.costs:
            shortest[rows] = min(context, shortest.get(rows, context))
        return [
            (int(rows * nodes), float(seconds), int(rows))
            for rows, context, nodes, seconds, *_ in self.costs
            if context == shortest[rows]
        ]

    def expected(self, drafter: Mapping[str, Any]) -> Expected | None:
        """What was predicted of it, on average over the cases that it was chosen for. None where nothing was."""
        figures = [one.figures for one in self.choices if one.drafter == drafter]
        try:
            nodes = fmean(float(one["nodes_per_step"]) - 1 for one in figures)
            tokens = fmean(float(one["tokens_per_step"]) - 1 for one in figures)
            drafts = self.drafts.get(figures[0]["name"], {})
            seconds = {int(rows): float(value) for rows, value in drafts.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        are_sound = all(isfinite(value) and value >= 0 for value in (nodes, tokens, *seconds.values()))
        return Expected(nodes, tokens, seconds) if are_sound else None

    def write(self, path: Path) -> None:
        """At once. What drafters name is named as it lies from there. Raises OSError."""
        choices = [
            {
                "rows": one.rows,
                "temperature": one.temperature,
                "drafter": loosened(one.drafter, path.parent),
                **one.figures,
            }
            for one in self.choices
        ]
        content = {
            "forerun_plan": VERSION,
            "target": self.target,
            "machine": self.machine,
            "choices": choices,
            "costs": self.costs,
            "drafts": self.drafts,
            **self.about,
        }
        put(path, f"{json.dumps(content, indent=1)}\n".encode())

    @staticmethod
    def read(path: Path) -> Planned:
        """DrafterError for what cannot be read or is no plan."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DrafterError(f"cannot read the plan {path}: {error.strerror}") from None
        except ValueError:
            raise DrafterError(f"the plan {path} is not JSON: make it again with forerun plan") from None
        try:
            if content.pop("forerun_plan") != VERSION:
                raise DrafterError(f"the plan {path} was made by another version: make it again with forerun plan")
            return Planned(
                dict(content.pop("target")),
                dict(content.pop("machine")),
                [_choice(dict(one), path.parent) for one in content.pop("choices")],
                [[float(value) for value in point] for point in content.pop("costs")],
                {str(name): dict(seconds) for name, seconds in content.pop("drafts").items()},
                content,
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            raise DrafterError(f"{path} is no plan of forerun plan: make it again") from None


def _choice(content: dict[str, Any], folder: Path) -> Choice:
    rows, temperature = int(content.pop("rows")), float(content.pop("temperature"))
    return Choice(rows, temperature, anchored(dict(content.pop("drafter")), folder), content)
