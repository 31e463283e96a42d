"""Block drafters on native kernels against the readable ones in fp32, on random networks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from drafters.heading import filled
from forerun.drafters.block import BlockConfig
from forerun.drafters.block.drafter import TorchBlocks
from forerun.drafters.block.network import BlockModule
from forerun.drafting.drafter import Context
from forerun.drafting.growth import TopTree
from forerun.drafting.markov import MarkovExpander
from forerun.drafting.trained import LayerConfig
from forerun.native import library
from forerun.native.matrix import Packed
from forerun.nn.backends.blocks import BestTree, TreeLimits
from forerun.nn.backends.native.blocks import PackedBlocks
from forerun.nn.backends.native.transformer import pack
from forerun.nn.cache import Cache
from forerun.row import Row
from forerun.sampling import SamplingParams
from nn.kernel_oracles import BF16, CPU, FP32, INT8, REASON, guarded, instructions, same, some, some_examples, threads

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

KINDS = [(BF16, BF16), (FP32, FP32), (BF16, INT8), (FP32, INT8), (FP32, BF16)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
NAN, ALL = float("nan"), -math.inf
Steps = Sequence[Sequence[int]]
"""How many new states every row gets, step by step."""


@pytest.fixture(scope="module", params=library.ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instructions(request.param) as there:
        if not there:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param


# ---- blocks, and what the target said


@dataclass(frozen=True)
class Case:
    """A random network, and random states of the target."""

    width: int = 40
    vocabulary: int = 70
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 10
    mlp_width: int = 50
    layers: int = 2
    sources: int = 2
    count: int = 5
    rank: int = 6
    longest: int = 900
    dtype: torch.dtype = FP32
    weights: torch.dtype = FP32

    @cached_property
    def module(self) -> BlockModule:
        layer = LayerConfig(self.heads, self.kv_heads, self.head_dim, self.mlp_width, max_length=self.longest)
        sources = tuple(range(self.sources))
        config = BlockConfig(
            self.width, self.vocabulary, self.count, self.layers, rank=self.rank, sources=sources, layer=layer
        )
        return filled(BlockModule(config), 1.5, seed=3).to(self.dtype).eval().requires_grad_(False)  # type: ignore[no-any-return]

    @cached_property
    def embedding(self) -> Tensor:
        return some(self.vocabulary, self.width, seed=1, dtype=self.dtype)

    @cached_property
    def head(self) -> Tensor:
        return (some(self.vocabulary, self.width, seed=2) * 3 * self.width**-0.5).to(self.dtype)

    def states(self, row: int, begin: int, count: int) -> Tensor:
        return _states(row, self.longest, self.sources * self.width)[begin : begin + count].to(self.dtype)

    def packed(self) -> PackedBlocks:
        stack = pack(self.module.stack, self.weights)
        stack.borrow(self.embedding, Packed.of(self.head, self.weights))
        return PackedBlocks(self.module.parts(self.embedding), stack, self.weights)

    def empty(self, rows: int, capacity: int = 0) -> Cache:
        memory = Cache(self.module.stack.config.cache_shape, self.dtype, CPU)
        memory.reserve(rows, capacity or self.longest + self.count)
        for _ in range(rows):
            memory.admit()
        return memory

    def after(self, blocks: PackedBlocks, steps: Steps, rows: Sequence[int] = (), capacity: int = 0) -> Cache:
        """The memory after these steps, of these rows (all) alone."""
        rows = rows or range(len(steps[0]))
        memory = self.empty(len(rows), capacity)
        for step in steps:
            lengths = list(memory.lengths)
            blocks.read(memory, 0, [self.states(r, length, step[r]) for r, length in zip(rows, lengths, strict=True)])
        return memory

    def readable(self, steps: Steps) -> TorchBlocks:
        """In fp32, whatever the case is in, on the weights as they are packed."""
        exact = replace(self, dtype=FP32, weights=FP32)
        exact.module.load_state_dict(self.module.state_dict())
        if self.weights != FP32:
            for name, weight in exact.module.named_parameters():
                if weight.dim() == 2 and not name.startswith("markov."):
                    weight.copy_(Packed.of(weight, self.weights).unpacked())
        head = Packed.of(self.head, self.weights).unpacked()
        blocks = TorchBlocks(exact.module, self.embedding.float(), head)
        for _ in steps[0]:
            blocks.admit(self.row(), None)
        for step in steps:
            lengths = list(blocks.cache.lengths)
            blocks.observe(
                [self.states(r, length, n).float() for r, (length, n) in enumerate(zip(lengths, step, strict=True))]
            )
        return blocks

    def row(self) -> Row:
        return Row([1, 2], 2, SamplingParams(), key=0, limit=self.longest)

    def roots(self, rows: int) -> list[int]:
        return [(11 * row + 3) % self.vocabulary for row in range(rows)]


@cache
def _states(row: int, count: int, width: int) -> Tensor:
    return some(count, width, seed=100 + row)


RAGGED = [[3, 1, 17], [0, 2, 1], [1, 0, 30], [2, 2, 2]]


def close(found: Tensor, expected: Tensor, off: float) -> None:
    """Up to this share of the length of the whole."""
    assert found.shape == expected.shape and bool(found.isfinite().all())
    assert float((found.float() - expected.float()).norm()) <= off * float(expected.norm())


def reads_and_says_the_same(case: Case, steps: Steps, off: float = 2e-5) -> None:
    packed, readable, rows = case.packed(), case.readable(steps), len(steps[0])
    memory = case.after(packed, steps)
    assert list(memory.lengths) == list(readable.cache.lengths)
    for row in range(rows):
        if memory.lengths[row]:
            close(memory.entries(row), readable.cache.entries(row), off)
    roots = case.roots(rows)
    expected = readable.states(torch.tensor(roots)) @ readable.head.T
    close(packed.logits(memory, roots), expected, off)


PIECES = st.integers(1, 4).flatmap(
    lambda rows: st.lists(st.lists(st.integers(0, 40), min_size=rows, max_size=rows), min_size=1, max_size=4)
)


@some_examples
@given(
    width=st.integers(3, 70),
    vocabulary=st.integers(1, 150),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    half=st.integers(1, 20),
    layers=st.integers(1, 2),
    sources=st.integers(1, 3),
    count=st.integers(1, 9),
    steps=PIECES,
)
@example(64, 128, 2, 2, 16, 2, 3, 7, [[16, 15]])
@example(5, 9, 1, 1, 1, 1, 1, 1, [[0]])
def test_blocks_say_what_the_readable_ones_do(
    width: int,
    vocabulary: int,
    kv_heads: int,
    group: int,
    half: int,
    layers: int,
    sources: int,
    count: int,
    steps: Steps,
) -> None:
    """Several rows whose text came in pieces, some of them empty; at odd widths, too."""
    case = Case(width, vocabulary, kv_heads * group, kv_heads, 2 * half, 2 * width, layers, sources, count, rank=0)
    reads_and_says_the_same(case, steps, 1e-4)


@every_kind
def test_other_number_formats_round_and_no_more(kind: tuple[torch.dtype, torch.dtype]) -> None:
    case = Case(width=136, vocabulary=300, head_dim=16, dtype=kind[0], weights=kind[1])
    reads_and_says_the_same(case, RAGGED, {FP32: 2e-5, BF16: 0.03, INT8: 0.06}[kind[1]])


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_long_texts(kv_heads: int, count: int) -> None:
    """Where one head's text is shared out among threads, as well."""
    with threads(count):
        reads_and_says_the_same(Case(heads=2, kv_heads=kv_heads), [[512], [130], [1]])


