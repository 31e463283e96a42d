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


def commands(block: str) -> list[str]:
    return [line for line in block.splitlines() if line.startswith("forerun ")]


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "tokens per step" in capsys.readouterr().out


@pytest.mark.parametrize("block", [block for block in blocks("bash") if commands(block)])
def test_the_command_line_examples_run(block: str, tmp_path: Path) -> None:
    """In order, and where what they write harms nobody."""
    for folder in ("models", "src"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    program = Path(sys.executable).with_name("forerun")
    for command in commands(block):
        done = subprocess.run(
            [str(program), *shlex.split(command)[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout, command


def test_the_drafter_file_builds() -> None:
    from forerun.drafting.registry import names
    from forerun.drafting.spec import describe

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
