"""A smaller language model of the same vocabulary drafts: Leviathan et al. 2023, Chen et al. 2023.

Three shapes. A *chain* is drawn token by token until a stopping rule ends it. A *tree* keeps the best continuations of the
draft model: level by level the `width` most probable nodes are extended, and in the end the `nodes` most probable of all that
were seen are proposed (EAGLE-2's dynamic tree, Li et al. 2024, section 4; deterministic, so it is verified with one-hot
laws). A *sampled* tree draws `widths[d]` children without replacement below every node of depth d.

Rows at temperature 0 draft greedily, others sample from the draft model's law under the row's own sampling parameters.
Stopping rules see the draft model's bare probabilities (temperature 1, nothing filtered), whatever the row asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.chance import Dice
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.stopping import Fixed, Stopping
from forerun.drafting.stopping import stopping as stopping_rule
from forerun.drafting.workshop import MOST, Workshop
from forerun.errors import DrafterError
from forerun.model import Model, Scores
from forerun.nn.ops import top_log_probs
from forerun.row import Row
from forerun.sampling import Prefix, edited, laws
from forerun.tree import TokenTree, Topology


class DraftModel(Drafter):
    """What the three shapes share: a model of its own that reads what was accepted and forgets the rest."""

    name = "small"

    def __init__(self, model: Model):
        self.model = model
        self._places: list[list[int]] = []  # per row: the scratch entry of each node of the last tree, -1 if unread

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        self.model.admit(row.limit)

    def release(self, slot: int) -> None:
        self.model.release(slot)

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        if self._places:
            kept = [[places[n] for n in path[1:]] for places, path in zip(self._places, verdict.kept, strict=True)]
            self.model.keep([[place for place in row if place >= 0] for row in kept])
        self._places = []

    def retract(self, lengths: Sequence[int]) -> None:
        for slot, length in enumerate(lengths):
            self.model.truncate(slot, length)

    def propose(self, context: Context) -> TokenTree:
        """Draft where a row has room for it, in its own text and in the draft model's context."""
        self._places = []  # an interrupted step may have left some
        room = [self.model.max_length - len(row.tokens) for row in context.rows]
        depths = [max(0, min(least)) for least in zip(context.depths, context.budgets, room, strict=True)]
        if not any(depths):
            return TokenTree.root([row.tokens[-1] for row in context.rows], context.device)
        return self.draft(context, depths)

    def draft(self, context: Context, depths: Sequence[int]) -> TokenTree:
        raise NotImplementedError


class Chain(DraftModel):
    """One token after the other, as long as the stopping rule says."""

    def __init__(self, model: Model, stopping: Stopping):
        super().__init__(model)
        self.stopping = stopping
        self.max_nodes = stopping.most

    def draft(self, context: Context, depths: Sequence[int]) -> TokenTree:
        rows, chance = context.rows, context.chance()
        is_greedy = all(row.params.is_greedy for row in rows)
        takes_best = is_greedy and not any(row.params.edits_scores for row in rows)
        longest = min(self.max_nodes, max(depths))
        sizes = [1 + min(depth, longest) for depth in depths]
        chains: list[list[int]] = [[row.tokens[-1]] for row in rows]
        steps: list[Tensor] = []
        confidence: list[Tensor] = []
        scores = self.model.next_scores(rows)
        for depth in range(1, longest + 1):
            if takes_best:
                token_B1 = scores.best
            else:
                steps.append(draft_laws(scores.logits_BNV, rows, [[chain[1:]] for chain in chains]))
                token_B1 = draw(steps[-1], rows, chance, depth)
            for chain, drawn in zip(chains, token_B1.tolist(), strict=True):
                chain += drawn
            if self.stopping.looks:
                confidence.append(scores.logits_BNV.float().softmax(-1).gather(-1, token_B1[..., None])[..., 0])
                goes_on = self.stopping.goes_on(torch.cat(confidence, -1)).tolist()
                sizes = [size if on else min(size, 1 + depth) for size, on in zip(sizes, goes_on, strict=True)]
            if depth >= max(sizes) - 1:
                break
            scores = self.model.grow(token_B1, np.full((len(rows), 1), depth))
        self._places = [[-1, *range(size - 1)] for size in sizes]
        tokens = [chain[:size] for chain, size in zip(chains, sizes, strict=True)]
        if is_greedy:
            return TokenTree.chain(tokens, context.device)
        return TokenTree.drawn_chain(tokens, torch.cat([*steps, torch.zeros_like(steps[0])], 1))


