"""The word everything else is about: a tree of proposed tokens, and how each of them was drawn.

Node 0 is the newest committed token, which the target has not read yet. Nodes are numbered so that
a parent comes before its children; siblings stand in the order in which they were drawn. A chain is
a tree, and so is a single node: plain decoding is a proposal of nothing.

Shapes: `B` rows, `N` nodes (padded to the largest tree of the batch; `sizes` says how many count), `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Paths = NDArray[np.int32]


class Drawn(IntEnum):
    """How a group of siblings came about. Acceptance is exact only if this is the truth.

    DETERMINISTIC: chosen without chance (top-k, a database hit): the law of each is one-hot.
    WITH_REPLACEMENT: independent draws from the group's law; duplicates may occur.
    WITHOUT_REPLACEMENT: draws from the group's law with the earlier siblings removed and the rest renormalised.
    """

    DETERMINISTIC = 0
    WITH_REPLACEMENT = 1
    WITHOUT_REPLACEMENT = 2


@dataclass(frozen=True)
class Topology:
    """Who is whose child, on the host: per row the parent of every node, -1 for node 0.

    Make it with `of` or `chains`: they give the topologies that come again and again as the same objects, so that their
    tables are computed once.
    """

    parents: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for row in self.parents:
            if row[:1] != (-1,) or any(not 0 <= parent < node for node, parent in enumerate(row[1:], 1)):
                raise ValueError(f"a tree has a node 0 of parent -1, and parents come before their children: not {row}")

    @staticmethod
    def chains(sizes: Sequence[int]) -> Topology:
        """One chain per row; `sizes` count node 0."""
        return _topology(tuple(tuple(range(-1, size - 1)) for size in sizes))

    @staticmethod
    def of(parents: Sequence[Sequence[int]]) -> Topology:
        """From one parent list per row, each starting with -1 for node 0."""
        return _topology(tuple(map(tuple, parents)))

    def behind(self, leads: Sequence[int]) -> Topology:
        """The same trees at the ends of chains: `leads[b]` nodes stand before node 0 of row b,
        whose number they shift."""
        return Topology.of(
            [
                (*range(-1, lead), *(parent + lead for parent in row[1:]))
                for lead, row in zip(leads, self.parents, strict=True)
            ]
        )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Nodes per row."""
        return tuple(map(len, self.parents))

    @cached_property
    def nodes(self) -> int:
        return max(self.sizes)

    @cached_property
    def is_chain(self) -> bool:
        """Every row is a chain."""
        return all(parent == node - 1 for row in self.parents for node, parent in enumerate(row))

    @cached_property
    def paths_BNJ(self) -> Paths:
        """The nodes from 0 to every node, itself the last, and -1 behind that. Padding is a path of its own."""
        depths = self.depths_BN
        paths = np.full((*depths.shape, int(depths.max()) + 1), -1, dtype=np.int32)
        paths[..., 0] = np.arange(self.nodes)
        for table, steps, parents in zip(paths, depths.tolist(), self.parents, strict=True):
            for node, parent in enumerate(parents[1:], 1):
                table[node] = table[parent]
                table[node, steps[node]] = node
        return paths

    @cached_property
    def depths_BN(self) -> Ints:
        """Steps below node 0 (padding: 0)."""
        depths = np.zeros((len(self.parents), self.nodes), dtype=np.int64)
        for row, parents in enumerate(self.parents):
            steps = [0]
            for parent in parents[1:]:
                steps.append(steps[parent] + 1)
            depths[row, : len(steps)] = steps
        return depths

    @cached_property
    def parents_BN(self) -> Ints:
        """The same as a table. Node 0 and padding: 0."""
        padded = [(0, *row[1:], *[0] * (self.nodes - len(row))) for row in self.parents]
        return np.array(padded, dtype=np.int64)

    @cached_property
    def children(self) -> tuple[dict[int, list[int]], ...]:
        """Per row: parent -> its children in drawing order."""
        table: list[dict[int, list[int]]] = []
        for row in self.parents:
            groups: dict[int, list[int]] = {}
            for node, parent in enumerate(row[1:], 1):
                groups.setdefault(parent, []).append(node)
            table.append(groups)
        return tuple(table)

    @cached_property
    def upwards(self) -> tuple[list[int], ...]:
        """Per row: all nodes, every one behind those below it, siblings in drawing order. Node 0 is the last."""
        orders = []
        for children in self.children:
            order, waiting = [], [0]
            while waiting:
                order.append(waiting.pop())
                waiting += children.get(order[-1], [])
            orders.append(order[::-1])
        return tuple(orders)

    def path(self, row: int, node: int) -> list[int]:
        """Nodes from 0 to `node`, both included."""
        found = [node]
        while node:
            node = self.parents[row][node]
            found.append(node)
        return found[::-1]


