"""How trees grow: level by level, over anything that can say what may follow.

An *expander* says what may follow the nodes of a *frontier*, the newest nodes that are to have
children: a draft model, heads level by level, a block that knows all depths at once. A *form* says
which children they get and which of those go on:

    Chain        one token after the other, until a stopping rule ends it
    TopTree      the best continuations: the `width` most probable nodes of every level are extended, and in
                 the end the `nodes` most probable of all are proposed (EAGLE-2's dynamic tree, Li et al.
                 2024, section 4), as far as they are worth what reading them costs. As wide as it has
                 nodes, it is the best-first tree
    SampledTree  `widths[d]` children drawn without replacement below every node of depth d
    StaticTree   the same ranks at every step

Trees of best tokens are deterministic, so they are verified with one-hot laws. Chains and sampled
trees are drawn from the expander's law under each row's own sampling parameters; rows at
temperature 0 take the best.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import inf, log
from operator import mul
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from forerun.chance import Dice
from forerun.drafting.drafter import Context
from forerun.drafting.stopping import LAST, Drafted, Stopping
from forerun.model import Model, Scores
from forerun.ranktree import Level, RankTree
from forerun.row import Row
from forerun.sampling import Prefix, SamplingParams, edited, laws
from forerun.tree import Ints, Paths, TokenTree, Topology

BARE = SamplingParams(temperature=1.0)
"""What stopping rules see: the draft model's own law."""


@dataclass(slots=True)
class Frontier:
    """The nodes of one level that are to have children, W in every row (padded with children of node 0).

    tokens_BW: int64, on the expander's device. depths_BW: steps below node 0. parents_BW: their
    parents' places in the frontier before this one (the first frontier's: 0). paths_BWJ: as
    `Model.grow` wants them; None: a chain. counts_B: how many of W are no padding; None: all.
    """

    tokens_BW: Tensor
    depths_BW: Ints
    parents_BW: Ints
    paths_BWJ: Paths | None = None
    counts_B: Ints | None = None

    @property
    def depth(self) -> int:
        """Of all of them, padding aside."""
        return int(self.depths_BW.max())


@dataclass(frozen=True)
class Known:
    """A part of a vocabulary. tokens: ascending, int64 [n]."""

    tokens: Tensor
    vocab_size: int

    @staticmethod
    def of(kept: Sequence[int], vocab_size: int, device: torch.device) -> Known | None:
        """None for no tokens: all are known."""
        return Known(torch.tensor(kept, device=device), vocab_size) if kept else None

    def whole(self, logits: Tensor) -> Tensor:
        """Over the vocabulary, [..., V], of those of these tokens, [..., n]."""
        spread = logits.new_full((*logits.shape[:-1], self.vocab_size), -inf)
        return spread.index_copy_(-1, self.tokens, logits)


