"""The options that say what an answer must be: --json-schema, --regex, --choice and --lark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forerun.cli import options

if TYPE_CHECKING:
    from forerun.constraint import Constraint

JsonSchema = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|JSON", help="The text is JSON that this schema describes.", rich_help_panel=options.ADVANCED
    ),
]
Regex = Annotated[
    str | None,
    typer.Option(metavar="PATTERN", help="The text matches this as a whole.", rich_help_panel=options.ADVANCED),
]
Choice = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="The text is this, or another --choice.", rich_help_panel=options.ADVANCED),
]
Lark = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The text is in the language of this grammar.", rich_help_panel=options.ADVANCED),
]


def chosen(
    json_schema: str | None, regex: str | None, choice: list[str] | None, lark: Path | None
) -> Constraint | None:
    """The constraint, if one is asked for. RequestError for several, and for what is none."""
    from forerun.constraint import Constraint
    from forerun.errors import RequestError

    asked = {"--json-schema": json_schema, "--regex": regex, "--choice": choice or None, "--lark": lark}
    several = [name for name, value in asked.items() if value is not None]
    if len(several) > 1:
        raise RequestError(f"{' and '.join(several)} exclude one another: give one of them")
    if json_schema is not None:
        is_written = json_schema.lstrip().startswith("{")
        return Constraint.json_schema(json_schema if is_written else _read(Path(json_schema)))
    if regex is not None:
        return Constraint.regex(regex)
    if choice:
        return Constraint.choice(choice)
    return None if lark is None else Constraint.lark(_read(lark))


def _read(path: Path) -> str:
    from forerun.errors import RequestError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise RequestError(f"cannot read {path} ({reason}): name a file of UTF-8 text") from None