def test_what_was_taken_back_is_forgotten() -> None:
    case = Case()
    blocks = case.packed()
    memory, once = case.after(blocks, RAGGED), case.after(blocks, [[4, 2, 40]])
    for row, length in enumerate((4, 2, 40)):
        memory.truncate(row, length)
    assert same(blocks.logits(memory, case.roots(3)), blocks.logits(once, case.roots(3)))
    blocks.read(memory, 0, [case.states(row, length, 3) for row, length in enumerate((4, 2, 40))])
    blocks.read(once, 0, [case.states(row, length, 3) for row, length in enumerate((4, 2, 40))])
    assert all(same(memory.entries(row), once.entries(row)) for row in range(3))


# ---- bits


def everything(
    case: Case, blocks: PackedBlocks, memory: Cache, roots: Sequence[int]
) -> list[tuple[Tensor, Tensor, BestTree]]:
    """Per row: what is remembered, what is said, and the tree."""
    logits = blocks.logits(memory, roots)
    trees = blocks.grow(memory, roots, [TreeLimits(9, case.count, ALL)] * len(roots))
    return [(memory.entries(row).clone(), logits[row], trees[row]) for row in range(len(roots))]


def equal(one: tuple[Tensor, Tensor, BestTree], other: tuple[Tensor, Tensor, BestTree]) -> bool:
    return same(one[0], other[0]) and same(one[1], other[1]) and one[2] == other[2]


