"""The registry of drafters: one line each, one file each.

A drafter file offers `build(workshop, **settings) -> Drafter`; its settings are the keys of the drafter's description:

    none                                      a name
    small:models/small                        a name and a checkpoint
    verified:models/small(lookup)             a drafter inside a drafter, its "inner"
    lookup | hydra:heads                      one in front of another: a "fallback"
    mine.yaml                                 a file (JSON or YAML) with a description; what it names may be named as it lies
                                              beside the file
    {"drafter": "small", "checkpoint": "models/small", "stopping": {"rule": "confidence", "threshold": 0.5}}

Wherever a description holds another drafter, any of these forms will do.

Packages outside this one register theirs under the entry point group `forerun.drafters`, as name = module.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
    "cascade": "forerun.drafters.cascade",
    "hierarchy": "forerun.drafters.hierarchy",
    "fallback": "forerun.drafters.fallback",
    "medusa": "forerun.drafters.medusa",
    "hydra": "forerun.drafters.hydra",
}

Description = Mapping[str, Any]
DEEPEST = 16
"""Drafters inside drafters."""
MOST = 1024
"""Tokens of anything that a drafter counts: what is more is a slip."""


@dataclass(frozen=True)
class Workshop:
    """What building a drafter may need: the target it is for, a way to load networks beside it, a fingerprint of the target's
    tokenizer (empty if not known), by which stores of tokens are told from those of another one, and how many drafters this
    one is inside."""

    target: Model
    load: Callable[[str], Network]
    tokenizer: Callable[[], str] = str
    depth: int = 0

    def build(self, description: str | Description) -> Drafter:
        """A drafter inside a drafter."""
        if self.depth >= DEEPEST:
            raise DrafterError(f"drafters stand in one another more than {DEEPEST} deep: does a file name itself?")
        return build(description, replace(self, depth=self.depth + 1))

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


def demand_count(drafter: str, setting: str, value: object) -> None:
    """DrafterError for anything but a number of tokens."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
        raise DrafterError(f"{drafter}: {setting} is a whole number of at least 1 and at most {MOST}, not {value!r}")


def names() -> list[str]:
    """Every drafter that can be built here."""
    return sorted({*REGISTRY, *(point.name for point in entry_points(group="forerun.drafters"))})


def describe(spec: str | Description) -> dict[str, Any]:
    """The description behind a SPEC: a name, `name:CHECKPOINT`, `name:CHECKPOINT(SPEC)`, `SPEC | SPEC`, JSON, or a JSON or YAML
    file."""
    if isinstance(spec, Mapping):
        return dict(spec)
    if not isinstance(spec, str):
        raise DrafterError(f'a drafter is a name or a mapping such as {{"drafter": "lookup"}}, not {spec!r}')
    spec = spec.strip()
    if spec.startswith("{"):
        return _parsed(spec, "the drafter description")
    alternatives = [part.strip() for part in _outside_brackets(spec)]
    if len(alternatives) > 1:
        return {"drafter": "fallback", "sources": [describe(part) for part in alternatives]}
    found = _SPEC.fullmatch(spec)
    if found and found["name"] in names():
        checkpoint, inner = (found["checkpoint"] or "").strip(), found["inner"]
        inside = {"inner": describe(inner)} if inner else {}
        return {"drafter": found["name"], **({"checkpoint": checkpoint} if checkpoint else {}), **inside}
    if spec.endswith((".json", ".yaml", ".yml")):
        try:
            return dict(_anchored(_parsed(Path(spec).read_text(), spec), Path(spec).parent))
        except OSError as error:
            raise DrafterError(f"cannot read the drafter file {spec}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise DrafterError(f"cannot read the drafter file {spec}: it is not text") from None
    raise DrafterError(_unknown(spec.partition(":")[0].partition("(")[0].strip()))


_SPEC = re.compile(r"(?P<name>[^:()|]+)(:(?P<checkpoint>[^()|]*))?(\((?P<inner>.*)\))?", re.DOTALL)


def _outside_brackets(spec: str) -> list[str]:
    """Cut at the bars that stand in no brackets."""
    parts, depth = [""], 0
    for sign in spec:
        depth += (sign == "(") - (sign == ")")
        if not 0 <= depth <= DEEPEST:
            break
        if sign == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    if depth:
        raise DrafterError(f"the brackets of the drafter {spec!r} do not match")
    return parts


def build(spec: str | Description, workshop: Workshop) -> Drafter:
    """The drafter that a SPEC or description asks for."""
    settings = describe(spec)
    name = settings.pop("drafter", None)
    if name is None:
        raise DrafterError(f'a drafter needs a name: write "drafter": "lookup" or the like beside {sorted(settings)}')
    if not isinstance(name, str) or name not in names():
        raise DrafterError(_unknown(str(name)))
    if not isinstance(settings.get("checkpoint", ""), str):
        raise DrafterError(f"the checkpoint of the drafter {name} is a path, not {settings['checkpoint']!r}")
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
    except RecursionError:
        raise DrafterError(f"{source} nests too deep to be a drafter") from None
    if not isinstance(value, dict):
        raise DrafterError(f'{source} must be a mapping such as {{"drafter": "lookup"}}')
    return value


def _anchored(description: Any, folder: Path, key: str = "") -> Any:
    """Checkpoints, trees and stores that lie beside the file that names them, wherever the command runs."""
    if isinstance(description, Mapping):
        return {key: _anchored(value, folder, key) for key, value in description.items()}
    if isinstance(description, list):
        return [_anchored(value, folder, key) for value in description]
    if isinstance(description, str) and key in _SPECS and not description.lstrip().startswith("{"):
        return _NAMED.sub(lambda found: _beside(found, folder), description)
    if isinstance(description, str) and key in _PLACES:
        kind, colon, place = description.rpartition(":")
        if place and (folder / place).exists():
            return f"{kind}{colon}{folder / place}"
    return description


def _beside(found: re.Match[str], folder: Path) -> str:
    """One name within a SPEC, anchored if it is a file's and not a drafter's."""
    colon, name = found["colon"], found["name"]
    lies_there = bool(name) and (folder / name).exists() and (bool(colon) or name not in names())
    return f"{colon}{found['before']}{folder / name if lies_there else name}"


_NAMED = re.compile(r"(?P<colon>:?)(?P<before>\s*)(?P<name>[^:()|\s]([^:()|]*[^:()|\s])?)")
_SPECS = {"drafter", "inner", "sources", "last"}
"""Settings that hold a SPEC, in which any checkpoint or file may be named."""
_PLACES = {"checkpoint", "tree", "store", "stores", "models"}
"""Settings that may name files, alone or behind the name of a kind of store."""


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, names(), 2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}"
    return f"unknown drafter {name!r}: {hint}"
