"""Trees grow as listing all continuations says they must, whoever says what may follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from drafters.heading import every_kernel, lively, on
from enumeration import distance, plain_law
from fakes import Near, TableNetwork, engine_of, plain
from forerun.accept.exact import Verdict
from forerun.drafters.small import DraftModel
from forerun.drafting.drafter import Context
from forerun.drafting.growth import Chain, Expander, Form, Frontier, SampledTree, StaticTree, TopTree
from forerun.drafting.stopping import LAST, Confidence, Drafted, Fixed
from forerun.errors import DrafterError
from forerun.model import Model, Scores
from forerun.nn.feed import Feed, Read
from forerun.ranktree import RankTree
from forerun.row import Row
from forerun.sampling import SamplingParams
from test_engine import engine_law, processed

CPU = torch.device("cpu")
VOCAB = 4
FORMS = ["chain", "best", "drawn"]
EXACT = 1e-6


def table(seed: int = 1, vocab: int = VOCAB) -> TableNetwork:
    return TableNetwork(vocab, seed, order=1000)


def rows_of(sizes: Sequence[int], **wishes: float) -> list[Row]:
    texts = [np.random.default_rng(n).integers(0, VOCAB, size).tolist() for n, size in enumerate(sizes)]
    return [Row(text, len(text), SamplingParams(**wishes), key=n, limit=200) for n, text in enumerate(texts)]


def context_of(rows: Sequence[Row], depths: Sequence[int], budget: int = 99) -> Context:
    return Context(rows, [budget] * len(rows), depths, CPU)


def paths_of(tree: object, row: int) -> list[tuple[int, ...]]:
    """The tokens on the way to every node."""
    tokens, topology = tree.tokens[row], tree.topology
    return [tuple(tokens[n] for n in topology.path(row, node)[1:]) for node in range(topology.sizes[row])]


class Listed(Expander):
    """A table asked about whole texts, without model, cache or scratch."""

    def __init__(self, network: TableNetwork, rows: Sequence[Row]):
        self._network, self._texts = network, [[row.tokens] for row in rows]

    def begin(self) -> Scores:
        return self._scores()

    def expand(self, frontier: Frontier) -> Scores:
        self._texts = [
            [[*texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
            for texts, parents, tokens in zip(
                self._texts, frontier.parents_BW.tolist(), frontier.tokens_BW.tolist(), strict=True
            )
        ]
        return self._scores()

    def _scores(self) -> Scores:
        return Scores(torch.stack([torch.stack([self._network.logits(t) for t in texts]) for texts in self._texts]))


class Levels(Expander):
    """The same may follow every node of a level, as with heads that see the context alone."""

    def __init__(self, laws: Sequence[Tensor], rows: int):
        self._logits = [law.log().expand(rows, 1, -1) for law in laws]

    def begin(self) -> Scores:
        return Scores(self._logits[0])

    def expand(self, frontier: Frontier) -> Scores:
        return Scores(self._logits[frontier.depth])


def best_first(network: TableNetwork, text: Sequence[int], depth: int, form: TopTree) -> dict[tuple[int, ...], float]:
    """The slow version: all children of the best `width` nodes of a level, and of them all the best `nodes`."""
    seen: dict[tuple[int, ...], float] = {}
    level: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(min(depth, form.depth)):
        grown = {}
        for path, score in level.items():
            law = network.logits([*text, *path]).float().log_softmax(-1).tolist()
            ranked = sorted(range(len(law)), key=lambda token: -law[token])[: form.width]
            grown |= {(*path, token): score + law[token] for token in ranked}
        seen |= grown
        level = dict(sorted(grown.items(), key=lambda item: -item[1])[: form.width])
    return dict(sorted(seen.items(), key=lambda item: -item[1])[: form.nodes])


forms = st.builds(TopTree, width=st.integers(1, 3), depth=st.integers(1, 4), nodes=st.integers(1, 9))
shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4)), min_size=1, max_size=3).filter(
    lambda pairs: any(depth for _, depth in pairs)
)


@settings(max_examples=40, deadline=None)
@given(forms, shapes, st.booleans())
def test_the_best_continuations_are_those_of_a_list_of_all(
    form: TopTree, pairs: list[tuple[int, int]], is_model: bool
) -> None:
    rows, depths = rows_of([size for size, _ in pairs]), [depth for _, depth in pairs]
    if is_model:
        drafter = DraftModel.on(table(), form)
        for row in rows:
            drafter.admit(row, {})
        tree = drafter.propose(context_of(rows, depths))
    else:
        tree = form.grow(Listed(table(), rows), context_of(rows, depths), depths).tree
    for index, (row, depth) in enumerate(zip(rows, depths, strict=True)):
        found = paths_of(tree, index)
        assert found[0] == () and set(found[1:]) == set(best_first(table(), row.tokens, depth, form))


ranks = st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5).map(
    lambda some: RankTree(sorted({path[:end] for path in some for end in range(1, len(path) + 1)}, key=len))
)


@settings(max_examples=40, deadline=None)
@given(ranks, shapes, st.integers(1, 12), st.booleans())
def test_a_static_tree_follows_the_ranks_of_every_nodes_own_text(
    tree: RankTree, pairs: list[tuple[int, int]], budget: int, is_model: bool
) -> None:
    rows, depths = rows_of([size for size, _ in pairs]), [depth for _, depth in pairs]
    context = context_of(rows, depths, budget)
    form = StaticTree(tree)
    if is_model:
        drafter = DraftModel.on(table(), form)
        for row in rows:
            drafter.admit(row, {})
        found = drafter.propose(context)
    else:
        found = form.grow(Listed(table(), rows), context, depths).tree
    for index, (row, depth) in enumerate(zip(rows, depths, strict=True)):
        part = tree.within(max(depths), budget)
        right = []
        for path in part.nodes if part else []:
            said: list[int] = []
            for rank in path:
                law = table().logits([*row.tokens, *said]).tolist()
                said.append(sorted(range(VOCAB), key=lambda token: -law[token])[rank])
            right += [tuple(said)] if len(path) <= depth else []
        assert paths_of(found, index) == [(), *right]


def test_forms_grow_over_expanders_that_say_the_same_for_a_whole_level() -> None:
    """Independent heads: the best continuations are those of products of the levels' laws."""
    laws = [torch.tensor(law) for law in ([0.5, 0.3, 0.15, 0.05], [0.6, 0.25, 0.1, 0.05], [0.4, 0.3, 0.2, 0.1])]
    rows, form = rows_of([2, 3]), TopTree(width=4, depth=3, nodes=8)
    tree = form.grow(Levels(laws, 2), context_of(rows, [3, 3]), [3, 3]).tree
    every = {
        path: float(np.prod([law[token] for law, token in zip(laws, path, strict=False)]))
        for depth in (1, 2, 3)
        for path in product(range(VOCAB), repeat=depth)
    }
    best = sorted(every, key=lambda path: -every[path])[:8]
    assert [set(paths_of(tree, row)[1:]) for row in (0, 1)] == [set(best)] * 2
    static = StaticTree(RankTree([[0], [1], [0, 0], [1, 2]]))
    tree = static.grow(Levels(laws, 2), context_of(rows, [3, 3]), [3, 3]).tree
    assert paths_of(tree, 0)[1:] == [(0,), (1,), (0, 0), (1, 2)]
    drawn = SampledTree([2, 2]).grow(Levels(laws, 2), context_of(rows_of([2, 3], temperature=1.0), [3, 1]), [3, 1])
    assert drawn.tree.sizes == (7, 3)


