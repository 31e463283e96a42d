"""Measuring for the planner: acceptance against brute force, costs of the right operations, rounds as they happen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from enumeration import one_law
from fakes import Near, TableNetwork, engine_of, plain
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.model import Model
from forerun.plan import measure as look
from forerun.plan.hierarchy import Chain, Verifier, at_least
from forerun.sampling import SamplingParams

TARGET = TableNetwork(vocab_size=5, seed=3, order=3)
SMALL, MIDDLE = Near(TARGET, 0.8, seed=1), Near(TARGET, 0.4, seed=2)
PROMPTS = [[1, 2, 3], [4], [0, 0, 1, 2, 3, 4, 0]]
GREEDY = SamplingParams(max_new_tokens=150)
WARM = SamplingParams(max_new_tokens=150, temperature=0.9, top_k=4, seed=3)


def texts(params: SamplingParams) -> list[look.Text]:
    return look.texts_of(engine_of(TARGET), PROMPTS, params)


def test_texts_are_what_the_target_says() -> None:
    for prompt, text in zip(PROMPTS, texts(GREEDY), strict=True):
        assert text.tokens == (*prompt, *plain(TARGET, prompt, 150))
        assert (text.prompt_length, text.answer_length) == (len(prompt), 150)


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
    step = look.target_cost(engine_of(TARGET), text, params, 3)
    assert {*look.LENGTHS} <= {*read}
    read.clear()
    round = look.verifier_cost(SMALL, text, params, rounds=3)
    assert {*look.LENGTHS} <= {*read}
    for measured in (step, round):
        assert [tokens for tokens, _ in measured.points] == list(look.LENGTHS)
        assert all(seconds > 0 for _, seconds in measured.points)
    writing = look.writer_cost(SMALL, text, params, TARGET, 3)
    assert writing(9) > writing(1) > 0
    assert look.reading_seconds(SMALL, text) > 0


def test_a_measured_round_has_the_yields_of_the_engine() -> None:
    """Under `at_least`, a round over a store and the target above it give what the engine gives."""
    engine = engine_of(TARGET)
    workshop = Workshop(Model(TARGET, 1), {}.__getitem__)
    store = build({"drafter": "lookup", "cost": 0.02}, workshop)
    found = look.measured_round(engine, None, store, PROMPTS, GREEDY)
    again = Engine(TARGET, build({"drafter": "lookup", "cost": 0.02}, workshop), max_rows=1)
    outputs = again.generate(PROMPTS, GREEDY)
    steps = sum(output.stats.steps for output in outputs)
    # the last step of an answer may verify more than the answer has room for
    assert found.tokens == pytest.approx(sum(output.stats.new_tokens for output in outputs) / steps, rel=0.02)
    assert found.seconds > 0 and found.yields[0] == 0
    below = look.measured_round(engine, MIDDLE, build("lookup", workshop), PROMPTS, GREEDY)
    chain = Chain(below, (Verifier(1.0, 0.8),))
    assert 1 <= at_least(chain, (4,)).tokens <= 5 + len(below.yields)


def test_yields_become_probabilities() -> None:
    assert look.pmf([1, 1, 2, 4]).tolist() == [0, 0.5, 0.25, 0, 0.25]