@lru_cache(maxsize=256)
def _topology(parents: tuple[tuple[int, ...], ...]) -> Topology:
    return Topology(parents)


@dataclass(frozen=True)
class TokenTree:
    """Proposed tokens with parents, and the laws they were drawn from.

    tokens: per row, of every node (on the host; `tokens_BN` is the same on the model's device).
    drawn_BN: one `Drawn` per group of siblings, at the index of their parent (host); None: every
    group is deterministic. laws_BNV: the law of each group, at the index of its parent; rows of
    groups that are deterministic or empty are ignored. Build it with `root`, `chain`,
    `drawn_chain`, `of`, `drawn` or the constructor.
    """

    tokens: Sequence[Sequence[int]]
    topology: Topology
    device: torch.device
    drawn_BN: NDArray[np.uint8] | None = None
    laws_BNV: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if tuple(map(len, self.tokens)) != self.topology.sizes:
            raise ValueError(f"{[len(row) for row in self.tokens]} tokens for {self.topology.sizes} nodes")
        if self.drawn_BN is None and self.laws_BNV is not None:
            raise ValueError("a tree with laws must say how each group of siblings was drawn")
        if self.drawn_BN is None:
            return
        shape = (self.rows, self.nodes)
        if self.drawn_BN.shape != shape:
            raise ValueError(f"drawn has shape {self.drawn_BN.shape}, the tree {shape}")
        if self.drawn_BN.any() and (self.laws_BNV is None or tuple(self.laws_BNV.shape[:2]) != shape):
            raise ValueError("siblings that were drawn by chance need the law they were drawn from")

    @staticmethod
    def root(tokens: Sequence[int], device: torch.device) -> TokenTree:
        """Propose nothing: one node per row."""
        return TokenTree.chain([[token] for token in tokens], device)

    @staticmethod
    def of(tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]], device: torch.device) -> TokenTree:
        """Deterministic trees, one list of tokens and one of parents per row (node 0 included, parent -1)."""
        return TokenTree(tokens, Topology.of(parents), device)

    @staticmethod
    def chain(tokens: Sequence[Sequence[int]], device: torch.device) -> TokenTree:
        """Deterministic chains, node 0 included."""
        return TokenTree(tokens, Topology.chains([len(row) for row in tokens]), device)

    @staticmethod
    def drawn_chain(tokens: Sequence[Sequence[int]], laws_BNV: Tensor) -> TokenTree:
        """Sampled chains: token n + 1 of a row was drawn from `laws_BNV[row, n]`. laws may have N -
        1 or N positions."""
        topology = Topology.chains([len(row) for row in tokens])
        rows, nodes = len(tokens), topology.nodes
        if laws_BNV.shape[1] == nodes - 1:
            laws_BNV = torch.cat((laws_BNV, laws_BNV.new_zeros(rows, 1, laws_BNV.shape[2])), 1)
        drawn = np.full((rows, nodes), Drawn.WITHOUT_REPLACEMENT, dtype=np.uint8)
        return TokenTree(tokens, topology, laws_BNV.device, drawn, laws_BNV)

    @staticmethod
    def drawn(
        tokens: Sequence[Sequence[int]],
        topology: Topology,
        laws: Sequence[Mapping[int, Tensor]],
        device: torch.device,
    ) -> TokenTree:
        """laws: per row, parent -> the law [V] from which its children were drawn without replacement; other groups are
        deterministic."""
        some = next((law for row in laws for law in row.values()), None)
        if some is None:
            return TokenTree(tokens, topology, device)
        table = some.new_zeros(len(tokens), topology.nodes, some.shape[0])
        drawn = np.zeros((len(tokens), topology.nodes), dtype=np.uint8)
        for index, row in enumerate(laws):
            for node, law in row.items():
                table[index, node], drawn[index, node] = law, Drawn.WITHOUT_REPLACEMENT
        return TokenTree(tokens, topology, device, drawn, table)

    @cached_property
    def tokens_BN(self) -> Tensor:
        """int64, padded with 0."""
        nodes = self.nodes
        padded = [[*row, *[0] * (nodes - len(row))] for row in self.tokens]
        return torch.from_numpy(np.array(padded, dtype=np.int64)).to(self.device)

    @property
    def rows(self) -> int:
        return len(self.tokens)

    @property
    def nodes(self) -> int:
        return self.topology.nodes

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.topology.sizes

    @property
    def is_deterministic(self) -> bool:
        return self.drawn_BN is None or not self.drawn_BN.any()