@dataclass
class Grown:
    """One row's tree while it grows. places: the scratch entry of each node that was read. scores: log-probability of the
    path (of use to the deterministic tree alone)."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    places: list[int] = field(default_factory=lambda: [-1])
    scores: list[float] = field(default_factory=lambda: [0.0])
    depths: list[int] = field(default_factory=lambda: [0])

    def add(self, token: int, parent: int, score: float = 0.0) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.places.append(-1)
        self.scores.append(score)
        self.depths.append(self.depths[parent] + 1)
        return len(self.tokens) - 1

    def path(self, node: int) -> list[int]:
        """Nodes below 0 down to `node`."""
        found = []
        while node > 0:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def said(self, node: int) -> list[int]:
        """The tokens of the path below 0 down to `node`."""
        return [self.tokens[n] for n in self.path(node)]

    def pruned(self, nodes: Sequence[int]) -> Grown:
        """Only these nodes (a parent is among them if its child is) and node 0."""
        order = [0, *sorted(nodes)]
        number = {old: new for new, old in enumerate(order)}
        return Grown(
            tokens=[self.tokens[n] for n in order],
            parents=[-1, *(number[self.parents[n]] for n in order[1:])],
            places=[self.places[n] for n in order],
            scores=[self.scores[n] for n in order],
            depths=[self.depths[n] for n in order],
        )


class _Growing(DraftModel):
    """Trees that grow level by level."""

    def _read(
        self, grown: Sequence[Grown], frontiers: Sequence[Sequence[int]], held: int, device: torch.device
    ) -> Tensor:
        """Read every row's frontier (padded with the last token) and score it, [B, W, V]. `held`: scratch in use."""
        width = max(1, max(map(len, frontiers)))
        tokens = np.zeros((len(grown), width), dtype=np.int64)
        depths = np.ones((len(grown), width), dtype=np.int64)
        visible = np.zeros((len(grown), width, held + width), dtype=np.bool_)
        visible[:, np.arange(width), held + np.arange(width)] = True
        for index, (row, frontier) in enumerate(zip(grown, frontiers, strict=True)):
            for offset, node in enumerate(frontier):
                tokens[index, offset], depths[index, offset] = row.tokens[node], row.depths[node]
                visible[index, offset, [row.places[n] for n in row.path(row.parents[node])]] = True
                row.places[node] = held + offset
        return self.model.grow(torch.from_numpy(tokens).to(device), depths, visible).logits_BNV


class TopTree(_Growing):
    """The most probable continuations, at most `nodes` of them, `depth` deep, extending `width` nodes per level."""

    def __init__(self, model: Model, width: int, depth: int, nodes: int):
        super().__init__(model)
        self.width, self.depth, self.max_nodes = width, depth, nodes

    def draft(self, context: Context, depths: Sequence[int]) -> TokenTree:
        rows = context.rows
        grown = [Grown([row.tokens[-1]]) for row in rows]
        frontiers: list[list[int]] = [[0] for _ in rows]
        logits, held = self.model.next_scores(rows).logits_BNV, 0
        deepest = min(self.depth, max(depths))
        for level in range(1, deepest + 1):
            width = min(self.width, logits.shape[-1])
            log_probs, best = top_log_probs(logits, width, self.model.network.kernels)
            values, tokens = log_probs.tolist(), best.tolist()
            for index, row in enumerate(grown):
                if level <= depths[index]:
                    frontiers[index] = self._extend(row, frontiers[index], values[index], tokens[index])
                else:
                    frontiers[index] = []
            if level < deepest:
                logits = self._read(grown, frontiers, held, context.device)
                held += logits.shape[1]
        kept = [self._best(row, min(self.max_nodes, most)) for row, most in zip(grown, context.budgets, strict=True)]
        self._places = [row.places for row in kept]
        return TokenTree.of([row.tokens for row in kept], [row.parents for row in kept], context.device)

    def _extend(
        self, row: Grown, frontier: Sequence[int], values: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]
    ) -> list[int]:
        """Add the children of the frontier; the best of them are the next frontier."""
        added = [
            row.add(token, node, row.scores[node] + value)
            for node, these, scores in zip(frontier, tokens, values, strict=False)
            for token, value in zip(these, scores, strict=True)
        ]
        return sorted(sorted(added, key=lambda node: -row.scores[node])[: self.width])

    @staticmethod
    def _best(row: Grown, nodes: int) -> Grown:
        """Ties go to the shallower, then the older node, so a child never outranks its parent (eagle.md, section 6)."""
        ranked = sorted(range(1, len(row.tokens)), key=lambda n: (-row.scores[n], row.depths[n], n))
        return row.pruned(ranked[:nodes])


