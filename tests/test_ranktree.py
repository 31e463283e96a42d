"""Rank trees: the published ones number for number, tables that say what the paths say, and
searches that find the best."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain, combinations, pairwise, product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.errors import DrafterError
from forerun.ranktree import PUBLISHED, Path, RankTree, grown, most_followed

relaxed = settings(max_examples=60, deadline=None)
MC_SIM = RankTree.named("mc_sim_7b_63")


@st.composite
def path_sets(draw: st.DrawFn) -> list[Path]:
    """Closed under prefixes, in an order in which a tree may grow; ranks need not be contiguous."""
    paths: list[Path] = []
    for _ in range(draw(st.integers(1, 12))):
        above = draw(st.sampled_from([(), *paths]))
        path = (*above, draw(st.integers(0, 6)))
        if path not in paths and len(path) <= 5:
            paths.append(path)
    return paths


# ---- the published trees


@pytest.mark.parametrize(
    ("name", "depths", "leaves", "ones"),
    [
        ("mc_sim_7b_63", [10, 28, 23, 2], 42, 207),
        ("vicuna_7b_stage1", [10, 32, 20, 1], 44, 202),
        ("vicuna_13b_stage1", [10, 29, 23, 1], 44, 205),
        ("vicuna_33b_stage1", [10, 34, 19], 46, 199),
        ("vicuna_7b_stage2", [10, 23, 23, 7], 42, 217),
        ("vicuna_13b_stage2", [10, 19, 25, 9], 42, 223),
        ("vicuna_33b_stage2", [10, 24, 24, 5], 43, 214),
        ("zephyr_stage2", [10, 27, 23, 3], 44, 209),
        ("vicuna_7b_stage1_ablation", [10, 21, 25, 7], 42, 219),
    ],
)
def test_a_published_tree_is_the_published_one(name: str, depths: list[int], leaves: int, ones: int) -> None:
    """The figures are those of Medusa's own buffers for its medusa_choices.py."""
    tree = RankTree.named(name)
    topology = tree.topology(1)
    paths = topology.paths_BNJ[0].tolist()
    ancestors = np.array([[node in path for node in range(64)] for path in paths])
    assert tree.size + 1 == topology.nodes == 64
    assert [len(level.ranks) for level in tree.levels] == depths and tree.depth == len(depths)
    assert tree.size + 1 - len(set(tree.parents[1:])) == leaves
    assert ancestors.sum() == ones
    assert ancestors.diagonal().all() and (ancestors == np.tril(ancestors)).all()
    assert ((ancestors.astype(int) @ ancestors > 0) == ancestors).all(), "an ancestor's ancestor is one"
    assert topology.depths_BN[0].tolist() == [0, *(len(path) for path in tree.nodes)]
    for above in [(), *tree.nodes]:
        ranks = [path[-1] for path in tree.nodes if path[:-1] == above]
        assert ranks == list(range(len(ranks)))


def test_every_published_tree_was_compared() -> None:
    assert len(PUBLISHED) == 9
    with pytest.raises(DrafterError, match=r"no published tree 'mc_sim'.*mc_sim_7b_63"):
        RankTree.named("mc_sim")


def retrieve_rows(tree: RankTree) -> list[list[int]]:
    """The reference's rows: the sorted paths are walked backwards, and each that is on no row yet
    makes one, padded with -1."""
    number = {(): 0} | {path: node for node, path in enumerate(tree.nodes, 1)}
    covered: set[Path] = set()
    rows = []
    for path in reversed(tree.nodes):
        prefixes = [path[:depth] for depth in range(len(path) + 1)]
        if path not in covered:
            rows.append([*(number[prefix] for prefix in prefixes), *[-1] * (tree.depth - len(path))])
        covered.update(prefixes)
    return rows


def test_the_default_tree_gives_the_references_buffers() -> None:
    """Not what we compute with, but what shows that our numbering is theirs."""
    indices = [0, *(1 + (len(path) - 1) * 10 + path[-1] for path in MC_SIM.nodes)]
    assert max(indices) == 32
    rows = retrieve_rows(MC_SIM)
    assert np.array(rows).shape == (42, 5)
    assert rows[0] == [0, 1, 11, 39, 63]
    assert sum(-1 in row for row in rows) == 40 and sum(row.count(-1) for row in rows) == 58
    for row in rows:
        nodes = [node for node in row if node >= 0]
        assert MC_SIM.topology(1).path(0, nodes[-1]) == nodes


def test_the_default_tree_is_grown_with_hydras_counts() -> None:
    """n: children of every parent that is expanded; e: how many of them are parents again; from hydra.md, section 3."""
    counts = [np.bincount(level.parents).tolist() for level in MC_SIM.levels]
    assert counts == [[10], [10, 7, 3, 2, 1, 1, 1, 1, 1, 1], [10, 3, 2, 1, 1, 1, 1, 1, 2, 1], [2]]
    expanded = [
        np.bincount(level.parents[level.grows], minlength=len(count)).tolist()
        for level, count in zip(MC_SIM.levels, counts, strict=True)
    ]
    assert expanded == [[10], [8, 1, 1, *[0] * 7], [1, *[0] * 9], [0]]
    assert [len(count) for count in counts] == [1, 10, 10, 1], "rows that each head is asked about"
    assert MC_SIM.widest == 10 and [level.widest for level in MC_SIM.levels] == [10, 10, 10, 2]


