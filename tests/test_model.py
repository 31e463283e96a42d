"""A model says what its network says of the text itself, whatever its cache holds when it is asked.

The table network hashes the whole prefix, so that one entry too many, too few or in the wrong place
is another law (or NaN).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import forerun.model
from fakes import TableNetwork
from forerun.model import CHUNK, SHORT, Model
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.tree import TokenTree, Topology

CPU = torch.device("cpu")
VOCAB = 5


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts need not be long to have several chunks."""
    monkeypatch.setattr(forerun.model, "CHUNK", 6)


def network(**options: int) -> TableNetwork:
    return TableNetwork(VOCAB, **{"seed": 1, "order": 1000, **options})


def row_of(tokens: list[int], limit: int = 200) -> Row:
    return Row(list(tokens), len(tokens), SamplingParams(), key=0, limit=limit)


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def model_of(rows: list[Row], table: TableNetwork, scratch: int = 16) -> Model:
    model = Model(table, scratch)
    for row in rows:
        model.admit(row.limit)
    return model


def expected(table: TableNetwork, rows: list[Row], tree: TokenTree) -> list[Tensor]:
    """The logits of every node, from its own text."""
    found = []
    for index, row in enumerate(rows):
        tokens = tree.tokens_BN[index].tolist()
        paths = [tree.topology.path(index, node)[1:] for node in range(tree.sizes[index])]
        found.append(torch.stack([table.logits(row.tokens + [tokens[node] for node in path]) for path in paths]))
    return found


def assert_scores(model: Model, table: TableNetwork, rows: list[Row], tree: TokenTree) -> None:
    scores = model.score(tree, rows).logits_BNV
    assert scores.shape == (len(rows), tree.nodes, VOCAB)
    for index, right in enumerate(expected(table, rows, tree)):
        assert (scores[index, : len(right)] == right).all(), index


def tree_for(rows: list[Row], parents: list[list[int]], seed: int = 0) -> TokenTree:
    tokens = [
        [row.tokens[-1], *text(seed + index, len(some) - 1)]
        for index, (row, some) in enumerate(zip(rows, parents, strict=True))
    ]
    return TokenTree.of(tokens, parents, CPU)


@st.composite
def parent_lists(draw: st.DrawFn) -> list[int]:
    size = draw(st.integers(1, 6))
    return [-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))]


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(lengths, st.data())
def test_scores_are_those_of_every_nodes_own_text_after_any_lag(sizes: list[int], data: st.DataObject) -> None:
    """Nothing was read before, or anything up to the newest token: rows of different lengths and lags side by side."""
    table = network()
    rows = [row_of(text(index, size)) for index, size in enumerate(sizes)]
    model = model_of(rows, table)
    for slot, row in enumerate(rows):
        for _ in range(data.draw(st.integers(0, 6))):
            model.prefill(row, slot)
    parents = [data.draw(parent_lists()) for _ in rows]
    assert_scores(model, table, rows, tree_for(rows, parents))


@settings(max_examples=30, deadline=None)
@given(lengths, st.data())
def test_what_comes_next_is_known_after_any_lag(sizes: list[int], data: st.DataObject) -> None:
    table = network()
    rows = [row_of(text(index, size)) for index, size in enumerate(sizes)]
    model = model_of(rows, table)
    for slot, row in enumerate(rows):
        for _ in range(data.draw(st.integers(0, 6))):
            model.prefill(row, slot)
    for _ in range(2):  # the second time everything is read already
        found = model.next_scores(rows).logits_BNV[:, 0]
        assert (found == torch.stack([table.logits(row.tokens) for row in rows])).all()
    assert model.cache.lengths == sizes


