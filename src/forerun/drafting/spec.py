"""The grammar of SPECs: what a drafter is called, on the command line, in Python and in files.

    none                                      a name
    small:models/small                        a name and a checkpoint
    verified:models/small(lookup)             a drafter inside a drafter, its "inner"
    lookup | hydra:heads                      one in front of another: a "fallback"
    mine.yaml                                 a file (JSON or YAML) with a description; what it names may be
                                              named as it lies beside the file
    {"drafter": "small", "checkpoint": "models/small", "stopping": {"rule": "confidence", "threshold": 0.5}}
    {"method": "ngram", "num_speculative_tokens": 4}     vLLM's speculative_config (`drafting/elsewhere.py`)

Wherever a description holds another drafter, any of these forms will do. Methods answer to the names
that other engines give them (`registry.ALIASES`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from forerun.drafting import elsewhere
from forerun.drafting.registry import canonical, is_known, method, unknown
from forerun.drafting.settings import Kind
from forerun.errors import DrafterError

Description = Mapping[str, Any]
DEEPEST = 16
"""Drafters inside drafters."""


def describe(spec: str | Description) -> dict[str, Any]:
    """The description behind a SPEC: a name, `name:CHECKPOINT`, `name:CHECKPOINT(SPEC)`, `SPEC |
    SPEC`, JSON, or a JSON or YAML file."""
    if isinstance(spec, Mapping):
        return _ours(spec)
    if not isinstance(spec, str):
        raise DrafterError(f'a drafter is a name or a mapping such as {{"drafter": "lookup"}}, not {spec!r}')
    spec = spec.strip()
    if spec.startswith("{"):
        return _ours(_parsed(spec, "the drafter description"))
    alternatives = [part.strip() for part in _outside_brackets(spec)]
    if len(alternatives) > 1:
        return {"drafter": "fallback", "sources": [describe(part) for part in alternatives]}
    found = _SPEC.fullmatch(spec)
    if found and is_known(found["name"]):
        checkpoint, inner = (found["checkpoint"] or "").strip(), found["inner"]
        inside = {"inner": describe(inner)} if inner else {}
        return {"drafter": canonical(found["name"]), **({"checkpoint": checkpoint} if checkpoint else {}), **inside}
    if spec.endswith((".json", ".yaml", ".yml")):
        try:
            return anchored(_ours(_parsed(Path(spec).read_text(), spec)), Path(spec).parent)
        except OSError as error:
            raise DrafterError(f"cannot read the drafter file {spec}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise DrafterError(f"cannot read the drafter file {spec}: it is not text") from None
    raise DrafterError(_unreadable(spec))


def _unreadable(spec: str) -> str:
    if not spec:
        return "a drafter has no name: write one, on both sides of a bar, as in lookup | small:PATH"
    if os.path.isdir(spec):  # noqa: PTH112 - of a name that is too long Path.is_dir raises
        return f"{spec} is a folder, and does not say what drafts: write small:{spec} for a draft model, or KIND:{spec}"
    return unknown(spec.partition(":")[0].partition("(")[0].strip())


def _ours(description: Description) -> dict[str, Any]:
    """A description in our words: names as they are here, and another engine's settings translated."""
    if elsewhere.is_foreign(description):
        return elsewhere.translated(description)
    name = description.get("drafter")
    return {**description, **({"drafter": canonical(name)} if isinstance(name, str) else {})}


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


def anchored(description: Description, folder: Path) -> dict[str, Any]:
    """What a file in this folder describes: checkpoints, trees and stores that lie beside it are named as they are
    found from here."""

    def place(name: str) -> str:
        return str(folder / name) if (folder / name).exists() else name

    return dict(_moved(description, place))


def loosened(description: Description, folder: Path) -> dict[str, Any]:
    """The same the other way: as a file in this folder names what is there, so that both can be moved together."""

    def place(name: str) -> str:
        return Path(os.path.relpath(Path(name).resolve(), folder.resolve())).as_posix() if Path(name).exists() else name

    return dict(_moved(description, place))


def _moved(value: Any, place: Callable[[str], str], kind: Kind | None = "spec") -> Any:
    """With every name of something that lies somewhere replaced."""
    if isinstance(value, Mapping) and kind in _SPECS:
        name = value.get("drafter")
        kinds = method(name).kinds if is_known(name) else {}
        kinds |= {"drafter": "spec"}
        return {key: _moved(inside, place, kinds.get(key)) for key, inside in value.items()}
    if isinstance(value, Mapping) and kind == "rule":
        return {key: _moved(inside, place, "heads" if key == "checkpoint" else None) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_moved(inside, place, kind) for inside in value]
    if isinstance(value, str) and kind in _SPECS and not value.lstrip().startswith("{"):
        return _NAMED.sub(lambda found: _renamed(found, place), value)
    if isinstance(value, str) and kind in _PLACES:
        before, colon, name = value.rpartition(":")
        return f"{before}{colon}{place(name)}" if name else value
    return value


def _renamed(found: re.Match[str], place: Callable[[str], str]) -> str:
    """One name within a SPEC, if it is a file's and not a drafter's."""
    colon, name = found["colon"], found["name"]
    is_place = bool(name) and (bool(colon) or not is_known(name))
    return f"{colon}{found['before']}{place(name) if is_place else name}"


_NAMED = re.compile(r"(?P<colon>:?)(?P<before>\s*)(?P<name>[^:()|\s]([^:()|]*[^:()|\s])?)")
_SPECS: set[Kind | None] = {"spec", "specs", "parts"}
"""Kinds of settings that hold SPECs, in which any checkpoint or file may be named."""
_PLACES: set[Kind | None] = {"model", "models", "heads", "store", "stores", "tree", "plan", "rule"}
"""Kinds of settings that may name files, alone or behind the name of a kind of store or rule."""