@pytest.mark.parametrize(("kind", "heads"), [*((kind, (2, 1)) for kind in KINDS), (KINDS[0], (4, 2))], ids=str)
def test_bits_do_not_depend_on_company_threads_or_memory(
    kind: tuple[torch.dtype, torch.dtype], heads: tuple[int, int]
) -> None:
    case = Case(heads=heads[0], kv_heads=heads[1], dtype=kind[0], weights=kind[1])
    blocks, steps = case.packed(), [*RAGGED, [1, 600, 20]]
    with threads(1):
        together = everything(case, blocks, case.after(blocks, steps), case.roots(3))
    for count in (1, 3):
        with threads(count):
            again = everything(case, blocks, case.after(blocks, steps), case.roots(3))
            assert all(map(equal, again, together))
            for row in range(3):
                memory = case.after(blocks, steps, [row], 700 + 40 * row)
                (alone,) = everything(case, blocks, memory, case.roots(3)[row : row + 1])
                assert equal(alone, together[row])
    whole = case.empty(3)  # in one piece per row, into a slot of one's own
    for row in range(3):
        blocks.read(whole, row, [case.states(row, 0, sum(step[row] for step in steps))])
    assert all(map(equal, everything(case, blocks, whole, case.roots(3)), together))


@every_kind
def test_what_was_computed_before_leaves_no_trace(kind: tuple[torch.dtype, torch.dtype]) -> None:
    """The kernels keep their scratch memory: here it is full of NaN when the next block is drafted."""
    case = Case(width=20, vocabulary=61, dtype=kind[0], weights=kind[1])
    expected = everything(case, case.packed(), case.after(case.packed(), RAGGED), case.roots(3))
    larger = Case(width=150, vocabulary=300, count=9, rank=70, dtype=kind[0], weights=kind[1])
    blocks, memory = larger.packed(), larger.empty(4)
    blocks.read(memory, 0, [larger.states(row, 0, 30) * NAN for row in range(4)])
    blocks.grow(memory, larger.roots(4), [TreeLimits(20, 9, ALL)] * 4)
    found = everything(case, case.packed(), case.after(case.packed(), RAGGED), case.roots(3))
    assert all(map(equal, found, expected))


@pytest.mark.parametrize("rank", [0, 6])
def test_bad_states_spoil_their_own_row_only(rank: int) -> None:
    case = Case(rank=rank)
    blocks, memory = case.packed(), case.empty(3)
    expected = everything(case, blocks, case.after(blocks, [[5, 5, 5]]), case.roots(3))
    bad = case.states(1, 0, 5).clone()
    bad[2, 7] = NAN
    for count in (1, 3):
        memory = case.empty(3)
        with threads(count):
            blocks.read(memory, 0, [case.states(0, 0, 5), bad, case.states(2, 0, 5)])
            found = everything(case, blocks, memory, case.roots(3))
        assert equal(found[0], expected[0]) and equal(found[2], expected[2])
        assert found[1][2] == BestTree([case.roots(3)[1]], [-1], [0.0])


# ---- trees


def paths_of(tokens: Sequence[int], parents: Sequence[int]) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


def expected_paths(
    case: Case, blocks: PackedBlocks, memory: Cache, limits: Sequence[TreeLimits]
) -> list[set[tuple[int, ...]]]:
    """By the readable form, over the same logits."""
    rows = len(limits)
    roots = case.roots(rows)
    expander = MarkovExpander(blocks.logits(memory, roots), torch.tensor(roots), case.module.markov)
    contexts = [Row([root], 1, SamplingParams(max_new_tokens=40), key=0, limit=99) for root in roots]
    most = max(one.nodes for one in limits)
    prices = [math.exp(one.least) for one in limits] if any(one.least > ALL for one in limits) else None
    context = Context(contexts, [one.nodes for one in limits], [one.depth for one in limits], CPU, prices=prices)
    tree = TopTree(most, case.count, most).grow(expander, context, [one.depth for one in limits]).tree
    return [set(paths_of(*row)) for row in zip(tree.tokens, tree.topology.parents, strict=True)]


