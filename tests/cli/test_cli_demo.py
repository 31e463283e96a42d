"""`forerun demo`: the text, the table, and the files it leaves."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest

from forerun.bench.run import Summary
from forerun.bench.suites import Prompt, spread
from forerun.cli.demo import _beside, _colour, same

COLUMNS = {
    "drafter", "tokens_per_second", "speedup", "tokens_per_step", "draft_seconds", "verify_seconds", "other_seconds",
    "identical",
}  # fmt: skip
SMALL = ("--limit", 2, "--rounds", 1, "--max-new-tokens", 6, "--dtype", "fp32")


@pytest.fixture
def ran(family, forerun, tmp_path):
    def call(*options):
        code, out, err = forerun("demo", "--model", family / "target", *SMALL, *options)
        assert code == 0, err
        return out

    return call


def test_the_table_and_its_file(ran, family, tmp_path):
    drafters = f"lookup,small:{family / 'small'}"
    out = ran("--drafters", drafters, "--json", tmp_path / "rows.json", "--plot", tmp_path / "rows.png")
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [row["drafter"] for row in found["rows"]] == ["none", *drafters.split(",")]
    assert all(set(row) >= COLUMNS and row["identical"] is True for row in found["rows"])
    assert found["rows"][0]["speedup"] == 1 and found["rows"][0]["tokens_per_step"] == 1
    assert found["dtype"] == "float32" and len(found["runs"]) == 3 * 2
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "rows.png"]
    assert "float32" in out and "identical" in out and "── lookup" in out


def test_without_drafters_it_takes_what_lies_beside_the_target(ran, family, tmp_path):
    ran("--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["drafter"] for row in rows] == ["none", "lookup", "hierarchy", "small"]


def test_what_lies_beside_a_target_is_told_by_its_config(tmp_path):
    """Whatever the folders are called: trained heads, and models that are smaller and have as many tokens."""
    held = {
        "target": ({"vocab_size": 9}, 100),
        "a": ({"drafter": "hydra"}, 10),
        "b": ({"vocab_size": 9}, 50),
        "larger": ({"vocab_size": 9}, 200),
        "other": ({"vocab_size": 8}, 50),
        "stranger": ({"drafter": "nobody"}, 10),
    }
    for name, (config, size) in held.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(b"0" * size)
    found = _beside(tmp_path / "target")
    assert list(found) == ["lookup", "hierarchy", "b", "a"]
    assert (found["a"], found["b"]) == (f"hydra:{tmp_path / 'a'}", f"small:{tmp_path / 'b'}")


def test_what_lies_there_and_cannot_be_built_is_left_out_aloud(family, forerun, tmp_path):
    shutil.copytree(family / "target", tmp_path / "target")
    (tmp_path / "broken.yaml").write_text("drafter: verified\ncheckpoint: ./nowhere\n")
    code, out, err = forerun("demo", "--model", tmp_path / "target", *SMALL)
    assert code == 0 and "── lookup" in out and f"without {tmp_path / 'broken.yaml'}: " in err
    code, _, err = forerun("demo", "--model", tmp_path / "target", *SMALL, "--drafter", tmp_path / "broken.yaml")
    assert code == 2 and err.startswith("forerun: ")


def test_the_object_may_go_to_stdout_alone(ran):
    assert set(json.loads(ran("--drafters", "none", "--json", "-"))["rows"][0]) >= COLUMNS


def test_sampling_has_no_identical(ran, tmp_path):
    ran("--drafters", "lookup", "--temperature", 1, "--json", tmp_path / "rows.json")
    assert {row["identical"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]} == {None}


def test_without_matplotlib_a_sentence(family, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "forerun[plots]" in refused("demo", "--model", family / "target", "--plot", tmp_path / "rows.png")


def test_prompts_are_spread_over_categories():
    prompts = [Prompt(f"{kind}{n}", kind, "", "", "x") for kind in "abc" for n in range(2)]
    assert [prompt.id for prompt in spread(prompts)] == ["a0", "b0", "c0", "a1", "b1", "c1"]


def row(identical: bool | None) -> Summary:
    return Summary("x", 1, 1, 1, 0, 0, 0, 0, identical, 7, 9, (1, 1), "", True)


def test_identical_is_said_honestly():
    assert [same(row(value)) for value in (True, False, None)] == ["yes", "no (7 of 9)", "-"]


def test_winners_and_losers_have_their_colours():
    rows = [replace(row(True), speedup=one) for one in (1, 0.8, 1.3, 1.9)]
    assert [_colour(one, rows) for one in rows] == ["", "red", "green", "bold green"]


def test_without_the_source_s_models_a_model_is_asked_for(refused, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["forerun.cli.demo"], "reference", lambda: tmp_path / "models" / "target")
    assert "--model" in refused("demo")
