"""The command line: `forerun COMMAND`, or `python -m forerun COMMAND`.

Every command has a module of its name (see `cli/command.py`). Every error that an input can cause ends in `run`: one
sentence on stderr, exit code 2, no traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import forerun
from forerun.cli.command import LOGGER, NAMES, Quiet, Said, Verbose, lazily, set_level
from forerun.cli.complaint import sentence_of

WRONG_INPUT, INTERRUPTED = 2, 130

COMMANDS = {
    "demo": "Plain decoding and every drafter at hand, side by side.",
    "generate": "What a model says to prompts, faster.",
    "chat": "Talk to a model, and see which words were drafted.",
    "serve": "A model behind the endpoints of OpenAI's clients.",
    "check": "Prove that a drafter changes nothing.",
    "inspect": "What this machine, a model, heads, a store or a file is.",
    "distill": "The model's own answers, to train draft heads on.",
    "train": "Draft heads for a model of yours, or a model.",
    "plan": "Which drafter is fastest for a model on this machine.",
    "calibrate": "The tree of drafts that is fastest on this machine.",
    "design": "The draft model to train for a model of yours, on this machine.",
    "bench": "What a server brings under load.",
    "convert": "Draft heads from and to the layouts of other engines.",
    "federated": "An image-text model that parties learn together.",
    "index": "Texts into a store that drafters copy from.",
}
EXAMPLES = """
forerun demo
forerun generate MODEL "def main():" --drafter lookup --compare
forerun check MODEL --drafter lookup
"""

app = typer.Typer(
    name="forerun",
    cls=lazily(COMMANDS),
    help="Language models generate faster without changing what they say.",
    epilog=EXAMPLES.strip(),
    context_settings=NAMES,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"forerun {forerun.__version__}")
        raise typer.Exit


@app.callback()
def _forerun(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    set_level(quiet, verbose)


def main() -> None:
    """Run the command line that this process was called with, and exit."""
    _open_streams()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code: 0, 1 (a check that failed), 2 (wrong input), 130 (Ctrl-C)."""
    try:
        with _logging():
            code = app(list(arguments) or ["--help"], prog_name="forerun", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 1  # whoever read our output has gone, and wants to hear nothing
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if not _came_of_an_interruption(error):
            sentence = sentence_of(error)
            if sentence is None:
                raise
            _drop_output()
            print(f"forerun: {sentence}", file=sys.stderr)
            return WRONG_INPUT
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("forerun: interrupted", file=sys.stderr)
    return int(code or 0)


def _came_of_an_interruption(error: BaseException) -> bool:
    """Importers of other packages make of Ctrl-C that a module cannot be imported."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return isinstance(error, KeyboardInterrupt)


@contextmanager
def _logging() -> Iterator[None]:
    """What the library logs goes to stderr, for as long as a command runs."""
    handler = Said()
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(logging.NOTSET)


def _open_streams() -> None:
    """Streams that whoever started us has closed are empty ones, and nobody need ask whether there are any."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def _drop_output() -> None:
    """What stdout still holds goes nowhere: at exit Python would try to write it again, and complain again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
