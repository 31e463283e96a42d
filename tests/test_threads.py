"""How many threads compute, and the warning where a machine is busy."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import forerun
from forerun.cli import run
from forerun.engine import threads
from forerun.errors import ForerunError

TARGET = Path(__file__).parents[1] / "models" / "target"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_are_those_asked_for_else_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    assert threads.use_threads(3) == 3 == torch.get_num_threads()
    assert threads.use_threads(None) == 3
    monkeypatch.setenv(threads.VARIABLE, "2")
    assert threads.use_threads(None) == 2 == torch.get_num_threads()
    assert threads.use_threads(1) == 1 == torch.get_num_threads()


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_a_number_of_threads_that_makes_no_sense(wrong: object) -> None:
    with pytest.raises(ForerunError, match=r"threads=.* makes no sense: give 1 or more"):
        threads.use_threads(wrong)  # type: ignore[arg-type]


def test_more_threads_than_any_machine_has_use_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("the process would end here"))
    with pytest.raises(ForerunError, match="or fewer"):
        threads.use_threads(100_000)


@pytest.mark.parametrize("wrong", ["0", "many", "-1", "1.5"])
def test_an_environment_that_makes_no_sense(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(threads.VARIABLE, wrong)
    with pytest.raises(ForerunError, match=threads.VARIABLE):
        threads.use_threads(None)


@pytest.mark.parametrize(
    ("load", "cpus", "count", "warned"),
    [(0.2, 2, 2, False), (1.6, 2, 2, True), (9.0, 2, 1, False), (3.0, 8, 4, False), (7.0, 8, 4, True)],
)
def test_a_busy_machine_is_mentioned(
    load: float, cpus: int, count: int, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(threads, "available_cpus", lambda: cpus)
    with caplog.at_level(logging.WARNING, "forerun"):
        threads.warn_if_busy(count)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    assert not warned or f"load {load:.1f} on {cpus} CPUs" in caplog.text


def test_loading_says_so_and_sets_them(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (50.0, 0, 0))
    monkeypatch.setattr(threads, "available_cpus", lambda: 2)
    forerun.load(TARGET, threads=2)
    assert torch.get_num_threads() == 2 and "load(threads=1), --threads 1 or FORERUN_THREADS=1" in caplog.text
    caplog.clear()
    forerun.load(TARGET, threads=1)
    assert torch.get_num_threads() == 1 and not caplog.text


def test_commands_take_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--threads", "3"]) == 0
    assert "threads         3" in capsys.readouterr().out and torch.get_num_threads() == 3
    assert run(["generate", str(TARGET), "def", "--threads", "1", "--max-new-tokens", "2"]) == 0
    assert torch.get_num_threads() == 1