STATIC = StaticTree(RankTree([[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0]]))


def test_text_drafted_by_static_trees_of_a_model_is_the_targets() -> None:
    target = TableNetwork(VOCAB, 3)
    one = engine_of(target, DraftModel.on(Near(target, 0.7), STATIC), max_rows=3)
    prompts = [[1, 2], [3], [0, 1, 2, 3, 1], [2, 2]]
    outputs = one.generate(prompts, SamplingParams(max_new_tokens=40))
    assert [output.token_ids for output in outputs] == [plain(target, prompt, 40) for prompt in prompts]
    assert outputs[0].stats.accepted > 0.5


def test_entries_of_kept_paths_are_not_read_again() -> None:
    """A draft model that is the target: after the first step it never reads more than the newest tokens."""
    target = TableNetwork(VOCAB, 3)
    drafter = DraftModel.on(target, STATIC)
    one = engine_of(target, drafter)
    (output,) = one.generate([[1, 2, 3]], SamplingParams(max_new_tokens=24))
    assert output.stats.accepted == 3 and drafter.model.passes == output.stats.steps * 3


# ---- stopping rules that read


class Linear(nn.Module):
    """Goes on while a linear function of the state before the newest token is positive: a toy of what is trained."""

    looks = False

    def __init__(self, width: int, most: int, seed: int = 0, layer: int = 1):
        super().__init__()
        self.most, self.reads = most, frozenset({layer})
        self.told: list[Drafted] = []
        weight = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def goes_on(self, drafted: Drafted) -> Tensor:
        self.told.append(drafted)
        (state_BD,) = drafted.states.values()
        return (state_BD @ self.weight > 0) & (drafted.depth < self.most)


