"""Every drafter that can be built here, by name.

Packages outside this one register theirs under the entry point group `forerun.drafters`, as name = module.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points
from typing import Any

REGISTRY = {
    "none": "forerun.drafters.none",
    "lookup": "forerun.drafters.lookup",
    "maxgram": "forerun.drafters.maxgram",
    "small": "forerun.drafters.small",
    "verified": "forerun.drafters.verified",
    "cascade": "forerun.drafters.cascade",
    "hierarchy": "forerun.drafters.hierarchy",
    "fallback": "forerun.drafters.fallback",
    "medusa": "forerun.drafters.medusa.method",
    "hydra": "forerun.drafters.hydra.method",
}


def names() -> list[str]:
    """Every drafter that can be built here."""
    return sorted({*REGISTRY, *(point.name for point in entry_points(group="forerun.drafters"))})


def module_of(name: str) -> Any:
    if name in REGISTRY:
        return importlib.import_module(REGISTRY[name])
    return next(point for point in entry_points(group="forerun.drafters") if point.name == name).load()


def unknown(name: str) -> str:
    near = difflib.get_close_matches(name, names(), 2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}"
    return f"unknown drafter {name!r}: {hint}"
