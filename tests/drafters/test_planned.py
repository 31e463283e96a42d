"""A plan's file, and what `auto` makes of it: here, on another machine, and of another target."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from fakes import TableNetwork, engine_of
from forerun.drafters.auto import plan_for
from forerun.drafters.switch import Switch
from forerun.drafting.pace import PLAIN, Wish
from forerun.drafting.pace import Choice as PaceChoice
from forerun.drafting.planned import NAME, Choice, Planned
from forerun.drafting.workshop import Workshop, build
from forerun.errors import DrafterError
from forerun.model import Model
from forerun.nn.machine import record
from forerun.sources.source import Source

SMALL = Path(__file__).parents[2] / "models" / "small"
COSTS = [
    [1.0, 50.0, 1.0, 0.01, 0.0],
    [1.0, 50.0, 5.0, 0.02, 0.0],
    [1.0, 900.0, 1.0, 9.0, 0.0],
    [4.0, 80.0, 2.0, 0.03, 0.0],
]


@pytest.fixture
def target(tmp_path: Path) -> TableNetwork:
    """A table that lies in a folder."""
    network = TableNetwork(vocab_size=5)
    network.home = tmp_path / "target"
    network.home.mkdir()
    for path in SMALL.iterdir():
        (network.home / path.name).symlink_to(path)
    return network


def plan_of(network: TableNetwork, **changes: object) -> Planned:
    assert network.home is not None
    choices = [
        Choice(1, 0.0, {"drafter": "lookup", "nodes": 4}, {"predicted": 3.0}),
        Choice(8, 0.0, {"drafter": "none"}),
        Choice(32, 0.0, {"drafter": "lookup", "nodes": 4}),
    ]
    about = {"name": "target", "fingerprint": Source.of(network.home).fingerprint}
    made = {"target": about, "machine": record(network), "choices": choices, "costs": COSTS, "drafts": {}}
    return Planned(**{**made, **changes})  # type: ignore[arg-type]


def auto(target: TableNetwork, **settings: str) -> Switch:
    made = build({"drafter": "auto", **settings}, Workshop(Model(target, 0), {}.__getitem__))
    assert isinstance(made, Switch)
    return made


def names(switch: Switch) -> list[tuple[str, int]]:
    return [(part.name, part.max_nodes) for part in switch.parts]


def test_auto_drafts_by_the_plan_in_the_targets_folder_and_begins_with_its_costs(target: TableNetwork) -> None:
    plan_of(target).write(target.home / NAME)
    made = auto(target)
    assert names(made) == [("lookup", 4), ("hierarchy", 16)], "each choice once, and the stores"
    costs = engine_of(target, made).costs
    assert costs.points == ((1, 0.01), (5, 0.02)) and costs(8, 4) == 0.03, "of the shortest context"
    (target.home / NAME).unlink()
    assert names(auto(target)) == [("hierarchy", 16)] and not engine_of(target, auto(target)).costs.points


@pytest.mark.parametrize("tokens", [1.5, 0.1])
def test_auto_begins_with_what_the_plan_promises(target: TableNetwork, tokens: float) -> None:
    """Before any step was made: the choice where it pays, and plain decoding where it does not."""
    figures = {"name": "a lookup", "nodes_per_step": 4.0, "tokens_per_step": 1 + tokens}
    choices = [Choice(1, heat, {"drafter": "lookup", "nodes": 4}, figures) for heat in (0.0, 1.0)]
    plan_of(target, choices=choices, drafts={"a lookup": {"1": 0.001}}).write(target.home / NAME)
    made = auto(target)
    assert made.pace._parts[0].draft.points == ((1, 0.001),)
    for _ in range(2):  # as new after a reset, too
        made.pace.admit()
        made.pace.choose(engine_of(target, made).costs, [Wish(9, frozenset([0]))])
        assert made.pace.seats[0].choice == (PaceChoice(0, 4) if tokens > 1 else PLAIN)
        made.pace.release(0)
        made.reset()


@pytest.mark.parametrize(
    "figures",
    [{}, {"tokens_per_step": math.nan}, {"nodes_per_step": "many"}, {"name": ["a", "list"]}, {"tokens_per_step": -1.0}],
    ids=repr,
)
def test_a_promise_that_makes_no_sense_is_none(target: TableNetwork, figures: dict[str, object]) -> None:
    """The choice is used all the same, and tried like any other."""
    sound = {"name": "a lookup", "nodes_per_step": 4.0, "tokens_per_step": 2.0} if figures else {}
    choice = Choice(1, 0.0, {"drafter": "lookup", "nodes": 4}, {**sound, **figures})
    plan_of(target, choices=[choice]).write(target.home / NAME)
    made = auto(target)
    assert names(made)[0] == ("lookup", 4) and not made.pace._expected


def test_on_another_machine_choices_hold_and_costs_do_not(
    target: TableNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    plan_of(target, machine={**record(target), "processor": "an abacus"}).write(target.home / NAME)
    with caplog.at_level(logging.INFO):
        made = auto(target)
    assert "made on another machine (processor an abacus)" in caplog.text
    assert names(made)[0] == ("lookup", 4) and made.known_costs == []


def test_a_plan_of_another_target_is_ignored_with_a_warning_and_refused_by_name(
    target: TableNetwork, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    plan_of(target, target={"name": "target", "fingerprint": "another"}).write(target.home / NAME)
    with caplog.at_level(logging.WARNING):
        assert names(auto(target)) == [("hierarchy", 16)]
    assert "made for another target" in caplog.text
    with pytest.raises(DrafterError, match="another target"):
        auto(target, checkpoint=str(target.home / NAME))
    plan_of(target).write(tmp_path / "elsewhere.json")
    assert names(auto(target, checkpoint=str(tmp_path / "elsewhere.json")))[0] == ("lookup", 4)


def test_a_choice_that_is_gone_is_left_out_with_a_warning(
    target: TableNetwork, caplog: pytest.LogCaptureFixture
) -> None:
    gone = [Choice(1, 0.0, {"drafter": "hydra", "checkpoint": "no/heads"})]
    plan_of(target, choices=gone).write(target.home / NAME)
    with caplog.at_level(logging.WARNING):
        assert names(auto(target)) == [("hierarchy", 16)]
    assert "hydra is not used" in caplog.text


def test_a_file_names_what_lies_beside_it_and_can_be_moved_with_it(
    target: TableNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heads").mkdir()
    inner = {"drafter": "fallback", "sources": [{"drafter": "lookup"}, {"drafter": "hydra", "checkpoint": "heads"}]}
    plan_of(target, choices=[Choice(1, 0.8, inner, {"predicted": 2.0})]).write(Path("target") / NAME)
    raw = json.loads((tmp_path / "target" / NAME).read_text())
    assert raw["choices"][0]["drafter"]["sources"][1]["checkpoint"] == "../heads"
    monkeypatch.chdir("/")
    found = Planned.read(tmp_path / "target" / NAME)
    (choice,) = found.choices
    assert choice.drafter["sources"][1]["checkpoint"] == str(tmp_path / "target" / ".." / "heads")
    assert (choice.rows, choice.temperature, choice.figures) == (1, 0.8, {"predicted": 2.0})
    assert found.costs == COSTS and found.machine == record(target)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"forerun_plan": 9}', '{"forerun_plan": 1, "target": 3}', "\x00"], ids=repr
)
def test_what_is_no_plan_is_refused_in_a_sentence(
    target: TableNetwork, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = target.home / NAME
    path.write_text(text)
    with pytest.raises(DrafterError, match="again"):
        plan_for(target, str(path))
    with caplog.at_level(logging.WARNING):
        assert plan_for(target, None) is None
    assert str(path) in caplog.text
    with pytest.raises(DrafterError, match="cannot read the plan"):
        plan_for(target, str(path.with_name("no.json")))
