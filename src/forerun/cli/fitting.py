"""Which drafters a command compares: those that were asked for, or what fits the model and lies beside it."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any


def given(drafters: list[str]) -> dict[str, str]:
    """The drafters asked for, by the words they were asked with."""
    parts = chain.from_iterable([one] if one.lstrip().startswith("{") else one.split(",") for one in drafters)
    return {part.strip(): part.strip() for part in parts if part.strip() not in ("none", "")}


def beside(target: Path) -> dict[str, str]:
    """What needs nothing, and what lies beside the target, by name."""
    family = sorted(target.parent.glob("*/config.json"))
    kinds = {path.parent: _kind(path, target) for path in family}
    there = sorted((kind != "small", folder) for folder, kind in kinds.items() if kind)
    return (
        {"lookup": "lookup", "hierarchy": "hierarchy"}
        | {folder.name: f"{kinds[folder]}:{folder}" for _, folder in there}
        | {path.stem: str(path) for path in sorted(target.parent.glob("*.yaml"))}
    )


def _kind(config: Path, target: Path) -> str:
    """The drafter that a folder holds: trained heads, or a smaller model with as many tokens; empty
    if none for this target."""
    from forerun.drafting.registry import names
    from forerun.sources.folder import CONFIG

    found, own = _settings(config), _settings(target / CONFIG)
    if "drafter" in found:
        return str(found["drafter"]) if found["drafter"] in names() else ""
    is_smaller = _bytes(config.parent) < _bytes(target)
    return "small" if is_smaller and found.get("vocab_size") == own.get("vocab_size") else ""


def _settings(config: Path) -> dict[str, Any]:
    try:
        found = json.loads(config.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