def log_prob(case: Case, logits_WV: Tensor, root: int, path: Sequence[int]) -> float:
    """Of a path, in fp64."""
    total = 0.0
    for law, above, token in zip(logits_WV.double(), (root, *path), path, strict=False):
        if case.module.markov is not None:
            law = law + case.module.markov.behind.double() @ case.module.markov.before[above].double()
        total += float(law.log_softmax(-1)[token])
    return total


def demand_best(case: Case, limits: Sequence[TreeLimits], steps: Steps = RAGGED) -> list[BestTree]:
    """Trees are those of the readable form, but for paths that are as probable as the last one to come."""
    blocks = case.packed()
    memory, roots = case.after(blocks, steps), case.roots(len(limits))
    found, logits = blocks.grow(memory, roots, limits), blocks.logits(memory, roots)
    for row, expected in enumerate(expected_paths(case, blocks, memory, limits)):
        tree, limit = found[row], limits[row]
        paths = set(paths_of(tree.tokens, tree.parents))
        assert len(paths) == len(tree.tokens) - 1 <= limit.nodes
        assert tree.tokens[0] == roots[row] and tree.parents[0] == -1
        assert all(parent < node for node, parent in enumerate(tree.parents))
        last = min(tree.log_probs) if len(paths) == limit.nodes else limit.least
        for path in paths ^ expected:
            assert abs(log_prob(case, logits[row], roots[row], path) - last) < 1e-4
    return found


@some_examples
@given(
    vocabulary=st.integers(1, 200),
    rank=st.sampled_from((0, 1, 6, 33, 64, 70)),
    nodes=st.lists(st.integers(1, 24), min_size=3, max_size=3),
    depths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    least=st.sampled_from((ALL, -5.0, -2.0)),
    count=st.integers(1, 2),
)
@example(1, 6, [12, 12, 12], [5, 5, 5], ALL, 1)
@example(2, 6, [24, 24, 24], [5, 5, 1], ALL, 2)
@example(200, 64, [1, 12, 24], [5, 5, 5], -5.0, 2)
def test_trees_are_the_best_first_ones(
    vocabulary: int, rank: int, nodes: list[int], depths: list[int], least: float, count: int
) -> None:
    case = Case(vocabulary=vocabulary, rank=rank)
    limits = [TreeLimits(most, depth, least) for most, depth in zip(nodes, depths, strict=True)]
    with threads(count):
        found = demand_best(case, limits)
    for tree, limit in zip(found, limits, strict=True):
        assert max(map(len, paths_of(tree.tokens, tree.parents)), default=0) <= limit.depth
        assert all(value >= limit.least for value in tree.log_probs)


@pytest.mark.parametrize("rank", [0, 6])
def test_log_probabilities_are_those_of_the_paths(rank: int) -> None:
    case = Case(rank=rank)
    blocks = case.packed()
    memory, roots = case.after(blocks, RAGGED), case.roots(3)
    logits = blocks.logits(memory, roots)
    for row, tree in enumerate(blocks.grow(memory, roots, [TreeLimits(16, 5, ALL)] * 3)):
        for path, value in zip(paths_of(tree.tokens, tree.parents), tree.log_probs[1:], strict=True):
            assert math.isclose(value, log_prob(case, logits[row], roots[row], path), rel_tol=1e-5, abs_tol=1e-5)


@pytest.mark.parametrize("nodes", [1, 3, 5, 8, 12, 20])
@pytest.mark.parametrize("vocabulary", [1, 3, 40])
def test_of_equal_paths_the_first_come_first(vocabulary: int, nodes: int) -> None:
    """All tokens are equally probable: the shallower, then the lower ranks, exactly as in the readable form."""
    case = Case(vocabulary=vocabulary, rank=0)
    case.head.zero_()
    blocks = case.packed()
    memory, limits = case.after(blocks, RAGGED), [TreeLimits(nodes, 5, ALL)] * 3
    for tree, expected in zip(
        blocks.grow(memory, case.roots(3), limits), expected_paths(case, blocks, memory, limits), strict=True
    ):
        assert set(paths_of(tree.tokens, tree.parents)) == expected


