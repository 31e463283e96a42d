"""Lenient review: the published greedy rule and the sampled one, each written down slowly; and
nobody takes it for exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from enumeration import Luck, Ways, distance, law_of, one_law
from fakes import Near, TableNetwork, Wild, engine_of, plain
from forerun.accept.exact import Verdict, match
from forerun.accept.judge import LENIENT, is_exact
from forerun.accept.lossy import Lenient, Typical, lenient, lossy_of
from forerun.chance import Dice, key_of
from forerun.drafting.drafter import Context
from forerun.errors import ForerunError
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.tree import Drawn, TokenTree, Topology

CPU = torch.device("cpu")
V = 4
fast = settings(max_examples=60, deadline=None)


def some_laws(rng: np.random.Generator, *shape: int) -> Tensor:
    """Random laws [*shape, V], some of them sharp, some with zeros."""
    weights = np.exp(rng.normal(size=(*shape, V)) * 2) * (rng.random((*shape, V)) > 0.2) + 1e-9
    return torch.from_numpy(weights / weights.sum(-1, keepdims=True))


def dice(seed: int, rows: int = 1) -> Dice:
    return Dice([key_of(seed + row) for row in range(rows)], [5] * rows)


def chain_of(tokens: Sequence[Sequence[int]], laws: Tensor | None) -> TokenTree:
    """Chains, drawn where there are laws."""
    return TokenTree.chain(tokens, CPU) if laws is None else TokenTree.drawn_chain(tokens, laws)


def one(tree: TokenTree, laws: Tensor, factor: float, greedy: bool, seed: int = 0) -> Verdict:
    return lenient(tree, laws, Lenient(factor), [greedy], dice(seed))


# ---- the published rule


def published(tokens: Sequence[int], p: Tensor, q: Tensor | None, factor: float) -> list[int]:
    """cs_drafting.md, 4.1: the tokens said, the one of the reviewer's own included."""
    said: list[int] = []
    for place, x in enumerate(tokens):
        thought = 1.0 if q is None else float(q[place, x])
        if x != int(p[place].argmax()) and not (factor > 1 and float(p[place, x]) > thought / factor):
            return [*said, int(p[place].argmax())]
        said.append(x)
    return [*said, int(p[len(tokens)].argmax())]


chains = st.tuples(st.integers(0, 6), st.integers(0, 10_000))


@fast
@given(st.lists(chains, min_size=1, max_size=4), st.floats(1.01, 50), st.booleans())
def test_greedy_rows_follow_the_published_rule(wanted: list[tuple[int, int]], factor: float, is_drawn: bool) -> None:
    """Rows of different lengths beside one another; drafts that were drawn, and drafts that were certain."""
    longest = max(size for size, _ in wanted)
    rngs = [np.random.default_rng(seed) for _, seed in wanted]
    p = torch.stack([some_laws(rng, longest + 1) for rng in rngs])
    q = torch.stack([some_laws(rng, longest + 1) for rng in rngs]) if is_drawn else None
    tokens = [rng.integers(0, V, size).tolist() for rng, (size, _) in zip(rngs, wanted, strict=True)]
    tree = chain_of([[0, *row] for row in tokens], q)
    verdict = lenient(tree, p, Lenient(factor), [True] * len(wanted), dice(1, len(wanted)))
    for row, drafted in enumerate(tokens):
        said = published(drafted, p[row], None if q is None else q[row], factor)
        assert verdict.kept[row] == list(range(len(said))) and verdict.next_tokens[row] == said[-1]
        assert said[:-1] == drafted[: len(said) - 1]
        assert verdict.bonus[row] == (len(said) == len(drafted) + 1)


def test_the_bounds_are_strict_and_what_was_certain_counts_as_one() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0]] * 2, dtype=torch.float64)[None]
    for token, factor, kept in ((0, 1.1, True), (1, 4.0, False), (1, 4.01, True), (3, 1e9, False)):
        verdict = one(TokenTree.chain([[0, token]], CPU), p, factor, greedy=True)
        assert (verdict.accepted == [1]) == kept, (token, factor)
    q = torch.tensor([[0.2, 0.5, 0.1, 0.2]] * 2, dtype=torch.float64)[None]
    for token, factor, kept in ((1, 2.0, False), (1, 2.01, True), (2, 1.01, True), (3, 1e9, False)):
        verdict = one(TokenTree.drawn_chain([[0, token]], q), p, factor, greedy=True)
        assert (verdict.accepted == [1]) == kept, (token, factor)


