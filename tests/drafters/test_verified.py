"""Hierarchies of models: the law is exact at three levels, every level speaks by its own model, and
every pass is counted.

`one_law` of a level's own table is the truth about that level. `Script` is a model whose greedy
word depends on the position alone, so that what a hierarchy does can be traced by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from drafters.heading import PROMPTS, greedy, lively, relative
from enumeration import Law, Luck, continued, distance, ideal_dice, law_of, one_law, plain_law
from fakes import Near, TableNetwork, engine_of, plain
from forerun.accept.judge import Judgement, judge
from forerun.accept.lossy import Lenient
from forerun.chance import key_of
from forerun.drafters import verified
from forerun.drafters.none import Nothing
from forerun.drafters.small import DraftModel
from forerun.drafters.verified import Verified
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.growth import Chain
from forerun.drafting.stopping import Fixed
from forerun.engine.engine import Engine
from forerun.model import Model, Scores
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.tree import Drawn, TokenTree
from test_engine import engine_law, processed

CPU = torch.device("cpu")
EXACT = 1e-6
Networks = dict[str, Any]


# ---- models


class Sparse(TableNetwork):
    """Forbids tokens at random: zero probabilities, in other places for every seed."""

    def logits(self, prefix: Sequence[int]) -> Tensor:
        logits = super().logits(prefix)
        forbidden = logits < logits.median()
        return logits.masked_fill(forbidden, -torch.inf)


class Among(TableNetwork):
    """Says these tokens and no others."""

    def __init__(self, allowed: Sequence[int], vocab_size: int, seed: int):
        super().__init__(vocab_size, seed, order=2, sharpness=1.0)
        self._allowed = list(allowed)

    def logits(self, prefix: Sequence[int]) -> Tensor:
        everywhere = torch.full((self.vocab_size,), -torch.inf, dtype=self.dtype)
        everywhere[self._allowed] = super().logits(prefix)[self._allowed]
        return everywhere


class Always(TableNetwork):
    """One law, whatever came before."""

    def __init__(self, *law: float):
        super().__init__(len(law))
        self._law = torch.tensor(law, dtype=self.dtype).log()

    def logits(self, prefix: Sequence[int]) -> Tensor:
        return self._law


class Script(TableNetwork):
    """Its best token depends on the position alone: 1, or 2 + `voice` where it is wrong."""

    def __init__(self, wrong: Sequence[int] = (), voice: int = 0, vocab_size: int = 6):
        super().__init__(vocab_size)
        self._wrong, self._voice = set(wrong), voice
        self._order = 10_000

    def logits(self, prefix: Sequence[int]) -> Tensor:
        token = 2 + self._voice if len(prefix) in self._wrong else 1
        return torch.nn.functional.one_hot(torch.tensor(token), self.vocab_size).to(self.dtype) * 9


@cache
def families() -> dict[str, Networks]:
    target = TableNetwork(2, 3, 2, 1.0)
    near = {name: Near(target, noise, seed) for seed, (name, noise) in enumerate([("middle", 1), ("low", 2)])}
    three = TableNetwork(3, 5, 2, 1.0)
    return {
        "near": {"target": target, **near},
        "three tokens": {"target": three, "middle": Near(three, 0.7, 1), "low": Near(three, 1.4, 2)},
        "zero probabilities": {name: Sparse(3, seed, 2, 1.0) for seed, name in enumerate(("target", "middle", "low"))},
        "identical": dict.fromkeys(("target", "middle", "low"), target),
        "disjoint": {
            "target": Among([0, 1], 4, 1),
            "middle": Among([2, 3], 4, 2),
            "low": Among([0, 1], 4, 3),
        },
        "disjoint below": {"target": Among([0, 1], 4, 1), "middle": Among([0, 1], 4, 2), "low": Among([2, 3], 4, 3)},
    }


every_family = pytest.mark.parametrize("family", families())


def hierarchy(networks: Networks, sizes: Sequence[int], lenient: Lenient | None = None) -> Verified:
    """middle over low, and that over lowest; without a lowest, middle over itself and low. `sizes`
    from the top; the last one is what the model at the bottom drafts."""
    *lengths, drafts = sizes
    three = ["middle", "low", "lowest"] if "lowest" in networks else ["middle", "middle", "low"]
    names = ["middle", "low"] if len(lengths) == 1 else three
    inner: Drafter = DraftModel.on(networks[names[-1]], Chain(Fixed(drafts)))
    for name, length in reversed(list(zip(names, lengths, strict=False))):
        inner = Verified(Model(networks[name], inner.max_nodes + 1), inner, length, lenient)
    assert isinstance(inner, Verified)
    return inner


# ---- the law


@every_family
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, 2), (2, 1, 1)], ids=str)
def test_three_levels_follow_the_law_of_the_target(family: str, sizes: Sequence[int]) -> None:
    networks = families()[family]
    count = 4 if family == "near" else 3
    wishes = SamplingParams(temperature=1.0, max_new_tokens=count)
    law = engine_law(lambda: hierarchy(networks, sizes), networks, [1, 0], wishes)
    assert sum(law.values()) == pytest.approx(1, abs=EXACT)
    assert distance(law, plain_law(processed(wishes, networks["target"], [1, 0]), count)) < EXACT


@pytest.mark.parametrize("count", [1, 2, 3])
@every_family
def test_short_texts_follow_the_law(family: str, count: int) -> None:
    networks, wishes = families()[family], SamplingParams(temperature=1.0, max_new_tokens=count)
    law = engine_law(lambda: hierarchy(networks, (2, 2)), networks, [0], wishes)
    assert distance(law, plain_law(processed(wishes, networks["target"], [0]), count)) < EXACT


def until(law: Law, end: int) -> Law:
    """The same texts, cut behind their first token of this kind."""
    found: Law = {}
    for text, probability in law.items():
        assert isinstance(text, tuple)
        short = text[: text.index(end) + 1] if end in text else text
        found[short] = found.get(short, 0.0) + probability
    return found


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 1, 1)], ids=str)
def test_an_end_inside_the_buffer_of_any_level_leaves_the_law_as_it_is(sizes: Sequence[int], end: int) -> None:
    """The level above may reject the end and say something else."""
    networks = families()["near"]
    wishes = SamplingParams(temperature=1.0, max_new_tokens=4, stop_token_ids=[end])
    law = engine_law(lambda: hierarchy(networks, sizes), networks, [1, 1], wishes)
    plainly = plain_law(processed(wishes, networks["target"], [1, 1]), 4)
    assert distance(law, until(plainly, end)) < EXACT


def said_by(drafter: Callable[[], Drafter], prompt: Sequence[int], most: int, calls: int = 1) -> Law:
    """The law of what a drafter proposes. Everything that it proposes is taken as it is, `calls` times."""

    def program(_: list[None], lucks: list[Luck]) -> list[tuple[int, ...]]:
        params = SamplingParams(temperature=1.0)
        rows = [Row(list(prompt), len(prompt), params, key_of(seed), 64) for seed in range(len(lucks))]
        one = drafter()
        for row in rows:
            one.admit(row, {})
        with ideal_dice({key_of(seed): luck for seed, luck in enumerate(lucks)}):
            for step in range(calls):
                tree = one.propose(Context(rows, [most] * len(rows), [most] * len(rows), CPU, path=(step,)))
                for row, tokens in zip(rows, tree.tokens, strict=True):
                    row.tokens += tokens[1:]
        return [tuple(row.tokens[len(prompt) :]) for row in rows]

    return law_of(program)


@every_family
@pytest.mark.parametrize("sizes", [(3, 1), (2, 2), (2, 1, 1)], ids=str)
def test_tokens_that_leave_a_middle_level_follow_its_model(family: str, sizes: Sequence[int]) -> None:
    networks = families()[family]
    law = said_by(lambda: hierarchy(networks, sizes), [1, 0], 9)
    assert len({len(text) for text in law}) > 1 or "identical" in family or "disjoint" in family
    middle = processed(SamplingParams(temperature=1.0), networks["middle"], [1, 0])
    assert distance(continued(law, middle, 3), plain_law(middle, 3)) < EXACT


def test_what_is_handed_up_is_the_law_of_the_model_that_reviewed() -> None:
    """At every node, and whether its token was accepted, corrected or added: the very law that it
    was verified against."""
    networks = families()["three tokens"]
    one = hierarchy(networks, (4, 2, 2))
    params = SamplingParams(temperature=0.8, top_k=2)
    rows = [Row([0, 1, *[2] * length], 1, params, key_of(length), 64) for length in range(6)]
    for row in rows:
        one.admit(row, {})
    tree = one.propose(Context(rows, [20] * 6, [20, 20, 3, 2, 1, 0], CPU))
    assert tree.laws_BNV is not None and tree.drawn_BN is not None
    assert (tree.drawn_BN == Drawn.WITHOUT_REPLACEMENT).all() and tree.topology.is_chain
    assert tree.sizes[2:] == (4, 3, 2, 1) and min(tree.sizes[:2]) > 4
    for index, row in enumerate(rows):
        for node in range(tree.sizes[index] - 1):
            text = [*row.tokens, *tree.tokens[index][1 : node + 1]]
            torch.testing.assert_close(tree.laws_BNV[index, node], one_law(networks["middle"].logits(text), params))


# ---- mistakes that the law would show

BOUND = 0.01


def tampered(monkeypatch: pytest.MonkeyPatch, tamper: Callable[[TokenTree, Judgement, Sequence[Row]], Tensor]) -> None:
    """Every verified model hands up other laws than it should."""

    def judging(tree: TokenTree, logits: Tensor, rows: Sequence[Row], *rest: Any) -> Judgement:
        judgement = judge(tree, logits, rows, *rest)
        return replace(judgement, laws_BNV=tamper(tree, judgement, rows))

    monkeypatch.setattr(verified, "judge", judging)


def of_the_drafter(tree: TokenTree, judgement: Judgement, rows: Sequence[Row]) -> Tensor:
    """The classic mistake: the law that the token was drafted from."""
    assert judgement.laws_BNV is not None
    if tree.laws_BNV is None:
        return judgement.laws_BNV
    laws = judgement.laws_BNV.clone()
    for index, size in enumerate(tree.sizes):
        laws[index, : size - 1] = tree.laws_BNV[index, : size - 1]
    return laws


def of_the_residual(tree: TokenTree, judgement: Judgement, rows: Sequence[Row]) -> Tensor:
    """The law that a corrected token was really drawn from."""
    assert judgement.laws_BNV is not None
    laws = judgement.laws_BNV.clone()
    for index, path in enumerate(judgement.verdict.kept):
        if not judgement.verdict.bonus[index]:
            assert tree.laws_BNV is not None
            rest = (laws[index, path[-1]] - tree.laws_BNV[index, path[-1]]).clamp(min=0)
            laws[index, path[-1]] = rest / rest.sum()
    return laws


def first_token(law: Law) -> list[float]:
    shares = [0.0, 0.0]
    for text, probability in law.items():
        assert isinstance(text, tuple)
        shares[text[0]] += probability
    return shares


def test_the_law_of_the_original_drafter_two_levels_up_would_give_another_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """hsd.md, section 3: the middle says fair coins, and a target that believed them to be 0.9 to
    0.1 would say A with 0.2778."""
    networks: Networks = {"target": Always(0.5, 0.5), "middle": Always(0.5, 0.5), "low": Always(0.9, 0.1)}
    wishes = SamplingParams(temperature=1.0, max_new_tokens=3)
    right = engine_law(lambda: hierarchy(networks, (1, 1)), networks, [0], wishes)
    assert first_token(right) == pytest.approx([0.5, 0.5], abs=EXACT)
    tampered(monkeypatch, of_the_drafter)
    wrong = engine_law(lambda: hierarchy(networks, (1, 1)), networks, [0], wishes)
    assert first_token(wrong)[0] == pytest.approx(0.5 * 0.5 / 0.9, abs=EXACT)
    assert first_token(wrong)[0] == pytest.approx(0.2778, abs=1e-4)


def law_and_truth(drafter: Callable[[Networks], Drafter]) -> float:
    """How far the output's law is from the target's."""
    networks, wishes = families()["near"], SamplingParams(temperature=1.0, max_new_tokens=4)
    law = engine_law(lambda: drafter(networks), networks, [1, 0], wishes)
    return distance(law, plain_law(processed(wishes, networks["target"], [1, 0]), 4))


def test_a_residual_that_is_handed_up_would_give_another_law(monkeypatch: pytest.MonkeyPatch) -> None:
    assert law_and_truth(lambda networks: hierarchy(networks, (1, 1))) < EXACT
    tampered(monkeypatch, of_the_residual)
    assert law_and_truth(lambda networks: hierarchy(networks, (1, 1))) > BOUND


def test_a_bonus_paired_with_the_law_of_the_draft_would_give_another_law(monkeypatch: pytest.MonkeyPatch) -> None:
    low = families()["near"]["low"]

    def of_the_draft_at_the_bonus(tree: TokenTree, judgement: Judgement, rows: Sequence[Row]) -> Tensor:
        assert judgement.laws_BNV is not None
        laws = judgement.laws_BNV.clone()
        for index, path in enumerate(judgement.verdict.kept):
            if judgement.verdict.bonus[index]:
                text = [*rows[index].tokens, *(tree.tokens[index][node] for node in path[1:])]
                laws[index, path[-1]] = one_law(low.logits(text), rows[index].params)
        return laws

    tampered(monkeypatch, of_the_draft_at_the_bonus)
    assert law_and_truth(lambda networks: hierarchy(networks, (1, 1))) > BOUND


class Choosy(Verified):
    """Cuts its buffer by value: a last token that it does not like is taken off again."""

    def propose(self, context: Context) -> TokenTree:
        tree = super().propose(context)
        tokens = [row[:-1] if len(row) > 1 and row[-1] == 0 else row for row in tree.tokens]
        if tree.laws_BNV is None:
            return tree
        return TokenTree.drawn_chain(tokens, tree.laws_BNV[:, : max(map(len, tokens))])


def test_a_buffer_that_is_cut_by_value_would_give_another_law() -> None:
    def choosy(networks: Networks) -> Drafter:
        right = hierarchy(networks, (1, 1))
        return Choosy(right.model, right.inner, right.length)

    assert law_and_truth(choosy) > BOUND


# ---- the structure


class Rounds:
    """What every verified model was given and what it said, per call of `judge`: (proposed, said) of each row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seen: list[tuple[int, int]] = []
        monkeypatch.setattr(verified, "judge", self._judge)

    def _judge(self, tree: TokenTree, *rest: Any) -> Judgement:
        judgement = judge(tree, *rest)
        self.seen += [(s - 1, a + 1) for s, a in zip(tree.sizes, judgement.verdict.accepted, strict=True)]
        return judgement