class SampledTree(_Growing):
    """`widths[d]` children, drawn without replacement, below every node of depth d (greedy rows: one, the best)."""

    def __init__(self, model: Model, widths: Sequence[int]):
        super().__init__(model)
        self.widths = list(widths)
        self.max_nodes = int(np.cumprod(self.widths).sum())

    def draft(self, context: Context, depths: Sequence[int]) -> TokenTree:
        rows, chance = context.rows, context.chance()
        grown = [Grown([row.tokens[-1]]) for row in rows]
        groups: list[dict[int, Tensor]] = [{} for _ in rows]
        frontiers: list[list[int]] = [[0] for _ in rows]
        logits, held = self.model.next_scores(rows).logits_BNV, 0
        for level, width in enumerate(self.widths, 1):
            frontiers = [nodes if level <= most else [] for nodes, most in zip(frontiers, depths, strict=True)]
            if not any(frontiers):
                break
            if level > 1:
                logits = self._read(grown, frontiers, held, context.device)
                held += logits.shape[1]
            paths = [[row.said(node) for node in nodes] for row, nodes in zip(grown, frontiers, strict=True)]
            laws_BNV = draft_laws(logits, rows, paths)
            families = _children(laws_BNV, chance, frontiers, width)
            for index, row in enumerate(grown):
                drawn: list[int] = []
                for offset, (node, children) in enumerate(zip(frontiers[index], families[index], strict=True)):
                    if len(row.tokens) + len(children) <= context.budgets[index] + 1 and children:
                        groups[index][node] = laws_BNV[index, offset]
                        drawn += [row.add(token, node) for token in children]
                frontiers[index] = drawn
        self._places = [row.places for row in grown]
        topology = Topology.of([row.parents for row in grown])
        return TokenTree.drawn([row.tokens for row in grown], topology, groups, context.device)


def _children(laws_BNV: Tensor, chance: Dice, nodes: Sequence[Sequence[int]], count: int) -> list[list[list[int]]]:
    """Below each of these nodes of each row: distinct tokens, each from what its predecessors left of the law."""
    columns, vocab_size = laws_BNV.shape[1:]
    places = np.array([[*row, *[0] * (columns - len(row))] for row in nodes]) * vocab_size
    families: list[list[list[int]]] = [[[] for _ in row] for row in nodes]
    rest = laws_BNV.clone()
    for attempt in range(count):
        left, tokens = rest.sum(-1).tolist(), chance.token(rest, places + attempt)
        for row, *told in zip(families, left, tokens.tolist(), strict=True):
            for children, share, token in zip(row, *told, strict=False):
                if share > 0:
                    children.append(token)
        rest.scatter_(-1, tokens[..., None], 0.0)
    return families


def draft_laws(logits_BNV: Tensor, rows: Sequence[Row], drafted: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """The draft model's laws [B, N, V] under each row's own sampling parameters. drafted: per row and node, what was drafted
    behind the text (a row may have fewer nodes than N)."""
    scores = logits_BNV.float()
    if any(row.params.edits_scores for row in rows):
        scores = scores.clone()  # stopping rules want the bare ones
    for index, row in enumerate(rows):
        if row.params.edits_scores:
            prefixes = [Prefix([*row.tokens, *path], row.prompt_length) for path in drafted[index]]
            scores[index, : len(prefixes)] = edited(scores[index, : len(prefixes)], row.params, prefixes)
    return laws(scores, [row.params for row in rows])


def draw(laws_B1V: Tensor, rows: Sequence[Row], chance: Dice, depth: int) -> Tensor:
    """A token per row, [B, 1]; greedy rows have one-hot laws, so luck does not matter to them."""
    if all(row.params.is_greedy for row in rows):
        return laws_B1V.argmax(-1)
    return chance.token(laws_B1V, np.full((len(rows), 1), depth))


def build(
    workshop: Workshop,
    checkpoint: str | None = None,
    length: int | None = None,
    stopping: Mapping[str, Any] | None = None,
    tree: Mapping[str, int] | None = None,
    widths: Sequence[int] | None = None,
) -> Drafter:
    """{"drafter": "small", "checkpoint": PATH, ...} and one of

    "length": N                                          a chain of N tokens (the default, 3)
    "stopping": {"rule": "confidence", "threshold": 0.4} a chain that ends itself
    "tree": {"width": 4, "depth": 5, "nodes": 16}        the best continuations as a tree
    "widths": [3, 2, 1]                                  a sampled tree
    """
    if sum(option is not None for option in (length, stopping, tree, widths)) > 1:
        raise DrafterError("small: give only one of length, stopping, tree, widths")
    for setting, value, kind in (("tree", tree, Mapping), ("stopping", stopping, Mapping), ("widths", widths, list)):
        if value is not None and not isinstance(value, kind):
            raise DrafterError(f"small: {setting} is a {'list' if kind is list else 'mapping'}, not {value!r}")
    network = workshop.network(checkpoint, "small")
    if tree is not None:
        shape = {"width": 4, "depth": 5, "nodes": 16, **tree}
        if set(shape) != {"width", "depth", "nodes"} or not _are_counts(shape.values()):
            raise DrafterError(f"small: a tree has width, depth and nodes of at least 1, not {dict(tree)}")
        return TopTree(Model(network, shape["width"] * shape["depth"]), **shape)
    if widths is not None:
        if not widths or not _are_counts(widths):
            raise DrafterError(f"small: widths are numbers of children per level, at least 1, not {list(widths)}")
        return SampledTree(Model(network, int(np.cumprod(widths).sum())), widths)
    if length is not None and not _are_counts([length]):
        raise DrafterError(f"small: a length of {length} drafts nothing; give 1 or more, or use the drafter none")
    rule = stopping_rule(**stopping) if stopping else Fixed(length or 3)
    return Chain(Model(network, rule.most), rule)


def _are_counts(values: Iterable[object]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST for value in values)
