"""Acceptance is exact: every outcome is listed, the drafter's own draws among them, and every classic mistake is seen.

A `Group` says how the siblings below a node come about and what stands below each of them; the
drafter draws its tokens with the same enumerated luck as the rule. Laws are random tables of the
whole prefix, so that a path taken wrongly shows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from enumeration import Law, Luck, Target, Ways, continued, distance, law_of, plain_law, ways
from enumeration import verification as traversal_verification
from forerun.accept.exact import Verdict, match, sample_choices
from forerun.accept.judge import judge
from forerun.chance import Chance, final_dice, key_of
from forerun.row import Row, final_chance
from forerun.sampling import SamplingParams
from forerun.tree import Drawn, TokenTree, Topology

EXACT = 1e-9
CPU = torch.device("cpu")
Rule = Callable[[TokenTree, Tensor, Chance], Verdict]


# ---- laws


def table(seed: int, vocab: int, zeros: float = 0.0, sharpness: float = 1.0) -> Target:
    """A random law after every prefix; `zeros`: the share of tokens it forbids."""

    @cache
    def law(prefix: tuple[int, ...]) -> Tensor:
        rng = np.random.default_rng([seed, *[token + 1 for token in prefix]])
        weights = np.exp(rng.normal(size=vocab) * sharpness) * (rng.random(vocab) >= zeros)
        if not weights.any():
            weights[rng.integers(vocab)] = 1
        return torch.from_numpy(weights / weights.sum())

    return law


def one_hot(law: Target) -> Target:
    return cache(lambda prefix: torch.zeros_like(law(prefix)).index_fill(0, law(prefix).argmax(), 1.0))


# ---- trees


@dataclass(frozen=True)
class Group:
    """How many siblings, how they are drawn, and the group below each (None: nothing)."""

    drawn: Drawn
    below: tuple[Group | None, ...]

    @property
    def depth(self) -> int:
        return 1 + max(group.depth if group else 0 for group in self.below)


D, R, W = Drawn.DETERMINISTIC, Drawn.WITH_REPLACEMENT, Drawn.WITHOUT_REPLACEMENT


def chain(drawn: Drawn, length: int) -> Group | None:
    return Group(drawn, (chain(drawn, length - 1),)) if length else None


def bush(drawn: Drawn, *widths: int) -> Group | None:
    """The same number of siblings below every node of a level."""
    return Group(drawn, (bush(drawn, *widths[1:]),) * widths[0]) if widths else None


@dataclass(frozen=True)
class Draft:
    """What was drafted: per node its token, its parent, and how its children were drawn."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    drawn: tuple[Drawn, ...]

    def path(self, node: int) -> tuple[int, ...]:
        """The drafted tokens down to a node."""
        return () if node == 0 else (*self.path(self.parents[node]), self.tokens[node])


def drafted(group: Group | None, draft: Target, luck: Luck) -> Draft:
    """Draw a tree, depth first."""
    tokens, parents, drawn = [0], [-1], [D]
    waiting = [(0, (), group)]
    while waiting:
        node, prefix, here = waiting.pop()
        if here is None:
            continue
        drawn[node] = here.drawn
        for token, below in zip(siblings(here, draft(prefix), luck, node), here.below, strict=False):
            waiting.append((len(tokens), (*prefix, token), below))
            tokens.append(token)
            parents.append(node)
            drawn.append(D)
    return Draft(tuple(tokens), tuple(parents), tuple(drawn))


def siblings(group: Group, law: Tensor, luck: Luck, node: int) -> list[int]:
    count = len(group.below)
    if group.drawn is D:
        return law.topk(min(count, len(law))).indices.tolist()
    found: list[int] = []
    for attempt in range(count):
        rest = law.clone()
        if group.drawn is W:
            rest[found] = 0
        if not rest.sum() > 0:
            break
        found.append(luck.token(("draft", node, attempt), rest))
    return found


def batch(drafts: Sequence[Draft], draft: Target) -> TokenTree:
    """As tensors; the padding behind short rows looks like token 0."""
    topology = Topology.of([one.parents for one in drafts])
    drawn = np.zeros((len(drafts), topology.nodes), dtype=np.uint8)
    laws = torch.zeros(*drawn.shape, len(draft(())), dtype=torch.float64)
    for row, one in enumerate(drafts):
        size = len(one.tokens)
        drawn[row, :size] = one.drawn
        for node in range(size):
            laws[row, node] = draft(one.path(node))
    return TokenTree([one.tokens for one in drafts], topology, CPU, drawn, laws)


