"""A block drafter's network as a backend gets it, and what it makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from forerun.nn.cache import Cache


@dataclass(frozen=True)
class BlockWeights:
    """What drafts blocks of `count` rows, the anchor's among them (`drafters/block/network.py` says how).

    stack: its layers, a `Transformer` without a vocabulary. before, behind: the tables of the term that ties a token to
    the one above it, None without. known: the tokens that can be proposed, ascending, None: all; the rows of `behind`
    are theirs. temperature: of the laws that trees grow by.
    """

    count: int
    stack: nn.Module
    mask: Tensor  # [D]
    fuse: Tensor  # [D, M D]
    fuse_norm: Tensor  # [D]
    before: Tensor | None  # [V, R]
    behind: Tensor | None  # [V or fewer, R]
    known: Tensor | None = None
    temperature: float = 1.0


@dataclass(frozen=True)
class TreeLimits:
    """Of one row's tree: the most nodes, node 0 not counted, how deep, and the least log-probability of a path."""

    nodes: int
    depth: int
    least: float


@dataclass(frozen=True)
class BestTree:
    """The most probable paths of a row, the root first and parents before children: tokens, parents, log-probabilities
    of the paths."""

    tokens: list[int]
    parents: list[int]
    log_probs: list[float]


class BlockNetwork(Protocol):
    """Blocks on a backend. Their memory is a `Cache` that others look after; behind the entries of a row it needs room
    for `count` more.

    All raise IndexError for tokens outside the vocabulary, and where the cache or the longest text ends.
    """

    count: int

    def read(self, cache: Cache, start: int, states: Sequence[Tensor]) -> None:
        """Remember what the target said of the next tokens of the rows in slots from `start` on, [n, M D] each."""

    def logits(self, cache: Cache, roots: Sequence[int]) -> Tensor:
        """What may follow these roots at every depth, [B, W, V], without the term of the token above and whatever the
        temperature; fp32. Where only some tokens are known, of these alone."""
        ...

    def grow(self, cache: Cache, roots: Sequence[int], limits: Sequence[TreeLimits]) -> list[BestTree]:
        """The best-first tree of every row."""
        ...
