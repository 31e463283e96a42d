"""Networks that are tables: any law, exactly known, behind the same seam as a transformer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forerun.chance import Chance
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.model import Model
from forerun.nn.backends.torch import TORCH
from forerun.nn.cache import Cache, CacheShape
from forerun.nn.feed import Feed, Read
from forerun.row import Row
from forerun.tree import Drawn, TokenTree

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

torch.set_num_threads(1)  # tables are tiny: threads would only wait for one another


class TableNetwork:
    """Logits are a function of the prefix, looked up by hash. The cache holds token ids as keys and
    positions as values, so a wrong mask, a wrong position or a wrongly kept path is an assertion
    error or another law, never luck."""

    backend = TORCH
    no_tokens: Tensor | None = None
    home: Path | None = None
    device = torch.device("cpu")
    dtype = weights = torch.float64
    windows: frozenset[int] = frozenset()
    cache_shape = CacheShape(1, 1, 1)

    def __init__(
        self, vocab_size: int = 4, seed: int = 0, order: int = 3, sharpness: float = 1.5, max_length: int = 4096
    ):
        self.vocab_size, self.max_length = vocab_size, max_length
        self._seed, self._order, self._sharpness = seed, order, sharpness
        self.forwards = 0

    @property
    def output_shape(self) -> tuple[int, int]:
        """Its states are its logits."""
        return self.vocab_size, self.vocab_size

    def logits(self, prefix: Sequence[int]) -> Tensor:
        return self._logits(tuple(prefix[-self._order :]))

    @lru_cache(maxsize=100_000)  # noqa: B019
    def _logits(self, context: tuple[int, ...]) -> Tensor:
        normal = Random(f"{self._seed} {context}").gauss
        return torch.tensor([normal(0, self._sharpness) for _ in range(self.vocab_size)], dtype=self.dtype)

    def forward(self, feed: Feed, cache: Cache, hidden_layers: Collection[int] = ()) -> Read:
        self.forwards += 1
        tokens = feed.tokens_BN.double()[:, :, None, None]
        keys, values = cache.append(0, feed, tokens, feed.positions_BN.double()[:, :, None, None])
        held, places = keys[..., 0, 0].long().numpy(), values[..., 0, 0].long().numpy()
        visible = None if feed.visible_BNS is None else feed.visible_BNS.numpy()
        last_BN = feed.positions_BN.numpy()
        nowhere = torch.full((self.vocab_size,), float("nan"), dtype=self.dtype)
        texts = read_in_order(held, places, visible, last_BN, self._order)
        found = [nowhere if text is None else self.logits(text) for text in texts]
        logits = torch.stack(found).view(*feed.tokens_BN.shape, self.vocab_size)
        return Read(feed.wanted(logits), dict.fromkeys(hidden_layers, logits))


def read_in_order(
    held_BS: Ints, places_BS: Ints, visible_BNS: Bools | None, last_BN: Ints, count: int
) -> list[list[int] | None]:
    """For every node the last `count` tokens up to its position, None unless it sees every position up to that once."""
    (rows, nodes), span = last_BN.shape, held_BS.shape[1]
    in_order_S = (places_BS == np.arange(span)).all(0)
    if visible_BNS is None and in_order_S.all():
        ends = held_BS[:, -count:].tolist()
        return [ends[row] if last == span - 1 else None for (row, _), last in np.ndenumerate(last_BN)]
    visible_BNS = np.ones((rows, nodes, span), bool) if visible_BNS is None else visible_BNS
    in_order_S = np.append(in_order_S & visible_BNS.all((0, 1)), False)
    begin = max(0, int(in_order_S.argmin()) - count)  # all see what lies before this, and its end is looked at
    rest, last_BN = span - begin, last_BN - begin
    row, node, entry = (visible_BNS := visible_BNS[:, :, begin:]).nonzero()
    text_BNS = np.full((rows, nodes, rest + 1), -1)  # the last column takes what is out of place
    place = places_BS[row, entry + begin] - begin
    text_BNS[row, node, np.where((place >= 0) & (place < rest), place, rest)] = held_BS[row, entry + begin]
    whole_BN = ((text_BNS[:, :, :rest] >= 0) | (np.arange(rest) > last_BN[:, :, None])).all(-1)
    whole_BN &= visible_BNS.sum(-1) == last_BN + 1
    whole, last = whole_BN.ravel().tolist(), last_BN.ravel().tolist()
    texts = text_BNS.reshape(rows * nodes, rest + 1).tolist()
    return [
        text[max(0, end + 1 - count) : end + 1] if right else None
        for text, end, right in zip(texts, last, whole, strict=True)
    ]


class Near(TableNetwork):
    """A drafter's table: the target's logits plus noise."""

    def __init__(self, target: TableNetwork, noise: float, seed: int = 99, max_length: int | None = None):
        super().__init__(target.vocab_size, seed, target._order, noise, max_length or target.max_length)
        self._target = target

    def logits(self, prefix: Sequence[int]) -> Tensor:
        return self._target.logits(prefix) + super().logits(prefix)


class Wild(Drafter):
    """Any tree: shapes, tokens and kinds of drawing are random but known from the row's length and
    step alone, so some rows have nothing, some chains, some bushes, some deterministic groups below
    drawn ones."""

    name = "wild"

    def __init__(self, vocab_size: int, max_nodes: int = 6, seed: int = 0, kinds: Sequence[Drawn] = tuple(Drawn)):
        self.max_nodes = max_nodes
        self._vocab, self._seed, self._kinds = vocab_size, seed, kinds

    def propose(self, context: Context) -> TokenTree:
        chance = context.chance()
        rows = [
            self._draft(row, depth, chance.row(index))
            for index, (row, depth) in enumerate(zip(context.rows, context.depths, strict=True))
        ]
        plain = TokenTree.of([row[0] for row in rows], [row[1] for row in rows], context.device)
        drawn = np.zeros((plain.rows, plain.nodes), dtype=np.uint8)
        laws = torch.zeros(plain.rows, plain.nodes, self._vocab, dtype=torch.float64)
        for index, (_, _, groups) in enumerate(rows):
            for node, (kind, law) in groups.items():
                drawn[index, node], laws[index, node] = kind, law
        return TokenTree(plain.tokens, plain.topology, context.device, drawn, laws) if drawn.any() else plain

    def _draft(
        self, row: Row, most: int, chance: Chance
    ) -> tuple[list[int], list[int], dict[int, tuple[Drawn, Tensor]]]:
        rng = np.random.default_rng([self._seed, len(row.tokens), row.step])
        tokens, parents, depths = [row.tokens[-1]], [-1], [0]
        groups: dict[int, tuple[Drawn, Tensor]] = {}
        size = int(rng.integers(0, self.max_nodes + 1))
        for node in range(self.max_nodes):  # nodes that do not exist yet are skipped, but their numbers are drawn
            kind, count = self._kinds[rng.integers(len(self._kinds))], int(rng.integers(0, 4))
            law = torch.from_numpy(rng.dirichlet(np.ones(self._vocab)))
            rest, choices = law.clone(), rng.integers(self._vocab, size=4).tolist()
            if node >= len(tokens) or depths[node] >= most:
                continue
            for attempt in range(min(count, size + 1 - len(tokens))):
                token = choices[attempt]
                if kind != Drawn.DETERMINISTIC:
                    if not rest.sum() > 0:
                        break
                    token = int(chance.token(rest[None, None], np.array([[node * 10 + attempt]])))
                    groups[node] = kind, law
                if kind == Drawn.WITHOUT_REPLACEMENT:
                    rest[token] = 0
                tokens.append(token)
                parents.append(node)
                depths.append(depths[node] + 1)
        return tokens, parents, groups


def engine_of(
    target: TableNetwork, drafter: object = "none", networks: dict[str, TableNetwork] | None = None, **options: object
) -> Engine:
    """An engine over tables; checkpoints in the drafter's description are names in `networks`."""
    if not isinstance(drafter, Drafter):
        drafter = build(drafter, Workshop(Model(target, 0), (networks or {}).__getitem__))
    return Engine(target, drafter, **options)


def plain(target: TableNetwork, prompt: Sequence[int], count: int) -> list[int]:
    """The slow obvious version: greedy decoding without engine, cache or tree."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(target.logits(tokens).argmax()))
    return tokens[len(prompt) :]
