"""Draft heads on native kernels against a slow version that thinks about every path alone, in float64.

Tokens come out, not numbers, so what is promised bit by bit is held against vocabularies whose
logits differ in their last bits only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from forerun.native import library
from forerun.native.matrix import Packed
from forerun.nn.backends.heads import HeadWeights
from forerun.nn.backends.native.heads import PackedHeads
from forerun.ranktree import PUBLISHED, RankTree
from nn.kernel_oracles import (
    BF16,
    FP32,
    INT8,
    REASON,
    guarded,
    instructions,
    quantised,
    some,
    some_examples,
    strided,
    threads,
)

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

TREES = {
    "chain": RankTree.chain(4),
    "star": RankTree([(rank,) for rank in range(9)]),
    "one": RankTree([(0,)]),
    "ragged": RankTree(
        [(0,), (1,), (2,), (0, 0), (1, 0), (1, 1), (0, 0, 0), (0, 0, 0, 0), (1, 1, 0), (1, 1, 0, 2)][:9]
    ),
    "gaps": RankTree([(3,), (1,), (3, 4), (1, 2), (1, 0), (3, 4, 1), (1, 2, 5), (1, 2, 5, 3)]),
    "wide": RankTree.named("mc_sim_7b_63"),
}
KINDS = [(BF16, BF16), (FP32, FP32), (BF16, INT8), (FP32, INT8), (FP32, BF16)]
FORMS = ("medusa", "medusa through", "hydra")
NAN = float("nan")


@pytest.fixture(scope="module", params=library.ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instructions(request.param) as there:
        if not there:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param


# ---- heads, and what they should say


@dataclass(frozen=True)
class Case:
    """Random heads, and what they are asked."""

    form: str = "hydra"
    width: int = 48
    vocabulary: int = 61
    blocks: int = 1
    tied: bool = False
    biased: bool = True
    shared: bool = False
    tree: str = "wide"
    rows: int = 2
    dtype: torch.dtype = FP32
    weights: torch.dtype = FP32
    seed: int = 0

    @property
    def chained(self) -> bool:
        return self.form == "hydra"

    def heads(self) -> list[HeadWeights]:
        shared = self._random(self.vocabulary, self.width)
        return [self._head(number, shared if self.shared else None) for number in range(TREES[self.tree].depth)]

    def _head(self, number: int, vocabulary: Tensor | None) -> HeadWeights:
        chance = 10 * number + 1
        inputs = (number + 2) * self.width if self.chained else self.width
        through = self._random(self.width, inputs, chance + 1) if self.form != "medusa" else None
        tied = self._random(self.width, self.width, chance + 2), some(self.width, seed=self.seed + chance + 2)
        later = [self._random(self.width, self.width, chance + 3 + i) for i in range(self.blocks)]
        return HeadWeights(
            first=self._random(self.width, inputs, chance),
            first_bias=self._bias(self.width, chance),
            through=through,
            through_bias=None if through is None else self._bias(self.width, chance + 1),
            blocks=(tied,) * self.blocks if self.tied else tuple((weight, weight[0]) for weight in later),
            vocabulary=self._random(self.vocabulary, self.width, chance + 6) if vocabulary is None else vocabulary,
            vocabulary_bias=self._bias(self.vocabulary, chance + 6),
        )

    def _random(self, out: int, in_: int, chance: int = 0) -> Tensor:
        return some(out, in_, seed=self.seed + chance) * 1.5 * in_**-0.5

    def _bias(self, size: int, chance: int) -> Tensor | None:
        return some(size, seed=self.seed + chance + 100) if self.biased else None

    @property
    def embedding(self) -> Tensor | None:
        return some(self.vocabulary, self.width, seed=self.seed + 200, dtype=self.dtype) if self.chained else None

    @property
    def contexts(self) -> Tensor:
        return some(self.rows, self.width, seed=self.seed + 300, dtype=self.dtype)

    @property
    def roots(self) -> list[int]:
        return [(7 * row + 3) % self.vocabulary for row in range(self.rows)]

    def packed(self) -> PackedHeads:
        return PackedHeads(self.heads(), self.embedding, self.dtype, self.weights)

    def run(self, heads: PackedHeads | None = None, rows: Sequence[int] | None = None) -> list[list[int]]:
        rows = range(self.rows) if rows is None else rows
        roots = [self.roots[row] for row in rows]
        return (heads or self.packed()).draft(self.contexts[list(rows)], roots, TREES[self.tree])


def rounded(head: HeadWeights, weights: torch.dtype) -> HeadWeights:
    """Every matrix in float64, as it is rounded when it is packed."""

    def one(weight: Tensor) -> Tensor:
        return Packed.of(weight, weights).unpacked().double()

    assert isinstance(head.vocabulary, Tensor)
    return replace(
        head,
        first=one(head.first),
        through=None if head.through is None else one(head.through),
        blocks=tuple((one(weight), bias) for weight, bias in head.blocks),
        vocabulary=one(head.vocabulary),
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, weights: torch.dtype) -> Tensor:
    """In float64, of inputs that are rounded for a product with a weight that has been."""
    inputs = quantised(x.float()) if weights == INT8 else x.to(weights).double()
    y = weight @ inputs
    return y if bias is None else y + bias.double()


def logits(head: HeadWeights, z: Tensor, weights: torch.dtype) -> Tensor:
    y = z if head.through is None else product(z, head.through, head.through_bias, weights)
    y = y + F.silu(product(z, head.first, head.first_bias, weights))
    for weight, bias in head.blocks:
        y = y + F.silu(product(y, weight, bias, weights))
    assert isinstance(head.vocabulary, Tensor)
    return product(y, head.vocabulary, head.vocabulary_bias, weights)


def check(case: Case, drafted: list[list[int]]) -> None:
    """Every node is its parent's best token of its rank: exactly in fp32, else up to roundings that
    fall the other way."""
    tree, embedding = TREES[case.tree], case.embedding
    heads = [rounded(head, case.weights) for head in case.heads()]
    slack = {FP32: 0.0, BF16: 0.01, INT8: 0.06}[case.weights]
    assert len(drafted) == case.rows
    for context, root, tokens in zip(case.contexts.double(), case.roots, drafted, strict=True):
        named = dict(zip([(), *tree.nodes], tokens, strict=True))
        assert named[()] == root
        for parent in {path[:-1] for path in tree.nodes}:
            seen = (
                [] if embedding is None else [embedding[named[parent[:end]]].double() for end in range(len(parent) + 1)]
            )
            said = logits(heads[len(parent)], torch.cat([context, *seen]), case.weights)
            best = said.sort(descending=True, stable=True)
            children = {path[-1]: named[path] for path in tree.nodes if path[:-1] == parent}
            assert len(set(children.values())) == len(children)
            for rank, token in children.items():
                assert token == best.indices[rank] or best.values[rank] - said[token] <= slack * said.std()
                assert token == best.indices[rank] or said[token] - best.values[rank] <= slack * said.std()


cases = st.builds(
    Case,
    form=st.sampled_from(FORMS),
    width=st.sampled_from((20, 33, 48, 64, 130)),
    vocabulary=st.sampled_from((11, 61, 100, 300)),
    blocks=st.integers(0, 3),
    tied=st.booleans(),
    biased=st.booleans(),
    shared=st.booleans(),
    tree=st.sampled_from(sorted(TREES)),
    rows=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
kinds = st.sampled_from(KINDS)


@some_examples
@given(cases, kinds)
def test_every_node_is_what_its_head_finds_best(case: Case, kind: tuple[torch.dtype, torch.dtype]) -> None:
    case = replace(case, dtype=kind[0], weights=kind[1])
    check(case, case.run())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tree", TREES)
def test_in_fp32_every_token_is_exact(tree: str, form: str) -> None:
    for blocks, tied, width in ((0, False, 20), (1, False, 48), (3, True, 20), (2, False, 128)):
        case = Case(form, width, blocks=blocks, tied=tied, tree=tree, biased=blocks != 2, shared=tied, rows=3)
        check(case, case.run())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rounded_weights_and_inputs_stay_close(form: str, kind: tuple[torch.dtype, torch.dtype]) -> None:
    for width, blocks in ((48, 0), (128, 2), (260, 1)):
        case = Case(form, width, 300, blocks, dtype=kind[0], weights=kind[1])
        check(case, case.run())


def test_published_trees_grow() -> None:
    for name in PUBLISHED:
        tree, case = RankTree.named(name), Case(rows=1)
        drafted = PackedHeads(case.heads(), case.embedding, FP32).draft(case.contexts, case.roots, tree)
        assert len(drafted[0]) == tree.size + 1


# ---- the same in any company


def sensitive(case: Case) -> PackedHeads:
    """Logits that differ in their last bits alone: the order of tokens shows every rounding before them."""
    heads = []
    for head in case.heads():
        assert isinstance(head.vocabulary, Tensor)
        row = head.vocabulary[:1]
        nearly = row + row.abs().max() * 2e-7 * some(*head.vocabulary.shape, seed=case.seed + 5)
        heads.append(replace(head, vocabulary=nearly, vocabulary_bias=None))
    return PackedHeads(heads, case.embedding, case.dtype, case.weights)


@some_examples
@given(cases, st.sampled_from(KINDS[:2] + KINDS[3:]), st.integers(2, 3))
@example(Case("medusa", 48, 300, 2, rows=5, tree="wide"), (FP32, FP32), 3)
@example(Case("hydra", 64, 300, 1, rows=5, tree="wide"), (FP32, FP32), 2)
@example(Case("hydra", 20, 61, 2, rows=5, tree="gaps"), (FP32, INT8), 2)
def test_a_row_is_the_same_alone_in_company_and_on_any_number_of_threads(
    case: Case, kind: tuple[torch.dtype, torch.dtype], count: int
) -> None:
    case = replace(case, dtype=kind[0], weights=kind[1])
    heads = sensitive(case)
    alone = [case.run(heads, [row])[0] for row in range(case.rows)]
    assert case.run(heads) == alone
    with threads(count):
        assert case.run(heads) == alone
        assert case.run(heads, range(case.rows)[::-1]) == alone[::-1]


def test_a_node_is_the_same_in_another_tree() -> None:
    case = Case("hydra", 64, 300, 1)
    heads, whole = sensitive(case), TREES["wide"]
    named = [dict(zip([(), *whole.nodes], tokens, strict=True)) for tokens in case.run(heads)]
    for size in (1, 5, 20, 50):
        part = whole.within(4, size)
        assert part is not None
        for row, tokens in enumerate(heads.draft(case.contexts, case.roots, part)):
            assert tokens == [named[row][path] for path in [(), *part.nodes]]


@pytest.mark.parametrize("form", FORMS)
def test_threads_that_come_late_change_nothing(form: str) -> None:
    """More threads than cores, many times: some of them find that the others have gone on without them."""
    for weights in (FP32, INT8):
        case = Case(form, 40, 100, 1, weights=weights, rows=3)
        heads = sensitive(case)
        expected = case.run(heads)
        with threads((os.cpu_count() or 1) + 2):
            assert all(case.run(heads) == expected for _ in range(10))


def test_several_threads_of_python_may_draft_at_once() -> None:
    case = Case("hydra", 40, 100, 1, rows=4)
    heads = case.packed()
    expected = case.run(heads)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(lambda _: case.run(heads), range(40)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 3])
def test_of_equal_logits_the_lower_token_comes_first(count: int, form: str) -> None:
    case = Case(form, 20, 300, 0, biased=False, tree="wide", rows=2)
    plain = case.heads()
    for shift in (0, 150, 250):
        heads = [replace(head, vocabulary=torch.zeros(300, 20)) for head in plain]
        for head in heads:
            assert isinstance(head.vocabulary, Tensor)
            head.vocabulary[shift : shift + 20 : 2] = head.vocabulary[shift + 21 : shift + 40 : 2] = 0
        with threads(count):
            for tokens in PackedHeads(heads, case.embedding, FP32).draft(case.contexts, case.roots, TREES["wide"]):
                assert tokens[1:] == [path[-1] for path in TREES["wide"].nodes]
    twice = [replace(head, vocabulary=torch.cat([head.vocabulary[:150]] * 2)) for head in plain]  # type: ignore[index]
    with threads(count):
        pairs = PackedHeads(twice, case.embedding, FP32).draft(case.contexts, case.roots, TREES["star"])
    for tokens in pairs:
        assert all(high == low + 150 for low, high in zip(tokens[1:9:2], tokens[2:9:2], strict=True))


# ---- what is not a number, and memory


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_bad_context_spoils_its_own_row_only(form: str, kind: tuple[torch.dtype, torch.dtype]) -> None:
    case = Case(form, 48, 100, 1, dtype=kind[0], weights=kind[1], rows=3)
    heads, contexts, expected = case.packed(), case.contexts, case.run()
    contexts[1, 17] = NAN
    for count in (1, 3):
        with threads(count):
            found = heads.draft(contexts, case.roots, TREES["wide"])
        assert [found[0], found[2]] == [expected[0], expected[2]]
        assert found[1][1:] == [path[-1] for path in TREES["wide"].nodes]  # nothing is best: the first tokens


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_bad_logits_come_last(kind: tuple[torch.dtype, torch.dtype]) -> None:
    case = Case("medusa", 48, 100, 0, dtype=kind[0], weights=kind[1], tree="star", rows=1)
    expected = case.run()[0]
    heads = case.heads()
    for bad in range(5, 100, 7):
        heads[0].vocabulary[bad] = NAN  # type: ignore[index]
    found = PackedHeads(heads, None, *kind).draft(case.contexts, case.roots, TREES["star"])[0]
    kept = [token for token in expected[1:] if token % 7 != 5]
    assert found[1 : 1 + len(kept)] == kept


@pytest.mark.parametrize("form", FORMS)
def test_what_was_computed_before_leaves_no_trace(form: str) -> None:
    """The kernels keep their scratch memory: here it is full of NaN when the next tree is grown."""
    for kind in KINDS:
        case = Case(form, 20, 61, 2, dtype=kind[0], weights=kind[1])
        heads, expected = case.packed(), case.run()
        for weights in (kind[1], FP32, BF16):
            larger = Case(form, 150, 300, 2, dtype=kind[0], weights=weights, rows=5)
            larger.packed().draft(larger.contexts * NAN, larger.roots, TREES["wide"])
        assert case.run(heads) == expected


def test_only_embeddings_of_the_tree_are_read() -> None:
    case = Case("hydra", 48, 300, 1, rows=3)
    expected, embedding = case.run(), case.embedding
    assert embedding is not None
    used = sorted({token for tokens in expected for token in tokens})
    poisoned = torch.full_like(embedding, NAN)
    poisoned[used] = embedding[used]
    assert case.run(PackedHeads(case.heads(), poisoned, FP32)) == expected


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_tokens_fill_their_memory_and_nothing_beside_it(form: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for tree in TREES:
        case = Case(form, tree=tree, rows=3)
        heads = case.packed()
        with threads(count), guarded(monkeypatch) as made:
            case.run(heads)
        assert len(made) == 1
        made[0].check()


def test_inputs_may_lie_anywhere() -> None:
    case = Case("hydra", 48, 100, 1, tied=True)
    heads = [
        replace(head, first=strided(head.first), vocabulary=head.vocabulary.T.contiguous().T)  # type: ignore[union-attr]
        for head in case.heads()
    ]
    assert case.embedding is not None
    packed = PackedHeads(heads, strided(case.embedding), FP32)
    assert packed.draft(strided(case.contexts), case.roots, TREES["wide"]) == case.run()


# ---- what is packed once, and what does not fit


def test_no_rows_give_nothing() -> None:
    case = Case()
    assert case.packed().draft(case.contexts[:0], [], TREES["wide"]) == []


def test_a_matrix_given_twice_is_packed_once() -> None:
    size = {
        (tied, shared): Case("medusa", 64, 320, 3, tied, biased=False, shared=shared).packed().nbytes
        for tied in (False, True)
        for shared in (False, True)
    }
    block, vocabulary, biases = 64 * 64 * 4, 320 * 64 * 4, 4 * 3 * 64 * 4
    assert size[False, False] == 4 * (4 * block + vocabulary) + biases
    assert size[True, False] == size[False, False] - 4 * 2 * block
    assert size[False, True] == size[False, False] - 3 * vocabulary
    # Views of the same memory are the same matrix.
    heads = Case("medusa", 64, 320, 0, biased=False).heads()
    whole = torch.stack([heads[0].vocabulary, heads[1].vocabulary])  # type: ignore[list-item]
    views = [replace(head, vocabulary=whole[number % 2]) for number, head in enumerate(heads)]
    assert PackedHeads(views, None, FP32).nbytes == 4 * block + 2 * vocabulary


@pytest.mark.parametrize("weights", [FP32, BF16, INT8], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_heads_may_share_a_packed_vocabulary(biased: bool, weights: torch.dtype) -> None:
    """Such as the target's own head, in a number format of its own."""
    case = Case("hydra", 48, 100, 1, shared=True, biased=biased, weights=weights)
    heads = case.heads()
    assert isinstance(heads[0].vocabulary, Tensor)
    target = Packed.of(heads[0].vocabulary, weights)
    lent = PackedHeads([replace(head, vocabulary=target) for head in heads], case.embedding, FP32, weights)
    assert case.run(lent) == case.run()
    assert lent.nbytes < case.packed().nbytes
    for others in (FP32, BF16, INT8):
        mixed = PackedHeads([replace(head, vocabulary=target) for head in heads], case.embedding, FP32, others)
        agree = sum(
            a == b
            for mine, theirs in zip(case.run(mixed), case.run(), strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )
        assert agree >= (128 if others == weights else 12)
    own = Packed.of(heads[0].vocabulary, weights, some(100, seed=9))
    both = [replace(h, vocabulary=own, vocabulary_bias=some(100, seed=8)) for h in heads]
    sums = [replace(h, vocabulary_bias=some(100, seed=9) + some(100, seed=8)) for h in heads]
    assert case.run(PackedHeads(both, case.embedding, FP32, weights)) == case.run(
        PackedHeads(sums, case.embedding, FP32, weights)
    )


def test_many_trees_may_be_grown() -> None:
    case = Case("medusa", 20, 400, 0, tree="star", rows=1)
    heads = case.packed()
    best = heads.draft(case.contexts, case.roots, RankTree([(rank,) for rank in range(300)]))[0]
    for rank in range(300):
        assert heads.draft(case.contexts, case.roots, RankTree([(rank,)])) == [[best[0], best[1 + rank]]]


def test_what_does_not_fit_is_refused() -> None:
    case = Case("hydra", 48, 61, 1)
    heads, embedding = case.heads(), case.embedding
    assert embedding is not None
    packed = PackedHeads(heads, embedding, FP32)
    for said, contexts, roots, tree in (
        ("depth 5 for 4 heads", case.contexts, [1, 2], RankTree.chain(5)),
        ("rank 61 for 61 tokens", case.contexts, [1, 2], RankTree([(61,)])),
        ("2 rows of width 48", case.contexts[:1], [1, 2], TREES["chain"]),
        ("1 rows of width 48", case.contexts[:1, :40], [1], TREES["chain"]),
    ):
        with pytest.raises(ValueError, match=said):
            packed.draft(contexts, roots, tree)
    for root in (-1, 61):
        with pytest.raises(IndexError, match="vocabulary"):
            packed.draft(case.contexts, [3, root], TREES["chain"])
    first, gated = heads[0], Packed.of(some(122, 48, seed=0), gated=True)
    for said, wrong in (
        ("first of head 0 is \\[48, 95\\] and not \\[48, 96\\]", replace(first, first=first.first[:, 1:])),
        ("first_bias", replace(first, first_bias=some(47, seed=0))),
        ("needs a matrix `through`", replace(first, through=None)),
        ("through of head 0", replace(first, through=first.first[1:])),
        ("through_bias", replace(first, through_bias=some(1, seed=0))),
        ("block 0 of head 0", replace(first, blocks=((some(48, 47, seed=0), some(48, seed=0)),))),
        ("bias of block 0", replace(first, blocks=((some(48, 48, seed=0), some(40, seed=0)),))),
        ("embedding \\[61, 48\\] for heads over 60 tokens", replace(first, vocabulary=some(60, 48, seed=0))),
        ("vocabulary_bias", replace(first, vocabulary_bias=some(60, seed=0))),
        ("different number formats", replace(first, vocabulary=Packed.of(some(61, 48, seed=0)))),
    ):
        with pytest.raises(ValueError, match=said):
            PackedHeads([wrong, *heads[1:]], embedding, FP32)
    with pytest.raises(ValueError, match="gated"):
        PackedHeads([replace(first, vocabulary=gated)], embedding, FP32)
    with pytest.raises(ValueError, match="first of head 0"):
        PackedHeads(heads, None, FP32)
    with pytest.raises(ValueError, match="at least one"):
        PackedHeads([], embedding, FP32)
    with pytest.raises(ValueError, match="float16"):
        PackedHeads(heads, embedding, torch.float16)
