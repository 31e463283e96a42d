"""Pictures: what they say, which colours mean what, and that nothing is written upon anything else."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.errors import ForerunError
from forerun.nn import machine
from forerun.plots import planning, style
from forerun.plots.style import DARK, LIGHT, Sheet, apart, write
from forerun.plots.training import drawing

image = pytest.importorskip("matplotlib.image")

HEADS = [
    {
        "step": 10.0 * n,
        "train_loss": 9.0 / n,
        "loss": 9.5 / n,
        "tokens_per_step": 1 + n / 10,
        **{f"head{head}_loss": 2.0 + head / n for head in (1, 2)},
        **{f"head{head}_top1": 0.1 * n / head for head in (1, 2)},
    }
    for n in (1, 2, 3)
]
MODEL = [{name: row[name] for name in ("step", "train_loss", "loss")} for row in HEADS]
SAID = ("medusa heads for mine", "30 steps  ·  a machine, 2 threads")


@pytest.mark.parametrize(("theme", "ending"), [(LIGHT, ""), (DARK, "-dark")])
def test_a_picture_is_written_on_light_and_on_dark_ground(theme, ending, tmp_path):
    paths = write(drawing(HEADS, *SAID), tmp_path / "run.png")
    assert [path.name for path in paths] == ["run.png", "run-dark.png"]
    pixels = image.imread(io.BytesIO((tmp_path / f"run{ending}.png").read_bytes()))
    corner = "#" + "".join(f"{round(255 * float(channel)):02x}" for channel in pixels[2, 2][:3])
    assert corner == theme.ground and pixels.shape[1] > pixels.shape[0] > 900


def test_it_names_the_model_and_the_machine_and_every_line():
    sheet = drawing(HEADS, *SAID)(LIGHT)
    assert [text.get_text() for text in sheet.figure.texts] == list(SAID)
    titles = [axes.get_title("left") for axes in sheet.panels]
    assert titles[0] == "Loss, nats" and len(titles) == 4 and titles[3].startswith("Tokens per step")
    names = [[text.get_text() for text in axes.texts] for axes in sheet.panels]
    assert names == [["training", "held out"], ["head 1", "head 2"], ["head 1", "head 2"], ["plain", "1.30"]]


def test_conditional_acceptance_is_shown_where_the_log_has_it():
    rows = [row | {f"head{head}_given": 0.2 * row["step"] / 30 for head in (1, 2)} for row in HEADS]
    panel = drawing(rows, *SAID)(LIGHT).panels[2]
    assert panel.get_title("left") == "Right where all heads before are"
    assert list(panel.lines[1].get_ydata()) == [row["head2_given"] for row in rows]
    assert drawing(HEADS, *SAID)(LIGHT).panels[2].get_title("left") == "Best token is right, by head"


def test_no_two_marks_of_an_axis_are_named_alike():
    """Heads that have learnt little differ by less than a percent."""
    rows = [row | {f"head{head}_top1": 0.01 + 0.001 * row["step"] / 10 / head for head in (1, 2)} for row in HEADS]
    sheet = drawing(rows, *SAID)(LIGHT)
    sheet.figure.canvas.draw()
    for axes in sheet.panels:
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert len(names) == len(set(names)) > 1


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_colour_means_one_thing(theme):
    panels = drawing(HEADS, *SAID)(theme).panels
    colours = [[line.get_color() for line in axes.lines] for axes in panels]
    assert colours[0] == [theme["plain"], theme["loss"]] and colours[3] == [theme["plain"], theme["accepted"]]
    assert colours[1] == theme.shades("loss", 2) and colours[2] == theme.shades("accepted", 2)
    assert colours[1][0] == theme["loss"] != colours[1][1]


def test_the_lines_are_the_log():
    panels = drawing(HEADS, *SAID)(LIGHT).panels
    assert list(panels[0].lines[1].get_ydata()) == [row["loss"] for row in HEADS]
    assert list(panels[2].lines[1].get_ydata()) == [row["head2_top1"] for row in HEADS]
    assert list(panels[3].lines[1].get_xdata()) == [10.0, 20.0, 30.0]


def test_a_language_model_has_a_loss_alone():
    assert [axes.get_title("left") for axes in drawing(MODEL, *SAID)(LIGHT).panels] == ["Loss, nats"]


def test_a_discriminator_has_a_panel_of_its_own():
    rows = [row | {"discriminator_accuracy": 0.9 - row["step"] / 100} for row in HEADS]
    panels = drawing(rows, *SAID)(LIGHT).panels
    assert len(panels) == 5 and panels[4].get_title("left") == "Discriminator is right"
    assert [line.get_ydata()[-1] for line in panels[4].lines] == [0.5, pytest.approx(0.6)]


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(ForerunError, match=r"name the file \.png, \.svg or \.pdf"):
        write(drawing(MODEL, *SAID), tmp_path / "run.doc")
    with pytest.raises(ForerunError, match="cannot be written"):
        write(drawing(MODEL, *SAID), tmp_path / "no" / "run.png")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ForerunError, match=r"pip install 'forerun\[plots\]'"):
        style.demand_matplotlib()
    assert not list(tmp_path.iterdir())


def test_panels_lie_within_the_picture_and_apart():
    boxes = [axes.get_position() for axes in Sheet(LIGHT, "a", "b", ["1", "2", "3", "4"]).panels]
    assert all(0 < box.x0 < box.x1 < 1 and 0 < box.y0 < box.y1 < 0.9 for box in boxes)
    assert boxes[0].x1 < boxes[1].x0 and boxes[2].y1 < boxes[0].y0


@given(st.lists(st.floats(0, 1), max_size=6))
def test_names_do_not_stand_upon_one_another(heights):
    moved = apart(heights, 0.1)
    assert all(above - below > 0.1 - 1e-9 for below, above in pairwise(sorted(moved)))
    order = sorted(range(len(heights)), key=lambda place: (heights[place], moved[place]))
    assert [moved[place] for place in order] == sorted(moved)
    if all(above - below > 0.1 for below, above in pairwise(sorted(heights))):
        assert moved == pytest.approx(heights)


def test_the_machine_has_its_makers_name(tmp_path, monkeypatch):
    import torch

    text = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz\nflags : x\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine.processor(torch.device("cpu")) == "Intel Xeon Gold 6338"
    assert machine.described(torch.device("cpu")) == "Intel Xeon Gold 6338, 2 threads"
    monkeypatch.setattr(machine, "CPUINFO", Path(tmp_path / "none"))
    assert machine.processor(torch.device("cpu"))


def test_a_plan_shows_what_steps_cost_and_how_candidates_rank() -> None:
    costs = [
        [rows, context, nodes, 1e-3 * rows * nodes, 0] for rows in (1, 8) for context in (9, 99) for nodes in (1, 5)
    ]
    best = {"name": "lookup", "predicted": 30.0, "error": 2.0, "measured": 29.0, "slowest": 28.0, "fastest": 31.0}
    others = [{"name": f"number {n}", "predicted": 20.0 - n, "error": 1.0} for n in range(12)]
    plain = {"name": "none", "predicted": 3.0, "error": 0.1}
    ranked = planning.Ranked("1 side by side", [best, *others, plain])
    sheet = planning.drawing(costs, [ranked], "What is fastest", "mine, a machine")(LIGHT)
    curves, ranking = sheet.panels
    assert len(curves.lines) == 4 and [text.get_text() for text in curves.texts] == ["1 row", "8 rows"]
    shown = [label.get_text() for label in ranking.get_yticklabels()]
    assert shown[0] == "lookup" and shown[-1] == "none" and len(shown) == planning.SHOWN + 1
    assert len(ranking.containers) == len(shown) + 1, "a prediction each, and what was measured"
