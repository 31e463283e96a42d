"""What the README and the documentation show is run as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import forerun
from forerun.cli import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("*/README.md"))]


def blocks(language: str) -> list[pytest.ParameterSet]:
    """Every block of a language, with the name of its page and its number there."""
    found = []
    for page in PAGES:
        parts = re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        found += [pytest.param(part, id=f"{page.stem}-{number}") for number, part in enumerate(parts)]
    return found


def commands(block: str) -> list[str]:
    return [line for line in block.splitlines() if line.startswith("forerun ")]


@pytest.mark.parametrize("block", blocks("python"))
def test_python_examples_run(block: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(block, "an example", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("block", blocks("bash"))
def test_command_line_examples_run(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In order, where what they write harms nobody, and in this process: to import torch takes longer than most."""
    monkeypatch.chdir(tmp_path)
    for folder in ("models", "src"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    assert commands(block), "a block of bash without a command of ours"
    for command in commands(block):
        code = run(shlex.split(command)[1:])
        out, err = capfd.readouterr()
        assert code == 0, f"{command}: {err}"
        assert out, command


def test_the_program_that_the_examples_name_is_installed() -> None:
    program = Path(sys.executable).with_name("forerun")
    said = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=True).stdout
    assert said == f"forerun {forerun.__version__}\n"


@pytest.mark.parametrize("block", blocks("yaml"))
def test_drafter_files_build(block: str) -> None:
    from forerun.drafting.registry import names
    from forerun.drafting.spec import describe

    assert describe(yaml.safe_load(block))["drafter"] in names()


def test_the_scripts_exist_and_can_be_run() -> None:
    for page in PAGES:
        for name in set(re.findall(r"scripts/\w+", page.read_text())):
            assert os.access(ROOT / name, os.X_OK), f"{page.name}: {name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.stem)
def test_prose_wraps(page: Path) -> None:
    """At 100. Tables, pictures and code, which is fenced or indented, are as wide as they must be."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not [line for line in text.splitlines() if len(line) > 100 and not line.startswith(("|", "![", "    "))]


def test_every_module_of_the_rooms_exists() -> None:
    rooms = (ROOT / "docs" / "how-it-works.md").read_text().split("## The rooms")[1]
    named = [line.strip().split("  ")[0] for line in rooms.splitlines() if line.startswith("      ")]
    assert named
    for name in " ".join(named).split():
        path = ROOT / "src" / "forerun" / name
        assert path.is_dir() or path.with_suffix(".py").exists(), name
