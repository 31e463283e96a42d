"""`forerun demo`: the panes, the table, and the files it leaves."""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from forerun.bench.run import Summary
from forerun.bench.suites import Prompt, spread
from forerun.cli import drafted, race
from forerun.cli.demo import _print_table, reference, same
from forerun.cli.fitting import beside
from forerun.cli.ink import PAPERS, Ink
from forerun.cli.race import Lane, frame, show
from forerun.engine.load import load
from forerun.engine.requests import Piece
from forerun.errors import RequestError
from forerun.sampling import SamplingParams

command = importlib.import_module("forerun.cli.demo")  # the package has the command under that name

COLUMNS = {
    "drafter", "tokens_per_second", "speedup", "tokens_per_step", "draft_seconds", "verify_seconds", "other_seconds",
    "identical",
}  # fmt: skip
SMALL = ("--limit", 2, "--rounds", 1, "--max-new-tokens", 6, "--dtype", "fp32")
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
PROMPT = "def main(argv):\n    return argv\n" * 3


@pytest.fixture
def ran(family, forerun, tmp_path):
    def call(*options):
        code, out, err = forerun("demo", family / "target", *SMALL, *options)
        assert code == 0, err
        return out

    return call


@pytest.fixture(scope="module")
def engines(family):
    plain = load(str(family / "target"), "none", dtype="fp32")
    return {"none": plain, "lookup": load(str(family / "target"), "lookup", dtype="fp32")}


# ---- what is compared


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
    assert "float32" in out and "identical" in out and "times plain" in out


def test_without_drafters_it_takes_what_lies_beside_the_target(ran, tmp_path):
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
    found = beside(tmp_path / "target")
    assert list(found) == ["lookup", "hierarchy", "b", "a"]
    assert (found["a"], found["b"]) == (f"hydra:{tmp_path / 'a'}", f"small:{tmp_path / 'b'}")


@pytest.mark.parametrize("text", ["drafter: verified\ncheckpoint: ./nowhere\n", "drafter: nobody\n", "- {a: ["])
def test_what_lies_there_and_cannot_be_built_is_left_out_aloud(family, forerun, tmp_path, text):
    """A file of another program too, which may be no drafter at all."""
    shutil.copytree(family / "target", tmp_path / "target")
    (tmp_path / "broken.yaml").write_text(text)
    code, out, err = forerun("demo", tmp_path / "target", *SMALL)
    assert code == 0 and "lookup" in out and f"without {tmp_path / 'broken.yaml'}: " in err
    for option in ("--drafter", "--show"):
        code, _, err = forerun("demo", tmp_path / "target", *SMALL, option, tmp_path / "broken.yaml")
        assert code == 2 and err.startswith("forerun: ")


def test_an_installed_package_has_no_model_of_its_own(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "__file__", str(tmp_path / "lib" / "forerun" / "cli" / "demo.py"))
    assert "name a model" in refused("demo")
    with pytest.raises(RequestError):
        reference()
    (tmp_path / "models" / "target").mkdir(parents=True)
    assert reference() == Path("models/target")


