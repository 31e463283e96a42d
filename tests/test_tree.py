"""Trees: what the index tables say is what walking from parent to parent says, and wrong trees are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.tree import Drawn, TokenTree, Topology

CPU = torch.device("cpu")


@st.composite
def parent_lists(draw: st.DrawFn) -> list[int]:
    size = draw(st.integers(1, 9))
    return [-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))]


rows_of_parents = st.lists(parent_lists(), min_size=1, max_size=4)


def ancestors(parents: list[int], node: int) -> list[int]:
    """From node 0 down to the node."""
    return [0] if node == 0 else [*ancestors(parents, parents[node]), node]


def visited(children: dict[int, list[int]], node: int) -> list[int]:
    """Everything below a node, child by child, and the node."""
    return [*(found for child in children.get(node, []) for found in visited(children, child)), node]


@settings(max_examples=100, deadline=None)
@given(rows_of_parents)
def test_tables_say_what_walking_says(rows: list[list[int]]) -> None:
    topology = Topology.of(rows)
    assert topology.sizes == tuple(map(len, rows)) and topology.nodes == max(map(len, rows))
    for row, parents in enumerate(rows):
        for node in range(topology.nodes):
            inside = node < len(parents)
            path = ancestors(parents, node) if inside else [node]
            table = topology.paths_BNJ[row, node].tolist()
            assert table == path + [-1] * (len(table) - len(path))
            assert topology.depths_BN[row, node] == (len(path) - 1 if inside else 0)
            if inside:
                assert topology.path(row, node) == path
                children = [child for child, parent in enumerate(parents) if parent == node]
                assert topology.children[row].get(node, []) == children
            assert topology.parents_BN[row, node] == (max(0, parents[node]) if inside else 0)
        assert topology.upwards[row] == visited(topology.children[row], 0)
    assert topology.is_chain == all(parents == list(range(-1, len(parents) - 1)) for parents in rows)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_chains_are_trees_without_branches(sizes: list[int]) -> None:
    chains = Topology.chains(sizes)
    same = Topology.of([list(range(-1, size - 1)) for size in sizes])
    assert chains.is_chain and chains == same and chains.sizes == same.sizes
    assert (chains.depths_BN == (same.paths_BNJ >= 0).sum(-1) - 1).all()


def test_a_topology_that_comes_again_is_the_same_object() -> None:
    assert Topology.chains([1, 2]) is Topology.of([[-1], [-1, 0]]) is Topology.chains((1, 2))


def test_one_branch_among_chains_makes_the_batch_no_chain() -> None:
    assert not Topology.of([[-1, 0, 1], [-1, 0, 0]]).is_chain
    assert not Topology.of([[-1, 0, 0]]).is_chain
    assert Topology.of([[-1], [-1, 0]]).is_chain


@pytest.mark.parametrize(
    "parents",
    [
        [[-1, 1]],  # its own parent
        [[-1, 2, 0]],  # a parent that comes later
        [[-1, -1]],  # a second root
        [[0, 0]],  # a root with a parent
        [[-1, 0], []],  # no root
        [[-1, 5]],  # a parent outside
        [[-1, -2]],  # a parent before all
    ],
)
def test_what_is_no_tree_is_refused(parents: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"parent"):
        Topology.of(parents)


def test_a_chain_has_a_node_0() -> None:
    with pytest.raises(ValueError, match=r"node 0"):
        Topology.chains([2, 0])


@settings(max_examples=30, deadline=None)
@given(rows_of_parents)
def test_a_deterministic_tree_says_so_and_is_padded(rows: list[list[int]]) -> None:
    tokens = [[10 * row + node for node in range(len(parents))] for row, parents in enumerate(rows)]
    tree = TokenTree.of(tokens, rows, CPU)
    assert tree.is_deterministic and tree.tokens_BN.dtype == torch.int64
    assert (tree.rows, tree.nodes, tree.sizes) == (len(rows), max(map(len, rows)), tuple(map(len, rows)))
    for row, values in enumerate(tokens):
        assert tree.tokens_BN[row, : len(values)].tolist() == values
        assert not tree.tokens_BN[row, len(values) :].any()


def test_the_makers_agree() -> None:
    chain = TokenTree.chain([[1, 2, 3], [4]], CPU)
    same = TokenTree.of([[1, 2, 3], [4]], [[-1, 0, 1], [-1]], CPU)
    assert (chain.tokens_BN == same.tokens_BN).all() and chain.sizes == same.sizes
    root = TokenTree.root([7, 8], CPU)
    assert root.tokens_BN.tolist() == [[7], [8]] and root.sizes == (1, 1) and root.is_deterministic


@pytest.mark.parametrize("positions", [2, 3])
def test_a_drawn_chain_knows_the_law_of_every_token(positions: int) -> None:
    laws = torch.rand(2, positions, 5)
    tree = TokenTree.drawn_chain([[1, 2, 3], [4]], laws)
    assert not tree.is_deterministic and tree.topology.is_chain and tree.sizes == (3, 1)
    assert tree.laws_BNV is not None and tree.laws_BNV.shape == (2, 3, 5)
    assert (tree.laws_BNV[:, :2] == laws[:, :2]).all()
    assert tree.drawn_BN is not None and (tree.drawn_BN == Drawn.WITHOUT_REPLACEMENT).all()


def test_a_tree_that_does_not_say_how_it_was_drawn_is_refused() -> None:
    topology, tokens = Topology.chains([2]), [[1, 2]]
    drawn = np.full((1, 2), Drawn.WITH_REPLACEMENT, dtype=np.uint8)
    laws = torch.rand(1, 2, 4)
    TokenTree(tokens, topology, CPU, drawn, laws)
    for wrong in (
        lambda: TokenTree(tokens, topology, CPU, None, laws),
        lambda: TokenTree(tokens, topology, CPU, drawn, None),
        lambda: TokenTree(tokens, topology, CPU, drawn, laws[:, :1]),
        lambda: TokenTree(tokens, topology, CPU, drawn[:, :1], laws),
        lambda: TokenTree([[1]], topology, CPU, drawn, laws),
    ):
        with pytest.raises(ValueError):
            wrong()
    assert TokenTree(tokens, topology, CPU, np.zeros((1, 2), dtype=np.uint8)).is_deterministic
