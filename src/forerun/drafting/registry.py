"""Every method there is, by name: the modules of `forerun/drafters/`, and those of other packages.

Packages outside this one register theirs under the entry point group `forerun.drafters`, as name =
module. A module states its method as METHOD (see `Method`).
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from forerun.drafting.method import Method
from forerun.drafting.trained import HeadsConfig, Layout, Preset, Trained
from forerun.errors import DrafterError

HOME = "forerun.drafters"
_MODULES = list(pkgutil.iter_modules(getattr(find_spec(HOME), "submodule_search_locations", None)))
REGISTRY = {module.name: f"{HOME}.{module.name}" for module in _MODULES}
"""Where the method of each name is."""
PACKAGES = [module.name for module in _MODULES if module.ispkg]
"""Methods that are trained are packages, so that their entries can be read without their networks."""

ALIASES = {
    "ngram": "lookup",
    "ngram_gpu": "lookup",
    "prompt_lookup": "lookup",
    "draft_model": "small",
    "suffix": "hierarchy",
}
"""What other engines call methods of ours. vLLM's suffix decoding reads the request's text and earlier outputs."""


@cache
def _outside() -> dict[str, EntryPoint]:
    """Looked for once, which takes longer than all of the rest."""
    return {point.name: point for point in entry_points(group=HOME)}


def names() -> list[str]:
    """Every drafter that can be built here."""
    return sorted({*REGISTRY, *_outside()})


def is_known(name: object) -> bool:
    """A drafter of ours is called this, here or elsewhere."""
    return isinstance(name, str) and (name in names() or name in ALIASES)


def canonical(name: str) -> str:
    """What a drafter is called here."""
    return name if name in names() else ALIASES.get(name, name)


def method(name: object) -> Method:
    """The entry of this name. Raises DrafterError where there is none."""
    if not isinstance(name, str) or not is_known(name):
        raise DrafterError(unknown(str(name)))
    name = canonical(name)
    module: Any = importlib.import_module(REGISTRY[name]) if name in REGISTRY else _outside()[name].load()
    found: Method = module.METHOD
    return found


def unknown(name: str) -> str:
    near = difflib.get_close_matches(name, [*names(), *ALIASES], 2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}"
    return f"unknown drafter {name!r}: {hint}"


# ---- those that are trained


def trained() -> dict[str, Trained]:
    """What methods with trained heads state, the oldest first."""
    entries = [method(name) for name in (*PACKAGES, *_outside())]
    found = {entry.name: entry.trained for entry in entries if entry.trained is not None}
    return dict(sorted(found.items(), key=lambda item: item[1].paper))


def calibrated() -> dict[str, Trained]:
    """Those that grow static trees, which can be fitted to a machine."""
    return {name: one for name, one in trained().items() if method(name).grows == "ranks"}


def preset(name: str) -> tuple[str, Trained, Preset]:
    """The method that a training belongs to, and the training's settings."""
    return next((kind, one, one.presets[name]) for kind, one in trained().items() if name in one.presets)


def trained_of(config: HeadsConfig) -> tuple[str, Trained]:
    """The method whose architecture this is."""
    return next((kind, one) for kind, one in trained().items() if type(config) is one.config)


def layouts() -> list[Layout]:
    """Foreign layouts of heads."""
    return [layout for one in trained().values() for layout in one.layouts]
