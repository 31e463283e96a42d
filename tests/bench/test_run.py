"""Measuring: the same counter for all, interleaved, medians, and an honest `identical`."""

from __future__ import annotations

import pytest

from fakes import Near, TableNetwork, engine_of
from forerun.bench.picture import drawing
from forerun.bench.run import Timing, common, measure, table
from forerun.engine.requests import Stats
from forerun.errors import ForerunError, RequestError
from forerun.plots.style import DARK, LIGHT
from forerun.sampling import SamplingParams

PROMPTS = [[1, 2, 3], [0, 4]]


def engines() -> dict:
    target = TableNetwork(5, seed=1)
    networks = {"draft": Near(target, 0.5)}
    return {"none": engine_of(target), "small": engine_of(target, "small:draft", networks)}


def test_rows_and_runs():
    seen = []
    result = measure(engines(), PROMPTS, SamplingParams(max_new_tokens=20), rounds=3, watch=seen.append)
    assert [run.drafter for run in result.runs[:4]] == ["none", "small", "none", "small"], "interleaved"
    assert len(result.runs) == 3 * 2 * 2 and tuple(seen) == result.runs
    plain, small = result.rows
    assert (plain.drafter, plain.speedup, plain.tokens_per_step, plain.accepted) == ("none", 1.0, 1.0, 0.0)
    assert small.identical and small.equal_tokens == small.new_tokens == plain.new_tokens == 40
    assert small.tokens_per_step > 1.5 and small.speedup == small.tokens_per_second / plain.tokens_per_second
    assert small.rule == "greedy match" and small.exact
    for row in result.rows:
        assert row.spread[0] <= row.tokens_per_second <= row.spread[1]
        assert row.verify_seconds > 0 and row.other_seconds >= 0
    assert plain.draft_seconds < small.draft_seconds


def test_no_round_is_begun_that_would_take_too_long():
    result = measure(engines(), PROMPTS, SamplingParams(max_new_tokens=5), rounds=9, seconds=0)
    assert result.rounds == 1 and len(result.runs) == 4


def made_up(drafter: str, number: int, prompt: int, tokens: list[int], seconds: float) -> Timing:
    stats = Stats(drafter, steps=2, new_tokens=len(tokens), accepted_tokens=len(tokens) - 2, seconds=seconds + 1.0)
    stats.prefill_seconds, stats.verify_seconds, stats.draft_seconds = 1.0, seconds / 2, seconds / 4
    return Timing(drafter, number, prompt, tuple(tokens), stats)


def test_figures_are_medians_of_rounds_and_the_prompt_does_not_count():
    runs = [made_up("none", number, 0, [1, 2, 3, 4], seconds) for number, seconds in enumerate((1.0, 4.0, 2.0))]
    (row,) = table(runs)
    assert row.tokens_per_second == 2.0 and row.spread == (1.0, 4.0)
    assert row.verify_seconds == 1.0 and row.draft_seconds == 0.5 and row.other_seconds == 0.5
    assert row.tokens_per_step == 2.0 and row.accepted == 1.0


def test_a_difference_is_reported_with_how_far_it_was_equal():
    runs = [made_up("none", 0, 0, [1, 2, 3, 4], 1), made_up("x", 0, 0, [1, 2, 9, 4], 1)]
    runs += [made_up("none", 0, 1, [5, 6], 1), made_up("x", 0, 1, [5, 6], 1)]
    row = table(runs)[1]
    assert row.identical is False and (row.equal_tokens, row.new_tokens) == (4, 6)
    assert table(runs, greedy=False)[1].identical is None


def test_common():
    assert [common(left, right) for left, right in (([], []), ([1], [1, 2]), ([1, 2], [1, 3]), ([2], [1]))] == [
        0,
        1,
        1,
        0,
    ]


def test_nothing_to_measure():
    for prompts, rounds in (([], 1), (PROMPTS, 0)):
        with pytest.raises(RequestError, match="nothing to measure"):
            measure(engines(), prompts, SamplingParams(), rounds)


def test_ctrl_c_ends_the_measurement(monkeypatch):
    made = engines()

    def interrupted():
        raise KeyboardInterrupt

    made["small"].add([1])
    made["small"].clear()
    monkeypatch.setattr(made["small"].drafter, "propose", lambda context: interrupted())
    with pytest.raises(KeyboardInterrupt):
        measure(made, PROMPTS, SamplingParams(max_new_tokens=5), rounds=1)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_a_picture(theme):
    pytest.importorskip("matplotlib")
    rows = measure(engines(), PROMPTS, SamplingParams(max_new_tokens=4), rounds=1).rows
    sheet = drawing(rows, "two drafters", "on a machine")(theme)
    assert sheet.content().startswith(b"\x89PNG") and b"<svg" in sheet.content("svg")
    bars = [patch.get_width() for patch in sheet.panels[0].patches]
    assert bars == [row.tokens_per_second for row in rows]
    assert [text.get_text() for text in sheet.panels[0].texts] == [f"{row.speedup:.2f}x" for row in rows]
    with pytest.raises(ForerunError, match="svg"):
        sheet.content("docx")
