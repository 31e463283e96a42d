"""forerun: language models generate faster without changing what they say.

    engine = forerun.load("models/target", drafter="lookup")
    outputs = engine.generate(["def main():"], forerun.SamplingParams(max_new_tokens=64))

Names are imported when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forerun.constraint import Constraint
    from forerun.engine.asynchronous import AsyncEngine
    from forerun.engine.engine import Engine
    from forerun.engine.load import load
    from forerun.engine.requests import Output, Piece, Stats, TokenLogprob
    from forerun.errors import CheckpointError, DrafterError, ForerunError, RequestError, TrainingError
    from forerun.sampling import SamplingParams

__all__ = [
    "AsyncEngine",
    "CheckpointError",
    "Constraint",
    "DrafterError",
    "Engine",
    "ForerunError",
    "Output",
    "Piece",
    "RequestError",
    "SamplingParams",
    "Stats",
    "TokenLogprob",
    "TrainingError",
    "load",
]

__version__ = "0.1.0"

_HOMES = {
    "load": "engine.load",
    "SamplingParams": "sampling",
    "Constraint": "constraint",
    "AsyncEngine": "engine.asynchronous",
    "Engine": "engine.engine",
    **dict.fromkeys(("Output", "Piece", "Stats", "TokenLogprob"), "engine.requests"),
    **dict.fromkeys(("CheckpointError", "DrafterError", "ForerunError", "RequestError", "TrainingError"), "errors"),
}


_PACKAGES = ("hf",)
"""Reached as attributes: `forerun.hf.generate`."""


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"forerun.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'forerun' has no attribute {name!r}")
    return getattr(importlib.import_module(f"forerun.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