def target_laws(drafts: Sequence[Draft], nodes: int, target: Target) -> Tensor:
    """What the target says after every node; padding is sure of token 0."""
    laws = torch.zeros(len(drafts), nodes, len(target(())), dtype=torch.float64)
    laws[..., 0] = 1
    for row, one in enumerate(drafts):
        for node in range(len(one.tokens)):
            laws[row, node] = target(one.path(node))
    return laws


COMPANION = Draft((0,) * 6, tuple(range(-1, 5)), (W,) * 6)
"""A row of another length at the head of every batch, so that there is padding, and its luck is another's."""


def said(rule: Rule, tree: TokenTree, laws: Tensor, chance: Chance) -> list[tuple[int, ...]]:
    """What each row emits."""
    verdict = rule(tree, laws, chance)
    return [
        (*tree.tokens_BN[row, path[1:]].tolist(), token)
        for row, (path, token) in enumerate(zip(verdict.kept, verdict.next_tokens, strict=True))
    ]


def emitted(rule: Rule, drafts: Sequence[tuple[Draft, float]], target: Target, draft: Target) -> Law:
    """The law of what one step emits, given how probable each draft is."""

    def program(items: list[tuple[Draft, float]], lucks: list[Luck]) -> list[tuple[int, ...]]:
        rows = [COMPANION, *(item for item, _ in items)]
        tree = batch(rows, draft)
        return said(rule, tree, target_laws(rows, tree.nodes, target), Ways([Luck(), *lucks]))[1:]

    law: Law = defaultdict(float)
    for (_, share), result, probability in ways(program, list(drafts)):
        law[result] += share * probability
    return dict(law)


def drafts_of(group: Group | None, draft: Target) -> list[tuple[Draft, float]]:
    """Every tree that can be drafted, and its probability."""
    return list(law_of(lambda _, lucks: [drafted(group, draft, luck) for luck in lucks]).items())


def output_law(rule: Rule, group: Group | None, target: Target, draft: Target) -> Law:
    """The law of the first tokens of the output, as many as one step can give."""
    return continued(emitted(rule, drafts_of(group, draft), target, draft), target, depth_of(group) + 1)


def depth_of(group: Group | None) -> int:
    return group.depth if group else 0


def sample_and_match(tree: TokenTree, laws: Tensor, chance: Chance) -> Verdict:
    return match(tree, sample_choices(laws, tree, chance))


def assert_exact(rule: Rule, group: Group | None, target: Target, draft: Target) -> None:
    law = output_law(rule, group, target, draft)
    assert sum(law.values()) == pytest.approx(1, abs=EXACT)
    assert distance(law, plain_law(target, depth_of(group) + 1)) < EXACT


# ---- exactness


LAWS = {
    "dense": (table(1, 3), table(2, 3)),
    "five tokens": (table(3, 5, sharpness=1.5), table(4, 5, zeros=0.4)),
    "target with zeros": (table(5, 4, zeros=0.5), table(6, 4)),
    "draft with zeros": (table(7, 3), table(8, 3, zeros=0.5)),
    "both with zeros": (table(9, 4, zeros=0.5), table(10, 4, zeros=0.5)),
    "equal": (table(11, 3), table(11, 3)),
    "certain target": (one_hot(table(12, 3)), table(13, 3)),
    "certain draft": (table(14, 3), one_hot(table(15, 3))),
    "both certain": (one_hot(table(16, 3)), one_hot(table(17, 3))),
    "sharp": (table(18, 3, sharpness=4), table(19, 3, sharpness=4)),
}
every_law = pytest.mark.parametrize("laws", LAWS.values(), ids=LAWS)


@every_law
@pytest.mark.parametrize("length", range(4))
def test_verification_of_drawn_chains_is_plain_sampling(length: int, laws: tuple[Target, Target]) -> None:
    if length == 3 and len(laws[0](())) == 5:
        pytest.skip("as many outcomes as all the others together")
    assert_exact(traversal_verification, chain(W, length), *laws)


@every_law
@pytest.mark.parametrize("drawn", [D, R, W], ids=lambda d: d.name.lower())
@pytest.mark.parametrize("widths", [(1, 1), (2,), (3,), (2, 1)], ids=str)
def test_verification_of_trees_is_plain_sampling(
    widths: tuple[int, ...], drawn: Drawn, laws: tuple[Target, Target]
) -> None:
    assert_exact(traversal_verification, bush(drawn, *widths), *laws)


MIXED = {
    "deterministic below drawn": Group(W, (Group(D, (None, None)), Group(D, (None,)))),
    "drawn below deterministic": Group(D, (Group(W, (None, None)), Group(R, (None,)))),
    "both kinds of drawing": Group(R, (Group(W, (None, None)), None)),
    "three levels": Group(R, (Group(D, (None, Group(W, (None,)))),)),
    "one side only": Group(W, (None, None, Group(R, (Group(W, (None,)),)))),
    "nothing": None,
}


