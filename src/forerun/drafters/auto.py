"""What to draft with where nobody says: what a plan says, or whatever lies beside the target, under a switch that
measures.

A plan of `forerun plan` for this target, in its folder, names what was fastest: these drafters and the stores are the
parts then, and the switch begins with what it promises of them; with its costs too, if it was made on this machine.
Without one:

The stores of tokens need nothing and are always there. Behind them stands what was made for this
target and lies in its folder or beside it: the trained heads whose record names its fingerprint (of
several those that promised most tokens per step), and the smallest draft model of its tokenizer
that has at most an eighth of its size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from forerun.drafters.switch import Switch, is_certain
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.drafter import Drafter
from forerun.drafting.method import Method
from forerun.drafting.planned import Planned, place_of_plan
from forerun.drafting.registry import is_known
from forerun.drafting.settings import setting
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError, ForerunError
from forerun.nn.machine import record
from forerun.nn.network import Network
from forerun.sources.folder import CONFIG
from forerun.sources.gguf.head import SUFFIX, begins
from forerun.sources.source import Source

log = logging.getLogger(__name__)

STORES = {"drafter": "hierarchy"}
SMALLER = 8
"""A draft model is worth trying from so many times smaller on."""


@dataclass(frozen=True)
class Settings:
    """{"drafter": "auto"}"""

    checkpoint: str | None = setting(None, "A plan that does not lie in the target's folder.", "plan")


def build(workshop: Workshop, settings: Settings) -> Drafter:
    """Something that a plan names, or that lies beside the target, is left out with a warning if it turns out to be
    broken; so is a plan that nobody asked for."""
    plan = plan_for(workshop.target.network, settings.checkpoint)
    return _beside(workshop) if plan is None else _planned(workshop, plan)


def plan_for(target: Network, path: str | None) -> Planned | None:
    """The plan of this name, or the one in the target's folder if there is any. DrafterError for one that was asked
    for and cannot be followed."""
    if path is not None:
        return _fitting(target, Path(path))
    place = place_of_plan(target.home) if target.home is not None else None
    if place is None or not place.exists():
        return None
    try:
        return _fitting(target, place)
    except DrafterError as error:
        log.warning("%s", error)
        return None


def _fitting(target: Network, path: Path) -> Planned:
    found = Planned.read(path)
    own = Source.of(target.home).fingerprint if target.home is not None else None
    if found.target.get("fingerprint") != own:
        raise DrafterError(f"the plan {path} was made for another target: make one with forerun plan")
    here = record(target)
    if dict(found.machine) == here:
        return found
    different = [f"{name} {found.machine.get(name)}" for name in here if found.machine.get(name) != here[name]]
    log.info(
        "the plan %s was made on another machine (%s): what it chose is used, and costs are learnt anew",
        path,
        ", ".join(different),
    )
    return replace(found, costs=(), drafts={})


def _planned(workshop: Workshop, plan: Planned) -> Drafter:
    """The plan's choices come first: where no clock may have a say, the first part answers."""
    parts: list[Drafter] = []
    certain, known = [], {}
    for description in [*plan.drafters, STORES]:
        try:
            parts.append(workshop.build(description))
        except ForerunError as error:
            log.warning("%s is not used: %s", description["drafter"], error)
            continue
        certain.append(is_certain(description))
        expected = plan.expected(description)
        if expected is not None:
            known[len(parts) - 1] = expected
    made = Switch(parts, certain, METHOD.name, known)
    made.known_costs = plan.steps
    return made


def _beside(workshop: Workshop) -> Drafter:
    parts, certain = [workshop.build(STORES)], [is_certain(STORES)]
    for candidates in beside(workshop.target.network.home):
        for found in candidates:
            description = {"drafter": "fallback", "sources": [STORES, found]}
            try:
                parts.append(workshop.build(description))
            except ForerunError as error:
                log.warning("%s is not used: %s", found["checkpoint"], error)
                continue
            certain.append(is_certain(description))
            log.info("drafts with %s:%s", found["drafter"], found["checkpoint"])
            break
    return Switch(parts, certain, METHOD.name)


def beside(home: Path | None) -> list[list[dict[str, Any]]]:
    """Descriptions of heads for the target that lies here, the best first, and of draft models, the smallest first."""
    if home is None:
        return []
    target, folders = Source.of(home), list(_folders(home))
    heads = [one for one in map(_heads, folders) if one is not None and _target_of(one) == target.fingerprint]
    models = [one for one in map(Source.of, [*folders, *_files(target)]) if _is_draft_model(one, target)]
    return [
        [{"drafter": one.drafter, "checkpoint": str(one.folder)} for one in sorted(heads, key=_promise, reverse=True)],
        [{"drafter": "small", "checkpoint": str(one.path)} for one in sorted(models, key=_size)],
    ]


def _folders(home: Path) -> Iterator[Path]:
    """Folders with a config, in this one and beside it, in an order that does not change."""
    for place in (home, home.absolute().parent):
        yield from sorted(one.parent for one in place.glob(f"*/{CONFIG}") if one.parent.resolve() != home.resolve())


def _files(target: Source) -> Iterator[Path]:
    """Beside a target in a GGUF file, others that are much smaller: there, a family of models is a folder of files."""
    if target.path.is_file():
        most = target.weights.bytes / SMALLER
        beside = sorted(target.path.absolute().parent.glob(f"*{SUFFIX}"))
        yield from (one for one in beside if one.stat().st_size <= most and begins(one))


def _heads(folder: Path) -> Checkpoint | None:
    try:
        found = checkpoints.read(folder)
    except ForerunError:
        return None
    return found if is_known(found.drafter) else None


def _target_of(heads: Checkpoint) -> object:
    """The fingerprint of the target whose answers they learnt."""
    data = heads.training.get("data")
    target = data.get("target") if isinstance(data, dict) else None
    return target.get("fingerprint") if isinstance(target, dict) else None


def _promise(heads: Checkpoint) -> float:
    figures = heads.training.get("figures")
    promised = figures.get("tokens_per_step") if isinstance(figures, dict) else None
    return promised if isinstance(promised, float) and isfinite(promised) else 0.0


def _is_draft_model(one: Source, target: Source) -> bool:
    try:
        is_model = getattr(one.config, "vocab_size", None) is not None  # heads that came with a tokenizer are none
        fits = is_model and SMALLER * _size(one) <= _size(target)
        return fits and bool(one.vocabulary_fingerprint) and one.vocabulary_fingerprint == target.vocabulary_fingerprint
    except ForerunError:
        return False


def _size(model: Source) -> int:
    return model.weights.bytes


METHOD = Method(
    "auto",
    "What a plan says or whatever lies beside the target, and stores, where and while that pays.",
    Settings,
    build,
    grows="drawn",
)
