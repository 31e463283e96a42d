"""Hierarchy Drafting: stores in their order, one merged tree, silence where nothing helps, and never another text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from enumeration import Luck, distance, ideal_dice, law_of, plain_law
from fakes import Near, TableNetwork, engine_of, plain
from forerun.accept.exact import Verdict
from forerun.chance import key_of
from forerun.drafters.hierarchy import GRACE, LONGEST_PAUSE, Hierarchy, Patience, merge
from forerun.drafting.drafter import Context
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.errors import ForerunError
from forerun.model import Model, Scores
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.stores import index
from forerun.stores.store import Draft, Limits, Store, View
from forerun.tree import TokenTree

CPU = torch.device("cpu")
LIMITS = Limits(nodes=4, depth=4, min_match=1, cost=0.05)
TARGET = TableNetwork(vocab_size=5, seed=3, order=2)
PROMPTS = [[1, 2, 3, 1, 2], [4], [0, 0, 0, 0], [2, 3]]


class Said(Store, View):
    """A store that always has the same answer, and counts."""

    def __init__(self, *paths: Sequence[int], survival: float = 0.5):
        self.name, self.paths, self.survival = f"says {paths}", paths, survival
        self.asked, self.right, self.closed = 0, 0, 0

    def open(self, row: Row) -> View:
        return self

    def close(self, row: Row, view: View) -> None:
        self.closed += 1

    def draft(self, tokens: Sequence[int], firm: int, limits: Limits) -> Draft:
        self.asked += 1
        return trie(tokens[-1], self.paths, self.survival)

    def forget(self, length: int) -> None: ...

    def accepted(self, count: int) -> None:
        self.right += count


def trie(root: int, paths: Sequence[Sequence[int]], survival: float = 0.5) -> Draft:
    """Siblings share what is left, in order; a child has `survival` of it."""
    draft, places, rest = Draft([root], [-1], [1.0]), {(): 0}, [1.0]
    for path in paths:
        for depth in range(1, len(path) + 1):
            if tuple(path[:depth]) not in places:
                parent = places[tuple(path[: depth - 1])]
                places[tuple(path[:depth])] = len(draft.tokens)
                share = rest[parent] * survival
                draft.tokens.append(path[depth - 1])
                draft.parents.append(parent)
                draft.survival.append(share)
                rest[parent] -= share
                rest.append(share)
    return draft


def row_of(tokens: Sequence[int], **wishes: Any) -> Row:
    return Row(list(tokens), len(tokens), SamplingParams(**wishes), key=0, limit=10_000)


def propose(
    drafter: Hierarchy, rows: Sequence[Row], budget: int = 64, depths: Sequence[int] | None = None
) -> TokenTree:
    return drafter.propose(Context(rows, [budget] * len(rows), depths or [64] * len(rows), CPU))


def tell(drafter: Hierarchy, rows: Sequence[Row], tree: TokenTree, kept: list[list[int]]) -> None:
    context = Context(rows, [64] * len(rows), [64] * len(rows), CPU)
    drafter.observe(context, tree, Verdict(kept, [0] * len(rows), [False] * len(rows)), Scores(torch.zeros(1, 1, 1)))


def paths_of(tree: TokenTree, row: int = 0) -> list[list[int]]:
    return [[tree.tokens[row][n] for n in tree.topology.path(row, node)[1:]] for node in range(1, tree.sizes[row])]


def asked(*stores: Store, limits: Limits = LIMITS) -> tuple[Hierarchy, Row, TokenTree]:
    drafter, row = Hierarchy(stores, limits), row_of([7, 8])
    drafter.admit(row, {})
    return drafter, row, propose(drafter, [row])


# ---- the order of stores


def test_stores_behind_one_that_fills_the_budget_are_not_asked() -> None:
    first, second = Said([1, 2, 3, 4], survival=0.9), Said([9])
    _, _, tree = asked(first, second)
    assert paths_of(tree) == [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert (first.asked, second.asked) == (1, 0)


def test_a_later_store_fills_what_is_left_and_no_more() -> None:
    first, second, third = Said([1, 2]), Said([3, 4, 5, 6], survival=0.9), Said([8])
    _, _, tree = asked(first, second, third)
    assert paths_of(tree) == [[1], [1, 2], [3], [3, 4]]
    assert third.asked == 0


def test_what_several_stores_say_stands_in_the_tree_once() -> None:
    drafter, _, tree = asked(Said([1, 2]), Said([1, 3], [1, 2, 4]))
    assert paths_of(tree) == [[1], [1, 2], [1, 3], [1, 2, 4]]
    assert [tally.drafted for tally in drafter.tallies()] == [2, 2]


def test_a_newcomer_gets_what_its_siblings_left_and_must_be_worth_it() -> None:
    merged = trie(0, [[1]], 0.97)
    assert merge(merged, trie(0, [[2, 3]], 0.9), LIMITS) == 0, "0.03 is less than a node costs"
    merged = trie(0, [[1]], 0.6)
    assert merge(merged, trie(0, [[2, 3]], 0.9), LIMITS) == 2
    assert merged.survival[1:] == pytest.approx([0.6, 0.4, 0.4])


PATHS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=0, max_size=5)


@settings(deadline=None)
@given(PATHS, PATHS, PATHS, st.integers(1, 8), st.sampled_from([0.01, 0.2]))
def test_merged_trees_are_valid(a: Any, b: Any, c: Any, nodes: int, cost: float) -> None:
    merged, limits = trie(5, a), Limits(nodes, 9, 1, cost)
    before = len(merged.tokens)
    added = merge(merged, trie(5, b, 0.8), limits) + merge(merged, trie(5, c, 0.3), limits)
    assert len(merged.tokens) == before + added <= max(before, nodes + 1)
    assert len({*zip(merged.parents, merged.tokens, strict=True)}) == len(merged.tokens), (
        "siblings are different tokens"
    )
    for node, parent in enumerate(merged.parents[1:], 1):
        assert parent < node and merged.survival[node] <= merged.survival[parent] + 1e-12
        family = [s for s, p in zip(merged.survival, merged.parents, strict=True) if p == parent]
        assert sum(family) <= merged.survival[parent] + 1e-9
    known = {tuple(path[:n]) for path in [*a, *b, *c] for n in range(1, len(path) + 1)}
    assert {*map(tuple, paths_of(TokenTree.of([merged.tokens], [merged.parents], CPU)))} <= known


def test_budget_and_depth_hold_per_row() -> None:
    drafter, rows = Hierarchy([Said([1, 2, 3, 4], [5, 6])], LIMITS), [row_of([7]), row_of([8])]
    for row in rows:
        drafter.admit(row, {})
    assert propose(drafter, rows, depths=[0, 9]).sizes[0] == 1
    assert propose(drafter, rows, budget=0).nodes == 1


# ---- statistics and patience


def test_tallies_say_what_each_store_did() -> None:
    first, second = Said([1, 2]), Said([1, 3])
    drafter, row, tree = asked(first, second)
    tell(drafter, [row], tree, [[0, 1, 3]])
    one, two = drafter.tallies()
    assert (one.asked, one.hits, one.drafted, one.accepted) == (1, 1, 2, [1])
    assert (two.asked, two.hits, two.drafted, two.accepted) == (1, 1, 1, [0, 1])
    assert (first.right, second.right) == (1, 1)
    assert one.seconds > 0 and "accepted" in one.as_dict()


def test_every_node_names_the_store_that_said_it_first() -> None:
    first, second = Said([1, 2]), Said([1, 3])
    drafter, _, tree = asked(first, second)
    assert paths_of(tree) == [[1], [1, 2], [1, 3]]
    assert drafter.origins(0, [0, 1, 3]) == [first.name, second.name]
    assert drafter.origins(0, [0, 1, 2]) == [first.name] * 2 and drafter.origins(0, [0]) == []


def test_a_store_without_answers_is_asked_ever_less_often() -> None:
    first, silent = Said(), Said()
    drafter, row, _ = asked(first, silent)
    for _ in range(GRACE):
        propose(drafter, [row])
    assert silent.asked == 1 + GRACE, "it is given some time"
    for _ in range(400):
        propose(drafter, [row])
    assert silent.asked <= GRACE + 8 + 400 / (LONGEST_PAUSE + 1)
    assert first.asked == 401 + GRACE, "but the most local one is always asked"


def test_a_store_that_is_wrong_is_still_asked() -> None:
    """How often it is wrong is the business of its own estimates."""
    wrong = Said([1])
    drafter, row, tree = asked(Said(), wrong)
    for _ in range(50):
        tell(drafter, [row], tree, [[0]])
        tree = propose(drafter, [row])
    assert wrong.asked == 51


def test_patience_ends_with_the_first_answer() -> None:
    patience = Patience()
    for _ in range(GRACE + 9):
        patience.learn(answered=False)
    assert patience.pause == LONGEST_PAUSE and not patience.asks()
    patience.learn(answered=True)
    assert patience.asks() and patience.asks()


def test_rows_keep_their_seats() -> None:
    """A released slot takes the last row; only the store of the row that ended is told."""
    drafter, rows = build({"drafter": "hierarchy", "stores": ["context"]}, workshop()), [row_of(t) for t in TEXTS]
    assert isinstance(drafter, Hierarchy)
    for row in rows:
        drafter.admit(row, {})
    drafter.release(0)
    rows = [rows[2], rows[1]]
    tree = propose(drafter, rows)
    for index_, row in enumerate(rows):
        alone = build({"drafter": "hierarchy", "stores": ["context"]}, workshop())
        assert isinstance(alone, Hierarchy)
        alone.admit(row, {})
        assert paths_of(tree, index_) == paths_of(propose(alone, [row]))
    drafter.release(5)  # was never opened


TEXTS = ([1, 2, 3, 4] * 4, [3, 4, 0, 3, 4], [1, 2, 1, 3, 1, 2, 1])


# ---- in the engine: cold, warm, poisoned


def workshop() -> Workshop:
    return Workshop(Model(TARGET, 1), {"near": Near(TARGET, 0.3)}.__getitem__)


@pytest.fixture
def poison(tmp_path: Path) -> str:
    """A corpus of nonsense in the target's own tokens."""
    luck = random.Random(5)
    texts = [[luck.randrange(5) for _ in range(200)] for _ in range(5)]
    index.write(index.build(texts, 5), tmp_path / "poison.store")
    return str(tmp_path / "poison.store")