@pytest.mark.parametrize("name", ["dense", "draft with zeros", "certain target"])
@pytest.mark.parametrize("group", MIXED.values(), ids=MIXED)
def test_groups_of_different_kinds_live_in_one_tree(group: Group | None, name: str) -> None:
    assert_exact(traversal_verification, group, *LAWS[name])


@every_law
@pytest.mark.parametrize("widths", [(), (1,), (1, 1, 1), (2, 2), (3, 1)], ids=str)
def test_sample_and_match_is_plain_sampling(widths: tuple[int, ...], laws: tuple[Target, Target]) -> None:
    assert_exact(sample_and_match, bush(D, *widths), *laws)


@st.composite
def deterministic_drafts(draw: st.DrawFn) -> Draft:
    """Any shape, any tokens: siblings may repeat one another."""
    size = draw(st.integers(1, 8))
    parents = (-1, *(draw(st.integers(0, node - 1)) for node in range(1, size)))
    return Draft(tuple(draw(st.integers(0, 2)) for _ in range(size)), parents, (D,) * size)


@settings(max_examples=25, deadline=None)
@given(deterministic_drafts(), st.integers(0, 9), st.sampled_from([sample_and_match, traversal_verification]))
def test_deterministic_trees_of_any_shape_are_accepted_exactly(draft: Draft, seed: int, rule: Rule) -> None:
    target = table(seed, 3, zeros=0.2)
    longest = max(len(draft.path(node)) for node in range(len(draft.tokens)))
    count = min(longest + 1, 5)
    law = continued(emitted(rule, [(draft, 1.0)], target, target), target, count)
    assert distance(law, plain_law(target, count)) < EXACT


@st.composite
def groups(draw: st.DrawFn, nodes: int = 4) -> Group:
    """Any shape of at most so many nodes, every group drawn in its own way."""
    count = draw(st.integers(1, min(3, nodes)))
    below, left = [], nodes - count
    for _ in range(count):
        spend = draw(st.integers(0, left))
        below.append(draw(groups(spend)) if spend else None)
        left -= spend
    return Group(draw(st.sampled_from(Drawn)), tuple(below))


@settings(max_examples=25, deadline=None)
@given(groups(), st.integers(0, 99), st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.4]))
def test_trees_of_any_shape_and_kind_are_accepted_exactly(
    group: Group, seed: int, target_zeros: float, draft_zeros: float
) -> None:
    assert_exact(traversal_verification, group, table(seed, 3, target_zeros), table(seed + 1000, 3, draft_zeros))


@pytest.mark.parametrize("name", ["dense", "sharp"])
def test_a_block_that_ends_itself_by_looking_back_is_exact(name: str) -> None:
    """A stopping rule looks at the tokens drawn so far and decides whether there will be another."""
    target, draft = LAWS[name]

    def program(_: list[None], lucks: list[Luck]) -> list[Draft]:
        found = []
        for luck in lucks:
            tokens = [0]
            while len(tokens) < 4 and (len(tokens) == 1 or draft(tuple(tokens[1:-1]))[tokens[-1]] > 0.3):
                tokens.append(luck.token(("draft", len(tokens), 0), draft(tuple(tokens[1:]))))
            found.append(Draft(tuple(tokens), tuple(range(-1, len(tokens) - 1)), (W,) * len(tokens)))
        return found

    law = emitted(traversal_verification, list(law_of(program).items()), target, draft)
    assert distance(continued(law, target, 4), plain_law(target, 4)) < EXACT


# ---- greedy


@settings(max_examples=50, deadline=None)
@given(st.lists(deterministic_drafts(), min_size=1, max_size=4), st.integers(0, 9))
def test_greedy_match_says_what_greedy_decoding_says(drafts: list[Draft], seed: int) -> None:
    target = table(seed, 3)
    tree = batch(drafts, target)
    choices = target_laws(drafts, tree.nodes, target).argmax(-1)
    for row, text in enumerate(said(lambda *_: match(tree, choices), tree, choices, Ways([]))):
        prefix: tuple[int, ...] = ()
        for token in text:
            assert token == int(target(prefix).argmax()), (row, text)
            prefix = (*prefix, token)


def test_greedy_match_takes_the_longest_path_when_tokens_are_unique() -> None:
    tree = TokenTree.of([[9, 1, 2, 3, 4], [9, 5]], [[-1, 0, 0, 2, 3], [-1, 0]], CPU)
    verdict = match(tree, torch.tensor([[2, 0, 3, 4, 7], [6, 0, 0, 0, 0]]))
    assert verdict == Verdict([[0, 2, 3, 4], [0]], [7, 6], [True, False])
    assert verdict.accepted == [3, 0]