@settings(max_examples=30, deadline=None)
@given(lengths, st.data())
def test_rows_that_nobody_asks_for_are_not_read(sizes: list[int], data: st.DataObject) -> None:
    """Until somebody does."""
    table = network()
    rows = [row_of(text(index, size)) for index, size in enumerate(sizes)]
    model = model_of(rows, table)
    for _ in range(3):
        before = list(model.cache.lengths)
        asked = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)).filter(any))
        found = model.next_scores(rows, asked=asked).logits_BNV[:, 0]
        for row, one, logits in zip(rows, asked, found, strict=True):
            assert not one or (logits == table.logits(row.tokens)).all()
        for row, one, had, has in zip(rows, asked, before, model.cache.lengths, strict=True):
            assert has == (len(row.tokens) if one else min(had, len(row.tokens) - 1))
        for index, row in enumerate(rows):
            row.tokens += text(index, data.draw(st.integers(1, SHORT + 2)))


def test_prefill_reads_chunk_by_chunk_and_leaves_the_newest_token() -> None:
    row = row_of(text(0, 15))
    table = network()
    model = model_of([row], table)
    seen = []
    while (states := model.prefill(row, 0, [1])) is not None:
        seen.append(states[1])
    assert [part.shape[1] for part in seen] == [6, 6, 2] and model.cache.lengths == [14]
    found = torch.cat(seen, 1)[0]
    assert (found == torch.stack([table.logits(row.tokens[: end + 1]) for end in range(14)])).all()
    assert_scores(model, table, [row], tree_for([row], [[-1]]))


@pytest.mark.parametrize("chunk", [CHUNK])
def test_a_prompt_of_more_than_a_whole_chunk_is_read(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forerun.model, "CHUNK", chunk)
    table = network(order=8)
    rows = [row_of(text(0, 2 * chunk + 3), 2000), row_of(text(1, 5), 2000)]
    model = model_of(rows, table)
    assert_scores(model, table, rows, tree_for(rows, [[-1, 0, 0], [-1]]))
    again = model_of(rows, table)
    assert (again.next_scores(rows).logits_BNV[:, 0] == torch.stack([table.logits(row.tokens) for row in rows])).all()


def test_a_few_missing_tokens_are_read_in_one_forward_for_all_rows() -> None:
    rows = [row_of(text(index, 20 + index)) for index in range(4)]
    table = network()
    model = model_of(rows, table)
    model.next_scores(rows).logits_BNV[:, 0]
    for index, row in enumerate(rows):
        row.tokens += text(index, min(index + 1, SHORT))
    table.forwards = 0
    model.next_scores(rows).logits_BNV[:, 0]
    assert table.forwards == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data())
def test_any_path_of_a_tree_may_be_kept(sizes: list[int], data: st.DataObject) -> None:
    table = network()
    rows = [row_of(text(index, size)) for index, size in enumerate(sizes)]
    model = model_of(rows, table)
    for step in range(3):
        tree = tree_for(rows, [data.draw(parent_lists()) for _ in rows], step)
        assert_scores(model, table, rows, tree)
        ends = [data.draw(st.integers(0, size - 1)) for size in tree.sizes]
        paths = [tree.topology.path(index, end) for index, end in enumerate(ends)]
        model.keep(paths)
        for index, (row, path) in enumerate(zip(rows, paths, strict=True)):
            row.tokens += tree.tokens_BN[index, path[1:]].tolist()
        assert model.cache.lengths == [len(row.tokens) for row in rows]
        for index, row in enumerate(rows):
            row.tokens += text(100 + step + index, 1)


