"""Static draft trees: a set of rank paths, the same at every step.

A path [r1, ..., rj] follows, from the root, the r1-th best token of the first head, below it the r2-th best of the
second, and so on (ranks from 0). What the tokens are changes from step to step; who hangs below whom does not, so
every index that growing such a tree needs is computed once.

The published trees are those of Medusa (arXiv 2401.10774, its medusa_choices.py); `grown` is its search by marginal
accuracies (section 2.3.3), `most_followed` the search by observed paths that dependent heads need."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from forerun.errors import DrafterError
from forerun.tree import Ints, Paths, Topology

Path = tuple[int, ...]

PUBLISHED = {
    "mc_sim_7b_63": "10 / 10,7,3,2,1,1,1,1,1,1 / 0:10,3,2,1,1,1,1,1 1:2 2:1 / 00:2",
    "vicuna_7b_stage1": "10 / 10,7,4,3,2,2,1,1,1,1 / 0:9,3,2,1,1,1 1:2 2:1 / 00:1",
    "vicuna_13b_stage1": "10 / 10,7,4,2,2,1,1,1,1 / 0:10,4,2,1,1,1 1:2,1 2:1 / 00:1",
    "vicuna_33b_stage1": "10 / 10,8,5,3,2,2,1,1,1,1 / 0:9,3,2,1,1 1:2 2:1",
    "vicuna_7b_stage2": "10 / 10,5,2,2,1,1,1,1 / 0:9,4,2,1,1,1 1:3,1 2:1 / 00:4,1,1 01:1",
    "vicuna_13b_stage2": "10 / 10,4,2,1,1,1 / 0:10,4,2,1,1,1 1:3,1 2:1 3:1 / 00:4,2,1 01:1 10:1",
    "vicuna_33b_stage2": "10 / 10,5,3,2,1,1,1,1 / 0:10,4,2,1,1,1 1:3,1 2:1 / 00:3,1 01:1",
    "zephyr_stage2": "10 / 10,6,4,2,2,1,1,1 / 0:10,4,2,1,1,1 1:2,1 2:1 / 00:2,1",
    "vicuna_7b_stage1_ablation": "10 / 10,4,2,2,1,1,1 / 0:10,4,2,1,1,1 1:3,1 2:1 3:1 / 00:4,1,1 01:1",
}
"""Medusa's trees by name. Level by level: `prefix:a,b,c` are the numbers of children of the nodes prefix0, prefix1,
prefix2; children have the ranks 0 up."""


@dataclass(frozen=True)
class Level:
    """The nodes of one depth. first: the number of the first of them. parents: for each, the place
    of its parent among the nodes above that have children; ranks: which of that parent's best
    tokens it is. grows: the places, within this level, of the nodes that have children. widest: the
    most ranks that are looked at."""

    first: int
    parents: Ints
    ranks: Ints
    grows: Ints

    @property
    def widest(self) -> int:
        return int(self.ranks.max()) + 1


class RankTree:
    """Paths of ranks, closed under prefixes. Nodes are numbered by (length, path); node 0 is the root.

    `paths` keeps the order given, best first, if no path comes before its prefix there: a smaller
    budget takes the first of them. Raises DrafterError for what is not a tree.
    """

    def __init__(self, paths: Sequence[Sequence[int]]):
        given = [tuple(path) for path in paths]
        _demand_tree(given)
        self.paths = given if _is_grown_in_order(given) else sorted(given, key=_by_depth)
        self.nodes = sorted(given, key=_by_depth)

    @staticmethod
    def named(name: str) -> RankTree:
        """One of the published trees."""
        if name not in PUBLISHED:
            raise DrafterError(f"there is no published tree {name!r}: there are {', '.join(PUBLISHED)}")
        return RankTree(_decoded(PUBLISHED[name]))

    @staticmethod
    def chain(length: int) -> RankTree:
        return RankTree([(0,) * depth for depth in range(1, length + 1)])

    @property
    def size(self) -> int:
        """Nodes below the root."""
        return len(self.nodes)

    @cached_property
    def depth(self) -> int:
        return len(self.nodes[-1])

    @cached_property
    def widest(self) -> int:
        """The most ranks that are looked at in any level."""
        return max(level.widest for level in self.levels)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """Of every node, the root (-1) included."""
        return (-1, *(self._number[path[:-1]] for path in self.nodes))

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        by_depth = [[path for path in self.nodes if len(path) == depth] for depth in range(1, self.depth + 1)]
        inner = {path[:-1] for path in self.nodes}
        levels: list[Level] = []
        above: dict[Path, int] = {(): 0}
        for paths in by_depth:
            grows = [place for place, path in enumerate(paths) if path in inner]
            levels.append(
                Level(
                    first=self._number[paths[0]],
                    parents=np.array([above[path[:-1]] for path in paths]),
                    ranks=np.array([path[-1] for path in paths]),
                    grows=np.array(grows, dtype=np.int64),
                )
            )
            above = {paths[place]: row for row, place in enumerate(grows)}
        return tuple(levels)

    @cached_property
    def entries(self) -> tuple[int, ...]:
        """For every node, the root included, which scratch entry of a model holds it once the nodes
        that have children were read level by level; -1 for those that were not read."""
        entries, held = [-1] * (self.size + 1), 0
        for level in self.levels:
            for place, node in enumerate((level.first + level.grows).tolist()):
                entries[node] = held + place
            held += len(level.grows)
        return tuple(entries)

    @cached_property
    def frontiers(self) -> tuple[Paths, ...]:
        """Per level, [W, J]: the entries on the path to each node that has children, itself last, without the root."""
        return tuple(
            np.array([self._path_entries(node) for node in (level.first + level.grows).tolist()], dtype=np.int32)
            for level in self.levels
        )

    def _path_entries(self, node: int) -> list[int]:
        path = self.nodes[node - 1]
        return [self.entries[self._number[path[: depth + 1]]] for depth in range(len(path))]

    def topology(self, rows: int) -> Topology:
        """The same tree for so many rows."""
        return Topology.of((self.parents,) * rows)

    @cached_property
    def _number(self) -> dict[Path, int]:
        return {path: number for number, path in enumerate([(), *self.nodes])}

    @cached_property
    def _parts(self) -> dict[tuple[int, int], RankTree | None]:
        return {}

    def within(self, depth: int, size: int) -> RankTree | None:
        """Its best `size` nodes of at most this depth; None where that leaves nothing."""
        if depth >= self.depth and size >= self.size:
            return self
        key = (min(depth, self.depth), min(size, self.size))
        if key not in self._parts:
            paths = [path for path in self.paths if len(path) <= depth][: max(0, size)]
            self._parts[key] = RankTree(paths) if paths else None
        return self._parts[key]

    def nodes_of(self, part: RankTree | None) -> list[int]:
        """The numbers that the nodes of a part of this tree have here, the root first; None is the root alone."""
        return [0, *(self._number[path] for path in part.nodes)] if part else [0]

    def followed(self, ranks: Sequence[int]) -> int:
        """How deep a text goes down this tree whose next tokens have these ranks, one per level."""
        deep = 0
        while deep < min(len(ranks), self.depth) and tuple(ranks[: deep + 1]) in self._number:
            deep += 1
        return deep

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankTree) and self.paths == other.paths

    def __hash__(self) -> int:
        return hash(tuple(self.paths))

    def __repr__(self) -> str:
        return f"RankTree({[list(path) for path in self.paths]})"


def grown(accuracies: Sequence[Sequence[float]], size: int) -> RankTree:
    """Medusa's greedy search: nodes are added by the probability that all of their path is right, as if heads were
    independent.

    accuracies: per head, how often its first, second, ... token is the right one (not cumulated),
    each over that head's own count. Equal probabilities: the shallower, then the lower rank.
    """
    if not accuracies or not accuracies[0] or size < 1:
        raise DrafterError(f"no tree of {size} nodes grows from the accuracies of {len(accuracies)} heads")
    paths: list[Path] = []
    frontier: list[tuple[float, int, Path]] = [(-accuracies[0][0], 1, (0,))]
    while frontier and len(paths) < size:
        minus, depth, path = heapq.heappop(frontier)
        paths.append(path)
        last = accuracies[depth - 1]
        if path[-1] + 1 < len(last):
            before = minus / last[path[-1]] if last[path[-1]] else 0.0
            heapq.heappush(frontier, (before * last[path[-1] + 1], depth, (*path[:-1], path[-1] + 1)))
        if depth < len(accuracies) and accuracies[depth]:
            heapq.heappush(frontier, (minus * accuracies[depth][0], depth + 1, (*path, 0)))
    return RankTree(paths)


def most_followed(counts: Mapping[Path, int], size: int) -> RankTree:
    """The `size` paths that texts followed most often. A path is never followed more often than its prefix, so these
    are a tree, and no tree of that size has a larger expected depth. Equal counts: the shallower, then the lower
    ranks."""
    ranked = sorted(counts, key=lambda path: (-counts[path], len(path), path))
    return RankTree(ranked[:size])


@lru_cache(maxsize=len(PUBLISHED))
def _decoded(text: str) -> tuple[Path, ...]:
    first, *deeper = text.split(" / ")
    paths: list[Path] = [(rank,) for rank in range(int(first))]
    for level in deeper:
        for group in level.split():
            prefix, _, counts = group.rpartition(":")
            above = tuple(map(int, prefix))
            for rank, count in enumerate(map(int, counts.split(","))):
                paths += [(*above, rank, child) for child in range(count)]
    return tuple(paths)


def _by_depth(path: Path) -> tuple[int, Path]:
    return len(path), path


def _is_grown_in_order(paths: Sequence[Path]) -> bool:
    seen: set[Path] = {()}
    for path in paths:
        if path[:-1] not in seen:
            return False
        seen.add(path)
    return True


def _demand_tree(paths: Sequence[Path]) -> None:
    if not paths:
        raise DrafterError("a tree of no paths proposes nothing: give at least one, or use the drafter none")
    for path in paths:
        if not path or not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in path):
            raise DrafterError(f"{list(path)} is not a path: give ranks from 0 up, such as [0, 1]")
    known = set(paths)
    if len(known) < len(paths):
        twice = next(path for place, path in enumerate(paths) if path in paths[:place])
        raise DrafterError(f"the tree has the path {list(twice)} twice")
    for path in paths:
        if len(path) > 1 and path[:-1] not in known:
            raise DrafterError(f"the tree has the path {list(path)} without {list(path[:-1])}: add what it hangs below")
