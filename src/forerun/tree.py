"""The word everything else is about: a tree of proposed tokens, and how each of them was drawn.

Node 0 is the newest committed token, which the target has not read yet. Nodes are numbered so that a parent comes before
its children; siblings stand in the order in which they were drawn. A chain is a tree, and so is a single node: plain
decoding is a proposal of nothing.

Shapes: `B` rows, `N` nodes (padded to the largest tree of the batch; `sizes` says how many count), `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


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
    """Who is whose child, on the host. parents_BN: int64, -1 for node 0 and for padding; sizes: nodes per row.

    A drafter with a static tree builds one topology and reuses it: every index tensor is computed once.
    """

    parents_BN: Ints
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        parents = self.parents_BN
        rows, nodes = parents.shape
        if len(self.sizes) != rows or min(self.sizes, default=1) < 1 or max(self.sizes, default=1) > nodes:
            raise ValueError(f"a tree needs between 1 and {nodes} nodes in each of {rows} rows, not {self.sizes}")
        inside = np.arange(nodes) < np.asarray(self.sizes)[:, None]
        inside[:, 0] = False
        if (inside & ((parents < 0) | (parents >= np.arange(nodes)))).any() or (parents[~inside] != -1).any():
            raise ValueError("parents must come before their children; node 0 and padding have parent -1")

    @staticmethod
    def chains(sizes: Sequence[int]) -> Topology:
        """One chain per row; `sizes` count node 0."""
        nodes = max(sizes)
        parents = np.tile(np.arange(-1, nodes - 1), (len(sizes), 1))
        parents[np.arange(nodes) >= np.asarray(sizes)[:, None]] = -1
        return Topology(parents, tuple(sizes))

    @staticmethod
    def of(parents: Sequence[Sequence[int]]) -> Topology:
        """From one parent list per row, each starting with -1 for node 0."""
        sizes = tuple(len(row) for row in parents)
        table = np.full((len(parents), max(sizes)), -1, dtype=np.int64)
        for row, values in enumerate(parents):
            table[row, : len(values)] = values
        return Topology(table, sizes)

    @property
    def nodes(self) -> int:
        return int(self.parents_BN.shape[1])

    @cached_property
    def is_chain(self) -> bool:
        """Every row is a chain (the padding behind it does not matter)."""
        expected = np.arange(-1, self.nodes - 1)
        return bool(((self.parents_BN == expected) | (self.parents_BN == -1)).all())

    @cached_property
    def ancestors_BNN(self) -> NDArray[np.bool_]:
        """[b, n, m]: m is n or an ancestor of n. Padding sees itself alone."""
        rows, nodes = self.parents_BN.shape
        seen = np.zeros((rows, nodes, nodes), dtype=np.bool_)
        every = np.arange(rows)
        for node in range(nodes):
            parent = self.parents_BN[:, node]
            if node:
                seen[:, node] = seen[every, parent] & (parent >= 0)[:, None]
            seen[:, node, node] = True
        return seen

    @cached_property
    def depths_BN(self) -> Ints:
        """Steps below node 0 (padding: 0)."""
        if self.is_chain:
            return self.parents_BN + 1
        depths: Ints = self.ancestors_BNN.sum(-1, dtype=np.int64) - 1
        return depths

    @cached_property
    def children(self) -> tuple[dict[int, list[int]], ...]:
        """Per row: parent -> its children in drawing order."""
        table: list[dict[int, list[int]]] = []
        for row, size in zip(self.parents_BN.tolist(), self.sizes, strict=True):
            groups: dict[int, list[int]] = {}
            for node in range(1, size):
                groups.setdefault(row[node], []).append(node)
            table.append(groups)
        return tuple(table)

    def path(self, row: int, node: int) -> list[int]:
        """Nodes from 0 to `node`, both included."""
        return [int(m) for m in np.flatnonzero(self.ancestors_BNN[row, node])]


@dataclass(frozen=True)
class TokenTree:
    """Proposed tokens with parents, and the laws they were drawn from.

    tokens_BN: int64 on the model's device. drawn_BN: one `Drawn` per group of siblings, at the index of their parent (host);
    None: every group is deterministic. laws_BNV: the law of each group, at the index of its parent; rows of groups that are
    deterministic or empty are ignored. Build it with `root`, `chain`, `drawn_chain`, `of` or the constructor.
    """

    tokens_BN: Tensor
    topology: Topology
    drawn_BN: NDArray[np.uint8] | None = None
    laws_BNV: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape = self.topology.parents_BN.shape
        if tuple(self.tokens_BN.shape) != shape:
            raise ValueError(f"{tuple(self.tokens_BN.shape)} tokens for a topology of {shape}")
        if self.drawn_BN is None and self.laws_BNV is not None:
            raise ValueError("a tree with laws must say how each group of siblings was drawn")
        if self.drawn_BN is None:
            return
        if self.drawn_BN.shape != shape:
            raise ValueError(f"drawn has shape {self.drawn_BN.shape}, the tree {shape}")
        if self.drawn_BN.any() and (self.laws_BNV is None or tuple(self.laws_BNV.shape[:2]) != shape):
            raise ValueError("siblings that were drawn by chance need the law they were drawn from")

    @staticmethod
    def root(tokens: Sequence[int], device: torch.device) -> TokenTree:
        """Propose nothing: one node per row."""
        return TokenTree(torch.tensor(tokens, device=device)[:, None], Topology.chains([1] * len(tokens)))

    @staticmethod
    def of(tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]], device: torch.device) -> TokenTree:
        """Deterministic trees, one list of tokens and one of parents per row (node 0 included, parent -1)."""
        topology = Topology.of(parents)
        return TokenTree(_padded(tokens, topology.nodes, device), topology)

    @staticmethod
    def chain(tokens: Sequence[Sequence[int]], device: torch.device) -> TokenTree:
        """Deterministic chains, node 0 included."""
        topology = Topology.chains([len(row) for row in tokens])
        return TokenTree(_padded(tokens, topology.nodes, device), topology)

    @staticmethod
    def drawn_chain(tokens_BN: Tensor, sizes: Sequence[int], laws_BNV: Tensor) -> TokenTree:
        """Sampled chains: token n + 1 of a row was drawn from `laws_BNV[row, n]`. laws may have N - 1 or N positions."""
        rows, nodes = tokens_BN.shape
        if laws_BNV.shape[1] == nodes - 1:
            laws_BNV = torch.cat((laws_BNV, laws_BNV.new_zeros(rows, 1, laws_BNV.shape[2])), 1)
        drawn = np.full((rows, nodes), Drawn.WITHOUT_REPLACEMENT, dtype=np.uint8)
        return TokenTree(tokens_BN, Topology.chains(sizes), drawn, laws_BNV)

    @property
    def rows(self) -> int:
        return int(self.tokens_BN.shape[0])

    @property
    def nodes(self) -> int:
        return int(self.tokens_BN.shape[1])

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.topology.sizes

    @property
    def is_deterministic(self) -> bool:
        return self.drawn_BN is None or not self.drawn_BN.any()


def _padded(tokens: Sequence[Sequence[int]], nodes: int, device: torch.device) -> Tensor:
    return torch.tensor([[*row, *[0] * (nodes - len(row))] for row in tokens], dtype=torch.int64, device=device)
