"""Typical acceptance: the slow obvious version agrees, what it promises holds, and nobody takes it for exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from enumeration import one_law
from fakes import Near, TableNetwork, Wild, engine_of, plain
from forerun.accept.exact import Verdict, match
from forerun.accept.judge import TYPICAL
from forerun.accept.lossy import Typical, lossy_of, typical
from forerun.engine.requests import Output
from forerun.errors import ForerunError
from forerun.sampling import SamplingParams
from forerun.tree import Drawn, TokenTree

CPU = torch.device("cpu")
MEDUSA = Typical(epsilon=0.09, delta=0.3)
VOCABULARY = 5


def law_of(*shares: float) -> Tensor:
    return torch.tensor(shares, dtype=torch.float64)


def tree_of(tokens: Sequence[int], parents: Sequence[int]) -> TokenTree:
    return TokenTree.of([tokens], [parents], CPU)


def judged(tokens: Sequence[int], parents: Sequence[int], laws: Sequence[Tensor], rule: Typical = MEDUSA) -> Verdict:
    return typical(tree_of(tokens, parents), torch.stack(list(laws))[None], rule)


# ---- the threshold


@pytest.mark.parametrize(
    ("law", "threshold"),
    [
        (law_of(1.0, 0.0, 0.0, 0.0), 0.09),
        (law_of(0.7, 0.1, 0.1, 0.1), 0.09),
        (law_of(*[0.25] * 4), 0.0750),
        (law_of(*[0.01] * 100), 0.0030),
        (law_of(0.9, *[0.1 / 9] * 9), 0.09),
    ],
)
def test_thresholds_of_the_paper(law, threshold):
    assert float(MEDUSA.threshold(law[None, None])) == pytest.approx(threshold, abs=1e-12)


def test_the_entropy_takes_over_above_its_crossing():
    below, above = law_of(*[1 / 3] * 3), law_of(*[0.25] * 4)
    assert math.log(3) < math.log(0.3 / 0.09) < math.log(4)
    assert float(MEDUSA.threshold(below[None, None])) == 0.09 > float(MEDUSA.threshold(above[None, None]))


def test_a_token_must_exceed_the_threshold_and_not_only_reach_it():
    rule = Typical(epsilon=0.25, delta=0.9)  # a one-hot law would do: delta exp(-H) is above epsilon here
    exactly, more = law_of(0.5, 0.25, 0.25), law_of(0.5, 0.26, 0.24)
    assert judged([0, 1], [-1, 0], [exactly, exactly], rule).kept == [[0]]
    assert judged([0, 1], [-1, 0], [more, more], rule).kept == [[0, 1]]


def test_a_token_of_a_tenth_passes_beside_one_of_seven():
    law = law_of(0.7, 0.1, 0.1, 0.1)
    verdict = judged([0, 2], [-1, 0], [law, law])
    assert (verdict.kept, verdict.next_tokens, verdict.bonus) == ([[0, 1]], [0], [True])


# ---- the slow, obvious version


def oracle(tokens: Sequence[int], parents: Sequence[int], laws: Sequence[Sequence[float]], rule: Typical) -> list[int]:
    """Every path from the root: those of typical tokens alone; the longest, the most probable, the first."""

    def allowed(node: int) -> bool:
        above = laws[parents[node]]
        entropy = -sum(p * math.log(p) for p in above if p > 0)
        return above[tokens[node]] > min(rule.epsilon, rule.delta * math.exp(-entropy))

    def path(node: int) -> list[int]:
        return [0] if node == 0 else [*path(parents[node]), node]

    def log_probability(nodes: Sequence[int]) -> float:
        total = 0.0
        for above, node in pairwise(nodes):
            total += math.log(laws[above][tokens[node]])
        return total

    good = [path(node) for node in range(len(parents))]
    good = [nodes for nodes in good if all(allowed(node) for node in nodes[1:])]
    longest = [nodes for nodes in good if len(nodes) == max(map(len, good))]
    return max(longest, key=lambda nodes: (log_probability(nodes), -nodes[-1]))


@st.composite
def trees(draw: st.DrawFn, twins: bool = True) -> tuple[list[int], list[int], Tensor]:
    """Any tree in any order of growth, equal siblings among them unless `twins` is off, and a law
    at every node, with zeros in some of them."""
    parents, tokens = [-1], [draw(st.integers(0, VOCABULARY - 1))]
    for _ in range(draw(st.integers(0, 11))):
        places = [(parent, token) for parent in range(len(parents)) for token in range(VOCABULARY)]
        taken = set() if twins else set(zip(parents, tokens, strict=True))
        parent, token = draw(st.sampled_from([place for place in places if place not in taken]))
        parents.append(parent)
        tokens.append(token)
    nodes = len(parents)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    weights = rng.dirichlet(np.full(VOCABULARY, draw(st.sampled_from([0.2, 1.0, 8.0]))), nodes)
    weights *= rng.random((nodes, VOCABULARY)) >= draw(st.sampled_from([0.0, 0.4]))
    weights[weights.sum(-1) == 0, 0] = 1
    return tokens, parents, torch.from_numpy(weights / weights.sum(-1, keepdims=True))


rules = st.builds(Typical, epsilon=st.floats(0.01, 0.9), delta=st.floats(0.01, 0.95))
fast = settings(max_examples=150, deadline=None)


@fast
@given(trees(), rules)
def test_it_is_the_slow_obvious_version(tree, rule):
    tokens, parents, laws = tree
    verdict = typical(tree_of(tokens, parents), laws[None], rule)
    expected = oracle(tokens, parents, laws.tolist(), rule)
    assert verdict.kept == [expected]
    assert verdict.next_tokens == [int(laws[expected[-1]].argmax())]
    assert verdict.bonus == [expected[-1] not in parents]
    assert verdict.accepted == [len(expected) - 1]


@fast
@given(st.lists(trees(), min_size=2, max_size=5), rules)
def test_rows_of_different_trees_are_as_if_alone(batch, rule):
    nodes = max(len(tokens) for tokens, *_ in batch)
    laws = torch.full((len(batch), nodes, VOCABULARY), float("nan"), dtype=torch.float64)  # there is no law in padding
    for row, (*_, own) in zip(laws, batch, strict=True):
        row[: len(own)] = own
    together = typical(TokenTree.of([t for t, *_ in batch], [p for _, p, _ in batch], CPU), laws, rule)
    alone = [typical(tree_of(tokens, parents), own[None], rule) for tokens, parents, own in batch]
    assert together.kept == [verdict.kept[0] for verdict in alone]
    assert together.next_tokens == [verdict.next_tokens[0] for verdict in alone]
    assert together.bonus == [verdict.bonus[0] for verdict in alone]


def test_a_short_row_does_not_borrow_from_a_longer_one():
    """The published code pads short rows with token 0, which a law may well find typical (medusa.md, 4.4)."""
    zero = law_of(1.0, 0, 0)
    tree = TokenTree.of([[0], [0, 0, 0]], [[-1], [-1, 0, 1]], CPU)
    verdict = typical(tree, zero.expand(2, 3, 3), MEDUSA)
    assert verdict.kept == [[0], [0, 1, 2]] and verdict.bonus == [True, True]


# ---- what it promises


@fast
@given(trees(), rules)
def test_at_least_as_much_is_kept_as_greedily(tree, rule):
    tokens, parents, laws = tree
    proposal = tree_of(tokens, parents)
    greedy = match(proposal, laws.argmax(-1)[None])
    assert typical(proposal, laws[None], rule).accepted[0] >= greedy.accepted[0]


@fast
@given(trees(), rules)
def test_the_best_token_is_always_typical(tree, rule):
    *_, laws = tree
    assert (laws.amax(-1) > rule.threshold(laws[None])[0]).all()


@fast
@given(trees(), st.floats(0.01, 0.95), st.lists(st.floats(0.01, 0.9), min_size=2, max_size=6))
def test_a_larger_epsilon_is_stricter(tree, delta, epsilons):
    """It bounds from below what may be kept: never more with a larger one, and nothing of less than
    it (or delta exp(-H))."""
    tokens, parents, laws = tree
    rules = [Typical(epsilon, delta) for epsilon in sorted(epsilons)]
    verdicts = [typical(tree_of(tokens, parents), laws[None], rule) for rule in rules]
    lengths = [verdict.accepted[0] for verdict in verdicts]
    assert lengths == sorted(lengths, reverse=True)
    for rule, verdict in zip(rules, verdicts, strict=True):
        for above, node in pairwise(verdict.kept[0]):
            share = float(laws[above, tokens[node]])
            entropy = float(torch.special.entr(laws[above]).sum())
            assert share > min(rule.epsilon, rule.delta * math.exp(-entropy)) - 1e-12


@fast
@given(trees(twins=False), rules)
def test_at_a_vanishing_temperature_it_is_greedy_match(tree, rule):
    tokens, parents, laws = tree
    best = laws.argmax(-1)[None]
    cold = torch.nn.functional.one_hot(best, VOCABULARY).double()
    proposal = tree_of(tokens, parents)
    assert typical(proposal, cold, rule) == match(proposal, best)


def test_the_longest_path_wins_although_another_is_more_probable():
    law = law_of(0.8, 0.1, 0.1)
    verdict = judged([0, 0, 1, 2], [-1, 0, 0, 2], [law] * 4)
    assert verdict.kept == [[0, 2, 3]]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_of_paths_of_one_length_the_most_probable_wins(order):
    root, flat = law_of(0.2, 0.3, 0.5), law_of(*[1 / 3] * 3)
    assert judged([0, *order], [-1, 0, 0], [root, flat, flat]).kept == [[0, 1 + order.index(2)]]


def test_the_whole_path_counts_and_not_its_end():
    root, low, high = law_of(0.6, 0.4), law_of(0.5, 0.5), law_of(0.9, 0.1)
    verdict = judged([0, 0, 1, 0, 0], [-1, 0, 0, 1, 2], [root, low, high, low, low])
    assert 0.6 * 0.5 < 0.4 * 0.9 and verdict.kept == [[0, 2, 4]]


def test_the_next_token_is_the_best_one_at_the_end_of_the_path():
    verdict = judged([0, 0], [-1, 0], [law_of(0.6, 0.3, 0.1), law_of(0.1, 0.2, 0.7)])
    assert (verdict.kept, verdict.next_tokens) == ([[0, 1]], [2])
    nothing = judged([0, 2], [-1, 0], [law_of(0.95, 0.05, 0.0), law_of(0.1, 0.2, 0.7)])
    assert (nothing.kept, nothing.next_tokens, nothing.bonus) == ([[0]], [0], [False])


# ---- in the engine


def texts(outputs: Sequence[Output]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def wild(seed: int = 0) -> Wild:
    return Wild(VOCABULARY, seed=seed, kinds=(Drawn.DETERMINISTIC,))


PROMPTS = [[1, 2], [3], [4, 0, 2, 2], [2, 1, 3]]
WARM = SamplingParams(max_new_tokens=30, temperature=0.9, seed=3)
GREEDY = SamplingParams(max_new_tokens=30)


@pytest.fixture
def target() -> TableNetwork:
    return TableNetwork(VOCABULARY, seed=5)


@pytest.mark.parametrize("drafter", ["lookup", "wild", {"drafter": "small", "checkpoint": "near", "length": 4}])
def test_every_token_is_typical_or_the_best(target, drafter):
    params = SamplingParams(max_new_tokens=40, temperature=0.8, top_k=4, seed=1)
    made = wild() if drafter == "wild" else drafter
    engine = engine_of(target, made, {"near": Near(target, 0.6)}, lossy=MEDUSA)
    strange = 0
    for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        text = list(prompt)
        for token in output.token_ids:
            law = one_law(target.logits(text), params)
            assert token == law.argmax() or law[token] > MEDUSA.threshold(law[None, None])
            strange += int(token != law.argmax())
            text.append(token)
    assert strange, "the rule was never used"


def test_nothing_is_drawn(target):
    def said(seed: int | None) -> list[list[int]]:
        params = SamplingParams(max_new_tokens=30, temperature=0.9, seed=seed, n=2)
        return texts(engine_of(target, wild(), lossy=MEDUSA).generate(PROMPTS, params))

    one = said(3)
    assert one == said(4) == said(None) and one[0::2] == one[1::2]


def test_without_a_drafter_it_is_the_best_token_every_time(target):
    (output,) = engine_of(target, "none", lossy=MEDUSA).generate([1, 2], WARM)
    assert output.token_ids == plain(target, [1, 2], 30) and not output.stats.exact


def test_at_the_lowest_temperature_the_text_is_greedy(target):
    cold = SamplingParams(max_new_tokens=30, temperature=1e-5)
    outputs = engine_of(target, wild(), lossy=MEDUSA).generate(PROMPTS, cold)
    assert texts(outputs) == [plain(target, prompt, 30) for prompt in PROMPTS]


def test_rows_do_not_depend_on_their_neighbours(target):
    engine = engine_of(target, wild(), lossy=MEDUSA)
    alone = [engine.generate([prompt], WARM)[0].token_ids for prompt in PROMPTS]
    assert texts(engine.generate(PROMPTS, WARM)) == alone


def test_greedy_rows_beside_it_stay_exact(target):
    params = [WARM, GREEDY, WARM, GREEDY]
    outputs = engine_of(target, wild(), lossy=MEDUSA).generate(PROMPTS, params)
    assert [output.stats.exact for output in outputs] == [False, True, False, True]
    for prompt, output in list(zip(PROMPTS, outputs, strict=True))[1::2]:
        assert output.token_ids == plain(target, prompt, 30)
    alone = engine_of(target, wild(), lossy=MEDUSA).generate(PROMPTS[::2], WARM)
    assert texts(outputs[::2]) == texts(alone)


def test_the_statistics_name_the_rule(target):
    engine = engine_of(target, wild(), lossy=MEDUSA)
    warm, greedy = engine.generate([1, 2], WARM)[0].stats, engine.generate([1, 2], GREEDY)[0].stats
    assert (warm.rule, warm.exact, warm.as_dict()["exact"]) == (TYPICAL, False, False) and "lossy" in TYPICAL
    assert (greedy.rule, greedy.exact) == ("greedy match", True)
    exact = engine_of(target, wild()).generate([1, 2], WARM)[0].stats
    assert (exact.rule, exact.exact) == ("sample and match", True)


def test_a_greedy_row_is_never_said_to_be_judged_by_it(target):
    short = SamplingParams(max_new_tokens=8)  # it ends while the other goes on
    outputs = engine_of(target, wild(), lossy=MEDUSA).generate(PROMPTS[:2], [WARM, short])
    assert [output.stats.rule for output in outputs] == [TYPICAL, "greedy match"]


def test_more_is_kept_than_exactly(target):
    def steps(lossy: Typical | None) -> int:
        outputs = engine_of(target, wild(), lossy=lossy).generate(PROMPTS, WARM)
        return sum(output.stats.steps for output in outputs)

    assert steps(Typical(0.02, 0.1)) <= steps(MEDUSA) < steps(None)


# ---- the word on the command line


def test_words():
    assert lossy_of("exact") is None
    assert lossy_of("typical") == Typical() == MEDUSA
    assert lossy_of("typical:0.2,0.4") == Typical(0.2, 0.4)


@pytest.mark.parametrize(
    "word",
    "|lossy|Typical|exact:|typical:0.1|typical:1,2,3|typical:a,b|typical:0,0.3|typical:0.1,1|typical:nan,0.3|typical:,".split(
        "|"
    ),
)
def test_words_without_meaning(word):
    with pytest.raises(ForerunError, match=r"use exact, typical, typical:EPSILON,DELTA"):
        lossy_of(word)
