"""The fields of checked records: what each means, what it names, and how the command line offers
it. Nothing here needs torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from forerun.errors import DrafterError

MOST = 1024
"""Tokens of anything that a drafter counts: what is more is a slip."""

Kind = Literal["model", "models", "heads", "store", "stores", "tree", "plan", "spec", "specs", "parts", "rule"]


def setting(default: Any, sense: str, kind: Kind | None = None) -> Any:
    """A field of a settings record. kind: what it names, so that a file may name it as it lies
    beside the file: a "model" or a list of "models", trained "heads", a "store" of tokens or a list
    of "stores", a "tree", a "plan", another drafter ("spec"), a list of them ("specs"), or of them with
    settings of their own beside each ("parts"), a stopping "rule", which may have a checkpoint."""
    return field(default=default, metadata={"sense": sense, "kind": kind})


@dataclass(frozen=True)
class Option:
    """A field as an option of the command line. least, most: its bounds. words: all that it may be.
    flag: what it is called there, if not as the field; both names of a switch. shown: what is said
    in place of a default. rare: it stands on the long page of help alone."""

    sense: str
    least: float | None = None
    most: float | None = None
    words: tuple[str, ...] = ()
    flag: str = ""
    shown: str = "the paper's"
    rare: bool = False


def option(default: Any, sense: str, identifies: bool = True, **how: Any) -> Any:
    """A field of a record that the command line offers as an option (see `Option`). identifies: records that differ in
    it are not equal."""
    return field(default=default, compare=identifies, metadata={"option": Option(sense, **how)})


def demand_count(drafter: str, setting: str, value: object) -> None:
    """DrafterError for anything but a number of tokens."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
        raise DrafterError(f"{drafter}: {setting} is a whole number of at least 1 and at most {MOST}, not {value!r}")