def grow(model: Model, tree: TokenTree, levels: list[list[list[int]]]) -> dict[tuple[int, int], Tensor]:
    """Read the nodes of each level (per row), as drafters with trees do. Returns the logits by (row, node)."""
    places: dict[tuple[int, int], int] = {}
    found, held = {}, 0
    for level in levels:
        width = max(map(len, level))
        tokens = torch.zeros(tree.rows, width, dtype=torch.int64)
        depths = np.ones((tree.rows, width), dtype=np.int64)
        paths = np.full((tree.rows, width, held + width), -1, dtype=np.int32)
        paths[..., 0] = held + np.arange(width)
        for row, nodes in enumerate(level):
            for offset, node in enumerate(nodes):
                tokens[row, offset] = tree.tokens_BN[row, node]
                depths[row, offset] = tree.topology.depths_BN[row, node]
                places[row, node] = held + offset
                path = [places[row, other] for other in tree.topology.path(row, node)[1:]]
                paths[row, offset, : len(path)] = path
        logits = model.grow(tokens, depths, paths).logits_BNV
        found |= {(row, node): logits[row, i] for row, nodes in enumerate(level) for i, node in enumerate(nodes)}
        held += width
    return found


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.data())
def test_growing_level_by_level_is_scoring_the_whole_tree(sizes: list[int], data: st.DataObject) -> None:
    table = network()
    rows = [row_of(text(index, size)) for index, size in enumerate(sizes)]
    tree = tree_for(rows, [data.draw(parent_lists()) for _ in rows])
    depths = tree.topology.depths_BN
    levels = [
        [[node for node in range(1, tree.sizes[row]) if depths[row, node] == depth] for row in range(tree.rows)]
        for depth in range(1, int(depths.max()) + 1)
    ]
    model = model_of(rows, table, scratch=64)
    model.next_scores(rows).logits_BNV[:, 0]
    found = grow(model, tree, levels)
    for row, right in enumerate(expected(table, rows, tree)):
        for node in range(1, tree.sizes[row]):
            assert (found[row, node] == right[node]).all(), (row, node)


def test_a_chain_grows_token_by_token_without_a_mask_and_is_kept_in_part() -> None:
    table = network()
    rows = [row_of(text(0, 7)), row_of(text(1, 3))]
    model = model_of(rows, table)
    model.next_scores(rows).logits_BNV[:, 0]
    drawn = [text(5, 3), text(6, 3)]
    for depth in range(1, 4):
        tokens = torch.tensor([[chain[depth - 1]] for chain in drawn])
        logits = model.grow(tokens, np.full((2, 1), depth)).logits_BNV[:, 0]
        right = [table.logits(row.tokens + chain[:depth]) for row, chain in zip(rows, drawn, strict=True)]
        assert (logits == torch.stack(right)).all()
    model.keep([[0, 1, 2, 3], []])  # the place 3 was never read: it is left out
    assert model.cache.lengths == [10, 3]
    rows[0].tokens += drawn[0]
    assert (model.next_scores(rows).logits_BNV[:, 0] == torch.stack([table.logits(row.tokens) for row in rows])).all()


def test_a_prompt_is_read_rightly_after_a_forward_that_nobody_judged() -> None:
    """Ctrl-C, or a processor that raises, between the forward and the verdict: the nodes are still in scratch."""
    table = network()
    rows = [row_of(text(0, 9)), row_of(text(1, 9))]
    model = model_of(rows, table)
    model.score(tree_for(rows[:1], [[-1, 0, 1]]), rows[:1])
    model.prefill(rows[1], 1)
    assert_scores(model, table, rows, tree_for(rows, [[-1], [-1, 0]]))


# ---- a few missing tokens are read together with the tree


def said_of(table: TableNetwork, tokens: list[int], start: int, end: int) -> Tensor:
    """The states of tokens `start .. end - 1`: a table's state is its logits."""
    return torch.stack([table.logits(tokens[: place + 1]) for place in range(start, end)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=4), st.data())