def test_padding_is_never_accepted() -> None:
    """Padding carries token 0 and stands behind the row: a target that says 0 must not find it there."""
    tree = TokenTree.of([[5], [5, 0, 0]], [[-1], [-1, 0, 1]], CPU)
    sure = torch.zeros(2, 3, 6)
    sure[..., 0] = 1
    drawn = TokenTree.drawn_chain(tree.tokens, sure)
    for verdict in (
        match(tree, torch.zeros(2, 3, dtype=torch.int64)),
        traversal_verification(drawn, sure, Ways([Luck(), Luck()])),
    ):
        assert verdict == Verdict([[0], [0, 1, 2]], [0, 0], [True, True])


# ---- rows, rules and verdicts


def test_the_rule_follows_from_what_was_drawn() -> None:
    target, draft = table(3, 4), table(4, 4)
    rules = {
        "greedy match": (bush(D, 2), 0.0),
        "sample and match": (bush(D, 2), 1.0),
        "block verification": (Group(W, (chain(D, 2),)), 1.0),
        "traversal verification": (Group(D, (chain(R, 1), None)), 1.0),
    }
    for name, (group, temperature) in rules.items():
        rows = [Row([0], 1, SamplingParams(temperature=temperature), 7, 99)]
        one = drafted(group, draft, Luck())
        tree = batch([one], draft)
        judgement = judge(tree, target_laws([one], tree.nodes, target).log(), rows, final_chance(rows))
        assert judgement.rule == name


def throw(rule: Rule, drafts: Sequence[Draft], target: Target, draft: Target, seeds: Sequence[int]) -> Verdict:
    tree = batch(drafts, draft)
    keys = [key_of(seed) for seed in seeds]
    return rule(tree, target_laws(drafts, tree.nodes, target), final_dice(keys, [seed % 5 for seed in seeds]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(groups(6), st.integers(0, 999)), min_size=1, max_size=5), st.integers(0, 9))
def test_a_row_fares_as_it_would_alone(rows: list[tuple[Group, int]], seed: int) -> None:
    target, draft = table(seed, 4), table(seed + 50, 4)
    drafts = [drafted(group, draft, Luck()) for group, _ in rows]
    seeds = [seed for _, seed in rows]
    together = throw(traversal_verification, drafts, target, draft, seeds)
    for row, (one, own) in enumerate(zip(drafts, seeds, strict=True)):
        alone = throw(traversal_verification, [one], target, draft, [own])
        assert (alone.kept[0], alone.next_tokens[0], alone.bonus[0]) == (
            together.kept[row],
            together.next_tokens[row],
            together.bonus[row],
        )


@settings(max_examples=30, deadline=None)
@given(deterministic_drafts(), st.integers(0, 999))
def test_the_rule_that_a_batch_needs_does_not_change_the_luck_of_a_row(one: Draft, seed: int) -> None:
    """A deterministic tree beside a drawn one is not matched by itself; its row must not notice."""
    target = table(seed, 3)
    alone = throw(sample_and_match, [one], target, target, [seed])
    together = throw(traversal_verification, [COMPANION, one], target, target, [1, seed])
    assert (alone.kept[0], alone.next_tokens[0], alone.bonus[0]) == (
        together.kept[1],
        together.next_tokens[1],
        together.bonus[1],
    )


def test_a_perfect_draft_is_accepted_whole() -> None:
    target = table(3, 4)
    drafts = [one for one, _ in drafts_of(chain(W, 3), target)]
    verdict = throw(traversal_verification, drafts, target, target, range(len(drafts)))
    assert len(drafts) == 4**3 and set(verdict.accepted) == {3} and all(verdict.bonus)


