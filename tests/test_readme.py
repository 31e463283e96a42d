"""What the README shows is run as it stands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.startswith("forerun ")]


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "tokens per step" in capsys.readouterr().out


@pytest.mark.parametrize("command", commands())
def test_the_command_line_examples_run(command: str) -> None:
    program = Path(sys.executable).with_name("forerun")
    done = subprocess.run(
        [str(program), *shlex.split(command)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_drafter_file_builds() -> None:
    from forerun.drafters import describe, names

    for block in blocks("yaml"):
        assert describe(yaml.safe_load(block))["drafter"] in names()


def test_the_scripts_exist_and_can_be_run() -> None:
    for name in set(re.findall(r"scripts/\w+", README)):
        assert os.access(ROOT / name, os.X_OK), name


def test_every_module_of_the_layout_exists() -> None:
    section = README.split("## Layout")[1].split("## Limits")[0]
    for line in section.splitlines():
        if line.startswith("      "):
            for name in line.strip().split("  ")[0].split():
                path = ROOT / "src" / "forerun" / name
                assert path.is_dir() or path.with_suffix(".py").exists(), name
