"""Options of the command line that are made from the fields of records (see `Option` in drafting/settings.py)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal, get_type_hints

import typer

from forerun.cli.options import ADVANCED
from forerun.drafting.settings import Option


def flags(record: type[Any]) -> dict[str, str]:
    """The fields of a record that are options, by the name of their parameter."""
    found = {one.name: one.metadata["option"] for one in fields(record) if "option" in one.metadata}
    return {_parameter(name, option): name for name, option in found.items()}


def _parameter(name: str, option: Option) -> str:
    return option.flag.partition("/")[0].removeprefix("--").replace("-", "_") or name


def parameters(record: type[Any], panel: str) -> list[inspect.Parameter]:
    """A parameter for every field that is an option; what is not given is None."""
    hints = get_type_hints(record)
    options = {one.name: one.metadata["option"] for one in fields(record) if "option" in one.metadata}
    return [_made(_parameter(name, one), hints[name], one, panel) for name, one in options.items()]


def _made(name: str, kind: Any, option: Option, panel: str) -> inspect.Parameter:
    is_list = kind == tuple[int, ...]
    shown = typer.Option(
        None,
        option.flag or f"--{name.replace('_', '-')}",
        min=option.least,
        max=option.most,
        callback=finite if kind is float else numbers if is_list else None,
        metavar="N,N,..." if is_list else "|".join(option.words) or None,
        help=option.sense,
        rich_help_panel=ADVANCED if option.rare else panel,
        show_default=option.shown,
    )
    annotation = (Literal[option.words] if option.words else str if is_list else kind) | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=annotation)


def finite(value: float | None) -> float | None:
    """What bounds let through: neither nan nor inf is a number that anything here can count with."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number: give one")
    return value


def numbers(value: str | None) -> tuple[int, ...] | None:
    """A list of whole numbers, as the field has it."""
    try:
        return None if value is None else tuple(int(part) for part in value.split(","))
    except ValueError:
        raise typer.BadParameter(f"{value!r} is no list of whole numbers: write 2,5") from None


def one(name: str, kind: Any, sense: str, **how: Any) -> inspect.Parameter:
    """A parameter whose help text is known only now."""
    shown = typer.Option(None, f"--{name.replace('_', '-')}", help=sense, **how)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=kind | None)


def replacing(function: Callable[..., None], **made: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """The function as typer is to see it: with these parameters in the place of those that only
    mark it. It gets their values as **given."""
    own = inspect.signature(function, eval_str=True).parameters
    shown = [one for name, parameter in own.items() for one in made.get(name, [parameter]) if name != "given"]
    named = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in shown]
    function.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    return function