# ---- tables


@relaxed
@given(path_sets())
def test_levels_say_what_the_paths_say(paths: list[Path]) -> None:
    tree = RankTree(paths)
    assert tree.nodes == sorted(paths, key=lambda path: (len(path), path))
    expanding: list[Path] = [()]
    for depth, level in enumerate(tree.levels, 1):
        walked = [(*expanding[parent], rank) for parent, rank in zip(level.parents, level.ranks, strict=True)]
        assert walked == [path for path in tree.nodes if len(path) == depth]
        assert tree.nodes[level.first - 1] == walked[0]
        assert level.widest == max(path[-1] for path in walked) + 1
        expanding = [walked[place] for place in level.grows]
        assert expanding == [path for path in walked if any(p[:-1] == path for p in paths)]
    assert not expanding and len(tree.levels) == tree.depth
    topology = tree.topology(3)
    for node, path in enumerate(tree.nodes, 1):
        assert [(), *tree.nodes][tree.parents[node]] == path[:-1]
        assert topology.depths_BN[2, node] == len(path)
    assert tree.topology(3) is topology


@relaxed
@given(path_sets(), st.randoms(use_true_random=False))
def test_the_order_of_the_paths_does_not_matter_to_the_tables(paths: list[Path], luck: random.Random) -> None:
    one, other = RankTree(paths), RankTree(luck.sample(paths, len(paths)))
    assert one.nodes == other.nodes and one.parents == other.parents
    for mine, theirs in zip(one.levels, other.levels, strict=True):
        for name in ("parents", "ranks", "grows", "first"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))


def test_an_order_in_which_the_tree_can_grow_is_kept_and_any_other_is_by_depth() -> None:
    assert RankTree([[1], [0], [1, 1], [0, 0]]).paths == [(1,), (0,), (1, 1), (0, 0)]
    assert RankTree([[1, 1], [1], [0]]).paths == [(0,), (1,), (1, 1)]
    assert RankTree([[1], [0]]) != RankTree([[0], [1]]) and RankTree([[0]]) == RankTree.chain(1) != 3
    assert len({RankTree([[0]]), RankTree.chain(1), RankTree.chain(2)}) == 2


@relaxed
@given(path_sets(), st.integers(-1, 6), st.integers(-1, 13))
def test_a_part_is_the_best_of_what_is_shallow_enough(paths: list[Path], depth: int, size: int) -> None:
    tree = RankTree(paths)
    kept = [path for path in tree.paths if len(path) <= depth][: max(0, size)]
    part = tree.within(depth, size)
    assert (part.paths if part else []) == kept
    assert tree.within(depth, size) is part, "made once"
    if len(kept) == len(paths):
        assert part is tree


def test_a_part_that_is_cut_both_ways_is_full() -> None:
    """The nodes that are too deep do not count."""
    assert RankTree([[0], [0, 0], [1], [2]]).within(1, 2) == RankTree([[0], [1]])


@relaxed
@given(path_sets(), st.integers(0, 5))
def test_a_part_that_is_only_cut_by_depth_is_the_beginning_of_the_nodes(paths: list[Path], depth: int) -> None:
    """The drafter relies on it for rows that have little room left."""
    tree = RankTree(paths)
    part = tree.within(depth, tree.size)
    size = part.size if part else 0
    assert (part.nodes if part else []) == tree.nodes[:size]
    assert part is None or part.parents == tree.parents[: size + 1]


@relaxed
@given(path_sets(), st.lists(st.integers(0, 7), max_size=7))
def test_a_text_is_followed_as_deep_as_its_ranks_are_paths(paths: list[Path], ranks: list[int]) -> None:
    deepest = max([len(path) for path in paths if path == tuple(ranks[: len(path)])], default=0)
    assert RankTree(paths).followed(ranks) == deepest


# ---- what is not a tree


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        ([], "no paths"),
        ([[]], "not a path"),
        ([[0], [-1]], r"\[-1\] is not a path"),
        ([[0], [0, 1.0]], "not a path"),
        ([[True]], "not a path"),
        ([["0"]], "not a path"),
        ([[0], [1], [0]], r"the path \[0\] twice"),
        ([[0], [1, 0]], r"\[1, 0\] without \[1\]"),
        ([[0], [0, 0, 0]], r"\[0, 0, 0\] without \[0, 0\]"),
        ([[0, 0]], r"\[0, 0\] without \[0\]"),
    ],
    ids=str,
)
def test_what_is_not_a_tree_is_refused_with_a_sentence(paths: list[list[int]], says: str) -> None:
    with pytest.raises(DrafterError, match=says) as caught:
        RankTree(paths)
    assert "\n" not in str(caught.value)