# ---- sampled rows


def outcome(verdict: Verdict) -> tuple[int, int]:
    return len(verdict.kept[0]) - 1, verdict.next_tokens[0]


@pytest.mark.parametrize("factor", [1.0, 1.5, 3.0, 100.0])
@pytest.mark.parametrize("is_drawn", [True, False], ids=["drawn", "certain"])
@pytest.mark.parametrize("seed", range(3))
def test_sampled_rows_keep_a_token_by_its_worth_and_end_with_what_is_left(
    seed: int, is_drawn: bool, factor: float
) -> None:
    """min(1, factor p / q) of every token in turn; then max(0, p - q), or p without the rejected token."""
    rng = np.random.default_rng(seed)
    p, q, tokens = some_laws(rng, 3), some_laws(rng, 3), rng.integers(0, V, 2).tolist()
    if not is_drawn:
        q[:2] = torch.nn.functional.one_hot(torch.tensor(tokens), V).double()
    tree = chain_of([[0, *tokens]], q[None] if is_drawn else None)

    def program(_: list[None], lucks: list[Luck]) -> list[tuple[int, int]]:
        return [outcome(lenient(tree, p[None], Lenient(factor), [False], Ways([luck]))) for luck in lucks]

    found = law_of(program)
    expected: dict[tuple[int, int], float] = {}
    reached = 1.0
    for depth, x in enumerate([*tokens, None]):
        worth = 0.0 if x is None else min(1.0, factor * float(p[depth, x]) / float(q[depth, x]))
        rest = p[depth] if x is None else (p[depth] - q[depth]).clamp(min=0)
        for token, share in enumerate((rest / rest.sum()).tolist()):
            expected[depth, token] = expected.get((depth, token), 0.0) + reached * (1 - worth) * share
        reached *= worth
    assert distance(found, expected) < 1e-9


@pytest.mark.parametrize("is_drawn", [True, False], ids=["drawn", "certain"])
@pytest.mark.parametrize("seed", range(3))
def test_a_factor_of_one_is_exact_for_chains(seed: int, is_drawn: bool) -> None:
    """What is said, drafted or not, follows the reviewer's own law."""
    rng = np.random.default_rng(seed)
    p, q = some_laws(rng, 2), some_laws(rng, 2)
    certain = int(rng.integers(V))

    def program(_: list[None], lucks: list[Luck]) -> list[int]:
        said = []
        for luck in lucks:
            token = luck.token("draft", q[0]) if is_drawn else certain
            tree = chain_of([[0, token]], q[None] if is_drawn else None)
            accepted, following = outcome(lenient(tree, p[None], Lenient(1.0), [False], Ways([luck])))
            said.append(token if accepted else following)
        return said

    assert distance(law_of(program), dict(enumerate(p[0].tolist()))) < 1e-9


