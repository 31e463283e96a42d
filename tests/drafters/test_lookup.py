"""The lookup drafter: valid trees, only what really came before, silence where nothing hits."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import Near, TableNetwork, engine_of, plain
from forerun.drafters.lookup import Lookup
from forerun.drafting.drafter import Context
from forerun.drafting.workshop import Workshop, build
from forerun.errors import DrafterError
from forerun.model import Model
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.stores.automaton import Outlook
from forerun.stores.growth import RANKS, Odds, prior
from forerun.stores.store import Limits
from forerun.tree import TokenTree

DEVICE = torch.device("cpu")
relaxed = settings(deadline=None)
TOKENS = st.integers(2, 6).flatmap(lambda kinds: st.lists(st.integers(0, kinds - 1), min_size=1, max_size=50))


def lookup(**changes: float) -> Lookup:
    return Lookup(Limits(**{"nodes": 16, "depth": 16, "min_match": 1, "cost": 0.05, **changes}))  # type: ignore[arg-type]


def row_of(tokens: Sequence[int], tentative: int = 0) -> Row:
    return Row(list(tokens), 1, SamplingParams(temperature=0), key=0, limit=10_000, tentative=tentative)


def propose(drafter: Lookup, rows: Sequence[Row], budget: int = 64, depths: Sequence[int] | None = None) -> TokenTree:
    return drafter.propose(Context(rows, [budget] * len(rows), depths or [64] * len(rows), DEVICE))


def fresh(text: Sequence[int], tentative: int = 0, **changes: float) -> TokenTree:
    """What a drafter that was just given this row proposes."""
    drafter, row = lookup(**changes), row_of(text, tentative)
    drafter.admit(row, {})
    return propose(drafter, [row])


def paths(tree: TokenTree, index: int = 0) -> list[list[int]]:
    """The tokens from the children of node 0 down to each node, in node order."""
    tokens, topology = tree.tokens_BN[index].tolist(), tree.topology
    return [[tokens[n] for n in topology.path(index, node)[1:]] for node in range(1, topology.sizes[index])]


def occurs(text: list[int], pattern: list[int]) -> bool:
    return any(text[start : start + len(pattern)] == pattern for start in range(len(text) - len(pattern) + 1))


def chain_after(text: Sequence[int], **changes: float) -> list[int]:
    """The first child of node 0, its first child, and so on."""
    tree = fresh(text, **changes)
    children, tokens, node, said = tree.topology.children[0], tree.tokens_BN[0].tolist(), 0, []
    while node in children:
        node = children[node][0]
        said.append(tokens[node])
    return said


# ---- what is proposed


@pytest.mark.parametrize("min_match", [1, 2])
def test_the_example_of_vllm(min_match: int) -> None:
    assert chain_after([1, 2, 3, 4, 2, 3], min_match=min_match)[:3] == [4, 2, 3]


def test_several_continuations_stand_side_by_side_the_newest_first() -> None:
    a, b, c, d = 1, 2, 3, 4
    tree = fresh([a, b, c, 90, a, b, c, 91, a, b, d, 92, a, b])
    tops = [path[0] for path in paths(tree) if len(path) == 1]
    assert tops == [d, c]


def test_a_shorter_suffix_adds_what_the_longest_does_not_know() -> None:
    tree = fresh([7, 2, 5, 90, 1, 2, 3, 91, 1, 2], cost=0.01)
    assert [path[0] for path in paths(tree) if len(path) == 1] == [3, 5]


def test_a_copy_is_followed_to_the_depth_limit() -> None:
    text = list(range(100, 140))
    assert chain_after([*text, 1, *text[:9]]) == text[9 : 9 + 16]
    assert chain_after([*text, 1, *text[:9]], depth=5) == text[9 : 9 + 5]


def test_a_short_match_is_drafted_shorter_than_a_long_one() -> None:
    text = list(range(100, 140))
    drafted = [fresh([*text, 1, *text[9 - match : 9]]).nodes for match in (1, 2, 4, 8)]
    assert drafted == sorted(drafted)
    assert drafted[0] < drafted[-1]


def test_nothing_is_known_nothing_is_proposed() -> None:
    assert fresh([1]).sizes == (1,)
    assert fresh([1, 2, 3]).sizes == (1,)
    assert fresh([1, 2, 3, 9, 3], min_match=2).sizes == (1,)


def test_vocabularies_beyond_16_bits() -> None:
    assert chain_after([200_000, 70_000, 151_642, 9, 200_000, 70_000])[:2] == [151_642, 9]


@relaxed
@given(
    TOKENS, st.integers(0, 4), st.integers(1, 20), st.integers(1, 6), st.integers(1, 3), st.sampled_from([1e-4, 0.05])
)
def test_trees_are_valid_and_every_node_came_before(
    text: list[int], tentative: int, nodes: int, depth: int, min_match: int, cost: float
) -> None:
    tentative = min(tentative, len(text) - 1)
    tree = fresh(text, tentative, nodes=nodes, depth=depth, min_match=min_match, cost=cost)
    assert tree.is_deterministic
    assert tree.tokens_BN[0, 0] == text[-1]
    assert tree.nodes <= nodes + 1
    said, firm = paths(tree), text[: len(text) - tentative]
    assert len({tuple(path) for path in said}) == len(said), "siblings are different tokens"
    assert all(len(path) <= depth for path in said)
    for path in said:
        before = text + path[:-1]
        assert any(occurs(firm, [*before[-k:], path[-1]]) for k in range(min_match, len(before) + 1))


@relaxed
@given(TOKENS)
def test_the_first_child_is_what_followed_the_newest_occurrence_of_the_longest_match(text: list[int]) -> None:
    said = paths(fresh(text, cost=1e-6))
    ends = [text[-k:] for k in range(len(text) - 1, 0, -1)]
    found = next((end for end in ends if occurs(text[:-1], end)), None)
    assert (found is None) == (not said)
    if found is not None:
        k = len(found)
        newest = max(start for start in range(len(text) - k) if text[start : start + k] == found)
        assert next(path for path in said if len(path) == 1) == [text[newest + k]]


# ---- budgets, rows and slots


@relaxed
@given(st.integers(0, 20), st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_budget_and_depths_hold_per_row(budget: int, depths: list[int]) -> None:
    drafter, rows = lookup(), [row_of([1, 2, 3, 4] * 5) for _ in depths]
    for row in rows:
        drafter.admit(row, {})
    tree = propose(drafter, rows, budget, depths)
    assert max(tree.sizes) <= min(budget, drafter.max_nodes) + 1
    for index, depth in enumerate(depths):
        assert max(map(len, paths(tree, index)), default=0) <= depth
        if budget and depth:
            assert tree.sizes[index] > 1


TEXTS = ([1, 2, 3, 4] * 4, [5, 6, 7, 5, 6], [9, 8, 7, 6], [1, 2, 1, 3, 1, 2, 1])


def test_rows_do_not_know_each_other() -> None:
    drafter, rows = lookup(), [row_of(text) for text in TEXTS]
    for row in rows:
        drafter.admit(row, {})
    together = propose(drafter, rows)
    for index, text in enumerate(TEXTS):
        assert paths(together, index) == paths(fresh(text))


@pytest.mark.parametrize("slot", range(len(TEXTS)))
def test_a_released_slot_takes_the_last_row(slot: int) -> None:
    drafter, rows = lookup(), [row_of(text) for text in TEXTS]
    for row in rows:
        drafter.admit(row, {})
    drafter.release(slot)
    last = rows.pop()
    if slot < len(rows):
        rows[slot] = last
    tree = propose(drafter, rows)
    assert [paths(tree, index) for index in range(len(rows))] == [paths(fresh(row.tokens)) for row in rows]


def test_a_row_grows_as_if_it_had_been_read_at_once() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2]
    drafter, row = lookup(), row_of(text[:4])
    drafter.admit(row, {})
    for token in text[4:]:
        propose(drafter, [row])
        row.tokens.append(token)
    assert paths(propose(drafter, [row])) == paths(fresh(text))


# ---- tokens that may be taken back


def test_tentative_tokens_are_followed_but_not_learned() -> None:
    drafter, row = lookup(), row_of([1, 2, 3, 4, 5])
    drafter.admit(row, {})
    row.tokens += [2, 3]
    row.tentative = 2
    assert paths(propose(drafter, [row]))[0] == [4]
    row.tokens[5:] = [6, 7, 6]
    row.tentative = 3
    drafter.retract([5])
    assert propose(drafter, [row]).sizes == (1,), "6 7 is not firm, so it is no place to copy from"
    assert len(drafter._views[0].automaton) == 5


def test_tokens_that_become_firm_are_learned() -> None:
    drafter, row = lookup(), row_of([1, 6, 7, 6], tentative=3)
    drafter.admit(row, {})
    assert propose(drafter, [row]).sizes == (1,)
    row.tentative = 0
    assert paths(propose(drafter, [row]))[0] == [7]


@pytest.mark.parametrize("told", [True, False])
def test_a_text_that_shrinks_after_all_is_read_again(told: bool) -> None:
    drafter, row = lookup(), row_of([1, 2, 3, 1, 9, 3, 1])
    drafter.admit(row, {})
    del row.tokens[3:]
    if told:
        drafter.retract([3])
    row.tokens += [1]
    assert paths(propose(drafter, [row])) == paths(fresh([1, 2, 3, 1]))


# ---- how much is proposed


def test_the_prior_grows_with_the_match_and_the_run_and_falls_where_tokens_differ() -> None:
    assert prior(0, 8, 1, False) > prior(0, 1, 1, False)
    assert prior(0, 1, 8, False) > prior(0, 1, 1, False)
    assert prior(0, 8, 1, True) < prior(0, 8, 1, False)
    assert all(prior(rank + 1, 4, 1, False) < prior(rank, 4, 1, False) for rank in range(RANKS - 1))


def test_the_odds_follow_what_happens() -> None:
    odds, outlook = Odds(), Outlook(newest=7, run=1, branches=False)
    before = odds.survival(4, outlook, 0)
    for _ in range(30):
        odds.learn(4, outlook, 8)
    worse, elsewhere = odds.survival(4, outlook, 0), odds.survival(64, outlook, 0)
    for _ in range(60):
        odds.learn(4, outlook, 7)
    assert worse < 0.5 * before < before < odds.survival(4, outlook, 0)
    assert worse < elsewhere, "matches of another length are trusted longer"


def decode(text: Sequence[int], start: int, drafter: Lookup) -> list[tuple[int, int]]:
    """(nodes proposed, tokens accepted) per step, for a target that says `text`."""
    row, steps = row_of(text[:start]), []
    drafter.admit(row, {})
    while len(row.tokens) < len(text):
        tree, ahead = propose(drafter, [row]), list(text[len(row.tokens) :])
        accepted = max([len(path) for path in paths(tree) if path == ahead[: len(path)]], default=0)
        row.tokens += ahead[: accepted + 1]
        steps.append((tree.sizes[0] - 1, accepted))
    return steps


@pytest.mark.parametrize("kinds", [50, 1000, 100_000])
def test_on_random_text_it_falls_silent(kinds: int) -> None:
    """0.3 nodes per step at 0.035 of a plain step each are 1 % of it."""
    luck = random.Random(kinds)
    steps = decode([luck.randrange(kinds) for _ in range(900)], 100, lookup())
    nodes = [nodes for nodes, _ in steps]
    assert sum(nodes) <= 0.3 * len(nodes)
    assert sum(nodes[-300:]) <= 0.3 * 300


def test_it_wakes_up_when_the_text_begins_to_repeat_itself() -> None:
    luck = random.Random(1)
    noise = [luck.randrange(50) for _ in range(600)]
    verse = [luck.randrange(50) for _ in range(40)]
    quiet = len(decode(noise, 100, lookup()))
    steps = decode([*noise, *verse * 6], 100, lookup())
    assert len(steps) - quiet <= 40 + 40, "after the second verse, 160 tokens take few steps"
    assert sum(accepted for _, accepted in steps[-5:]) >= 5 * 8


def test_a_higher_cost_proposes_less() -> None:
    luck = random.Random(2)
    text = [luck.randrange(4) for _ in range(300)]
    drafted = [sum(nodes for nodes, _ in decode(text, 100, lookup(cost=cost))) for cost in (0.02, 0.1, 0.3)]
    assert drafted == sorted(drafted, reverse=True)
    assert drafted[0] > drafted[-1]


# ---- in the engine


@pytest.mark.parametrize("drafter", ["lookup", {"drafter": "verified", "checkpoint": "near", "inner": "lookup"}])
def test_greedy_text_is_that_of_plain_decoding(drafter: object) -> None:
    target = TableNetwork(vocab_size=5, seed=3, order=2)
    prompts = [[1, 2, 3, 1, 2], [4], [0, 0, 0, 0]]
    engine = engine_of(target, drafter, {"near": Near(target, 0.3)})
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=120))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == plain(target, prompt, 120)
        assert output.stats.tokens_per_step > 1.5


def test_sampled_text_is_that_of_plain_decoding_with_the_same_seed() -> None:
    params = SamplingParams(temperature=1.0, max_new_tokens=80, seed=5)
    texts = [
        engine_of(TableNetwork(vocab_size=4, seed=1), drafter).generate([[1, 2, 1, 2]], params)[0].token_ids
        for drafter in ("none", "lookup")
    ]
    assert texts[0] == texts[1]


# ---- settings


def workshop() -> Workshop:
    return Workshop(Model(TableNetwork(), 1), {}.__getitem__)


def test_it_is_built_by_name() -> None:
    drafter = build({"drafter": "lookup", "nodes": 8, "depth": 4, "min_match": 2, "cost": 0.1}, workshop())
    assert isinstance(drafter, Lookup)
    assert (drafter.max_nodes, drafter.limits) == (8, Limits(8, 4, 2, 0.1))
    assert build("lookup", workshop()).max_nodes == 16


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("nodes", 0),
        ("nodes", 2.5),
        ("depth", -1),
        ("depth", True),
        ("min_match", "2"),
        ("cost", 0),
        ("cost", 1),
        ("cost", "x"),
    ],
)
def test_a_wrong_setting_is_named(setting: str, value: object) -> None:
    with pytest.raises(DrafterError, match=rf"^lookup: {setting} is .*, not {value!r}$"):
        build({"drafter": "lookup", setting: value}, workshop())