@every_family
@pytest.mark.parametrize(("length", "drafts"), [(1, 1), (1, 3), (4, 1), (3, 3), (5, 2)])
def test_rounds_and_proposals_have_the_lengths_they_should(
    family: str, length: int, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round says one token to one more than were drafted; a proposal has at least `length`, and
    never a whole round more."""
    networks = families()[family]
    rounds, sizes = Rounds(monkeypatch), set()
    for seed in range(20):
        one = hierarchy(networks, (length, drafts))
        row = Row([1, 0], 2, SamplingParams(temperature=1.0), key_of(seed), 64)
        one.admit(row, {})
        begun = len(rounds.seen)
        (tokens,) = one.propose(Context([row], [50], [50], CPU)).tokens
        sizes.add(len(tokens) - 1)
        assert one.model.passes == len(rounds.seen) - begun
        assert sum(said for _, said in rounds.seen[begun:]) == len(tokens) - 1
        assert (one._tally.asked, one._tally.drafted) == (len(rounds.seen) - begun, len(tokens) - 1)
    assert all(1 <= said <= proposed + 1 and proposed == drafts for proposed, said in rounds.seen)
    assert min(sizes) >= length and max(sizes) <= length + drafts == one.max_nodes
    if family == "identical":
        assert {said for _, said in rounds.seen} == {drafts + 1}
        assert sizes == {-(-length // (drafts + 1)) * (drafts + 1)}
    if family == "disjoint":
        assert {said for _, said in rounds.seen} == {1} and sizes == {length}


def test_a_level_writes_nothing_behind_an_end_and_says_no_more_than_there_is_room_for() -> None:
    networks = families()["three tokens"]
    ended = 0
    for seed in range(30):
        one = hierarchy(networks, (6, 3, 2))
        rows = [
            Row([1, 0], 2, SamplingParams(temperature=1.0), key_of(10 * seed + index), 64, ends=ends)
            for index, ends in enumerate([frozenset({2}), frozenset(), frozenset({0, 1})])
        ]
        for row in rows:
            one.admit(row, {})
        tree = one.propose(Context(rows, [50] * 3, [50, 50, 4], CPU))
        assert [row.tokens for row in rows] == [[1, 0]] * 3 and [row.tentative for row in rows] == [0, 0, 0]
        for tokens, row in zip(tree.tokens, rows, strict=True):
            assert not row.ends & set(tokens[1:-1])
            ended += tokens[-1] in row.ends and len(tokens) > 1
        assert tree.sizes[1] > 6 and tree.sizes[2] <= 5
        assert tree.sizes[0] > 6 or tree.tokens[0][-1] == 2
    assert ended > 20


def test_a_row_that_has_ended_costs_no_more_rounds() -> None:
    """Its model says the end at once: one round, although it was asked for six tokens."""
    one = Verified(Model(Script(), 1), Nothing(), 6)
    row = Row([0, 1], 2, SamplingParams(), 0, 64, ends=frozenset({1}))
    one.admit(row, {})
    assert one.propose(Context([row], [50], [50], CPU)).tokens == [[1, 1]]
    assert one.model.passes == 1


# ---- passes, by hand


def scripted(
    low: Sequence[int], middle: Sequence[int], length: int, drafts: int
) -> tuple[Engine, Verified, DraftModel]:
    """A target that says 1 everywhere, and two models that are wrong at these positions."""
    chain = DraftModel.on(Script(low, 1), Chain(Fixed(drafts)))
    one = Verified(Model(Script(middle), drafts + 1), chain, length)
    return Engine(Script(), one), one, chain


def test_passes_of_every_level_are_those_of_a_hand_trace() -> None:
    """Drafts of two, at least three per proposal; the lowest model is wrong at positions 2, 8, 14 ...

    p1 and p2 drafted, p2 corrected; p3 and p4 drafted, p5 added: five tokens in two rounds; the
    target adds p6. So four passes of the lowest model, two of the middle, one of the target for six
    tokens, however often it is repeated: what the level above has placed costs no pass of its own.
    """
    engine, one, chain = scripted(range(2, 99, 6), [], 3, 2)
    for steps in (1, 2, 5):
        before = [engine.target.passes, one.model.passes, chain.model.passes]
        (output,) = engine.generate([[0]], SamplingParams(max_new_tokens=6 * steps))
        assert output.token_ids == [1] * (6 * steps) and output.stats.steps == steps
        after = [engine.target.passes, one.model.passes, chain.model.passes]
        assert [b - a for a, b in zip(before, after, strict=True)] == [steps, 2 * steps, 4 * steps]
    tally = one.tallies()[0]
    assert tally.asked == tally.hits == tally.passes == one.model.passes == 16
    assert (tally.drafted, tally.accepted) == (5 * 8, [8] * 5)


def test_a_correction_from_above_costs_no_pass_of_its_own() -> None:
    """The middle is wrong at every third position. p1 accepted, p2 corrected by the middle; p3
    drafted rightly, but the middle says otherwise: three tokens in two rounds, of which the target
    keeps two and corrects p3."""
    engine, one, chain = scripted(range(2, 99, 3), range(3, 99, 3), 3, 2)
    (output,) = engine.generate([[0]], SamplingParams(max_new_tokens=30))
    steps = output.stats.steps
    assert output.token_ids == [1] * 30 and output.stats.accepted_tokens == 2 * steps and steps == 10
    # at the end of the text there is room for two tokens only, and one round is enough
    assert (engine.target.passes, one.model.passes, chain.model.passes) == (10, 2 * 9 + 1, 4 * 9 + 1)


@pytest.mark.parametrize("length", [1, 2, 5, 7])
def test_every_round_is_one_forward_however_the_level_above_decided(length: int) -> None:
    """Sampled: corrections and bonus tokens at random. Prompts are short enough to be read within the first round."""
    networks = families()["three tokens"]
    low = DraftModel.on(networks["low"], Chain(Fixed(2)))
    lower = Verified(Model(networks["low"], 3), low, 2)
    upper = Verified(Model(networks["middle"], lower.max_nodes + 1), lower, length)
    engine = Engine(networks["target"], upper)
    params = SamplingParams(temperature=1.0, seed=4, max_new_tokens=60)
    engine.generate([[1, 2, 0]], params)
    for level in (upper, lower):
        assert level.model.passes == level.tallies()[0].asked > 15


def test_a_prompt_that_is_longer_than_what_is_read_in_passing_costs_one_pass() -> None:
    engine, one, _ = scripted([], [], 3, 2)
    engine.generate([[0] * 30], SamplingParams(max_new_tokens=5))
    assert one.model.passes == 2


# ---- what a level says is what its model says of the text itself


def relatives() -> Networks:
    """A random transformer and three that were knocked a little; in double precision, where rounding hides nothing."""
    found = {"target": lively(), "middle": relative(0, 0.1), "low": relative(1, 0.2), "lowest": relative(2, 0.3)}
    return {name: deepcopy(network).double() for name, network in found.items()}


class Scratchless:
    """Compares what every model says at every call with its network's word on the whole text, read at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.leads: set[int] = set()
        score, self.calls = Model.score, 0

        def checked(model: Model, tree: TokenTree, rows: Sequence[Row], layers: Any = ()) -> Scores:
            scores = score(model, tree, rows, layers)
            self.calls += 1
            self.leads |= {0, *model._leads}
            for index, row in enumerate(rows):
                assert (model.cache.lengths[index] + (model._leads or [0] * len(rows))[index]) == len(row.tokens) - 1
                for node in range(tree.sizes[index]):
                    path = tree.topology.path(index, node)[1:]
                    text = torch.tensor([[*row.tokens, *(tree.tokens[index][n] for n in path)]])
                    said = model.network.features(text)[0, -1] @ model.network.head.weight.T
                    torch.testing.assert_close(scores.logits_BNV[index, node], said, rtol=0, atol=1e-9)
            return scores

        monkeypatch.setattr(Model, "score", checked)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_with_memory_are_those_of_the_whole_text_at_every_call(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four levels, ragged rows that come and go, rejections wherever they fall."""
    networks, checks = relatives(), Scratchless(monkeypatch)
    one = Engine(networks["target"], hierarchy(networks, (5, 3, 2)), max_rows=3)
    wishes = [
        SamplingParams(temperature=temperature, seed=seed, max_new_tokens=8 + 5 * seed) for seed in range(len(PROMPTS))
    ]
    outputs = one.generate(PROMPTS, wishes)
    if not temperature:
        for prompt, wish, output in zip(PROMPTS, wishes, outputs, strict=True):
            assert output.token_ids == greedy(lively(), prompt, wish.max_new_tokens)
    accepted = one.drafter.tallies()[0].accepted
    assert checks.calls > 50 and {0, 1, 2} <= checks.leads
    assert len(accepted) > 3 and accepted[0] > accepted[3] > 0, "some were kept and some rejected, at every depth"


def test_ragged_rows_of_four_levels_say_what_they_say_alone() -> None:
    networks = relatives()
    wishes = [
        SamplingParams(temperature=0.9 * (seed % 2), seed=seed, max_new_tokens=3 + 4 * seed, stop_token_ids=[seed])
        for seed in range(len(PROMPTS))
    ]

    def engine() -> Engine:
        return Engine(networks["target"], hierarchy(networks, (4, 3, 2)), max_rows=4)

    alone = [engine().generate([p], w)[0].token_ids for p, w in zip(PROMPTS, wishes, strict=True)]
    assert [output.token_ids for output in engine().generate(PROMPTS, wishes)] == alone


# ---- leniency


def test_a_lenient_level_hands_up_tokens_without_laws() -> None:
    """Nobody knows the law of what it says, so the level above takes it as it is."""
    networks = families()["three tokens"]
    one = hierarchy(networks, (3, 2), Lenient(3.0))
    row = Row([1, 0], 2, SamplingParams(temperature=1.0), key_of(1), 64)
    one.admit(row, {})
    tree = one.propose(Context([row], [20], [20], CPU))
    assert tree.is_deterministic and tree.laws_BNV is None and "lossy" in one.tallies()[0].name


@pytest.mark.parametrize(
    ("sizes", "factor"), [((2, 1), 1.5), ((2, 1), 100.0), ((1, 1, 1), 3.0)], ids=["little", "any", "three levels"]
)
@pytest.mark.parametrize("family", [name for name in families() if name != "three tokens"])
def test_the_output_stays_exact_below_any_leniency(family: str, sizes: Sequence[int], factor: float) -> None:
    networks, wishes = families()[family], SamplingParams(temperature=1.0, max_new_tokens=3)
    law = engine_law(lambda: hierarchy(networks, sizes, Lenient(factor)), networks, [1, 0], wishes)
    assert distance(law, plain_law(processed(wishes, networks["target"], [1, 0]), 3)) < EXACT


def test_a_lenient_level_keeps_more_of_what_it_is_given() -> None:
    networks = families()["three tokens"]
    kept = []
    for lenient in (None, Lenient(2.0), Lenient(1000.0)):
        one = hierarchy(networks, (1, 3), lenient)
        engine_of(networks["target"], one).generate(
            [[1, 0]], SamplingParams(temperature=1.0, seed=1, max_new_tokens=90)
        )
        tally = one.tallies()[0]
        kept.append(tally.drafted / tally.asked)
    assert kept == sorted(kept) and kept[0] < kept[2] and kept[2] > 3
    greedily = engine_of(networks["target"], hierarchy(networks, (3, 2), Lenient(5.0)))
    (output,) = greedily.generate([[1, 0]], SamplingParams(max_new_tokens=60))
    assert output.token_ids == plain(networks["target"], [1, 0], 60)