def engines_of(description: Any) -> Engine:
    return engine_of(TARGET, description, {"near": Near(TARGET, 0.3)}, max_rows=2)


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a model"])
def test_cold_warm_and_poisoned_stores_change_nothing_that_is_said(inside: bool, poison: str) -> None:
    for stores in (["context", "model"], ["model"], ["model", f"corpus:{poison}", "context"]):
        description: Any = {"drafter": "hierarchy", "stores": stores, "cost": 0.01}
        if inside:
            description = {"drafter": "verified", "checkpoint": "near", "inner": description, "length": 3}
        engine = engines_of(description)
        for _ in range(3):
            outputs = engine.generate(PROMPTS, SamplingParams(max_new_tokens=60))
            for prompt, output in zip(PROMPTS, outputs, strict=True):
                assert output.token_ids == plain(TARGET, prompt, 60)


def test_sampled_text_is_that_of_plain_decoding_with_the_same_seed(poison: str) -> None:
    params = SamplingParams(temperature=1.0, max_new_tokens=80, seed=5)
    wanted = [output.token_ids for output in engines_of("none").generate(PROMPTS, params)]
    engine = engines_of({"drafter": "hierarchy", "stores": ["context", "model", f"corpus:{poison}"], "cost": 0.01})
    for _ in range(2):
        assert [output.token_ids for output in engine.generate(PROMPTS, params)] == wanted