class Both(Linear):
    looks = True

    def goes_on(self, drafted: Drafted) -> Tensor:
        assert drafted.probs_BJ is not None and drafted.probs_BJ.shape[1] == drafted.depth
        return super().goes_on(drafted) & (drafted.probs_BJ[:, -1] > 0.2)


@pytest.mark.parametrize("make", [Linear, Both])
@pytest.mark.parametrize(("seed", "layer"), [(0, 1), (1, LAST), (2, 1), (3, LAST)])
def test_a_rule_sees_the_states_that_the_newest_tokens_were_drawn_behind(
    make: type[Linear], seed: int, layer: int
) -> None:
    """A table's state is its logits, so the chain's length is known beforehand. No forward is made for the rule."""
    network, rule, rows = table(seed), make(VOCAB, 5, seed, layer), rows_of([3, 1, 6])
    drafter = DraftModel.on(network, Chain(rule))
    for row in rows:
        drafter.admit(row, {})
    depths = [5, 5, 2]
    tree = drafter.propose(context_of(rows, depths))
    for index, (row, most) in enumerate(zip(rows, depths, strict=True)):
        said: list[int] = []
        while len(said) < most:
            law = network.logits([*row.tokens, *said])
            said.append(int(law.argmax()))
            sure = float(law.float().softmax(-1).max()) > 0.2
            if not law @ rule.weight > 0 or (rule.looks and not sure):
                break
        assert list(tree.tokens[index][1:]) == said
    assert drafter.model.passes == max(map(len, tree.tokens)) - 1
    for drafted in rule.told:
        assert drafted.rows is rows and (drafted.probs_BJ is not None) == rule.looks
        for row, tokens, state in zip(rows, tree.tokens, drafted.states[layer], strict=True):
            if len(tokens) >= drafted.depth:
                assert (state == network.logits([*row.tokens, *tokens[1 : drafted.depth]])).all()


def test_a_rule_has_notes_of_one_draft() -> None:
    class Counting(Linear):
        def goes_on(self, drafted: Drafted) -> Tensor:
            seen = drafted.notes["seen"] = drafted.notes.get("seen", torch.zeros(len(drafted.rows))) + 1
            assert seen.tolist() == [drafted.depth] * len(drafted.rows)
            return seen < 3

    drafter, rows = DraftModel.on(table(), Chain(Counting(VOCAB, 9))), rows_of([3, 1])
    for row in rows:
        drafter.admit(row, {})
    assert [drafter.propose(context_of(rows, [5, 5])).sizes for _ in range(2)] == [(4, 4)] * 2


def law_off(form: Form) -> float:
    target = TableNetwork(3, 3, 2, 1.0)
    networks: Mapping[str, TableNetwork] = {"target": target, "small": Near(target, 1.0, 1)}
    wishes = SamplingParams(temperature=1.0, max_new_tokens=3)
    law = engine_law(lambda: DraftModel.on(networks["small"], form), networks, [1, 0], wishes)
    return distance(law, plain_law(processed(wishes, target, [1, 0]), 3))