def test_tokens_that_a_level_above_has_placed_are_read_with_the_tree(
    sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Rows that miss nothing beside rows that miss a few, and rows that miss so many that they are
    read before. Logits, the best tokens, and the states of nodes and of the missing tokens are
    those of the text; what is kept is what the tree said."""
    table = network()
    rows = [row_of(text(index, size)) for index, (size, _) in enumerate(sizes)]
    model = model_of(rows, table)
    model.next_scores(rows)
    for index, (row, (size, missing)) in enumerate(zip(rows, sizes, strict=True)):
        row.tokens += text(50 + index, missing)
        model.truncate(index, data.draw(st.integers(max(0, size - 3), size)))
    for step in range(3):
        lags = [len(row.tokens) - length for row, length in zip(rows, model.cache.lengths, strict=True)]
        firsts = [min(length, len(row.tokens) - 1) for row, length in zip(rows, model.cache.lengths, strict=True)]
        tree = tree_for(rows, [data.draw(parent_lists()) for _ in rows], step)
        passes = model.passes
        scores = model.score(tree, rows, [1])
        far = [lag for lag in lags if lag > SHORT]
        assert model.passes - passes == 1 + sum(-(-(lag - 1) // 6) for lag in far), "a chunk is six tokens here"
        for index, right in enumerate(expected(table, rows, tree)):
            size = tree.sizes[index]
            assert (scores.logits_BNV[index, :size] == right).all()
            assert (scores.best[index, :size] == right.argmax(-1)).all()
            assert (scores.hidden[1][index, :size] == right).all()
        if any(lag > 1 for lag in lags):
            for row, first, states in zip(rows, firsts, scores.before[1], strict=True):
                assert len(states) == len(row.tokens) - 1 - first
                assert not len(states) or (states == said_of(table, row.tokens, first, len(row.tokens) - 1)).all()
        else:
            assert not scores.before
        ends = [data.draw(st.integers(0, size - 1)) for size in tree.sizes]
        paths = [tree.topology.path(index, end) for index, end in enumerate(ends)]
        model.keep(paths)
        for index, (row, path) in enumerate(zip(rows, paths, strict=True)):
            row.tokens += tree.tokens_BN[index, path[1:]].tolist()
            held = model.cache.entries(index)[0, 0, :, 0, 0].long().tolist()
            assert held == row.tokens, "the missing tokens and the path, and nothing else"
            row.tokens += text(100 + step + index, data.draw(st.integers(1, 10)))


@pytest.mark.parametrize("missing", range(SHORT))
def test_as_many_as_seven_missing_tokens_cost_no_forward(missing: int) -> None:
    table = network()
    rows = [row_of(text(0, 20)), row_of(text(1, 9))]
    model = model_of(rows, table)
    model.next_scores(rows)
    rows[0].tokens += text(7, missing + 1)
    rows[1].tokens += text(8, 1)
    table.forwards, passes = 0, model.passes
    scores = model.score(tree_for(rows, [[-1, 0, 0], [-1, 0]]), rows, [1])
    assert table.forwards == model.passes - passes == 1
    assert [len(states) for states in scores.before.get(1, [])] == ([missing, 0] if missing else [])
    model.keep([[0], [0, 1]])
    assert model.cache.lengths == [20 + missing + 1, 11] and not model._leads


def test_one_more_costs_one() -> None:
    table = network()
    row = row_of(text(0, 20))
    model = model_of([row], table)
    model.next_scores([row])
    row.tokens += text(7, SHORT)
    row.tokens += [1]
    table.forwards = 0
    assert_scores(model, table, [row], tree_for([row], [[-1, 0, 0]]))
    assert table.forwards == 3, "eight tokens are two chunks here, and then the tree"


@pytest.mark.parametrize("then", ["truncate", "prefill", "next_scores"])
def test_a_forward_that_nobody_judged_leaves_no_lead_behind(then: str) -> None:
    table = network()
    row = row_of(text(0, 9))
    model = model_of([row], table)
    model.next_scores([row])
    model.truncate(0, 6)
    model.score(tree_for([row], [[-1, 0, 1]]), [row])
    assert model._leads == [2]
    {
        "truncate": lambda: model.truncate(0, 7),
        "prefill": lambda: model.prefill(row, 0),
        "next_scores": lambda: model.next_scores([row]),
    }[then]()
    assert not model._leads
    tree = tree_for([row], [[-1, 0, 0]], 3)
    assert_scores(model, table, [row], tree)
    model.keep([[0, 2]])
    held = model.cache.entries(0)[0, 0, :, 0, 0].long().tolist()
    assert held == [*row.tokens, tree.tokens[0][2]]


@pytest.mark.parametrize("parents", [[[-1]], [[-1, 0, 1], [-1, 0, 0, 1]]], ids=str)
def test_a_topology_behind_chains_is_the_chains_with_the_trees_at_their_ends(parents: list[list[int]]) -> None:
    leads = [2, 0][: len(parents)]
    behind = Topology.of(parents).behind(leads)
    for row, (lead, own) in enumerate(zip(leads, parents, strict=True)):
        assert behind.parents[row][: lead + 1] == tuple(range(-1, lead))
        for node in range(len(own)):
            path = Topology.of(parents).path(row, node)
            assert behind.path(row, lead + node) == [*range(lead), *(lead + other for other in path)]


class ModelMachine(RuleBasedStateMachine):
    """Rows come, go, grow, are scored, kept, cut back and taken back; the answers are always those of the text."""

    @initialize()
    def begin(self) -> None:
        forerun.model.CHUNK = 6
        self.table, self.rows, self.count = network(order=12), [], 0
        self.model = Model(self.table, 8)

    def teardown(self) -> None:
        forerun.model.CHUNK = CHUNK

    @precondition(lambda self: len(self.rows) < 4)
    @rule(length=st.integers(1, 20), limit=st.integers(40, 60))
    def admit(self, length: int, limit: int) -> None:
        self.count += 1
        self.rows.append(row_of(text(self.count, length), limit))
        assert self.model.admit(limit) == len(self.rows) - 1

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.integers(0, len(self.rows) - 1))
        self.model.release(slot)
        last = self.rows.pop()
        if slot < len(self.rows):
            self.rows[slot] = last

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def prefill(self, data: st.DataObject) -> None:
        slot = data.draw(st.integers(0, len(self.rows) - 1))
        self.model.prefill(self.rows[slot], slot)

    @precondition(lambda self: self.rows and all(len(row.tokens) + 8 < row.limit for row in self.rows))
    @rule(data=st.data(), interrupted=st.booleans())
    def score_and_keep(self, data: st.DataObject, interrupted: bool) -> None:
        self.count += 1
        tree = tree_for(self.rows, [data.draw(parent_lists()) for _ in self.rows], self.count)
        assert_scores(self.model, self.table, self.rows, tree)
        if interrupted:
            return  # Ctrl-C between the forward and the verdict
        paths = [tree.topology.path(row, data.draw(st.integers(0, size - 1))) for row, size in enumerate(tree.sizes)]
        self.model.keep(paths)
        for index, (row, path) in enumerate(zip(self.rows, paths, strict=True)):
            row.tokens += [*tree.tokens_BN[index, path[1:]].tolist(), data.draw(st.integers(0, VOCAB - 1))]

    @precondition(lambda self: self.rows)
    @rule()
    def ask_what_comes_next(self) -> None:
        found = self.model.next_scores(self.rows).logits_BNV[:, 0]
        assert (found == torch.stack([self.table.logits(row.tokens) for row in self.rows])).all()

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        """A verified drafter's own progress is undone, and the text goes on otherwise."""
        slot = data.draw(st.integers(0, len(self.rows) - 1))
        row = self.rows[slot]
        length = data.draw(st.integers(1, len(row.tokens)))
        self.model.truncate(slot, length)
        self.count += 1
        row.tokens = row.tokens[:length] + text(self.count, data.draw(st.integers(0, 2)))

    @invariant()
    def it_holds_no_more_than_the_text(self) -> None:
        if hasattr(self, "model"):
            assert self.model.cache.rows == len(self.rows)


ModelMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)
TestModelAgainstText = ModelMachine.TestCase
