"""The Dockerfile, as far as it can be held to its word without Docker."""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WHEEL_OF = {"src", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
"""What tests/packaging/test_wheel.py builds the wheel from."""


def instructions() -> list[tuple[str, str]]:
    """Keyword and rest of every instruction, lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1].strip()) for line in lines]


def copied() -> list[str]:
    """What is copied from the folder that the image is built in."""
    found = []
    for keyword, rest in instructions():
        if keyword == "COPY" and "--from" not in rest:
            found += shlex.split(rest)[:-1]
    return found


def installs() -> list[str]:
    commands = [part.strip() for keyword, rest in instructions() if keyword == "RUN" for part in rest.split("&&")]
    return [command for command in commands if command.startswith("pip install")]


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets this into the build: the last pattern that fits decides."""
    sent = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            bare = pattern.removeprefix("!").removeprefix("**/")
            names = [path.split("/")[0], path.split("/")[-1]] if pattern.startswith("**/") else [path.split("/")[0]]
            if any(fnmatch(name, bare) for name in names):
                sent = pattern.startswith("!")
    return sent


@pytest.mark.parametrize("source", copied())
def test_what_is_copied_is_there_and_sent(source: str) -> None:
    assert (ROOT / source).exists()
    assert is_sent(source)


def test_the_build_gets_all_that_a_wheel_is_made_of_and_nothing_heavy() -> None:
    assert set(copied()) >= WHEEL_OF
    assert not any(map(is_sent, ("models", ".git", ".venv", "tests", "src/forerun/native/_kernels.so")))


def test_every_version_is_the_pinned_one() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert {"torch", "setuptools"} <= pins.keys()
    assert len(installs()) == 3
    for command in installs():
        assert re.search(r"-c (/tmp/)?constraints\.txt ", command), command
        assert "==" not in command, f"{command}: say it in constraints.txt, once"


def test_kernels_are_demanded_and_nobody_is_root() -> None:
    text = dict(instructions())  # of equal keywords the last
    assert text["USER"] == "1000" and text["ENTRYPOINT"] == '["forerun"]'
    assert any(keyword == "RUN" and "ls /wheels/*-none-linux_*.whl" in rest for keyword, rest in instructions())


def test_the_python_is_one_that_is_allowed() -> None:
    images = {rest.split()[0] for keyword, rest in instructions() if keyword == "FROM"}
    assert images == {"python:3.11-slim-bookworm"}  # the one that constraints.txt was made with
