"""The page that `--help` prints: one screen of what is often wanted, in groups, with examples; the rest by name.

Groups are the options' `rich_help_panel`. Those of ADVANCED are only named, and described by `--help-all`; those of
ALWAYS, which every command has, share the last line.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from forerun.cli.options import ADVANCED, ALWAYS

WIDTH, NAMES = 100, 30
HEADING, NAME, QUIET = "bold yellow", "bold cyan", "dim"
OPTIONS = "Options"
SHORT = {"help": "this page", "version": "the version"}
"""What the last line says of options that typer or every program has."""
KINDS = {"int": "N", "float": "X", "str": "TEXT", "file": "FILE", "path": "FILE"}
"""What stands for a value, by typer's name of its type."""


def show(context: Any, everything: bool = False) -> None:
    """Print the page of a command. everything: describe the advanced options too."""
    command = context.command
    console = Console(file=sys.stdout, highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(Group(*_page(command, context, everything)))


def _page(command: Any, context: Any, everything: bool) -> Iterator[RenderableType]:
    shown = [one for one in command.get_params(context) if not getattr(one, "hidden", False)]
    yield Text.assemble(("Usage: ", HEADING), " ".join([context.command_path, *_usage(command, shown)]))
    yield Padding(Text(_flowing(command.help or "")), (1, 0, 1, 0))
    groups: dict[str, list[Any]] = {}
    for one in shown:
        groups.setdefault(_place(one), []).append(one)
    always, advanced = groups.pop(ALWAYS, []), groups.pop(ADVANCED, [])
    yield from _commands(command)
    for title, options in groups.items():
        yield from _group(title, options, context)
    if advanced and everything:
        yield from _group(ADVANCED, advanced, context)
    elif advanced:
        yield Text.assemble((ADVANCED, HEADING), (f" (described by {context.command_path} --help-all)", QUIET))
        yield Padding(Text("  ".join(one.opts[0] for one in advanced), NAME), (0, 0, 0, 2))
    if command.epilog:
        yield Text("Examples", HEADING)
        yield Padding(Text(command.epilog), (0, 0, 0, 2))
    yield Text(" · ".join(f"{min(one.opts, key=len)} {SHORT.get(one.name, one.help)}" for one in always), QUIET)


def _usage(command: Any, shown: list[Any]) -> Iterator[str]:
    if getattr(command, "senses", None):
        yield "COMMAND"
    for one in shown:
        if one.param_type_name == "argument":
            yield one.display_name_raw if one.required else f"[{one.display_name_raw}]"
    yield "[OPTIONS]"


def _place(option: Any) -> str:
    """The title of its group; none for arguments."""
    if option.param_type_name == "argument":
        return ""
    return ALWAYS if option.name in SHORT else option.rich_help_panel or OPTIONS


def _flowing(text: str) -> str:
    """Paragraphs, whose lines end where the screen does."""
    return "\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _commands(command: Any) -> Iterator[RenderableType]:
    senses: Mapping[str, str] = getattr(command, "senses", {})
    if senses:
        yield Text("Commands", HEADING)
        yield _table(((Text(name, NAME), Text(sense)) for name, sense in senses.items()), max(map(len, senses)) + 2)


def _group(title: str, options: list[Any], context: Any) -> Iterator[RenderableType]:
    if title:
        yield Text(title, HEADING)
    yield _table((_names(one, context), _sense(one)) for one in options)


def _table(rows: Iterator[tuple[Text, Text]], width: int = NAMES) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=width, overflow="fold")
    table.add_column()
    for name, sense in rows:
        table.add_row(Padding(name, (0, 0, 0, 2)), sense)
    return table


def _names(option: Any, context: Any) -> Text:
    if option.param_type_name == "argument":
        return Text(option.display_name_raw, NAME)
    long = [name for name in (*option.opts[:1], *option.secondary_opts[:1]) if name.startswith("--")]
    short = [name for name in option.opts if not name.startswith("--")]
    value = "" if option.is_flag else f" {option.metavar or _kind(option, context)}"
    return Text.assemble((", ".join([*short, *long]), NAME), value)


def _kind(option: Any, context: Any) -> str:
    """The type's own words if it is a choice; typer's other words say nothing to a reader."""
    name = str(option.display_type(context)).strip("<>").removeprefix("list[").removesuffix("]").removesuffix(" range")
    return KINDS.get(name.split(" | ")[0], name)


def _sense(option: Any) -> Text:
    """What it does, its other names, and what it is if not given."""
    text = Text(option.help or "")
    notes = [f"or {name}" for name in option.opts[1:] if name.startswith("--")]
    default = option.show_default if isinstance(option.show_default, str) else option.default
    if option.required and option.param_type_name == "option":
        notes.append("required")
    elif option.show_default and default not in (None, "", (), [], "auto") and not isinstance(default, bool):
        notes.append(f"{default:g}" if isinstance(default, float) else str(default))
    return text.append(f" ({'; '.join(notes)})", QUIET) if notes else text
