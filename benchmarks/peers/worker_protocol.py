"""What the driver (benchmarks/forwards.py) and a worker say to each other: one JSON object per line.

A worker loads one model in one engine and says {"ready": {...}} about itself. Then it waits for
commands and answers each:

    {"do": "forward", "tokens": n, "context": c, "repeats": r}  ->  {"milliseconds": [r numbers]}
    {"do": "plain", "prompts": [[ids], ...], "new": m}          ->  {"seconds": s, "ids": [[ids], ...]}
    anything that fails                                         ->  {"error": "..."}

`forward` reads c tokens, then times r cached forwards of n further tokens of one row, with the
logits of all n; `plain` times the engine's own greedy loop over all prompts at once, reading them
included, end-of-sequence ignored. Between commands a worker blocks on its standard input, so that
it costs the others nothing.

This file runs under the Python of every peer: it must import nothing but the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol, TextIO

WARM_UP = 3
"""Forwards before the clock starts, in every turn: caches, clock rates and sleeping threads recover
from the others' turns."""


class Engine(Protocol):
    """One model in one engine. about: versions and settings worth keeping with the numbers."""

    about: dict[str, Any]

    def forward(self, tokens: int, context: int, repeats: int) -> list[float]:
        """Milliseconds of every forward."""
        ...

    def plain(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        """Seconds, and the new tokens of every prompt."""
        ...


def token_ids(count: int, start: int = 0) -> list[int]:
    """Ids that every vocabulary here has, none of them special: text number `start` onwards of an
    arbitrary sequence."""
    return [3 + (7919 * (start + place) + 31) % 4000 for place in range(count)]


def run(load: Callable[[argparse.Namespace], Engine]) -> None:
    """Load the model named on the command line and serve it until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernels", help="forerun only: auto, native or torch")
    given = parser.parse_args()
    answers = _own_output()
    engine = load(given)
    _say(answers, {"ready": engine.about})
    for line in sys.stdin:
        _say(answers, _answer(engine, json.loads(line)))


def _own_output() -> TextIO:
    """The real standard output, for answers alone; what libraries print goes to standard error from here on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _answer(engine: Engine, command: dict[str, Any]) -> dict[str, Any]:
    try:
        if command["do"] == "forward":
            times = engine.forward(command["tokens"], command["context"], command["repeats"])
            return {"milliseconds": times}
        seconds, ids = engine.plain(command["prompts"], command["new"])
        return {"seconds": seconds, "ids": ids}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
