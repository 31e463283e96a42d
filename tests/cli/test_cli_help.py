"""What a stranger reads first: one screen per command, groups, examples that are command lines."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest
import typer
from typer.main import get_command

from forerun.cli import COMMANDS, app

LINES, COLUMNS = 44, 100
TRAIN = [
    "lm",
    "small",
    "medusa",
    "medusa-fused",
    "hydra",
    "hydra++",
    "amphista",
    "block",
    "eagle",
    "eagle3",
    "acceptance",
    "medusa2",
]
GROUPS = {"train": TRAIN, "federated": ["run"]}
PAGES = [[name] for name in COMMANDS] + [[group, name] for group, names in GROUPS.items() for name in names]


@pytest.mark.parametrize("words", [[], *PAGES], ids=" ".join)
def test_a_page_fits_one_screen_without_noise(forerun, words):
    code, out, err = forerun(*words, "--help")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) <= LINES and max(map(len, out.splitlines())) <= COLUMNS
    assert "<" not in out and "[default" not in out and "Examples" in out


def test_h_is_help(forerun):
    assert forerun("generate", "-h") == forerun("generate", "--help")
    assert forerun("-h") == forerun("--help") == forerun()
    assert forerun("train", "-h")[0] == 0


def test_advanced_options_are_named_and_described_by_another_page(forerun):
    _, short, _ = forerun("generate", "--help")
    _, long, _ = forerun("generate", "--help-all")
    assert "--repetition-penalty" in short and "Over prompt and output" not in short
    assert "Over prompt and output" in long and "--help-all" in short


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_every_option_is_on_the_page_or_has_its_reason(words):
    command = get_command(app)
    context = typer.Context(command)
    for word in words:
        command = command.get_command(context, word)
    hidden = {name for one in command.params for name in one.opts if getattr(one, "hidden", False)}
    assert hidden <= {"--help-all", "--trust-remote-code"}


@pytest.mark.parametrize("words", [[], *PAGES], ids=" ".join)
def test_examples_are_command_lines(words):
    """They are parsed, and not run: their models do not exist."""
    root = command = get_command(app)
    for word in words:
        command = command.get_command(typer.Context(command), word)
    for line in (command.epilog or "").splitlines():
        program, name, *rest = shlex.split(line.partition("   ")[0])
        assert program == "forerun"
        shown = root.get_command(typer.Context(root), name)
        if name in GROUPS:
            shown, rest = shown.get_command(typer.Context(shown), rest[0]), rest[1:]
        assert shown.make_context(name, rest) is not None


def test_python_m_forerun():
    done = subprocess.run([sys.executable, "-m", "forerun", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("forerun ")
