"""The exactness check: it passes what is exact, and it finds what is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fakes import Near, TableNetwork, engine_of
from forerun.accept import exact
from forerun.accept import judge as judging
from forerun.accept.exact import Verdict
from forerun.check import Amount, check
from forerun.check.greedy import check_greedy
from forerun.check.law import short_prompts
from forerun.check.rounding import moved, rounding_bound
from forerun.check.statistics import compare, distance, places
from forerun.check.texts import PlainText, plain_texts
from forerun.drafting import growth
from forerun.engine.engine import Engine
from forerun.errors import RequestError
from forerun.sampling import SamplingParams
from liars import Liar

PROMPTS = [[1, 2, 3, 0, 2, 1, 4, 4, 0, 1, 2, 2], [0, 4, 1, 1, 3], [2, 2, 4]]
PLAN = Amount(tokens=90, rows=(1, 3), length=30, samples=250, prompts=3)
SMALL = {"drafter": "small", "checkpoint": "draft"}


def target() -> TableNetwork:
    return TableNetwork(5, seed=1)


def engine(drafter: object = "none", noise: float = 0.7) -> Engine:
    network = target()
    return engine_of(network, drafter, {"draft": Near(network, noise)})


# ---- what is exact passes


@pytest.mark.parametrize(
    "drafter", [SMALL, {**SMALL, "widths": [2, 1]}, {**SMALL, "tree": {"width": 2, "depth": 3, "nodes": 5}}, "lookup"]
)
def test_exact_drafters_pass(drafter):
    report = check(engine(), engine(drafter), PROMPTS, PLAN)
    assert report.passed and not report.lossy, report.verdicts()
    assert [(part.rows, part.tokens, part.identical) for part in report.greedy] == [(1, 90, True), (3, 90, True)]
    assert len(report.sampled) == 3 * len(places(PLAN.positions))
    assert report.verdicts()[-1].startswith("EXACT: drafter ")


def test_the_law_is_that_of_the_given_parameters():
    law = SamplingParams(temperature=0.6, top_k=3, repetition_penalty=1.2, stop_token_ids=[0])
    assert check(engine(), engine(SMALL), PROMPTS, replace(PLAN, tokens=0, params=law)).passed


def test_plain_against_itself_passes_and_the_object_is_whole():
    found = check(engine(), engine(), PROMPTS, PLAN).as_dict()
    assert found["passed"] is True
    assert {"rows", "tokens", "bound", "divergences", "passed", "verdict"} <= set(found["greedy"][0])
    keys = {"prompt", "first", "last", "samples", "distance", "noise", "p", "detectable", "passed"}
    assert set(found["sampled"][0]) == keys


# ---- what is not exact fails


def test_a_drafter_that_lies_about_its_law_fails():
    plain = engine()
    liar = Engine(target(), Liar(5, token=3))
    report = check(plain, liar, PROMPTS, replace(PLAN, tokens=0))
    assert not report.passed and not report.lossy
    assert "law: DIFFERENT" in report.verdicts()[0] and "NOT EXACT" in report.verdicts()[-1]


def test_a_drafter_that_draws_more_sharply_than_it_says_fails(monkeypatch):
    """The mistake of the field: temperature or filters applied to the draft, and not to the law that is reported."""
    draw = growth.draw
    monkeypatch.setattr(growth, "draw", lambda law, *rest: draw(law**3 / (law**3).sum(-1, keepdim=True), *rest))
    assert not check(engine(), engine(SMALL), PROMPTS, replace(PLAN, tokens=0)).passed


def test_recovering_from_the_whole_law_instead_of_the_residual_fails(monkeypatch):
    excess = exact.excess
    monkeypatch.setattr(exact, "excess", lambda target, draft: (target, excess(target, draft)[1]))
    monkeypatch.setattr(exact.native, "fits", lambda *_: False)  # the readable form, which can be changed
    plan = replace(PLAN, tokens=0, samples=900, prompts=1)
    assert not check(engine(), engine(SMALL, noise=2.0), PROMPTS, plan).passed


def test_an_acceptance_that_keeps_whatever_is_proposed_fails_in_both_parts(monkeypatch):
    def gullible(tree, choices):
        kept = [list(range(size)) for size in tree.sizes]
        following = [int(row[size - 1]) for row, size in zip(choices, tree.sizes, strict=True)]
        return Verdict(kept, following, [True] * tree.rows)

    monkeypatch.setattr(judging, "match", gullible)
    report = check(engine(), engine({**SMALL, "tree": {"width": 1, "depth": 3, "nodes": 3}}), PROMPTS, PLAN)
    assert not any(part.passed for part in report.greedy)
    assert not all(part.passed for part in report.sampled)
    assert "DIFFERENT at prompt 1, token" in report.verdicts()[0]


def test_a_drafter_that_calls_itself_lossy_never_passes(monkeypatch):
    generate = Engine.generate

    def lossy(self, *arguments):
        outputs = generate(self, *arguments)
        for output in outputs:
            output.stats.exact = output.stats.drafter == "none"
        return outputs

    monkeypatch.setattr(Engine, "generate", lossy)
    report = check(engine(), engine("lookup"), PROMPTS, replace(PLAN, samples=20))
    assert report.lossy and not report.passed and report.verdicts()[-1].startswith("LOSSY")


# ---- greedy: ties


class Wobbling(TableNetwork):
    """Rounds as half precision does: a forward of several tokens gives another answer than one of a single token."""

    amount = 0.0

    def forward(self, feed, cache, hidden_layers=()):
        read = super().forward(feed, cache, hidden_layers)
        if feed.tokens_BN.shape[1] > 1:
            read.logits_BNV[..., 0] += self.amount
        return read


def wobbling(amount: float) -> tuple[Engine, Engine]:
    network = Wobbling(5, seed=1)
    network.amount = amount
    return engine_of(network), engine_of(network, SMALL, {"draft": Near(target(), 0.1)})


def test_a_tie_is_called_a_tie_and_the_rest_is_still_compared():
    plain, drafted = wobbling(0.5)
    report = check(plain, drafted, PROMPTS, replace(PLAN, samples=0, length=60, tokens=180))
    part = report.greedy[0]
    assert report.passed and not part.identical
    assert part.tokens == 180 - len(part.divergences), "everything but the ties themselves was found equal"
    assert all(0 <= found.gap <= part.bound and found.tie for found in part.divergences)
    assert "identical but for" in part.verdict("float64")


def test_a_gap_beyond_the_bound_is_a_difference():
    plain, drafted = wobbling(0.5)
    texts = plain_texts(plain, PROMPTS, 180, 60)
    strict, _ = check_greedy(drafted, texts, rows=1, bound=0.01)
    assert not strict.passed and "beyond the 0.01" in strict.verdict("bfloat16")


def test_the_bound_is_what_rounding_does_and_nothing_in_exact_arithmetic():
    for amount in (0.0, 0.25):
        plain, _ = wobbling(amount)
        texts = plain_texts(plain, PROMPTS, 90, 30)
        assert rounding_bound(plain.target, texts, width=6, rows=2) == pytest.approx(amount)
        assert plain.is_idle and plain.target.cache.rows == 0


def test_what_counts_is_the_gap_and_not_a_common_shift():
    plain = torch.tensor([[3.0, 2.0, 1.0]])
    assert moved(plain, plain + 7) == 0
    assert moved(plain, plain + torch.tensor([0.0, 0.5, -0.25])) == 0.5


def test_gaps_are_differences_of_log_probabilities():
    text = PlainText([1], [4], [{4: -0.5, 2: -0.75}])
    assert text.gap(0, 2) == 0.25 and text.gap(0, 3) is None and text.gap(0, None) is None


def test_texts_are_plain_decoding_and_as_long_as_asked():
    texts = plain_texts(engine(), PROMPTS[:2], tokens=100, length=10)
    assert [len(text.new) for text in texts] == [50, 50]
    assert all(text.best[0][text.new[0]] == max(text.best[0].values()) for text in texts)
    tiny = engine_of(TableNetwork(5, max_length=20))
    assert [(len(text.prompt), len(text.new)) for text in plain_texts(tiny, [[1] * 50], 90, 30)] == [(10, 10)]


def test_the_largest_batch_is_full():
    report = check(engine(), engine("lookup"), PROMPTS, Amount(tokens=60, rows=(3, 5), samples=0))
    assert [(part.prompts, part.tokens) for part in report.greedy] == [(3, 60), (5, 100)]
    assert Amount().greedy_length == 125


# ---- the statistics


def drawn(law: list[float], count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(len(law), size=(count, 3), p=law)


def test_equal_laws_fail_as_rarely_as_promised():
    """300 checks of equal laws at a level of 5 %: 15 expected; more than 30 happen once in ten thousand suites."""
    rng = np.random.default_rng(0)
    law = np.array([0.5, 0.3, 0.1, 0.05, 0.05])
    smallest = []
    for _ in range(300):
        pairs = [(drawn(law, 60, rng), drawn(law, 60, rng)) for _ in range(2)]
        outcomes = compare(pairs, 0.05, rng, permutations=200)
        smallest.append(min(one.p for group in outcomes for one in group))
    alarms = sum(p < 0.05 for p in smallest)
    assert 3 <= alarms <= 30, alarms


def test_a_true_distance_of_the_promised_size_is_found():
    rng = np.random.default_rng(1)
    law = np.array([0.4, 0.3, 0.2, 0.1])
    ((quiet, *_),) = compare([(drawn(law, 400, rng), drawn(law, 400, rng))], 0.01, rng)
    shift = quiet.detectable
    assert 0.05 < shift < 0.25
    other = law + np.array([-shift, 0, 0, shift])
    found = sum(
        min(one.p for one in compare([(drawn(law, 400, rng), drawn(other, 400, rng))], 0.01, rng, 500)[0]) < 0.01
        for _ in range(30)
    )
    assert found >= 24


def test_a_difference_in_pairs_alone_is_found():
    """Both tokens are fair coins in both arms; in one they always agree."""
    rng = np.random.default_rng(2)
    first = rng.integers(0, 2, 300)
    agreeing = np.stack((first, first), 1)
    independent = rng.integers(0, 2, (300, 2))
    outcomes = dict(
        zip([(s.start, s.stop) for s in places(2)], compare([(agreeing, independent)], 0.001, rng)[0], strict=True)
    )
    assert outcomes[0, 2].p < 0.001 < outcomes[0, 1].p


def test_distances():
    left, right = np.array([[0], [0], [1], [1]]), np.array([[0], [1], [1], [1]])
    assert distance(left, right) == 0.25 and distance(left, left) == 0 and distance(left, left + 2) == 1
    many = np.arange(200)[:, None]
    assert distance(many[::2], many[1::2]) <= 1


def test_a_law_without_chance_is_no_difference():
    same = np.zeros((50, 3), dtype=np.int64)
    assert {one.p for one in compare([(same, same)], 0.01, np.random.default_rng(0))[0]} == {1.0}


def test_short_prompts_repeat_every_other_time():
    made = short_prompts([list(range(30)), list(range(50, 53))], 4, 11)
    assert made[0] == list(range(11)) and made[1] == [50, 51, 52, 51, 52]
    assert made[2] == list(range(11, 22)) and all(0 < len(prompt) <= 11 for prompt in made)


# ---- plans


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": ()},
        {"rows": (0,)},
        {"tokens": 0, "samples": 0},
        {"length": 0},
        {"params": SamplingParams()},
        {"level": 0},
    ],
)
def test_a_plan_without_sense_is_refused(wrong):
    with pytest.raises(RequestError):
        Amount(**wrong)


def test_without_prompts_there_is_nothing_to_check():
    with pytest.raises(RequestError, match="prompts"):
        check(engine(), engine(), [])
