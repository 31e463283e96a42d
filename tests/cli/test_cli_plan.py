"""`forerun plan`: from a model and prompts to a file that `auto` drafts by."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

import forerun as library
from forerun.drafters.switch import Switch
from forerun.drafting.planned import NAME, Planned

FEW = ("--seconds", "1", "--max-new-tokens", "12", "--kernels", "torch", "--threads", "1")


@pytest.fixture
def shelf(tmp_path: Path, family: Path) -> Path:
    """A target of its own, so that a plan may lie in its folder, with a smaller model beside it and some prompts."""
    shutil.copytree(family / "target", tmp_path / "target")
    (tmp_path / "small").symlink_to(family / "small")
    lines = [json.dumps({"prompt_ids": [5 + place, 9, 11, 9, 11]}) for place in range(5)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_a_plan_from_the_command_to_the_drafter(shelf, forerun, monkeypatch, caplog) -> None:
    """Its choice is the fastest measured, its file says what it was made of, and auto drafts by it wherever it runs."""
    monkeypatch.chdir(shelf)
    code, out, err = forerun(
        "plan", "target", "--prompts", "prompts.jsonl", "--drafter", "lookup", "--drafter", "small:small", "--batch",
        "2,1", *FEW,
    )  # fmt: skip
    assert code == 0, err
    assert "1 side by side" in out and "2 side by side" in out and "auto drafts by it" in out
    found = Planned.read(shelf / "target" / NAME)
    assert [one.rows for one in found.choices] == [1, 2]
    assert {int(point[0]) for point in found.costs} == {1, 2}
    for one in found.choices:
        names = [each["name"] for each in one.figures["candidates"]]
        assert "none" in names and any("small" in name for name in names)
        measured = [each for each in one.figures["candidates"] if "measured" in each]
        assert len(measured) >= 2 and one.figures["name"] in {each["name"] for each in measured}
        assert one.figures["over_plain"] >= 1
    raw = json.loads((shelf / "target" / NAME).read_text())
    raw["choices"][0]["drafter"] = {"drafter": "small", "checkpoint": "../small", "length": 2}
    (shelf / "target" / NAME).write_text(json.dumps(raw))
    monkeypatch.chdir(shelf.parent)
    with caplog.at_level(logging.WARNING):
        engine = library.load(shelf / "target", drafter="auto", kernels="torch", threads=1)
    assert isinstance(engine.drafter, Switch) and not [one for one in caplog.records if one.levelno > logging.INFO]
    assert engine.drafter.parts[0].name == "small" and engine.drafter.parts[-1].name == "hierarchy"
    assert engine.costs.knows(1) and engine.costs.knows(2), "the switch begins with the plan's costs"


def test_a_plan_for_another_machine_from_its_costs(shelf, said, forerun, refused, monkeypatch) -> None:
    """Where a node more costs a plain step nothing is drafted, whatever is accepted; and nothing is measured."""
    monkeypatch.chdir(shelf)
    ask = ("plan", "target", "--prompts", "prompts.jsonl", "--drafter", "lookup", "--batch", "1", *FEW)
    assert forerun(*ask, "--out", "there.json")[0] == 0
    there = json.loads((shelf / "there.json").read_text())
    there["costs"] = [[1, 1, 1, 1.0, 0], [1, 1, 2, 2.0, 0]]
    there["drafts"] = {}
    there["machine"]["processor"] = "an abacus"
    (shelf / "there.json").write_text(json.dumps(there))
    found = said(*ask, "--costs", "there.json", "--out", "here.json", "--temperature", "0", "--temperature", "0.8")
    assert [(one["rows"], one["temperature"]) for one in found["choices"]] == [(1, 0.0), (1, 0.8)]
    assert all(one["drafter"] == {"drafter": "none"} and "measured" not in one for one in found["choices"])
    assert found["machine"]["processor"] == "an abacus" and found["costs"] == there["costs"]
    there["target"]["fingerprint"] = "another"
    (shelf / "there.json").write_text(json.dumps(there))
    assert "costs of another target" in refused(*ask, "--costs", "there.json", "--out", "here.json")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--batch", "1,zwei"], "--batch is a list of numbers"),
        (["--batch", "0"], "--batch is a list of numbers"),
        (["--out", "no/where.json"], "there is no folder no"),
        (["--out", "."], "is a folder"),
        (["--drafter", "auto"], "name the drafters that it may choose from"),
        (["--drafter", "luckup"], "lookup"),
        (["--costs", "no.json"], "cannot read the plan no.json"),
    ],
    ids=lambda one: " ".join(one) if isinstance(one, list) else None,
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(shelf, refused, monkeypatch, words, sentence) -> None:
    monkeypatch.chdir(shelf)
    assert sentence in refused("plan", "target", *words)
    assert not (shelf / "target" / NAME).exists()
