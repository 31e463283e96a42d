"""From what a planner found to the file that says so."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import forerun
from forerun.drafting.planned import Choice, Planned
from forerun.errors import DrafterError
from forerun.plan.costs import Costs
from forerun.plan.planner import Elsewhere, Ranking, Result
from forerun.sources.source import Source


def planned(
    target: Source, machine: Mapping[str, Any], results: Mapping[float, Result], about: Mapping[str, Any]
) -> Planned:
    """results: by temperature. machine: what the seconds are true of. about: the user's prompts and the like."""
    choices: list[Choice] = []
    drafts: dict[str, dict[str, float]] = {}
    for temperature, result in results.items():
        choices += [_choice(ranking, temperature, result) for ranking in result.rankings]
        drafts |= result.drafts
    some = next(iter(results.values()))
    made = {"version": forerun.__version__, "date": datetime.date.today().isoformat(), **about}
    name = {"name": target.name, "fingerprint": target.fingerprint}
    return Planned(name, machine, choices, some.costs.as_list(), drafts, made)


def _choice(ranking: Ranking, temperature: float, result: Result) -> Choice:
    winner = ranking.winner
    figures = {
        **winner.as_dict(),
        "over_plain": ranking.over_plain(winner),
        "off_over_plain": ranking.off(winner) if winner.measured else None,
        "plain": ranking.plain.as_dict(),
        "bound": result.hierarchy.bound if result.hierarchy and ranking.rows == 1 else None,
        "candidates": [one.as_dict() for one in ranking.ranks],
        "unseen": list(ranking.unseen),
    }
    return Choice(ranking.rows, temperature, winner.candidate.description, figures)


def elsewhere(path: Path, target: Source) -> tuple[Elsewhere, Mapping[str, Any]]:
    """Another machine, from a plan that was made there, and its record. DrafterError where it is about another
    target."""
    there = Planned.read(path)
    if there.target.get("fingerprint") != target.fingerprint:
        raise DrafterError(f"{path} has the costs of another target: make a plan of this one on that machine")
    return Elsewhere(Costs.of(there.costs), there.drafts), there.machine