@fast
@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.lists(st.floats(1.01, 100), min_size=2, max_size=5))
def test_more_leniency_never_keeps_less_of_a_chain(
    seed: int, greedy: bool, is_drawn: bool, factors: list[float]
) -> None:
    """With the same luck, draft and laws."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 8))
    p, q = some_laws(rng, 1, size + 1), some_laws(rng, 1, size + 1)
    tree = chain_of([[0, *rng.integers(0, V, size).tolist()]], q if is_drawn else None)
    kept = [one(tree, p, factor, greedy, seed).accepted[0] for factor in sorted(factors)]
    assert kept == sorted(kept)
    if greedy:
        assert kept[0] >= match(tree, p.argmax(-1)).accepted[0]


# ---- trees


def some_tree(seed: int, kinds: Sequence[Drawn] = tuple(Drawn)) -> TokenTree:
    wild = Wild(V, 8, seed, kinds)
    rows = [Row([1] * (2 + n), 1, SamplingParams(), key_of(n), 99) for n in range(4)]
    return wild.propose(Context(rows, [99] * 4, [9] * 4, CPU))


@fast
@given(st.integers(0, 10_000), st.floats(1.01, 20))
def test_greedy_rows_go_down_a_tree_at_least_as_far_as_exactly_and_every_token_was_worth_it(
    seed: int, factor: float
) -> None:
    tree = some_tree(seed)
    p = some_laws(np.random.default_rng(seed), tree.rows, tree.nodes)
    verdict = lenient(tree, p, Lenient(factor), [True] * tree.rows, dice(seed, tree.rows))
    exactly = match(tree, p.argmax(-1))
    for row, path in enumerate(verdict.kept):
        assert path[: len(exactly.kept[row])] == exactly.kept[row] or (
            [tree.tokens[row][n] for n in path[: len(exactly.kept[row])]]
            == [tree.tokens[row][n] for n in exactly.kept[row]]
        )
        for above, node in pairwise(path):
            x = tree.tokens[row][node]
            drawn = tree.drawn_BN is not None and tree.drawn_BN[row, above]
            thought = float(tree.laws_BNV[row, above, x]) if drawn and tree.laws_BNV is not None else 1.0
            assert tree.topology.parents[row][node] == above
            assert x == int(p[row, above].argmax()) or factor * float(p[row, above, x]) > thought
        assert verdict.next_tokens[row] == int(p[row, path[-1]].argmax())
        assert verdict.bonus[row] == (path[-1] not in tree.topology.children[row])


@fast
@given(st.integers(0, 10_000), st.floats(1.01, 20))
def test_rows_are_judged_as_if_they_were_alone(seed: int, factor: float) -> None:
    """Greedy beside sampled, chains beside bushes."""
    tree = some_tree(seed)
    p = some_laws(np.random.default_rng(seed), tree.rows, tree.nodes)
    greedy, luck = [n % 2 == 0 for n in range(tree.rows)], dice(seed, tree.rows)
    together = lenient(tree, p, Lenient(factor), greedy, luck)
    for row, size in enumerate(tree.sizes):
        laws = None if tree.laws_BNV is None else tree.laws_BNV[row : row + 1, :size]
        drawn = None if tree.drawn_BN is None else tree.drawn_BN[row : row + 1, :size]
        own = TokenTree([tree.tokens[row]], Topology.of([tree.topology.parents[row]]), CPU, drawn, laws)
        alone = lenient(own, p[row : row + 1, :size], Lenient(factor), greedy[row : row + 1], luck.row(row))
        assert (alone.kept[0], alone.next_tokens[0]) == (together.kept[row], together.next_tokens[row])
        assert alone.bonus[0] == together.bonus[row]


def test_the_targets_own_choice_is_preferred_to_an_earlier_sibling() -> None:
    p = torch.tensor([[[0.1, 0.4, 0.5, 0.0]] * 3], dtype=torch.float64)
    tree = TokenTree.of([[0, 1, 2]], [[-1, 0, 0]], CPU)
    assert one(tree, p, 10.0, greedy=True).kept == [[0, 2]]
    assert one(tree, p, 100.0, greedy=False).kept == [[0, 1]], "a row that samples takes the first that is kept"


def test_every_sibling_has_luck_of_its_own() -> None:
    p = torch.tensor([[[0.2, 0.3, 0.1, 0.4]] * 3], dtype=torch.float64)
    tree = TokenTree.of([[0, 1, 2]], [[-1, 0, 0]], CPU)

    def program(_: list[None], lucks: list[Luck]) -> list[tuple[int, ...]]:
        return [tuple(lenient(tree, p, Lenient(2.0), [False], Ways([luck])).kept[0]) for luck in lucks]

    expected = {(0, 1): 0.6, (0, 2): 0.4 * 0.2, (0,): 0.4 * 0.8}
    assert distance(law_of(program), expected) < 1e-9


def test_rejected_siblings_are_not_said_after_all() -> None:
    p = torch.tensor([[[0.2, 0.3, 0.1, 0.4]] * 3], dtype=torch.float64)
    tree = TokenTree.of([[0, 1, 2]], [[-1, 0, 0]], CPU)
    verdicts = [one(tree, p, 1.0, greedy=False, seed=seed) for seed in range(300)]
    rejected = {v.next_tokens[0] for v in verdicts if v.accepted == [0]}
    assert rejected == {0, 3}
    certain = torch.tensor([[[0.0, 1.0, 0.0, 0.0]] * 2], dtype=torch.float64)
    assert one(TokenTree.chain([[0, 1]], CPU), certain, 1.0, greedy=False).kept == [[0, 1]]


# ---- in the engine

PROMPTS = [[1, 2], [3], [4, 0, 2, 2], [2, 1, 3]]
GREEDY = SamplingParams(max_new_tokens=30)
WARM = SamplingParams(max_new_tokens=30, temperature=0.9, seed=3)


@pytest.fixture
def target() -> TableNetwork:
    return TableNetwork(5, seed=5)


def test_every_greedy_token_is_the_best_or_nearly_as_probable_as_it_was_thought(target: TableNetwork) -> None:
    """Certain drafts: more than a share of 1 / factor at temperature 1, penalties included."""
    wishes = [GREEDY, replace(GREEDY, logit_bias={2: 1.5}), GREEDY, GREEDY]
    one = engine_of(target, Wild(5, kinds=(Drawn.DETERMINISTIC,)), lossy=Lenient(4.0))
    strange = 0
    for prompt, wish, output in zip(PROMPTS, wishes, one.generate(PROMPTS, wishes), strict=True):
        text = list(prompt)
        for token in output.token_ids:
            logits = target.logits(text).index_add(
                0, torch.tensor([2]), torch.tensor([wish.logit_bias.get(2, 0.0)]).double()
            )
            law = one_law(logits, replace(wish, temperature=1.0))
            assert token == law.argmax() or law[token] > 1 / 4
            strange += int(token != law.argmax())
            text.append(token)
    assert strange, "the rule was never used"


def test_more_is_kept_than_exactly(target: TableNetwork) -> None:
    near = {"near": Near(target, 1.0)}
    for wish in (GREEDY, WARM):
        steps = []
        for lossy in (None, Lenient(4.0), Lenient(1e6)):
            one = engine_of(target, {"drafter": "small", "checkpoint": "near", "length": 4}, near, lossy=lossy)
            steps.append(sum(output.stats.steps for output in one.generate(PROMPTS, wish)))
        assert steps[0] > steps[1] > steps[2] == 4 * 6, "30 tokens, five at a time"


def test_rows_do_not_depend_on_their_neighbours(target: TableNetwork) -> None:
    def say(prompts: Sequence[list[int]], wishes: Sequence[SamplingParams]) -> list[list[int]]:
        drafter = {"drafter": "small", "checkpoint": "near", "length": 3}
        one = engine_of(target, drafter, {"near": Near(target, 0.7)}, lossy=Lenient(2.0))
        return [output.token_ids for output in one.generate(prompts, wishes)]

    wishes = [GREEDY, WARM, replace(WARM, temperature=0.4, seed=8), GREEDY]
    alone = [say([prompt], [wish])[0] for prompt, wish in zip(PROMPTS, wishes, strict=True)]
    together = say(PROMPTS, wishes)
    assert together[1:3] == alone[1:3]
    assert together[1:3] != [plain(target, prompt, 30) for prompt in PROMPTS[1:3]]


def test_the_statistics_name_the_rule_for_every_row(target: TableNetwork) -> None:
    one = engine_of(target, Wild(5), lossy=Lenient(2.0))
    for output in one.generate(PROMPTS[:2], [WARM, GREEDY]):
        assert (output.stats.rule, output.stats.exact) == (LENIENT, False) and "lossy" in LENIENT
    row = Row([0], 1, GREEDY, 0, 9)
    assert not is_exact(Lenient(), row) and is_exact(Typical(), row) and is_exact(None, row)


def test_without_a_drafter_it_is_plain_decoding(target: TableNetwork) -> None:
    (output,) = engine_of(target, "none", lossy=Lenient(5.0)).generate([1, 2], GREEDY)
    assert output.token_ids == plain(target, [1, 2], 30)
    (one,) = engine_of(target, "none", lossy=Lenient(5.0)).generate([1, 2], WARM)
    (two,) = engine_of(target, "none").generate([1, 2], WARM)
    assert one.token_ids == two.token_ids


# ---- the word on the command line


def test_words() -> None:
    assert lossy_of("lenient") == Lenient() == Lenient(2.0)
    assert lossy_of("lenient:3") == Lenient(3.0) and lossy_of("lenient:1.01") == Lenient(1.01)


@pytest.mark.parametrize(
    "word", "lenient:1|lenient:0.5|lenient:a|lenient:2,3|lenient:inf|lenient:nan|Lenient".split("|")
)
def test_words_without_meaning(word: str) -> None:
    with pytest.raises(ForerunError, match=f"no acceptance '{word}'.* a factor above 1$") as caught:
        lossy_of(word)
    assert "\n" not in str(caught.value)