def test_a_draft_that_the_target_never_says_is_rejected() -> None:
    never = cache(lambda prefix: torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    target = cache(lambda prefix: torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    one = drafted(chain(W, 3), never, Luck())
    verdict = throw(traversal_verification, [one], target, never, [1])
    assert verdict.accepted == [0] and verdict.bonus == [False] and verdict.next_tokens[0] in (0, 1)


def test_laws_of_less_precision_than_the_target_will_do() -> None:
    """Draft laws come in fp32, a target may speak fp64."""
    target, draft = LAWS["dense"]
    one = drafted(Group(W, (Group(D, (None,)), None)), draft, Luck())
    tree = batch([one], draft)
    assert tree.laws_BNV is not None
    verdict = traversal_verification(
        replace(tree, laws_BNV=tree.laws_BNV.float()), target_laws([one], tree.nodes, target), Ways([Luck()])
    )
    assert verdict.kept


# ---- the obvious versions


def error(law: Law, target: Target, count: int) -> float:
    return distance(continued(law, target, count), plain_law(target, count))


TARGET, DRAFT = table(31, 4, sharpness=1.5), table(32, 4, sharpness=1.5)


def naive(tree: TokenTree, laws: Tensor, chance: Chance, mistake: str = "") -> Verdict:
    """Traversal verification as its recursion is written down, in plain numbers, with room for mistakes."""
    kept, following = [], []
    for row in range(tree.rows):
        path, law = _visited(tree, laws, chance.row(row), row, 0, 1.0, mistake) or ([0], laws[row, 0])  # type: ignore[attr-defined]
        kept.append(path)
        following.append(int(chance.row(row).token(law[None, None], np.array([[len(path) - 1]]))))  # type: ignore[attr-defined]
    return Verdict(kept, following, [path[-1] not in tree.topology.children[row] for row, path in enumerate(kept)])


def _visited(
    tree: TokenTree, laws: Tensor, luck: Chance, row: int, node: int, budget: float, mistake: str
) -> tuple[list[int], Tensor] | None:
    """The path kept below a node, itself the first, and what is left of the law at its end; None if it is rejected."""
    law = laws[row, node]
    for child in tree.topology.children[row].get(node, []):
        token, proposal = tree.tokens[row][child], _proposal(tree, row, node, child, mistake)
        worth = budget * float(law[token] / proposal[token]) if proposal[token] > 0 else 0.0
        worth = worth if mistake == "budgets above one" else min(1.0, worth)
        if found := _visited(tree, laws, luck, row, child, worth, mistake):
            return [node, *found[0]], laws[row, node] if mistake == "bonus from the parent" else found[1]
        rest = (budget * law - proposal).clamp(min=0)
        if mistake == "swapped residual":
            rest = (proposal - budget * law).clamp(min=0)
        if mistake == "residual without the budget":
            rest = (law - proposal).clamp(min=0)
        left, missing = float(rest.sum()), float((proposal - law).clamp(min=0).sum())
        law = rest / left if left > 0 else law
        budget = _left_budget(left, budget, missing, mistake)
    if mistake == "everything asked is kept":
        budget = 1.0
    place, number = (len(tree.topology.path(row, node)) - 1, 0) if mistake == "coins of positions" else (0, node)
    kept = luck.coin(torch.tensor([[budget]], dtype=torch.float64), np.array([[place]]), np.array([[number]]))
    return ([node], law) if bool(kept) else None


def _left_budget(left: float, budget: float, missing: float, mistake: str) -> float:
    if mistake == "wrong normaliser":  # with the budget in what is missing as well it would be the right one
        return min(1.0, left / missing) if missing > 0 else 1.0
    if mistake == "no normaliser":
        return left
    return left / (left + 1 - budget) if left + 1 > budget else 1.0


def _proposal(tree: TokenTree, row: int, parent: int, node: int, mistake: str = "") -> Tensor:
    assert tree.laws_BNV is not None and tree.drawn_BN is not None
    law = tree.laws_BNV[row, parent].clone()
    if tree.drawn_BN[row, parent] == D:
        return torch.zeros_like(law).index_fill(0, tree.tokens_BN[row, node], 1.0)
    if tree.drawn_BN[row, parent] == W:
        earlier = [n for n in tree.topology.children[row][parent] if n < node]
        law[tree.tokens_BN[row, earlier]] = 0
        law = law if mistake == "not renormalised" else law / law.sum()
    return law


def block(tree: TokenTree, laws: Tensor, chance: Chance) -> Verdict:
    """Block verification as it is written down for chains: one coin for every place, and the last that falls well."""
    assert tree.laws_BNV is not None
    kept, following = [], []
    for row, size in enumerate(tree.sizes):
        luck, p, end, left = chance.row(row), 1.0, 0, laws[row, 0]  # type: ignore[attr-defined]
        for place in range(size):
            if place:
                token = tree.tokens[row][place]
                s = float(tree.laws_BNV[row, place - 1, token])
                p = min(1.0, p * float(laws[row, place - 1, token]) / s) if s > 0 else 0.0
            h, rest = p, laws[row, place]
            if place < size - 1:
                rest = (p * laws[row, place] - tree.laws_BNV[row, place]).clamp(min=0)
                z = float(rest.sum())
                h, rest = (z / (z + 1 - p) if z + 1 > p else 1.0), rest if z > 0 else laws[row, place]
            if bool(luck.coin(torch.tensor([[h]], dtype=torch.float64), np.array([[0]]), np.array([[place]]))):
                end, left = place, rest
        kept.append(list(range(end + 1)))
        following.append(int(luck.token(left[None, None], np.array([[end]]))))
    return Verdict(kept, following, [len(path) == size for path, size in zip(kept, tree.sizes, strict=True)])


def token_wise(tree: TokenTree, laws: Tensor, chance: Chance) -> Verdict:
    """What the joint rules are better than: speculative sampling, and for siblings SpecInfer's recursive rejection."""
    kept, following = [], []
    for row in range(tree.rows):
        luck, path, law, tried = chance.row(row), [0], laws[row, 0], 0  # type: ignore[attr-defined]
        left = list(tree.topology.children[row].get(0, []))
        while left:
            node = left.pop(0)
            token, proposal = tree.tokens[row][node], _proposal(tree, row, path[-1], node)
            ratio = law[token] / proposal[token] if proposal[token] > 0 else torch.zeros(())
            place = np.array([[len(path) - 1]])
            if luck.coin(ratio.clamp(max=1).double()[None, None], place, np.array([[tried]])):
                path.append(node)
                law, tried, left = laws[row, node], 0, list(tree.topology.children[row].get(node, []))
            else:
                rest, tried = (law - proposal).clamp(min=0), tried + 1
                law = rest / rest.sum() if rest.sum() > 0 else law
        kept.append(path)
        following.append(int(luck.token(law[None, None], np.array([[len(path) - 1]]))))
    return Verdict(kept, following, [path[-1] not in tree.topology.children[row] for row, path in enumerate(kept)])


@pytest.mark.parametrize("rule", [naive, token_wise])
@pytest.mark.parametrize("drawn", [D, R, W], ids=lambda d: d.name.lower())
def test_the_obvious_versions_are_exact_too(drawn: Drawn, rule: Rule) -> None:
    group = bush(drawn, 2, 1)
    assert error(emitted(rule, drafts_of(group, DRAFT), TARGET, DRAFT), TARGET, 3) < EXACT


@pytest.mark.parametrize("length", range(4))
def test_block_verification_as_it_is_written_down_is_exact_too(length: int) -> None:
    target, draft = LAWS["dense"]
    drafts = drafts_of(chain(W, length), draft)
    assert error(emitted(block, drafts, target, draft), target, length + 1) < EXACT


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(groups(7), st.integers(0, 999)), min_size=1, max_size=4),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.4]),
)
def test_it_is_the_slow_obvious_version(rows: list[tuple[Group, int]], seed: int, zeros: float) -> None:
    target, draft = table(seed, 4, zeros), table(seed + 50, 4, zeros)
    chosen = [drafted(group, draft, Luck()) for group, _ in rows]
    drafts = [one for one in chosen if any(one.drawn[parent] != D for parent in one.parents[1:])]
    if drafts:
        seeds = [seed for _, seed in rows][: len(drafts)]
        fast, slow = (throw(rule, drafts, target, draft, seeds) for rule in (traversal_verification, naive))
        assert fast == slow


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 999)), min_size=1, max_size=4), st.integers(0, 99))
def test_on_chains_it_is_block_verification(rows: list[tuple[int, int]], seed: int) -> None:
    target, draft = table(seed, 4), table(seed + 50, 4)
    drafts = [drafted(chain(W, length), draft, Luck()) for length, _ in rows]
    drafts = [replace(one, drawn=(W,) * len(one.drawn)) for one in drafts]
    fast, slow = (
        throw(rule, drafts, target, draft, [seed for _, seed in rows]) for rule in (traversal_verification, block)
    )
    assert fast == slow