@pytest.mark.parametrize(
    "form",
    [Chain(Linear(3, 2)), Chain(Both(3, 2, 1)), StaticTree(RankTree([[0], [1], [0, 0]]))],
    ids=["states", "states and probabilities", "static"],
)
def test_the_law_is_the_targets(form: Form) -> None:
    assert law_off(form) < EXACT


def test_rules_that_do_not_read_cost_no_forward_more() -> None:
    """A chain that ends after its first token has read none."""
    network, rows = table(), rows_of([4])
    drafter = DraftModel.on(network, Chain(Confidence(1.0, 5)))
    drafter.admit(rows[0], {})
    assert drafter.propose(context_of(rows, [5])).nodes == 2 and drafter.model.passes == 1


@pytest.mark.parametrize("depths", [[4, 0, 2], [0, 0, 3], [1, 4, 4]])
@pytest.mark.parametrize("form", [Chain(Confidence(0.45, 4)), TopTree(2, 3, 5), SampledTree([2, 1])], ids=FORMS)
def test_a_draft_model_reads_the_nodes_that_get_children_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, form: Form, depths: list[int]
) -> None:
    """Not those of rows that nothing is asked for, nor of chains that have ended; what it says is the same."""
    rows, alone = rows_of([3, 2, 6]), list[list[int]]()
    for row, depth in zip(rows, depths, strict=True):
        one = DraftModel.on(table(), form)
        one.admit(row, {})
        alone.append(list(one.propose(context_of([row], [depth])).tokens[0]))
    network, read = table(), list[list[int]]()
    forward = network.forward

    def watched(feed: Feed, *rest: object) -> Read:
        if len(feed.tokens_BN) == len(rows) and feed.last_B is None:
            read.append([feed.tokens_BN.shape[1]] * len(rows) if feed.counts_B is None else feed.counts_B.tolist())
        return forward(feed, *rest)

    monkeypatch.setattr(network, "forward", watched)
    drafter = DraftModel.on(network, form)
    for row in rows:
        drafter.admit(row, {})
    tree = drafter.propose(context_of(rows, depths))
    assert [list(tokens) for tokens in tree.tokens] == alone
    for row, depth in enumerate(depths):
        nodes = sum(counts[row] for counts in read)
        assert nodes == max(0, len(alone[row]) - 2) if isinstance(form, Chain) else (nodes > 0) == (depth > 1)


@pytest.mark.parametrize("form", [Chain(Fixed(4)), TopTree(3, 4, 9), SampledTree([1, 1, 1, 1])], ids=FORMS)
@every_kernel
def test_what_was_not_read_is_not_kept(kernels: str, form: Form) -> None:
    """Rows of several depths keep all of their longest paths; the draft model then says what a new one says."""
    network, rows = on(lively(), kernels), rows_of([3, 2, 6])
    drafter = DraftModel.on(network, form)
    for row in rows:
        drafter.admit(row, {})
    for depths in ([1, 4, 3], [4, 2, 1], [3, 1, 4]):
        context = context_of(rows, depths)
        tree = drafter.propose(context)
        paths = [
            max(map(tree.topology.path, [row] * size, range(size)), key=len) for row, size in enumerate(tree.sizes)
        ]
        said = [[*(tokens[node] for node in path[1:]), 1] for tokens, path in zip(tree.tokens, paths, strict=True)]
        for row, tokens in zip(rows, said, strict=True):
            row.tokens += tokens
        drafter.observe(context, tree, Verdict(paths, [1] * len(rows), [True] * len(rows)), Scores(torch.zeros(0)))
        fresh = Model(network, 1)
        for row in rows:
            fresh.admit(row.limit)
        found, expected = (model.next_scores(rows).logits_BNV for model in (drafter.model, fresh))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_rule_for_another_model_is_refused_with_a_sentence() -> None:
    with pytest.raises(DrafterError, match="reads layer 7, and the draft model has 1"):
        DraftModel(Model(table(), 4), Chain(Linear(VOCAB, 4, layer=7)))