def test_the_tables_of_the_paper_are_stores_too(tmp_path: Path) -> None:
    (tmp_path / "said.jsonl").write_text('{"answer": [1, 2, 3, 4, 0, 1]}\n{"answer": [1, 2, 3, 4, 0, 2]}\n')
    for compat in (False, True):
        stores = ["grams", f"grams:{tmp_path / 'said.jsonl'}"]
        engine = engines_of({"drafter": "hierarchy", "stores": stores, "compat": compat})
        outputs = engine.generate(PROMPTS, SamplingParams(max_new_tokens=60))
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            assert output.token_ids == plain(TARGET, prompt, 60)
        assert [tally.name for tally in engine.drafter.tallies()] == ["grams", "model grams"]
        assert all(tally.hits for tally in engine.drafter.tallies())
        engine.drafter.reset()
        assert not any(tally.asked for tally in engine.drafter.tallies())


def steps(engine: Engine, tenant: str = "") -> int:
    return sum(o.stats.steps for o in engine.generate(PROMPTS, SamplingParams(max_new_tokens=40, tenant=tenant)))


def test_what_was_said_makes_the_next_time_faster_but_only_for_the_same_tenant() -> None:
    engine = engines_of({"drafter": "hierarchy", "stores": ["model"], "cost": 0.08})
    cold, warm = steps(engine, "one"), steps(engine, "one")
    assert warm < 0.5 * cold
    assert steps(engine, "two") == cold
    engine.drafter.reset()
    assert steps(engine, "one") == cold