def test_prompts_of_ones_own_end_where_the_model_ends_them(ran, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "_compare", lambda engines, wish: seen.append(wish))
    rows = [{"prompt": "import os\n"}, {"prompt": "class A:"}, {"prompt": "x"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ran("--drafter", "lookup", "--prompts", tmp_path / "mine.jsonl")
    ran("--drafter", "lookup")
    mine, suite = seen
    assert [prompt.text for prompt in mine.prompts] == ["import os\n", "class A:"]
    assert mine.prompts[1].where.endswith("mine.jsonl, line 2")
    assert (mine.params.ignore_eos, suite.params.ignore_eos) == (False, True)


def test_the_prompts_of_a_file_are_continued(ran, tmp_path):
    (tmp_path / "mine.py").write_text("import argparse\nparser = argparse.")
    out = ran("--drafter", "lookup", "--prompts", tmp_path / "mine.py")
    assert "mine.py" in out and "parser = argparse." in out and "1 prompt, " in out


def test_the_object_may_go_to_stdout_alone(ran):
    assert set(json.loads(ran("--drafters", "none", "--json", "-"))["rows"][0]) >= COLUMNS


def test_sampling_has_no_identical(ran, tmp_path):
    ran("--drafters", "lookup", "--temperature", 1, "--json", tmp_path / "rows.json")
    assert {row["identical"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]} == {None}


def test_without_matplotlib_a_sentence(family, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "forerun[plots]" in refused("demo", family / "target", "--plot", tmp_path / "rows.png")


def test_prompts_are_spread_over_categories():
    prompts = [Prompt(f"{kind}{n}", kind, "", "", "x") for kind in "abc" for n in range(2)]
    assert [prompt.id for prompt in spread(prompts)] == ["a0", "b0", "c0", "a1", "b1", "c1"]


# ---- side by side


def console_of(width: int = 100, terminal: bool = True) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=terminal,
        width=width,
        height=30,
        color_system="truecolor",
        legacy_windows=False,
    )


def written(console: Console) -> str:
    return console.file.getvalue()


def test_both_continue_the_same_prompt_and_whoever_is_behind_goes_next(engines):
    tokens = engines["none"].encode(PROMPT)
    moments = list(race.race(engines, tokens, GREEDY))
    said = {name: [t for one in moments if one.name == name for t in one.piece.token_ids] for name in engines}
    assert said["none"] == said["lookup"] and len(said["none"]) == 40
    firsts = [next(one for one in moments if one.name == name).seconds for name in engines]
    assert firsts == [0, 0], "clocks start with the first words"
    clocks = dict.fromkeys(engines, 0.0)
    ends = {name: max(one.seconds for one in moments if one.name == name) for name in engines}
    for one in moments[2:]:
        before, clocks[one.name] = clocks[one.name], one.seconds
        assert all(before <= clocks[other] or clocks[other] == ends[other] for other in engines)


def test_an_answer_that_was_given_before_is_forgotten_before_the_race(family):
    """Else the store of what the model said would know the very text."""
    engine = load(str(family / "target"), "hierarchy", dtype="fp32")
    tokens = engine.encode("import os\n")
    steps = [len(list(race.race({"h": engine}, tokens, GREEDY))) for _ in range(2)]
    assert steps[0] == steps[1]


def test_on_a_terminal_there_are_panes_with_a_legend(engines, monkeypatch):
    monkeypatch.setattr(race, "SECONDS", 0.0)
    console = console_of()
    lanes = show(console, engines, engines["none"].encode(PROMPT), GREEDY, 1e3)
    out = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", written(console))
    assert "─ plain ─" in out and "─ lookup ─" in out and "the target itself" in out
    assert f"40 tokens, {lanes[1].steps} steps" in out
    assert [lane.title for lane in lanes] == ["plain", "lookup"] and lanes[0].text == lanes[1].text
    assert all(lane.is_over for lane in lanes) and lanes[1].steps < lanes[0].steps == 40


def test_what_is_too_fast_to_follow_is_slowed_down_and_says_so(engines, monkeypatch):
    slept = []
    monkeypatch.setattr(race, "SECONDS", 4.0)
    monkeypatch.setattr(race.time, "sleep", slept.append)
    fast, slow = console_of(), console_of()
    show(fast, engines, engines["none"].encode(PROMPT), GREEDY, 100.0)
    assert "Slowed down 10 times" in written(fast) and max(slept) > 0
    show(slow, engines, engines["none"].encode(PROMPT), GREEDY, 5.0)
    assert "Slowed down" not in written(slow)


@pytest.mark.parametrize(("width", "rows"), [(100, 1), (60, 2)])
def test_panes_stand_side_by_side_where_there_is_room(width, rows):
    console, lanes = console_of(width), [Lane("plain", [("word", "")]), Lane("lookup", [("word", "lookup")])]
    console.print(frame(console, lanes, Ink(), 1.0))
    lines = written(console).splitlines()
    assert sum("╭" in line for line in lines) == rows
    assert f"48;2;{int(PAPERS[0][1:3], 16)};" in written(console), "the drafted word has its colour"


def test_a_pane_shows_the_end_of_a_long_text():
    console = console_of()
    lane = Lane("plain", [(f"line {number}\n", "") for number in range(99)])
    console.print(frame(console, [lane], Ink(), 1.0))
    assert "line 98" in written(console) and "line 1 " not in written(console)


def test_elsewhere_a_text_is_written_once_with_all_who_said_it(ran):
    out = ran("--drafter", "lookup")
    assert "\x1b" not in out and "... and goes on:" in out
    accounts = re.findall(r"^  (plain|lookup): 6 tokens, (\d+) steps, [\d.]+ s$", out, re.MULTILINE)
    assert [name for name, _ in accounts] == ["plain", "lookup"] and accounts[0][1] == "6"


def test_ctrl_c_ends_the_race(family, forerun, monkeypatch):
    steps = race.race

    def broken(*arguments):
        yield next(steps(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(race, "race", broken)
    code, out, err = forerun("demo", family / "target", *SMALL, "--drafter", "lookup")
    assert code == 130 and err.endswith("forerun: interrupted\n") and "identical" not in out


def test_the_one_that_is_shown_may_be_named(ran, family):
    small = f"small:{family / 'small'}"
    assert f"  {small}: 6 tokens" in ran("--show", small)
    assert "  lookup: 6 tokens" in ran("--drafter", f"lookup,{small}", "--show", "lookup")


# ---- colours


def test_a_name_keeps_its_colour_and_the_target_has_none():
    ink = Ink()
    assert ink.paper("") == ink.style("") == ""
    papers = [ink.paper(name) for name in ("context", "small", "context")]
    assert papers == [PAPERS[0], PAPERS[1], PAPERS[0]]
    assert ink.legend() == [("context (this text)", PAPERS[0]), ("small", PAPERS[1])]


def test_a_lane_remembers_who_thought_of_each_word():
    lane = Lane("x")
    lane.add(race.Moment("x", 0.5, Piece(0, 0, 0, [1, 2], ["small", ""], ["a", "b"])))
    lane.add(race.Moment("x", 1.5, Piece(0, 0, 0, [3], [""], ["c"], "length")))
    assert lane.words == [("a", "small"), ("b", ""), ("c", "")]
    assert (lane.account, lane.is_over) == ("3 tokens, 2 steps, 1.50 s", True)


# ---- the table


def row(drafter: str = "x", speedup: float = 1.0, identical: bool | None = True) -> Summary:
    return Summary(drafter, 100 * speedup, speedup, 2.5, 0, 0, 0, 0, identical, 7, 9, (1, 1), "", True)


ROWS = [row("none"), row("good", 1.5), row("better", 2.0), row("bad", 0.8, identical=False)]


def test_winners_and_losers_have_colours_and_words():
    console = console_of()
    _print_table(console, ROWS, is_clocked=True)
    lines = {
        name: line
        for line in written(console).splitlines()
        for name in ("plain", "good", "better", "bad")
        if name in line
    }
    assert "\x1b[31m" in lines["bad"] and "a loss: 0.80x" in lines["bad"] and "no (7 of 9)" in lines["bad"]
    assert "\x1b[1;32m" in lines["better"] and "best: 2.00x" in lines["better"]
    assert "\x1b[32m" in lines["good"] and "150" in lines["good"] and "\x1b[3" not in lines["plain"]


def test_without_a_clock_nothing_is_said_about_seconds(ran):
    out = ran("--drafter", "lookup", "--rounds", 0)
    assert "tokens per step" in out and "times plain" not in out and "fastest" not in out


def test_what_to_do_with_the_table_is_said(engines):
    """By the spec, which may not be the name in the table."""
    wish = command.Wish("MODEL", {"better": "small:a folder"}, GREEDY, [], None, None, None, None, None)
    console = console_of(terminal=False)
    command._print_verdict(console, ROWS, engines["none"], wish)
    assert "    forerun generate MODEL ... --drafter 'small:a folder'\n" in written(console)
    assert "should not happen" in written(console)
    console = console_of(terminal=False)
    command._print_verdict(console, [row("none"), row("bad", 0.8)], engines["none"], wish)
    assert written(console) == "Nothing is faster than plain decoding here: use --drafter none.\n"


def test_identical_is_said_honestly():
    assert [same(row(identical=value)) for value in (True, False, None)] == ["yes", "no (7 of 9)", "-"]


# ---- the picture


def test_the_picture_is_whole_and_names_model_machine_and_drafters(ran, tmp_path):
    path = tmp_path / "drafted.svg"
    out = ran("--drafter", "lookup", "--picture", path)
    text = path.read_text()
    ElementTree.fromstring(text)
    assert len(text) < 200_000 and ">target with lookup<" in text and "✓ yes" in text and "times plain" in text
    machine = out.splitlines()[-1].removeprefix("target on ")
    assert machine in text and "float32" in text


def test_a_picture_has_one_kind(refused, family, tmp_path):
    assert "name the file .svg" in refused("demo", family / "target", "--picture", tmp_path / "drafted.png")
    missing = tmp_path / "missing" / "drafted.svg"
    assert str(missing) in refused("demo", family / "target", "--picture", missing)


def picture(words: list[tuple[str, str]], **rest) -> ElementTree.Element:
    one = drafted.Drafted("title", "account", ["last line"], words, ROWS, rest.get("is_clocked", True), ["footer"])
    return ElementTree.fromstring(drafted.svg(one))


def filled(root: ElementTree.Element) -> list[str]:
    return [rect.get("fill") for rect in root.iter("{http://www.w3.org/2000/svg}rect")]


def test_every_token_has_the_colour_of_who_thought_of_it():
    fills = filled(picture([("a", "small"), ("b", "small"), ("c", ""), ("d", "lookup"), ("\n", "small")]))
    legend = 1
    assert fills.count(PAPERS[0]) == 3 + legend and fills.count(PAPERS[1]) == 1 + legend


def test_the_table_of_the_picture_tells_winners_from_losers():
    fills = filled(picture([("a", "")]))
    assert fills[-4:] == [drafted.PLAIN, drafted.GAIN, drafted.BEST, drafted.LOSS]


def test_any_text_makes_a_readable_file():
    root = picture([("<&\x00\x1b]", "small"), ("日本", "small"), ("", "small"), ("\r\n\t", "")])
    assert any("<&··]" in (node.text or "") for node in root.iter())


def test_tokens_stand_where_the_text_has_them():
    found = drafted.blocks([("ab", "x"), ("cd\n", ""), ("\n", "x"), ("efghijk", "y")], columns=5)
    assert [(one.column, one.line, one.text, one.is_end) for one in found] == [
        (0, 0, "ab", False),
        (2, 0, "cd", True),
        (0, 1, "", True),
        (0, 2, "efghi", False),
        (0, 3, "jk", False),
    ]
    assert [(one.column, one.line) for one in drafted.blocks([("日本語", "")], columns=5)] == [(0, 0), (0, 1)]