class Expander:
    """Says what may follow. Override `begin` and `expand`; the rest where something faster is known.

    known: the tokens that its logits are of, None: all. `best` and `top` name tokens, and `whole` says the same of all.
    """

    known: Known | None = None

    def begin(self) -> Scores:
        """What may follow node 0 of every row (N is 1)."""
        raise NotImplementedError

    def expand(self, frontier: Frontier) -> Scores:
        """What may follow these nodes, children of those asked about before; N is W, or 1 if the
        same may follow them all."""
        raise NotImplementedError

    def best(self, logits_BWV: Tensor, count: int) -> Tensor:
        """The most probable tokens, [B, W, count], the best first, equal ones by id."""
        return self._named(best_tokens(logits_BWV, count))

    def top(self, logits_BWV: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Natural logarithms of the probabilities of the best tokens, and these, [B, W, count] each."""
        places = best_tokens(logits_BWV, count)
        return logits_BWV.float().log_softmax(-1).gather(-1, places), self._named(places)

    def whole(self) -> Expander:
        """What draws needs laws over the vocabulary."""
        return self if self.known is None else _Whole(self, self.known)

    def _named(self, places: Tensor) -> Tensor:
        return places if self.known is None else self.known.tokens[places]


class _Whole(Expander):
    """Tokens that are not known are impossible."""

    def __init__(self, inner: Expander, known: Known):
        self._inner, self._part = inner, known

    def begin(self) -> Scores:
        return self._spread(self._inner.begin())

    def expand(self, frontier: Frontier) -> Scores:
        return self._spread(self._inner.expand(frontier))

    def _spread(self, scores: Scores) -> Scores:
        return Scores(self._part.whole(scores.logits_BNV), scores.hidden)


class Tempered(Expander):
    """The same with a temperature for every depth, beyond which the last holds."""

    def __init__(self, inner: Expander, temperatures: Sequence[float]):
        self._inner, self._temperatures, self.known = inner, temperatures, inner.known

    def begin(self) -> Scores:
        return self._at(0, self._inner.begin())

    def expand(self, frontier: Frontier) -> Scores:
        return self._at(frontier.depth, self._inner.expand(frontier))

    def _at(self, depth: int, scores: Scores) -> Scores:
        temperature = self._temperatures[min(depth, len(self._temperatures) - 1)]
        return replace(scores, logits_BNV=scores.logits_BNV / temperature)

    def best(self, logits_BWV: Tensor, count: int) -> Tensor:
        return self._inner.best(logits_BWV, count)

    def top(self, logits_BWV: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return self._inner.top(logits_BWV, count)


def tempered(expander: Expander, temperatures: Sequence[float]) -> Expander:
    return Tempered(expander, temperatures) if temperatures else expander


class ModelExpander(Expander):
    """A draft model: the frontier goes into its scratch. layers: the hidden states that the form wants to know. asked:
    the rows that anything is wanted for, all if not given; of the others it reads nothing."""

    def __init__(
        self, model: Model, rows: Sequence[Row], layers: Collection[int] = (), asked: Sequence[bool] | None = None
    ):
        self._model, self._rows, self._asked = model, rows, None if asked is None or all(asked) else asked
        top = model.network.cache_shape.layers
        self._numbers = {layer: top if layer == LAST else layer for layer in layers}
        self._layers = tuple(self._numbers.values())

    def begin(self) -> Scores:
        return self._called(self._model.next_scores(self._rows, self._layers, self._asked))

    def expand(self, frontier: Frontier) -> Scores:
        counts = frontier.counts_B
        if self._asked is not None:
            counts = np.where(self._asked, frontier.tokens_BW.shape[1] if counts is None else counts, 0)
        where = frontier.depths_BW, frontier.paths_BWJ
        read = self._model.grow(frontier.tokens_BW, *where, self._layers, counts_B=counts)
        return self._called(read)

    def _called(self, scores: Scores) -> Scores:
        """With the states under the names that the form has for their layers."""
        if not self._numbers:
            return scores
        return replace(scores, hidden={layer: scores.hidden[number] for layer, number in self._numbers.items()})

    def best(self, logits_BWV: Tensor, count: int) -> Tensor:
        return self.top(logits_BWV, count)[1]

    def top(self, logits_BWV: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return self._model.network.backend.top_log_probs(logits_BWV, count)


def best_tokens(logits: Tensor, count: int) -> Tensor:
    """The most probable tokens, equal ones by id, as the kernels and the ranks of training have it.
    topk promises no order among equals, so it is given integers of which no two are: the bits of
    the number, ordered, and behind them the id."""
    bits = (logits.float() + 0.0).view(torch.int32).long()
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return ((ordered << 32) | (0xFFFFFFFF - ids)).topk(count, -1).indices


@dataclass(frozen=True)
class Grown:
    """A proposal, and per row which scratch entry of the expander holds each node (-1: it was not read)."""

    tree: TokenTree
    entries: Sequence[Sequence[int]]


class Form(Protocol):
    """Which children the nodes of a frontier get, and which of them go on.

    max_nodes: of the largest tree, node 0 not counted. scratch: the most nodes that are read.
    reads: the layers of the draft model whose states decide how the tree grows.
    """

    @property
    def max_nodes(self) -> int: ...

    @property
    def scratch(self) -> int: ...

    @property
    def reads(self) -> frozenset[int]: ...

    def grow(self, expander: Expander, context: Context, depths: Sequence[int]) -> Grown:
        """Trees of at most these depths per row, of which one is 1 or more."""


# ---- chains


@dataclass(frozen=True)
class Chain:
    """One token after the other, as long as the stopping rule says."""

    stopping: Stopping

    @property
    def max_nodes(self) -> int:
        return self.stopping.most

    @property
    def scratch(self) -> int:
        return self.stopping.most

    @property
    def reads(self) -> frozenset[int]:
        return self.stopping.reads

    def grow(self, expander: Expander, context: Context, depths: Sequence[int]) -> Grown:
        rows, pen, expander = context.rows, _Pen(context), expander.whole()
        longest = min(self.max_nodes, max(depths))
        watch = _Watch(self.stopping, context, [1 + min(depth, longest) for depth in depths])
        chains: list[list[int]] = [[row.tokens[-1]] for row in rows]
        parents, scores = np.zeros((len(rows), 1), np.int64), expander.begin()
        for depth in range(1, longest + 1):
            token_B1 = pen.draw(scores, chains, depth)
            for chain, drawn in zip(chains, token_B1.tolist(), strict=True):
                chain += drawn
            watch.drawn(depth, scores, token_B1)
            if depth >= watch.longest:
                break
            going_on = np.array([size > depth + 1 for size in watch.sizes], np.int64)
            scores = expander.expand(Frontier(token_B1, np.full((len(rows), 1), depth), parents, counts_B=going_on))
        tokens = [chain[:size] for chain, size in zip(chains, watch.sizes, strict=True)]
        entries = [[-1, *range(size - 2), -1][:size] for size in watch.sizes]
        return Grown(pen.tree(tokens), entries)


class _Pen:
    """Draws the next token of every row's chain, and remembers the laws they were drawn from."""

    def __init__(self, context: Context):
        self._rows, self._chance, self._device = context.rows, context.chance(), context.device
        self._is_greedy = all(row.params.is_greedy for row in context.rows)
        self._takes_best = self._is_greedy and not any(row.params.edits_scores for row in context.rows)
        self._laws: list[Tensor] = []

    def draw(self, scores: Scores, chains: Sequence[Sequence[int]], depth: int) -> Tensor:
        """A token per row, [B, 1]."""
        if self._takes_best:
            return scores.best
        law_B1V = draft_laws(scores.logits_BNV, self._rows, [[chain[1:]] for chain in chains])
        self._laws.append(law_B1V)
        return law_B1V.argmax(-1) if self._is_greedy else draw(law_B1V, self._chance, depth)

    def tree(self, tokens: Sequence[Sequence[int]]) -> TokenTree:
        if self._is_greedy:
            return TokenTree.chain(tokens, self._device)
        return TokenTree.drawn_chain(tokens, torch.cat([*self._laws, torch.zeros_like(self._laws[0])], 1))


def draw(law_B1V: Tensor, chance: Dice, depth: int) -> Tensor:
    """A token per row, [B, 1]; greedy rows have one-hot laws, so luck does not matter to them."""
    return chance.token(law_B1V, np.full((len(law_B1V), 1), depth))


class _Watch:
    """Asks a stopping rule after every token and keeps count of how long each row's chain is
    (`sizes`, node 0 included)."""

    def __init__(self, rule: Stopping, context: Context, sizes: list[int]):
        self.sizes, self.longest = sizes, max(sizes) - 1
        self._rule, self._rows, self._costs = rule, context.rows, context.costs
        self._probs: list[Tensor] = []
        self._notes: dict[str, Tensor] = {}

    def drawn(self, depth: int, scores: Scores, token_B1: Tensor) -> None:
        """These tokens were drawn of these scores."""
        rule = self._rule
        if depth >= self.longest or not (rule.looks or rule.reads):
            return
        if rule.looks:
            bare = laws(scores.logits_BNV, [BARE] * len(self._rows))
            self._probs.append(bare.gather(-1, token_B1[..., None])[..., 0])
        probs_BJ = torch.cat(self._probs, -1) if self._probs else None
        states = {layer: scores.hidden[layer][:, 0] for layer in rule.reads}
        goes_on = rule.goes_on(Drafted(depth, self._rows, probs_BJ, states, self._notes, self._costs)).tolist()
        self.sizes = [size if on else min(size, 1 + depth) for size, on in zip(self.sizes, goes_on, strict=True)]
        self.longest = max(self.sizes) - 1


def draft_laws(logits_BNV: Tensor, rows: Sequence[Row], drafted: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """The draft model's laws [B, N, V] under each row's own sampling parameters. drafted: per row
    and node, what was drafted behind the text (a row may have fewer nodes than N)."""
    scores = logits_BNV.float()
    if any(row.params.edits_scores for row in rows):
        scores = scores.clone()  # stopping rules want the bare ones
    for index, row in enumerate(rows):
        if row.params.edits_scores:
            prefixes = [Prefix([*row.tokens, *path], row.prompt_length) for path in drafted[index]]
            edits = edited(scores[index, : len(prefixes)], row.params, prefixes, matcher=row.matcher)
            scores[index, : len(prefixes)] = edits
    return laws(scores, [row.params for row in rows])


# ---- trees of which every row has its own


@dataclass
class _Tree:
    """One row's tree while it grows. entries: per node, the scratch entries on the path to it, once
    it was read. scores: log-probability of the path (of use to the deterministic tree alone)."""

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    entries: list[list[int]] = field(default_factory=lambda: [[]])
    scores: list[float] = field(default_factory=lambda: [0.0])
    depths: list[int] = field(default_factory=lambda: [0])

    def add(self, token: int, parent: int, score: float = 0.0) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        self.entries.append([])
        self.scores.append(score)
        self.depths.append(self.depths[parent] + 1)
        return len(self.tokens) - 1

    def said(self, node: int) -> list[int]:
        """The tokens of the path below 0 down to `node`."""
        found = []
        while node > 0:
            found.append(self.tokens[node])
            node = self.parents[node]
        return found[::-1]

    def pruned(self, nodes: Sequence[int]) -> _Tree:
        """Only these nodes (a parent is among them if its child is) and node 0."""
        order = [0, *sorted(nodes)]
        number = {old: new for new, old in enumerate(order)}
        return _Tree(
            tokens=[self.tokens[n] for n in order],
            parents=[-1, *(number[self.parents[n]] for n in order[1:])],
            entries=[self.entries[n] for n in order],
            scores=[self.scores[n] for n in order],
            depths=[self.depths[n] for n in order],
        )

    @property
    def places(self) -> list[int]:
        return [path[-1] if path else -1 for path in self.entries]


class _Grove:
    """The trees of all rows, side by side."""

    def __init__(self, context: Context):
        self.trees = [_Tree([row.tokens[-1]]) for row in context.rows]
        self._device, self._held, self._above = context.device, 0, 0

    def frontier(self, chosen: Sequence[Sequence[int]]) -> Frontier:
        """These nodes of each tree, children of those of the frontier before: they go into scratch now."""
        width, held = max(1, max(map(len, chosen))), self._held
        deep = max(tree.depths[node] for tree, nodes in zip(self.trees, chosen, strict=True) for node in nodes)
        shape = (len(chosen), width)
        tokens, depths = np.zeros(shape, np.int64), np.ones(shape, np.int64)
        parents, paths = np.zeros(shape, np.int64), np.full((*shape, deep), -1, np.int32)
        paths[:, :, 0] = held + np.arange(width)
        for index, (tree, nodes) in enumerate(zip(self.trees, chosen, strict=True)):
            for offset, node in enumerate(nodes):
                path = tree.entries[node] = [*tree.entries[tree.parents[node]], held + offset]
                tokens[index, offset], depths[index, offset] = tree.tokens[node], len(path)
                parents[index, offset] = path[-2] - self._above if len(path) > 1 else 0
                paths[index, offset, : len(path)] = path
        self._above, self._held = held, held + width
        counts = np.array([len(nodes) for nodes in chosen], np.int64)
        return Frontier(torch.from_numpy(tokens).to(self._device), depths, parents, paths, counts)


@dataclass(frozen=True)
class TopTree:
    """The most probable continuations, at most `nodes` of them, `depth` deep, extending `width` nodes per level."""

    width: int
    depth: int
    nodes: int
    reads = frozenset[int]()

    @property
    def max_nodes(self) -> int:
        return self.nodes

    @property
    def scratch(self) -> int:
        return self.width * self.depth

    @property
    def is_best_first(self) -> bool:
        """Nothing that belongs into the tree is left out while it grows."""
        return self.width >= self.nodes

    def grow(self, expander: Expander, context: Context, depths: Sequence[int]) -> Grown:
        grove = _Grove(context)
        frontiers: list[list[int]] = [[0] for _ in context.rows]
        scores, deepest, least = expander.begin(), min(self.depth, max(depths)), least_of(context)
        for level in range(1, deepest + 1):
            log_probs, best = expander.top(scores.logits_BNV, min(self.width, scores.logits_BNV.shape[-1]))
            values, tokens = log_probs.tolist(), best.tolist()
            for index, tree in enumerate(grove.trees):
                grown: list[int] = []
                if level <= depths[index]:
                    grown = self._extend(tree, frontiers[index], values[index], tokens[index])
                goes_on = level < depths[index]
                frontiers[index] = [node for node in grown if goes_on and tree.scores[node] >= least[index]]
            if not any(frontiers):
                break
            if level < deepest:
                scores = expander.expand(grove.frontier(frontiers))
        most = [min(self.nodes, budget) for budget in context.budgets]
        kept = [self._best(*row) for row in zip(grove.trees, most, least, strict=True)]
        proposal = TokenTree.of([tree.tokens for tree in kept], [tree.parents for tree in kept], context.device)
        return Grown(proposal, [tree.places for tree in kept])

    def _extend(
        self, tree: _Tree, frontier: Sequence[int], values: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]
    ) -> list[int]:
        """Add the children of the frontier; the best of them are the next frontier."""
        if len(tokens) == 1:  # the same may follow them all
            values, tokens = [*values] * len(frontier), [*tokens] * len(frontier)
        added = [
            tree.add(token, node, tree.scores[node] + value)
            for node, these, scores in zip(frontier, tokens, values, strict=False)
            for token, value in zip(these, scores, strict=True)
        ]
        return sorted(sorted(added, key=lambda node: -tree.scores[node])[: self.width])

    @staticmethod
    def _best(tree: _Tree, nodes: int, least: float) -> _Tree:
        """Ties go to the shallower, then the older node, so a child never outranks its parent."""
        worth = [node for node in range(1, len(tree.tokens)) if tree.scores[node] >= least]
        return tree.pruned(sorted(worth, key=lambda n: (-tree.scores[n], tree.depths[n], n))[:nodes])


def least_of(context: Context) -> list[float]:
    """The log-probability per row from which a node is worth reading, as far as the clock knows."""
    prices = [context.price(slot) for slot in range(len(context.rows))]
    return [-inf if price is None else log(price) for price in prices]


@dataclass(frozen=True)
class SampledTree:
    """`widths[d]` children, drawn without replacement, below every node of depth d (greedy rows: one, the best)."""

    widths: Sequence[int]
    reads = frozenset[int]()

    @property
    def max_nodes(self) -> int:
        return sum(accumulate(self.widths, mul))

    @property
    def scratch(self) -> int:
        return self.max_nodes

    def grow(self, expander: Expander, context: Context, depths: Sequence[int]) -> Grown:
        grove, chance, expander = _Grove(context), context.chance(), expander.whole()
        groups: list[dict[int, Tensor]] = [{} for _ in context.rows]
        frontiers: list[list[int]] = [[0] for _ in context.rows]
        for level, width in enumerate(self.widths, 1):
            frontiers = [nodes if level <= most else [] for nodes, most in zip(frontiers, depths, strict=True)]
            if not any(frontiers):
                break
            scores = expander.begin() if level == 1 else expander.expand(grove.frontier(frontiers))
            paths = [[tree.said(n) for n in nodes] for tree, nodes in zip(grove.trees, frontiers, strict=True)]
            laws_BWV = draft_laws(_each(scores.logits_BNV, frontiers), context.rows, paths)
            families = _children(laws_BWV, chance, frontiers, width)
            for index, tree in enumerate(grove.trees):
                drawn: list[int] = []
                for offset, (node, children) in enumerate(zip(frontiers[index], families[index], strict=True)):
                    if len(tree.tokens) + len(children) <= context.budgets[index] + 1 and children:
                        groups[index][node] = laws_BWV[index, offset]
                        drawn += [tree.add(token, node) for token in children]
                frontiers[index] = drawn
        topology = Topology.of([tree.parents for tree in grove.trees])
        proposal = TokenTree.drawn([tree.tokens for tree in grove.trees], topology, groups, context.device)
        return Grown(proposal, [tree.places for tree in grove.trees])


def _each(logits_BNV: Tensor, frontiers: Sequence[Sequence[int]]) -> Tensor:
    """The same logits for every node of a frontier, where the expander gave them once."""
    return logits_BNV.expand(-1, max(map(len, frontiers)), -1) if logits_BNV.shape[1] == 1 else logits_BNV


def _children(laws_BWV: Tensor, chance: Dice, nodes: Sequence[Sequence[int]], count: int) -> list[list[list[int]]]:
    """Below each of these nodes of each row: distinct tokens, each from what its predecessors left of the law."""
    columns, vocab_size = laws_BWV.shape[1:]
    places = np.array([[*row, *[0] * (columns - len(row))] for row in nodes]) * vocab_size
    families: list[list[list[int]]] = [[[] for _ in row] for row in nodes]
    rest = laws_BWV.clone()
    for attempt in range(count):
        tokens = chance.token(rest, places + attempt)
        shares = rest.gather(-1, tokens[..., None])[..., 0].tolist()
        for row, *told in zip(families, shares, tokens.tolist(), strict=True):
            for children, share, token in zip(row, *told, strict=False):
                if share > 0:  # otherwise nothing was left to be drawn
                    children.append(token)
        rest.scatter_(-1, tokens[..., None], 0.0)
    return families


# ---- trees of which all rows have the same


@dataclass(frozen=True)
class StaticTree:
    """The same ranks at every step, cut to what a row has room for."""

    ranks: RankTree
    reads = frozenset[int]()

    @property
    def max_nodes(self) -> int:
        return self.ranks.size

    @property
    def scratch(self) -> int:
        return self.ranks.size

    def grow(self, expander: Expander, context: Context, depths: Sequence[int]) -> Grown:
        roots, ranks = [row.tokens[-1] for row in context.rows], self.ranks.within(max(depths), max(context.budgets))
        if ranks is None:
            return Grown(TokenTree.root(roots, context.device), [[-1] for _ in roots])
        tokens, parts = (
            tokens_of(ranks, expander, roots, context.device).tolist(),
            parts_of(ranks, depths, context.budgets),
        )
        entries = [[ranks.entries[node] for node in ranks.nodes_of(part)] for part in parts]
        return Grown(cut(tokens, ranks, parts, context.device), entries)


def tokens_of(ranks: RankTree, expander: Expander, roots: Sequence[int], device: torch.device) -> Tensor:
    """The tokens of every node of every row, [B, N], the root first."""
    grown, scores = [torch.tensor(roots, device=device)[:, None]], expander.begin()
    for depth, (level, paths) in enumerate(zip(ranks.levels, ranks.frontiers, strict=True), 1):
        best = expander.best(scores.logits_BNV, level.widest)
        parents = level.parents if best.shape[1] > 1 else np.zeros_like(level.parents)
        grown.append(best[:, parents, level.ranks])
        if len(level.grows):
            scores = expander.expand(_level_frontier(level, paths, grown[-1], depth))
    return torch.cat(grown, 1)


def _level_frontier(level: Level, paths_WJ: Paths, tokens_BN: Tensor, depth: int) -> Frontier:
    shape = (len(tokens_BN), len(level.grows))
    return Frontier(
        tokens_BW=tokens_BN[:, level.grows],
        depths_BW=np.full(shape, depth),
        parents_BW=np.tile(level.parents[level.grows], (len(tokens_BN), 1)),
        paths_BWJ=np.broadcast_to(paths_WJ, (len(tokens_BN), *paths_WJ.shape)),
    )


def parts_of(ranks: RankTree, depths: Sequence[int], budgets: Sequence[int]) -> list[RankTree | None]:
    """What each row has room for of a static tree; None: of node 0 alone."""
    return [ranks.within(depth, most) for depth, most in zip(depths, budgets, strict=True)]


def cut(
    tokens: Sequence[Sequence[int]], ranks: RankTree, parts: Sequence[RankTree | None], device: torch.device
) -> TokenTree:
    """Static trees of these tokens, of every row its part."""
    if all(part is ranks for part in parts):
        return TokenTree(tokens, ranks.topology(len(tokens)), device)
    kept = [[row[node] for node in ranks.nodes_of(part)] for row, part in zip(tokens, parts, strict=True)]
    return TokenTree(kept, Topology.of([part.parents if part else (-1,) for part in parts]), device)