# ---- searches


VECTOR = [[0.60, 0.15, 0.08, 0.04], [0.35, 0.12, 0.07, 0.05], [0.22, 0.09, 0.06, 0.04]]


def expected(tree: RankTree, accuracies: list[list[float]]) -> float:
    """Accepted draft tokens per step, if heads were independent."""
    return sum(prod(accuracies[depth][rank] for depth, rank in enumerate(path)) for path in tree.nodes)


@pytest.mark.parametrize(
    ("size", "added", "gain"),
    [
        (1, [(0,)], 0.60),
        (2, [(0, 0)], 0.81),
        (3, [(1,)], 0.96),
        (5, [(2,), (0, 1)], 1.112),
        (8, [(1, 0), (0, 0, 0), (0, 2)], 1.2527),
        (12, [(3,), (0, 3), (2, 0), (0, 0, 1)], 1.3696),
    ],
)
def test_growing_reproduces_the_vector_of_the_specification(size: int, added: list[Path], gain: float) -> None:
    tree = grown(VECTOR, size)
    assert set(tree.paths[size - len(added) :]) == set(added)
    assert expected(tree, VECTOR) == pytest.approx(gain, abs=5e-5)


def all_trees(heads: int, ranks: int, size: int) -> list[RankTree]:
    every = list(chain.from_iterable(product(range(ranks), repeat=depth) for depth in range(1, heads + 1)))
    chosen = (set(paths) for paths in combinations(every, size))
    return [RankTree(sorted(c)) for c in chosen if all(len(path) == 1 or path[:-1] in c for path in c)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_a_grown_tree_is_the_best_of_all_trees_of_its_size(seed: int, size: int) -> None:
    luck = np.random.default_rng(seed)
    accuracies = [sorted(luck.dirichlet(np.ones(4))[:3].tolist(), reverse=True) for _ in range(2 if seed % 2 else 3)]
    accuracies = [head[:2] if seed % 2 == 0 else head for head in accuracies]
    best = max(expected(tree, accuracies) for tree in all_trees(len(accuracies), len(accuracies[0]), size))
    assert expected(grown(accuracies, size), accuracies) == pytest.approx(best)


@relaxed
@given(
    st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 40),
)
def test_growing_only_adds_and_adds_the_most_probable_first(counts: list[list[int]], size: int) -> None:
    """Whatever the accuracies, also zero and equal ones; and it stops when there is nothing left to add."""
    accuracies = [sorted((count / 20 for count in head), reverse=True) for head in counts]
    tree = grown(accuracies, size)
    whole = sum(prod(map(len, accuracies[:depth])) for depth in range(1, len(accuracies) + 1))
    assert tree.size == min(size, whole)
    assert grown(accuracies, size + 1).paths[: tree.size] == tree.paths
    gains = [prod(accuracies[depth][rank] for depth, rank in enumerate(path)) for path in tree.paths]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(gains))


def test_equal_probabilities_go_to_the_shallower_then_to_the_lower_rank() -> None:
    assert grown([[0.5, 0.5], [1.0]], 4).paths == [(0,), (1,), (0, 0), (1, 0)]


@pytest.mark.parametrize(("accuracies", "size"), [([], 3), ([[]], 3), ([[0.5]], 0)], ids=str)
def test_nothing_to_grow_from_is_refused(accuracies: list[list[float]], size: int) -> None:
    with pytest.raises(DrafterError, match=f"no tree of {size} nodes"):
        grown(accuracies, size)


def walks(seed: int, ranks: int, heads: int, count: int = 60) -> tuple[list[Path], Counter[Path]]:
    """Texts as paths, and how often each prefix of one was followed."""
    luck = random.Random(seed)
    texts = [tuple(luck.choice([0, 0, *range(ranks)]) for _ in range(luck.randint(0, heads))) for _ in range(count)]
    return texts, Counter(text[:depth] for text in texts for depth in range(1, len(text) + 1))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_the_most_followed_paths_are_the_best_tree_of_their_size(seed: int, size: int) -> None:
    """Best: the texts go deepest down it."""
    ranks, heads = (3, 2) if seed % 2 else (2, 3)
    texts, counts = walks(seed, ranks, heads)
    tree = most_followed(counts, size)
    assert tree.size == min(size, len(counts))
    deep = {t: sum(t.followed(text) for text in texts) for t in [tree, *all_trees(heads, ranks, size)]}
    assert deep[tree] == max(deep.values())
    assert most_followed(counts, size + 1).paths[:size] == tree.paths


def test_equally_followed_paths_are_the_shallower_then_the_lower() -> None:
    assert most_followed({(1,): 2, (0, 0): 2, (0,): 2, (0, 0, 0): 1}, 3).paths == [(0,), (1,), (0, 0)]