# ---- the gain


def mean_accepted(rule: Rule, group: Group | None, target: Target, draft: Target) -> float:
    law = emitted(rule, drafts_of(group, draft), target, draft)
    return sum(probability * (len(text) - 1) for text, probability in law.items() if isinstance(text, tuple))


@settings(max_examples=40, deadline=None)
@given(groups(), st.integers(0, 999), st.sampled_from([0.0, 0.4]), st.sampled_from([0.0, 0.4]))
def test_no_fewer_tokens_are_accepted_than_one_by_one(
    group: Group, seed: int, target_zeros: float, draft_zeros: float
) -> None:
    laws = table(seed, 3, target_zeros), table(seed + 1000, 3, draft_zeros)
    one_by_one = mean_accepted(token_wise, group, *laws)
    assert mean_accepted(traversal_verification, group, *laws) >= one_by_one - EXACT


def test_the_example_of_the_papers() -> None:
    """Two tokens under the same laws everywhere (Sun et al. 2025, section 2): 10/9 are accepted one by one, 11/9 so."""
    target = cache(lambda prefix: torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    draft = cache(lambda prefix: torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    assert mean_accepted(token_wise, chain(W, 2), target, draft) == pytest.approx(10 / 9, abs=EXACT)
    assert mean_accepted(traversal_verification, chain(W, 2), target, draft) == pytest.approx(11 / 9, abs=EXACT)


GAINS = {
    "a chain of two": (chain(W, 2), 1.03, 1.08),
    "a chain of three": (chain(W, 3), 1.06, 1.14),
    "a tree with replacement": (bush(R, 2, 1), 1.016, 1.06),
    "a tree without replacement": (bush(W, 2, 1), 1.016, 1.06),
    "one level": (bush(W, 2), 1 - EXACT, 1 + EXACT),
}


@pytest.mark.parametrize(("group", "least", "most"), GAINS.values(), ids=GAINS)
def test_deeper_drafts_gain_more(group: Group, least: float, most: float) -> None:
    """Over random laws. One level gains nothing: there is nothing to make up with."""
    joint, one_by_one = (
        sum(mean_accepted(rule, group, table(seed, 3), table(seed + 100, 3)) for seed in range(4))
        for rule in (traversal_verification, token_wise)
    )
    assert least < joint / one_by_one < most


# ---- mistakes: each of these is a way in which published code was, or easily is, wrong


def relabelled(drafts: Sequence[tuple[Draft, float]], drawn: Drawn) -> list[tuple[Draft, float]]:
    return [(replace(one, drawn=(drawn,) * len(one.drawn)), share) for one, share in drafts]


MISTAKES = {
    "swapped residual": chain(W, 2),
    "residual without the budget": chain(W, 2),
    "wrong normaliser": chain(W, 2),
    "no normaliser": bush(W, 2),
    "budgets above one": chain(W, 2),
    "everything asked is kept": chain(W, 2),
    "not renormalised": bush(W, 3),
    "bonus from the parent": bush(W, 2),
}


@pytest.mark.parametrize(("mistake", "group"), MISTAKES.items(), ids=MISTAKES)
def test_it_shows_when_the_rule_is_not_quite_this_one(mistake: str, group: Group) -> None:
    def wrong(tree: TokenTree, laws: Tensor, chance: Chance) -> Verdict:
        return naive(tree, laws, chance, mistake)

    law = emitted(wrong, drafts_of(group, DRAFT), TARGET, DRAFT)
    assert sum(law.values()) == pytest.approx(1, abs=EXACT)
    assert error(law, TARGET, group.depth + 1) > 0.005


def test_it_shows_when_a_coin_falls_again_in_the_next_step() -> None:
    """The first step throws coins for tokens that it does not keep, at positions that the second comes to."""
    target, draft = table(1, 3), table(2, 3)

    def two_steps(mistake: str) -> Law:
        def program(_: list[None], lucks: list[Luck]) -> list[tuple[int, ...]]:
            texts: list[tuple[int, ...]] = [() for _ in lucks]
            for length in (2, 1):
                for row, luck in enumerate(lucks):
                    texts[row] += step(texts[row], luck, length, mistake)
            return texts

        return law_of(program)

    def step(text: tuple[int, ...], luck: Luck, length: int, mistake: str) -> tuple[int, ...]:
        after_target, after_draft = (cache(lambda prefix, law=law: law((*text, *prefix))) for law in (target, draft))
        one = drafted(chain(W, length), after_draft, Renamed(luck, lambda name: (length, name)))
        placed = Renamed(luck, lambda name: (*name[:2], name[2] + len(text), name[3]))
        tree = batch([one], after_draft)
        return said(
            lambda *given: naive(*given, mistake), tree, target_laws([one], tree.nodes, after_target), Ways([placed])
        )[0]

    assert error(two_steps(""), target, 3) < EXACT
    assert error(two_steps("coins of positions"), target, 3) > 0.005


class Renamed(Luck):
    """The same luck, asked under other names."""

    def __init__(self, luck: Luck, name: Callable[[Any], Hashable]):
        self._luck, self._name = luck, name

    def place(self, name: Hashable, marks: Sequence[float]) -> float:
        return self._luck.place(self._name(name), marks)


def test_it_shows_when_the_best_tokens_are_tested_against_the_softmax() -> None:
    drafts = drafts_of(bush(D, 2), DRAFT)
    for label in (R, W):
        assert error(emitted(traversal_verification, relabelled(drafts, label), TARGET, DRAFT), TARGET, 1) > 0.1


def test_it_shows_when_distinct_siblings_pass_for_independent_draws() -> None:
    drafts = relabelled(drafts_of(bush(W, 2), DRAFT), R)
    assert error(emitted(traversal_verification, drafts, TARGET, DRAFT), TARGET, 1) > 0.01


def test_it_shows_when_independent_draws_pass_for_distinct_siblings() -> None:
    drafts = relabelled(drafts_of(bush(R, 2), DRAFT), W)
    assert error(emitted(traversal_verification, drafts, TARGET, DRAFT), TARGET, 1) > 0.005


def test_it_shows_when_the_first_drafters_law_is_used_two_levels_up() -> None:
    """The counterexample of specs/hsd.md, section 3: fair coins, tested against the law of the drafter below."""
    below = cache(lambda prefix: torch.tensor([0.9, 0.1], dtype=torch.float64))
    fair = cache(lambda prefix: torch.tensor([0.5, 0.5], dtype=torch.float64))
    spoken = emitted(traversal_verification, drafts_of(chain(W, 1), below), fair, below)
    middle = [(Draft((0, text[0]), (-1, 0), (W, W)), share) for text, share in spoken.items()]
    wrong = continued(emitted(traversal_verification, middle, fair, below), fair, 1)
    assert wrong[(0,)] == pytest.approx(0.5 / 0.9 / 2, abs=1e-9)
    assert wrong[(0,)] == pytest.approx(0.2778, abs=1e-4)
    right = continued(emitted(traversal_verification, middle, fair, fair), fair, 1)
    assert right[(0,)] == pytest.approx(0.5, abs=EXACT)


def test_it_shows_when_a_drawn_token_is_dropped_after_it_was_seen() -> None:
    def pruned(one: Draft) -> Draft:
        keep = DRAFT(())[one.tokens[1]] > 0.3
        return one if keep else Draft(one.tokens[:1], one.parents[:1], one.drawn[:1])

    drafts = [(pruned(one), share) for one, share in drafts_of(chain(W, 1), DRAFT)]
    assert error(emitted(traversal_verification, drafts, TARGET, DRAFT), TARGET, 1) > 0.05


def test_it_shows_when_the_least_confident_of_the_siblings_is_dropped() -> None:
    def pruned(one: Draft) -> Draft:
        law = DRAFT(())
        best = max(one.tokens[1:], key=lambda token: float(law[token]))
        return Draft((0, best), (-1, 0), (W, W))

    drafts = [(pruned(one), share) for one, share in drafts_of(bush(W, 2), DRAFT)]
    assert error(emitted(traversal_verification, drafts, TARGET, DRAFT), TARGET, 1) > 0.05


@pytest.mark.parametrize("shared", ["acceptance", "recovery"])
def test_it_shows_when_drafting_and_verifying_share_a_stream(shared: str) -> None:
    """One number for the drafted token and for its coin, or for the token after a rejection (specs: USERS.md, 1)."""
    kind = {"acceptance": "coin", "recovery": "token"}[shared]

    def program(_: list[None], lucks: list[Luck]) -> list[tuple[int, ...]]:
        drafts = []
        for luck in lucks:
            name = ("", kind, 0, 1 if kind == "coin" else -1)  # what `Ways` will ask for node 1
            drafts.append(Draft((0, luck.token(name, DRAFT(()))), (-1, 0), (W, W)))
        tree = batch(drafts, DRAFT)
        return said(traversal_verification, tree, target_laws(drafts, 2, TARGET), Ways(lucks))

    law = law_of(program)
    assert sum(law.values()) == pytest.approx(1, abs=EXACT)
    assert error(law, TARGET, 1) > 0.01


def test_sampling_once_per_leaf_as_medusa_did_is_not_plain_sampling() -> None:
    """specs/medusa.md, 4.3: every row of the tree draws for itself, the best row wins, a mismatch is drawn again."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rows = (0, 0, 0, 1)  # the first token of each root-to-leaf path

    def medusa(_: list[None], lucks: list[Luck]) -> list[int]:
        found = []
        for luck in lucks:
            drawn = [luck.token(row, p) for row in range(len(rows))]
            hits = [first for first, token in zip(rows, drawn, strict=True) if first == token]
            found.append(hits[0] if hits else luck.token("again", p))
        return found

    law = law_of(medusa)
    assert [law[token] for token in range(3)] == pytest.approx([0.91875, 0.06375, 0.0175], abs=1e-12)

    target: Target = lambda prefix: p  # noqa: E731
    tree = Draft((0, 0, 1, 1, 1, 1), (-1, 0, 0, 1, 1, 1), (D,) * 6)
    for rule in (sample_and_match, traversal_verification):
        exact = continued(emitted(rule, [(tree, 1.0)], target, target), target, 1)
        assert [exact[(token,)] for token in range(3)] == pytest.approx(p.tolist(), abs=EXACT)
