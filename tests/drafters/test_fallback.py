"""Fallbacks: who answers, what the others are told of it, and that the law is the target's whoever answers.

`Stub` is a source whose proposals are known in advance, row by row, and which remembers what it was asked and told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drafters.heading import VOCAB, Watching, every_kernel, greedy, lively, relative, some_heads
from enumeration import distance, plain_law
from fakes import Near, TableNetwork, Wild, engine_of, plain
from forerun.accept.exact import Verdict
from forerun.chance import key_of
from forerun.drafters.cascade import Cascade, Part
from forerun.drafters.fallback import Fallback
from forerun.drafters.small import DraftModel
from forerun.drafters.verified import Verified
from forerun.drafting.drafter import Context, Drafter, Tally
from forerun.drafting.growth import Chain, SampledTree
from forerun.drafting.stopping import Confidence, Fixed
from forerun.engine.engine import Engine
from forerun.errors import DrafterError
from forerun.model import Model, Scores
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.tree import Drawn, TokenTree
from test_engine import engine_law, processed

EXACT = 1e-6
CPU = torch.device("cpu")
V = 5


class Stub(Drafter):
    """Proposes chains of these lengths; `drawn`: by chance, it says, and its laws are its own."""

    def __init__(self, name: str, lengths: Sequence[int], drawn: bool = False, token: int = 1, hears: bool = False):
        self.name, self._lengths, self._drawn, self._token = name, lengths, drawn, token
        self.max_nodes = max(lengths, default=0)
        self.reads = frozenset({1}) if hears else frozenset()
        self.asked: list[list[int]] = []
        self.paths: list[tuple[int, ...]] = []
        self.told: list[tuple[TokenTree, list[list[int]]]] = []
        self.events: list[tuple[str, Any]] = []

    @property
    def law(self) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(self._token), V).double()

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        self.events.append(("admit", sorted(hidden)))

    def release(self, slot: int) -> None:
        self.events.append(("release", slot))

    def retract(self, lengths: Sequence[int]) -> None:
        self.events.append(("retract", list(lengths)))

    def propose(self, context: Context) -> TokenTree:
        self.asked.append(list(context.depths))
        self.paths.append(context.path)
        sizes = [min(pair) for pair in zip(self._lengths, context.depths, strict=True)]
        chains = [[row.tokens[-1], *[self._token] * size] for row, size in zip(context.rows, sizes, strict=True)]
        if not self._drawn:
            return TokenTree.chain(chains, CPU)
        return TokenTree.drawn_chain(chains, self.law.expand(len(chains), max(sizes) + 1, V))

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        self.told.append((tree, verdict.kept))


def context_of(count: int, depth: int = 9, **rest: Any) -> Context:
    rows = [Row([0] * (2 + index), 1, SamplingParams(temperature=1.0), key_of(index), 64) for index in range(count)]
    return Context(rows, [rest.pop("budget", 99)] * count, [depth] * count, CPU, **rest)


def told(one: Fallback, context: Context, tree: TokenTree, kept: list[list[int]]) -> None:
    one.observe(context, tree, Verdict(kept, [0] * len(kept), [False] * len(kept)), Scores(torch.zeros(0)))


def answers(tree: TokenTree) -> list[tuple[int, int]]:
    """Per row: the token that it is made of, and how many."""
    return [(max(row[1:], default=0), len(row) - 1) for row in tree.tokens]


# ---- who answers


@pytest.mark.parametrize(
    ("enough", "lengths", "chosen"),
    [
        (1, [(1, 3, 4)], [(1, 1)]),
        (1, [(0, 3, 4)], [(2, 3)]),
        (1, [(0, 0, 4)], [(3, 4)]),
        (1, [(0, 0, 0)], [(0, 0)]),
        (3, [(2, 3, 4)], [(2, 3)]),
        (3, [(3, 4, 5)], [(1, 3)]),
        (3, [(2, 1, 4)], [(3, 4)]),
        (3, [(1, 2, 2)], [(2, 2)]),
        (3, [(2, 2, 1)], [(1, 2)]),
        (3, [(0, 1, 0)], [(2, 1)]),
        (2, [(1, 2, 0), (2, 0, 0), (0, 1, 1), (0, 0, 4), (0, 0, 0)], [(2, 2), (1, 2), (2, 1), (3, 4), (0, 0)]),
    ],
    ids=str,
)
def test_the_first_source_with_enough_answers_or_else_the_one_with_most(
    enough: int, lengths: list[tuple[int, ...]], chosen: list[tuple[int, int]]
) -> None:
    stubs = [Stub(str(n), [row[n] for row in lengths], token=n + 1) for n in range(3)]
    tree = Fallback(stubs, enough).propose(context_of(len(lengths)))
    assert answers(tree) == chosen and tree.is_deterministic


def test_sources_behind_the_one_that_answered_are_not_asked() -> None:
    """Nor rows that have their answer; and every source has luck of its own."""
    stubs = [Stub("a", [2, 0, 0]), Stub("b", [3, 3, 0]), Stub("c", [4, 4, 4]), Stub("d", [9, 9, 9])]
    one = Fallback(stubs)
    one.propose(context_of(3, path=(7,)))
    assert [stub.asked for stub in stubs] == [[[9, 9, 9]], [[0, 9, 9]], [[0, 0, 9]], []]
    assert [stub.paths for stub in stubs] == [[(7, 0)], [(7, 1)], [(7, 2)], []]


def test_a_row_without_room_is_asked_of_nobody() -> None:
    stubs = [Stub("a", [0, 3]), Stub("b", [3, 3])]
    context = context_of(2)
    tree = Fallback(stubs).propose(Context(context.rows, [99, 99], [0, 9], CPU))
    assert answers(tree) == [(0, 0), (1, 3)] and [stub.asked for stub in stubs] == [[[0, 9]], []]


@pytest.mark.parametrize("length", [1, 2])
def test_what_was_drawn_is_an_answer_however_short_it_is(length: int) -> None:
    stubs = [Stub("short", [length], drawn=True), Stub("long", [5], token=2)]
    tree = Fallback(stubs, enough=4).propose(context_of(1))
    assert answers(tree) == [(1, length)] and not stubs[1].asked
    assert tree.laws_BNV is not None and (tree.laws_BNV[0, :length] == stubs[0].law).all()


def test_rows_of_a_batch_keep_the_laws_of_the_source_that_answered_them() -> None:
    """Drawn, certain, drawn by another, nothing."""
    first, second = Stub("first", [2, 0, 0, 0], drawn=True), Stub("second", [0, 3, 0, 0], token=2)
    third = Stub("third", [4, 4, 4, 0], drawn=True, token=3)
    tree = Fallback([first, second, third]).propose(context_of(4))
    assert answers(tree) == [(1, 2), (2, 3), (3, 4), (0, 0)]
    assert tree.laws_BNV is not None and tree.drawn_BN is not None
    assert [bool(row.any()) for row in tree.drawn_BN[:3]] == [True, False, True]
    for row, stub, size in ((0, first, 2), (2, third, 4)):
        assert (tree.laws_BNV[row, :size] == stub.law).all() and (tree.drawn_BN[row, :size] != 0).all()


def test_trees_of_any_shape_are_put_together_as_they_are() -> None:
    """Row by row what each source proposed: tokens, parents, laws, and how they were drawn."""
    sources: list[Drafter] = [Wild(V, 6, seed, [kind]) for seed, kind in enumerate(Drawn)]
    one = Fallback([*sources, Wild(V, 6, 9)], enough=4)
    context = context_of(12)
    tree = one.propose(context)
    assert len(set(one._chosen)) > 2
    for row, number in enumerate(one._chosen):
        part = one._trees[number]
        size = part.sizes[row]
        assert (tree.tokens[row], tree.topology.parents[row]) == (part.tokens[row], part.topology.parents[row])
        drawn = np.zeros(size) if part.drawn_BN is None else part.drawn_BN[row, :size]
        assert tree.drawn_BN is not None and (tree.drawn_BN[row, :size] == drawn).all()
        for node in np.flatnonzero(drawn):
            assert tree.laws_BNV is not None and part.laws_BNV is not None
            assert (tree.laws_BNV[row, node] == part.laws_BNV[row, node]).all()


# ---- what the sources are told


def test_a_source_is_told_what_was_kept_of_its_own_proposal() -> None:
    stubs = [Stub("a", [2, 0, 1]), Stub("b", [3, 3, 0]), Stub("c", [1, 1, 1])]
    one, context = Fallback(stubs), context_of(3)
    tree = one.propose(context)
    told(one, context, tree, [[0, 1], [0, 1, 2], [0, 1]])
    assert [kept for _, kept in stubs[0].told] == [[[0, 1], [0], [0, 1]]]
    assert [kept for _, kept in stubs[1].told] == [[[0], [0, 1, 2], [0]]]
    assert [tree.sizes for tree, _ in stubs[1].told] == [(1, 4, 1)], "with the tree that it proposed"
    assert not stubs[2].told, "it was not asked"


def test_a_source_that_reads_states_is_told_everything_whoever_answered() -> None:
    stubs = [Stub("a", [2, 0]), Stub("heads", [4, 4], hears=True)]
    one, context = Fallback(stubs), context_of(2)
    for _ in range(2):
        tree = one.propose(context)
        told(one, context, tree, [[0, 1, 2], [0, 1]])
        assert stubs[1].told[-1] == (tree, [[0, 1, 2], [0, 1]])
        stubs[0]._lengths = [1, 1]
        stubs[1].asked.clear()
    assert not stubs[1].asked and len(stubs[1].told) == 2, "asked or not"


def test_comings_and_goings_reach_every_source() -> None:
    stubs = [Stub("a", [2]), Stub("b", [3], hears=True)]
    one = Fallback(stubs)
    one.admit(context_of(1).rows[0], {1: torch.zeros(0)})
    one.retract([5])
    one.release(0)
    for stub in stubs:
        assert stub.events == [("admit", [1]), ("retract", [5]), ("release", 0)]
    assert one.reads == {1} and one.max_nodes == 3


def test_tallies_name_the_source_that_answered_and_add_up() -> None:
    stubs = [Stub("a", [2, 0, 1]), Stub("b", [3, 3, 0])]
    one, context = Fallback(stubs), context_of(3)
    for _ in range(2):
        told(one, context, one.propose(context), [[0, 1], [0, 1, 2, 3], [0]])
    first, second = one.tallies()
    assert [first.name, second.name] == ["fallback, a", "fallback, b"]
    assert (first.asked, first.hits, first.drafted, first.accepted) == (6, 4, 6, [2])
    assert (second.asked, second.hits, second.drafted, second.accepted) == (2, 2, 6, [2, 2, 2])


def test_every_row_names_the_source_that_answered_for_it() -> None:
    one, context = (
        Fallback([Stub("a", [2, 0, 0]), Fallback([Stub("b", [0, 3, 0]), Stub("c", [1, 1, 1])])]),
        context_of(3),
    )
    one.propose(context)
    assert [one.origins(row, path) for row, path in enumerate([[0, 1, 2], [0, 1], [0]])] == [["a", "a"], ["b"], []]
    assert one.origins(2, [0, 1]) == ["c"]


def test_what_the_sources_had_accepted_is_what_the_engine_had() -> None:
    target = TableNetwork(4, 3, 12)
    networks = {"target": target, "small": Near(target, 0.5, 1)}
    one = engine_of(target, {"drafter": "fallback", "sources": ["maxgram", "small:small", "none"]}, networks)
    outputs = one.generate([[1, 2], [3], [0, 0, 0]], SamplingParams(temperature=0.8, seed=3, max_new_tokens=50))
    tallies: list[Tally] = one.drafter.tallies()
    assert sum(sum(tally.accepted) for tally in tallies) == sum(output.stats.accepted_tokens for output in outputs)
    assert tallies[0].accepted and tallies[1].accepted and not tallies[2].accepted
    steps = sum(output.stats.steps for output in outputs)
    assert tallies[0].hits + tallies[1].hits <= steps and tallies[1].asked <= steps - tallies[0].hits


# ---- fallbacks within fallbacks


def test_a_fallback_as_a_source_learns_only_of_its_own_answers() -> None:
    """And heads in it of all: row 0 is answered by the outer source, row 1 by the inner one's
    first, row 2 by its heads."""
    outer, inner, heads = Stub("outer", [3, 0, 0]), Stub("inner", [0, 2, 0]), Stub("heads", [4, 4, 4], hears=True)
    nested = Fallback([inner, heads])
    one, context = Fallback([outer, nested]), context_of(3)
    tree = one.propose(context)
    kept = [[0, 1, 2, 3], [0, 1], [0, 1, 2]]
    told(one, context, tree, kept)
    assert [kept for _, kept in outer.told] == [[[0, 1, 2, 3], [0], [0]]]
    assert [kept for _, kept in inner.told] == [[[0], [0, 1], [0]]]
    assert [kept for _, kept in heads.told] == [kept]
    assert [tally.accepted for tally in nested.tallies()] == [[1], [1, 1]]


def test_a_fallback_that_was_not_asked_still_tells_its_heads() -> None:
    """From the first step on, and later, when what it last proposed is out of date."""
    outer, inner, heads = Stub("outer", [3]), Stub("inner", [2]), Stub("heads", [4], hears=True)
    one, context = Fallback([outer, Fallback([inner, heads])]), context_of(1)
    for length in (3, 0, 3, 3):
        outer._lengths = [length]
        tree = one.propose(context)
        told(one, context, tree, [list(range(tree.nodes))])
    assert [kept for _, kept in inner.told] == [[[0, 1, 2]]]
    assert [kept for _, kept in heads.told] == [[[0, 1, 2, 3]], [[0, 1, 2]], [[0, 1, 2, 3]], [[0, 1, 2, 3]]]


# ---- the law


def shortest(networks: Mapping[str, TableNetwork], enough: int = 2) -> Callable[[], Drafter]:
    """A drawn chain whose length depends on what was drawn, before another drawn chain."""
    return lambda: Fallback(
        [
            DraftModel.on(networks["small"], Chain(Confidence(threshold=0.5, most=2))),
            DraftModel.on(networks["other"], Chain(Fixed(2))),
        ],
        enough,
    )


@pytest.fixture
def networks() -> dict[str, TableNetwork]:
    target = TableNetwork(3, 3, 2, 1.0)
    return {"target": target, "small": Near(target, 1.0, 1), "other": Near(target, 1.5, 2)}


def off(networks: dict[str, TableNetwork], drafter: Callable[[], Drafter]) -> float:
    wishes = SamplingParams(temperature=1.0, max_new_tokens=3)
    law = engine_law(drafter, networks, [1, 0], wishes)
    return distance(law, plain_law(processed(wishes, networks["target"], [1, 0]), 3))


def test_the_law_is_the_targets_when_a_drawn_proposal_is_short(networks: dict[str, TableNetwork]) -> None:
    assert off(networks, shortest(networks)) < EXACT


def test_to_drop_a_drawn_proposal_for_its_length_would_give_another_law(
    networks: dict[str, TableNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_length(self: Fallback, tree: TokenTree, row: int) -> bool:
        return tree.sizes[row] > self.enough

    monkeypatch.setattr(Fallback, "_answers", by_length)
    assert off(networks, shortest(networks)) > 0.01


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("enough", [1, 3])
def test_the_law_is_the_targets_whatever_the_sources_propose(
    seed: int, enough: int, networks: dict[str, TableNetwork]
) -> None:
    """Certain trees of few nodes, trees of all kinds, sampled trees, and a verified model."""

    def drafter() -> Drafter:
        certain = Wild(3, 3, seed, [Drawn.DETERMINISTIC])
        nested = Fallback([Wild(3, 2, seed + 10), DraftModel.on(networks["small"], SampledTree([2]))])
        return Fallback([certain, nested, Verified(Model(networks["other"], 1), Wild(3, 2, seed + 20), 1)], enough)

    assert off(networks, drafter) < EXACT


def test_rows_with_answers_from_different_sources_say_what_they_say_alone(networks: dict[str, TableNetwork]) -> None:
    prompts = [[1, 2, 1], [0], [2] * 6, [0, 1, 0, 1, 0], [1]]
    wishes = [SamplingParams(temperature=0.5 * (n % 3), seed=n, max_new_tokens=10 + 9 * n) for n in range(5)]

    def one() -> Engine:
        sources: list[Drafter] = [Wild(3, 3, 5), DraftModel.on(networks["small"], Chain(Confidence(0.4, 3)))]
        return engine_of(networks["target"], Fallback(sources, 2), max_rows=3)

    alone = [one().generate([prompt], wish)[0].token_ids for prompt, wish in zip(prompts, wishes, strict=True)]
    together = [output.token_ids for output in one().generate(prompts, wishes)]
    assert together == alone
    assert together[0] == plain(networks["target"], prompts[0], 10)


# ---- heads behind another source


class Bursts(Drafter):
    """Knows what the target will say, five tokens at a time, and says it for many steps on end;
    then nothing for a few."""

    name, max_nodes = "bursts", 5

    def __init__(self, network: Any, silent: Callable[[Row], bool]):
        self._network, self._silent = network, silent

    def propose(self, context: Context) -> TokenTree:
        chains = [
            [row.tokens[-1], *([] if self._silent(row) else greedy(self._network, row.tokens, min(5, depth)))]
            for row, depth in zip(context.rows, context.depths, strict=True)
        ]
        return TokenTree.chain(chains, context.device)


def in_turns(row: Row) -> bool:
    """Nothing for ten tokens of every sixty; other ones for every prompt."""
    return (len(row.tokens) + 11 * row.prompt_length) % 60 < 10


HEADED = [[1, 2, 3], [4], [9, 30, 2, 2, 11, 25, 0, 6, 19, 5, 5, 5, 8]]


@every_kernel
@pytest.mark.parametrize("kind", ["hydra", "hydra++"])
def test_heads_know_the_text_after_another_source_has_answered_for_long(kind: str, kernels: str) -> None:
    """More tokens than the layer reads at once, in one row and not in the others."""
    heads = Watching(some_heads(kind), lively(), kernels)
    one = Engine(heads.model.network, Fallback([Bursts(lively(), in_turns), heads]), max_rows=2)
    heads.model = one.target
    outputs = one.generate(HEADED, SamplingParams(max_new_tokens=130))
    assert [output.token_ids for output in outputs] == [greedy(lively(), prompt, 130) for prompt in HEADED]
    assert 10 < heads.spoken < 100


@every_kernel
@pytest.mark.parametrize("kind", ["hydra", "hydra++"])
def test_heads_of_a_verified_model_that_nobody_asked_for_long_catch_up(kind: str, kernels: str) -> None:
    """The model itself is far behind then: more than it reads in passing. Its heads wait for that one pass."""
    inner = Watching(some_heads(kind), relative(0, 0.1), kernels)
    over = Verified(inner.model, inner, 3)
    one = Engine(lively(), Fallback([Bursts(lively(), in_turns), over]), max_rows=2)
    outputs = one.generate(HEADED, SamplingParams(max_new_tokens=130))
    assert [output.token_ids for output in outputs] == [greedy(lively(), prompt, 130) for prompt in HEADED]
    assert inner.spoken > 20 and inner.silent > 5


@pytest.mark.parametrize("kind", ["hydra", "hydra++"])
def test_heads_behind_another_source_within_a_verified_model(kind: str) -> None:
    """Both at once, and heads in a fallback in a fallback."""
    inner = Watching(some_heads(kind), relative(0, 0.1), "torch", scratch=6)
    sources = Fallback([Wild(VOCAB, 3, 1), inner])
    over = Verified(inner.model, Fallback([Bursts(relative(0, 0.1), in_turns), sources]), 6)
    one = Engine(lively(), over, max_rows=2)
    wishes = [SamplingParams(temperature=0.7 * n, seed=n, max_new_tokens=100) for n in (0, 1, 0)]
    outputs = one.generate(HEADED, wishes)
    for prompt, output in list(zip(HEADED, outputs, strict=True))[::2]:
        assert output.token_ids == greedy(lively(), prompt, 100)
    assert inner.spoken > 5


def now_and_then(row: Row) -> bool:
    return (len(row.tokens) + 3 * row.prompt_length) % 7 < 4


@pytest.mark.parametrize("kind", ["hydra", "hydra++"])
def test_rows_that_stand_still_are_not_read_twice_although_the_heads_are_not_asked(kind: str) -> None:
    """A part of a cascade is asked again without a word from above, and its heads behind another
    source not every time."""
    inner = Watching(some_heads(kind), relative(0, 0.2), "torch", scratch=6)
    below = Fallback([Bursts(relative(0, 0.2), now_and_then), inner])
    over = Cascade([Part(Verified(inner.model, below, 8), 20)])
    outputs = Engine(lively(), over).generate(HEADED, SamplingParams(max_new_tokens=50))
    assert [output.token_ids for output in outputs] == [greedy(lively(), prompt, 50) for prompt in HEADED]
    assert inner.spoken > 20


# ---- descriptions


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "at least two drafters"),
        ({"sources": ["none"]}, "at least two drafters"),
        ({"sources": "none"}, "at least two drafters"),
        ({"sources": 5}, "at least two drafters"),
        ({"sources": ["none", "nobody"]}, "nobody"),
        ({"sources": ["none", 5]}, "not 5"),
        ({"sources": ["none", None]}, "not None"),
        ({"sources": ["none", ["none"]]}, r"not \['none'\]"),
        ({"sources": ["none", "lookup"], "enough": 0}, "enough is a number of tokens, at least 1, not 0"),
        ({"sources": ["none", "lookup"], "enough": "two"}, "enough is a number of tokens, at least 1, not 'two'"),
        ({"sources": ["none", "lookup"], "enough": True}, "at least 1, not True"),
        ({"sources": ["none", "lookup"], "order": 1}, "no setting 'order'"),
    ],
    ids=str,
)
def test_a_fallback_that_cannot_be_is_refused_with_a_sentence(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(DrafterError, match=says) as caught:
        engine_of(TableNetwork(), {"drafter": "fallback", **settings})
    assert "\n" not in str(caught.value)