def test_rows_may_be_left_out() -> None:
    case = Case()
    blocks = case.packed()
    memory = case.after(blocks, RAGGED)
    limits = [TreeLimits(7, 5, ALL)] * 3
    whole = blocks.grow(memory, case.roots(3), limits)
    for idle in (TreeLimits(0, 5, ALL), TreeLimits(7, 0, ALL)):
        for row in range(3):
            found = blocks.grow(memory, case.roots(3), [*limits[:row], idle, *limits[row + 1 :]])
            alone = BestTree([case.roots(3)[row]], [-1], [0.0])
            assert found == [*whole[:row], alone, *whole[row + 1 :]]
    assert [one.parents for one in blocks.grow(memory, case.roots(3), [TreeLimits(0, 0, ALL)] * 3)] == [[-1]] * 3


def test_a_tree_may_have_more_nodes_than_there_are_paths() -> None:
    case = Case(vocabulary=2, count=3)
    for tree in demand_best(case, [TreeLimits(100, 9, ALL)] * 3):
        assert len(tree.tokens) == 1 + 2 + 4 + 8


# ---- memory, and what does not fit


@pytest.mark.parametrize("count", [1, 3])
def test_logits_fill_their_memory_and_nothing_beside_it(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(vocabulary=61)
    blocks = case.packed()
    memory = case.after(blocks, RAGGED)
    with threads(count), guarded(monkeypatch) as made:
        blocks.logits(memory, case.roots(3))
    assert len(made) == 1
    made[0].check()


def test_what_does_not_fit_is_refused() -> None:
    case = Case()
    blocks = case.packed()
    memory = case.after(blocks, [[3, 4]])
    limits = [TreeLimits(4, 3, ALL)] * 2
    for root in (-1, case.vocabulary):
        with pytest.raises(IndexError, match="vocabulary"):
            blocks.grow(memory, [3, root], limits)
        with pytest.raises(IndexError, match="vocabulary"):
            blocks.logits(memory, [root, 3])
    with pytest.raises(ValueError, match="2 roots and 1 limits"):
        blocks.grow(memory, [3, 3], limits[:1])
    with pytest.raises(ValueError, match="2 rows of a cache"):
        blocks.grow(memory, [3, 3, 3], limits[:1] * 3)
    with pytest.raises(ValueError, match="80 wide"):
        blocks.read(memory, 0, [case.states(0, 3, 1)[:, 1:], case.states(0, 3, 1)])
    small = case.empty(1, 10)
    blocks.read(small, 0, [case.states(0, 0, 6)])
    with pytest.raises(IndexError, match="no room"):
        blocks.logits(small, [1])
    with pytest.raises(IndexError, match="no room"):
        blocks.read(small, 0, [case.states(0, 6, 5)])
    assert list(small.lengths) == [6]
    brief = replace(case, longest=8)
    long = brief.empty(1, 40)
    with pytest.raises(IndexError, match="longest text"):
        brief.packed().read(long, 0, [case.states(0, 0, 14)])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("mask", (39,)), ("fuse", (39, 80)), ("fuse_norm", (41,)), ("before", (70, 5)), ("behind", (69, 6))],
)
def test_matrices_that_do_not_fit_are_refused(name: str, wrong: tuple[int, ...]) -> None:
    case = Case()
    stack = pack(case.module.stack)
    stack.borrow(case.embedding, Packed.of(case.head))
    with pytest.raises(ValueError, match=f"{'behind' if name == 'before' else name} is"):
        PackedBlocks(replace(case.module.parts(case.embedding), **{name: torch.zeros(wrong)}), stack, FP32)
    with pytest.raises(ValueError, match="two tables"):
        PackedBlocks(replace(case.module.parts(case.embedding), before=None), stack, FP32)
    with pytest.raises(ValueError, match="an embedding"):
        stack.borrow(case.embedding[:, 1:], Packed.of(case.head))