def test_a_memory_outlives_its_engine(tmp_path: Path) -> None:
    spec = {"drafter": "hierarchy", "stores": [f"model:{tmp_path / 'said.jsonl'}"], "cost": 0.08}
    cold = steps(engines_of(spec))
    assert steps(engines_of(spec)) < 0.5 * cold  # the engine before is gone, and its claim to the file
    warm = engines_of(spec)
    before = (tmp_path / "said.jsonl").read_bytes()
    warm.generate([[3, 1, 4, 1]], SamplingParams(max_new_tokens=9, temperature=1.0, seed=3))
    assert (tmp_path / "said.jsonl").read_bytes() != before
    warm.drafter.reset()
    assert (tmp_path / "said.jsonl").read_bytes() == before, "a measurement leaves no trace"


NAMED = SamplingParams(max_new_tokens=2, temperature=1.0, seed=3)
BELOW_LUCK: dict[str, Any] = {
    "in front of draws": {
        "drafter": "fallback",
        "sources": [
            {"drafter": "hierarchy", "stores": ["model"], "cost": 0.001, "depth": 1, "nodes": 2},
            {"drafter": "small", "checkpoint": "small", "length": 1},
        ],
    },
    "below a model": {
        "drafter": "verified",
        "checkpoint": "small",
        "inner": {"drafter": "hierarchy", "stores": ["model"], "cost": 0.001},
        "length": 1,
    },
}


@pytest.mark.parametrize("name", BELOW_LUCK)
def test_a_request_that_is_repeated_with_its_seed_keeps_its_law_and_its_text(name: str) -> None:
    """The second time the same dice fall, and what the store holds came from them: where it stands
    below something that draws, it must not choose with knowledge of that."""
    target = TableNetwork(3, seed=1, order=1, sharpness=1.0)
    networks = {"small": Near(target, 1.0, 5)}

    def program(_: list[None], lucks: list[Luck]) -> list[tuple[int, ...]]:
        texts = []
        for luck in lucks:
            with ideal_dice({key_of(3, 0): luck}):
                engine = engine_of(target, BELOW_LUCK[name], networks)
                engine.generate([[0]], NAMED)
                texts.append(tuple(engine.generate([[0]], NAMED)[0].token_ids))
        return texts

    law = plain_law(lambda text: target.logits([0, *text]).softmax(-1), 2)
    assert distance(law_of(program), law) < 1e-6
    for seed in range(20):
        engine = engine_of(TARGET, BELOW_LUCK[name], {"small": Near(TARGET, 0.5)})
        params = SamplingParams(max_new_tokens=20, temperature=1.0, seed=seed)
        first, second = (engine.generate([[1, 2, 1]], params)[0].token_ids for _ in range(2))
        assert first == second


def test_without_a_seed_a_memory_below_luck_is_used() -> None:
    engine = engine_of(TARGET, BELOW_LUCK["below a model"], {"small": Near(TARGET, 0.3)})
    for _ in range(2):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=20, temperature=0.5))
    assert engine.drafter.tallies()[1].hits


# ---- descriptions


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"stores": []}, "stores is a list"),
        ({"stores": "context"}, "stores is a list"),
        ({"stores": ["memory"]}, "no store 'memory'"),
        ({"stores": ["corpus"]}, "no store 'corpus'"),
        ({"stores": ["context:x"]}, "no store 'context:x'"),
        ({"stores": ["corpus:/nowhere"]}, "cannot read the store /nowhere"),
        ({"stores": ["context"], "checkpoint": "x"}, "not both"),
        ({"checkpoint": "/nowhere"}, "cannot read the store /nowhere"),
        ({"capacity": 0}, "at least 2"),
        ({"compat": 1}, "compat is true or false"),
        ({"stores": ["grams:/nowhere"]}, "no file or folder /nowhere"),
        ({"nodes": 0}, "nodes is a whole number"),
        ({"cost": 2}, "cost is a probability"),
    ],
)
def test_wrong_settings_get_one_sentence(settings_: dict[str, Any], said: str) -> None:
    with pytest.raises(ForerunError, match=r"^[^\n]+$") as error:
        build({"drafter": "hierarchy", **settings_}, workshop())
    assert said in str(error.value)


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    index.write(index.build([[1, 2, 3]], 5), tmp_path / "other.store", fingerprint="abc")
    spec = f"hierarchy:{tmp_path / 'other.store'}"
    target = Model(TARGET, 1)
    assert build(spec, Workshop(target, {}.__getitem__, tokenizer=lambda: "abc")).name == "hierarchy"
    with pytest.raises(ForerunError, match="another tokenizer"):
        build(spec, Workshop(target, {}.__getitem__, tokenizer=lambda: "def"))
