"""Measuring for the planner: acceptance against brute force, costs of the right operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from enumeration import one_law
from fakes import Near, TableNetwork, engine_of, plain
from forerun.errors import RequestError
from forerun.plan import measure as look
from forerun.sampling import SamplingParams

TARGET = TableNetwork(vocab_size=5, seed=3, order=3)
SMALL, MIDDLE = Near(TARGET, 0.8, seed=1), Near(TARGET, 0.4, seed=2)
PROMPTS = [[1, 2, 3], [4], [0, 0, 1, 2, 3, 4, 0]]
GREEDY = SamplingParams(max_new_tokens=150)
WARM = SamplingParams(max_new_tokens=150, temperature=0.9, top_k=4, seed=3)


def texts(params: SamplingParams) -> list[look.Transcript]:
    return look.texts_of(engine_of(TARGET), PROMPTS, params)


def test_texts_are_what_the_target_says() -> None:
    for prompt, text in zip(PROMPTS, texts(GREEDY), strict=True):
        assert text.tokens == (*prompt, *plain(TARGET, prompt, 150))
        assert (text.prompt, text.answer_length, text.limit) == (prompt, 150, len(prompt) + 150)


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_agreement_is_that_of_the_laws_at_every_place(params: SamplingParams) -> None:
    """150 tokens are more than are scored at a time."""
    some, models = texts(params), [SMALL, MIDDLE, TARGET]
    shares: dict[tuple[int, int], list[float]] = {(0, 1): [], (0, 2): [], (1, 2): []}
    for text in some:
        for end in range(text.prompt_length, len(text.tokens)):
            laws = [one_law(model.logits(text.tokens[:end]), params) for model in models]
            for (low, high), found in shares.items():
                found.append(float(torch.minimum(laws[low], laws[high]).sum()))
    found = look.agreement(models, some, params)
    assert found.positions == 450
    for (low, high), values in shares.items():
        assert found.rates[low, high] == found.rates[high, low] == pytest.approx(np.mean(values), abs=1e-5)
        assert found.errors[low, high] == pytest.approx(np.std(values, ddof=1) / 450**0.5, abs=1e-5)
    assert found.rates.diagonal().tolist() == [1, 1, 1]
    assert found.rates[1, 2] > found.rates[0, 2], "the middle model is nearer to the target"


@pytest.mark.parametrize("params", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_costs_are_measured_for_every_length(params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole operations: a forward over so many tokens each time."""
    text = texts(params)[0]
    read: list[int] = []
    forward = TableNetwork.forward

    def watched(self: TableNetwork, feed, *rest):
        read.append(feed.tokens_BN.shape[1])
        return forward(self, feed, *rest)

    monkeypatch.setattr(TableNetwork, "forward", watched)
    points = look.step_costs(engine_of(TARGET), [[text, text], [texts(params)[1]]], params, look.Timing(3))
    assert {*look.LENGTHS} <= {*read}
    of = [(rows, context, n) for rows, context in ((2, 153), (1, 151)) for n in look.LENGTHS]
    assert [(one.rows, one.context, one.nodes) for one in points] == of
    assert all(one.seconds > 0 and one.error >= 0 for one in points)
    read.clear()
    round = look.verifier_cost(SMALL, text, params, rounds=3)
    assert {*look.LENGTHS} <= {*read}
    assert [tokens for tokens, _ in round.points] == list(look.LENGTHS)
    assert all(seconds > 0 for _, seconds in round.points)
    writing = look.writer_cost(SMALL, text, params, TARGET, 3)
    assert writing(9) > writing(1) > 0


def test_timing_ends_when_its_time_is_up_and_is_refused_without_room() -> None:
    text = texts(GREEDY)[1]
    points = look.step_costs(engine_of(TARGET), [[text]], GREEDY, look.Timing(60, seconds=0, lengths=(1, 3)))
    assert [one.nodes for one in points] == [1, 3]
    narrow = TableNetwork(vocab_size=5, max_length=160)
    with pytest.raises(RequestError, match="no room to time"):
        look.step_costs(engine_of(narrow), [[text]], GREEDY)


def test_nothing_light_is_timed_behind_what_is_heaviest() -> None:
    """Streaks, of which the second half counts, and every other round backwards."""
    done: list[int] = []
    found = look._timings(done.append, (1, 9), look.Timing(2, streak=2))
    assert done == [1, 1, 9, 9, 9, 9, 1, 1] * 2
    assert {kind: len(seconds) for kind, seconds in found.items()} == {1: 2, 9: 2}
