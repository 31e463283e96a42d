"""The command line: `forerun demo | generate | check | inspect | index | distill | train | calibrate | convert`.

Every command has a module, which imports what is heavy only when it runs: `forerun --help` answers at once. Every error
that an input can cause ends in `run`: one sentence on stderr, exit code 2, no traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import forerun
from forerun.cli.calibrate import calibrate
from forerun.cli.check import check
from forerun.cli.complaint import sentence_of
from forerun.cli.convert import convert
from forerun.cli.demo import demo
from forerun.cli.distill import distill
from forerun.cli.generate import generate
from forerun.cli.index import index
from forerun.cli.inspect import inspect
from forerun.cli.train import app as train

WRONG_INPUT, INTERRUPTED = 2, 130

app = typer.Typer(
    name="forerun",
    help="Language models generate faster without changing what they say.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, generate, check, inspect, distill, calibrate, convert, index):
    app.command()(command)
app.add_typer(train, name="train")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"forerun {forerun.__version__}")
        raise typer.Exit


@app.callback()
def _forerun(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None: ...


def main() -> None:
    """The entry point of the `forerun` command."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; returns its exit code: 0, 1 (a check that failed), 2 (wrong input), 130 (Ctrl-C)."""
    try:
        code = app(list(arguments) or ["--help"], prog_name="forerun", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return 1  # whoever read our output has gone, and wants to hear nothing
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        _drop_output()
        print(f"forerun: {sentence}", file=sys.stderr)
        return WRONG_INPUT
    if code == INTERRUPTED:
        print("forerun: interrupted", file=sys.stderr)
    return int(code or 0)


def _drop_output() -> None:
    """What stdout still holds goes nowhere: at exit Python would try to write it again, and complain again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
