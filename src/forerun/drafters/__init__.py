"""The registry of drafters: one line each, one file each.

A drafter file offers `build(workshop, **settings) -> Drafter`; its settings are the keys of the drafter's description:

    none                                      a name
    small:models/small                        a name and a checkpoint
    mine.yaml                                 a file (JSON or YAML) with a description; its checkpoints may be named
                                              as they lie beside the file
    {"drafter": "small", "checkpoint": "models/small", "stopping": {"rule": "confidence", "threshold": 0.5}}

Packages outside this one register theirs under the entry point group `forerun.drafters`, as name = module.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from forerun.drafter import Drafter
from forerun.errors import DrafterError
from forerun.model import Model
from forerun.nn.network import Network

REGISTRY = {
    "none": "forerun.drafters.none",
    "lookup": "forerun.drafters.lookup",
    "maxgram": "forerun.drafters.maxgram",
    "small": "forerun.drafters.small",
    "verified": "forerun.drafters.verified",
    "medusa": "forerun.drafters.medusa",
    "hydra": "forerun.drafters.hydra",
}

Description = Mapping[str, Any]


@dataclass(frozen=True)
class Workshop:
    """What building a drafter may need: the target it is for, and a way to load networks beside it."""

    target: Model
    load: Callable[[str], Network]

    def build(self, description: str | Description) -> Drafter:
        """A drafter inside a drafter."""
        return build(description, self)

    def network(self, checkpoint: str | None, drafter: str) -> Network:
        """A draft network with the target's vocabulary, or a DrafterError that says why not."""
        if checkpoint is None:
            raise DrafterError(f"the drafter {drafter} needs a checkpoint: write {drafter}:PATH")
        network = self.load(checkpoint)
        if network.vocab_size != self.target.vocab_size:
            raise DrafterError(
                f"{checkpoint} has a vocabulary of {network.vocab_size} tokens and the target one of"
                f" {self.target.vocab_size}: use a drafter that shares the target's tokenizer"
            )
        return network


def names() -> list[str]:
    """Every drafter that can be built here."""
    return sorted({*REGISTRY, *(point.name for point in entry_points(group="forerun.drafters"))})


def describe(spec: str | Description) -> dict[str, Any]:
    """The description behind a command-line SPEC: `name`, `name:CHECKPOINT`, JSON, or a JSON or YAML file."""
    if not isinstance(spec, str):
        return dict(spec)
    if spec.lstrip().startswith("{"):
        return _parsed(spec, "the drafter description")
    name, _, checkpoint = spec.partition(":")
    if name in names():
        return {"drafter": name, **({"checkpoint": checkpoint} if checkpoint else {})}
    if spec.endswith((".json", ".yaml", ".yml")):
        try:
            return _anchored(_parsed(Path(spec).read_text(), spec), Path(spec).parent)
        except OSError as error:
            raise DrafterError(f"cannot read the drafter file {spec}: {error.strerror}") from None
    raise DrafterError(_unknown(name))


def build(spec: str | Description, workshop: Workshop) -> Drafter:
    """The drafter that a SPEC or description asks for."""
    settings = describe(spec)
    name = settings.pop("drafter", None)
    if not isinstance(name, str) or name not in names():
        raise DrafterError(_unknown(str(name)))
    maker = _module(name).build
    allowed = list(inspect.signature(maker).parameters)[1:]
    for key in settings:
        if key not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes no settings"
            raise DrafterError(f"the drafter {name} has no setting {key!r}: {takes}")
    drafter: Drafter = maker(workshop, **settings)
    return drafter


def _module(name: str) -> Any:
    if name in REGISTRY:
        return importlib.import_module(REGISTRY[name])
    return next(point for point in entry_points(group="forerun.drafters") if point.name == name).load()


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text) if not text.lstrip().startswith("{") else json.loads(text)
    except (yaml.YAMLError, ValueError) as error:
        raise DrafterError(f"{source} is neither JSON nor YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise DrafterError(f'{source} must be a mapping such as {{"drafter": "lookup"}}')
    return value


def _anchored(description: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Checkpoints, trees and stores that lie beside the file that names them, wherever the command runs."""
    inside = {key: _anchored(value, folder) if isinstance(value, dict) else value for key, value in description.items()}
    for key in ("checkpoint", "tree", "store"):
        value = inside.get(key)
        if isinstance(value, str) and (folder / value).exists():
            inside[key] = str(folder / value)
    return inside


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, names(), 2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}"
    return f"unknown drafter {name!r}: {hint}"
