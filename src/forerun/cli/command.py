"""What all commands have in common: the options of every command, its help page, and that it is read only when asked.

`forerun --help` imports no command; a command imports what is heavy only when it runs.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from forerun.cli import page
from forerun.cli.options import ALWAYS

NAMES = {"help_option_names": ["-h", "--help"]}
LOGGER = logging.getLogger("forerun")
REASON = (
    "--trust-remote-code is refused: forerun runs no code that comes with a model, only its own networks and those of"
    " transformers; leave it out, and forerun inspect MODEL says whether the model works without"
)


def _all_of_it(context: typer.Context, wanted: bool) -> None:
    if wanted:
        page.show(context, everything=True)
        raise typer.Exit


def _no_strange_code(wanted: bool) -> None:
    from forerun.errors import RequestError

    if wanted:
        raise RequestError(REASON)


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="results only", rich_help_panel=ALWAYS)]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="says what it does", rich_help_panel=ALWAYS)]
Everything = Annotated[bool, typer.Option("--help-all", callback=_all_of_it, is_eager=True, hidden=True)]
Strange = Annotated[bool, typer.Option("--trust-remote-code", callback=_no_strange_code, is_eager=True, hidden=True)]


def _of_every_command(
    quiet: Quiet = False, verbose: Verbose = False, help_all: Everything = False, trust_remote_code: Strange = False
) -> None: ...


COMMON = inspect.signature(_of_every_command, eval_str=True).parameters.values()


class Command(TyperCommand):
    """A command whose help fits one screen."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        page.show(ctx)


class Commands(TyperGroup):
    """Commands by name. senses: what each does, in a line."""

    @property
    def senses(self) -> Mapping[str, str]:
        return {name: (one.help or "").partition("\n\n")[0] for name, one in self.commands.items()}

    def format_help(self, ctx: Any, formatter: Any) -> None:
        page.show(ctx)


def lazily(senses: Mapping[str, str]) -> type[Commands]:
    """A group whose commands are modules of `forerun.cli`, imported when they are called."""

    class Lazy(Commands):
        @property
        def senses(self) -> Mapping[str, str]:
            return senses

        def list_commands(self, ctx: Any) -> list[str]:
            return list(senses)

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            return _command_of(cmd_name) if cmd_name in senses else None

    return Lazy


@functools.cache
def _command_of(name: str) -> Any:
    """The command that a module states: its function of the same name, with EXAMPLES, or its `app`."""
    module = importlib.import_module(f"forerun.cli.{name}")
    if not hasattr(module, "app"):
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        add(app, name, getattr(module, name), module.EXAMPLES)
        module_app = app
    else:
        module_app = module.app
    found = typer.main.get_command(module_app)
    found.name = name
    return found


def add(app: typer.Typer, name: str, function: Callable[..., None], examples: str) -> None:
    """Make a function a command, with the options that every command has."""
    app.command(name, cls=Command, epilog=examples.strip(), context_settings=NAMES)(_with_common(function))


def set_level(quiet: bool, verbose: bool) -> None:
    """What a command tells beside its result."""
    LOGGER.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


def _with_common(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def called(*, quiet: bool, verbose: bool, help_all: bool, trust_remote_code: bool, **given: Any) -> None:
        if quiet or verbose:  # else as it was said before the command
            set_level(quiet, verbose)
        function(**given)

    own = inspect.signature(function, eval_str=True).parameters.values()
    named = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own, *COMMON)]
    called.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
    return called


class Said(logging.StreamHandler[Any]):
    """What is logged goes to stderr, as it is; to where stderr is now, for tests replace it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(message)s"))
