"""Model: a network with a memory. Targets, draft models, the middle of a hierarchy, a layer that
reads another model's states and the teacher of a training run are all this one class.

It compares what its cache holds with what a row has committed before it speaks, so that nothing is
a special case: a row that was just admitted, a token that another model recovered, a draft that
survived completely. All of these are "catch up".

Networks that read states are told what to read (`append`, `grow`): a row's text does not say it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from forerun.chance import Ints
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed, Read
from forerun.nn.network import Network
from forerun.nn.prefixes import Prefixes
from forerun.row import Row
from forerun.tree import Paths, TokenTree, Topology

CHUNK = 512
"""Tokens of one row read at a time while catching up."""
SHORT = 8
"""Rows that are at most this far behind catch up together, padded to the longest."""


@dataclass(frozen=True)
class Inputs:
    """What comes next in some rows, the first `counts_B` of N each; the rest is padding.

    tokens_BN: int64. states_BND: read instead of the tokens' embeddings, or beside them, as the
    network has it; a network without a vocabulary knows the tokens' number alone.
    """

    tokens_BN: Tensor
    counts_B: Ints
    states_BND: Tensor | None = None

    @staticmethod
    def whole(tokens_BN: Tensor) -> Inputs:
        """Texts of one length."""
        return Inputs(tokens_BN, np.full(*tokens_BN.shape))

    @staticmethod
    def of_tokens(parts: Sequence[Sequence[int]], device: torch.device) -> Inputs:
        """Ragged."""
        counts = [len(part) for part in parts]
        longest = max(counts)
        padded = np.array([[*part, *[0] * (longest - len(part))] for part in parts])
        return Inputs(torch.from_numpy(padded).to(device), np.asarray(counts))

    @staticmethod
    def of_states(parts: Sequence[Tensor]) -> Inputs:
        """Ragged, [n, D] of each row."""
        counts = np.asarray([len(part) for part in parts])
        shape = len(parts), int(counts.max())
        padded = parts[0].new_zeros((*shape, parts[0].shape[1]))
        for row, part in zip(padded, parts, strict=True):
            row[: len(part)] = part
        return Inputs(torch.zeros(shape, dtype=torch.int64, device=padded.device), counts, padded)


@dataclass(frozen=True)
class Scores:
    """What a model says about a tree: logits [B, N, V] after every node, and the hidden states asked for, [B, N, D].

    best: the most probable token after every node, [B, N] (the first of equals). before: per layer
    and row, the hidden states [m, D] of committed tokens that were read on this occasion, in front
    of the tree; empty where there were none.
    """

    logits_BNV: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    best_BN: Tensor | None = None
    before: dict[int, list[Tensor]] = field(default_factory=dict)

    @property
    def best(self) -> Tensor:
        """[B, N]; many a network has found it already."""
        return self.logits_BNV.argmax(-1) if self.best_BN is None else self.best_BN


class Model:
    """A network and its cache. `scratch`: the most uncommitted tokens it is ever asked to hold per row."""

    def __init__(self, network: Network, scratch: int):
        self.network = network
        self.scratch = scratch
        self.cache = Cache(network.cache_shape, network.dtype, network.device)
        self._held = 0  # scratch entries in use; the same for all rows, which are padded to it
        self._offsets: list[Ints] = []  # their offsets behind the committed text, for sliding windows
        self._leads: list[int] = []  # committed tokens that were read together with a tree, in front of it
        self.passes = 0
        """Forwards so far, whatever they read."""
        self.prefixes = Prefixes(self.cache, 1, 0)
        """What it need not read again: nothing, until somebody allows it memory (`remember`)."""

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def vocab_size(self) -> int:
        return self.network.vocab_size

    @property
    def max_length(self) -> int:
        return self.network.max_length

    def remember(self, nbytes: int, layers: Collection[int] = ()) -> None:
        """Share what rows that begin alike have read, within so many bytes. It is done where a model catches up
        with a new row and no states are asked for; whoever calls `prefill` does it himself, with the states of
        these layers."""
        self.prefixes = Prefixes(self.cache, self.grain, nbytes, layers)

    @property
    def grain(self) -> int:
        """A text that was read up to a multiple of so many tokens, from its start in chunks,
        may be gone on with by whoever has a copy, and nobody finds other bits than if it had been
        read at once. 1: any text may, however it was read."""
        return 1 if self.network.backend.keeps_bits else CHUNK

    def reserve(self, rows: int, length: int) -> None:
        """Allocate for so many rows of so many tokens at once, instead of growing with every admission."""
        self.cache.reserve(rows, length + self.scratch + SHORT)

    def admit(self, limit: int) -> int:
        """Open the next slot for a row that will have at most `limit` tokens. Returns its number."""
        rows = self.cache.rows
        slots = rows if rows < self.cache.slots else max(1, 2 * rows)
        self.reserve(max(slots, rows + 1), limit)
        return self.cache.admit()

    def release(self, slot: int, ready: int | None = None) -> None:
        self.cache.release(slot, ready)

    def prefill(self, row: Row, slot: int, layers: Collection[int] = ()) -> dict[int, Tensor] | None:
        """Read one chunk of a row's tokens up to, but without, the newest.

        Returns the hidden states asked for of that chunk, [1, N, D], or None when nothing is left to read.
        """
        self._forget_scratch()
        start = self.cache.lengths[slot]
        part = row.tokens[start : min(start + CHUNK, len(row.tokens) - 1)]
        if not part:
            return None
        return self._commit([part], slot, layers).hidden

    def prefill_all(self, row: Row, slot: int, layers: Collection[int]) -> dict[int, Tensor]:
        """Read all of a row's tokens but the newest; the hidden states asked for, [1, S - 1, D], {} for one token."""
        parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        while (states := self.prefill(row, slot, layers)) is not None:
            for layer, part in states.items():
                parts[layer].append(part)
        return {layer: torch.cat(found, 1) for layer, found in parts.items() if found}

    def append(self, inputs: Inputs, start: int = 0, layers: Collection[int] = ()) -> Read:
        """Read what comes next in the rows `start ..`, committed, and score the last of each:
        logits [B, 1, V], and the hidden states asked for of all that was read, [B, N, D]. A row may
        have nothing to read if others have. The scratch is forgotten."""
        self._forget_scratch()
        feed = self._feed(
            inputs.tokens_BN,
            np.broadcast_to(np.arange(inputs.tokens_BN.shape[1]), tuple(inputs.tokens_BN.shape)),
            None,
            inputs.counts_B,
            start,
        )
        feed.states_BND, feed.last_B = inputs.states_BND, np.maximum(inputs.counts_B - 1, 0)
        read = self._forward(feed, layers)
        for row, count in enumerate(inputs.counts_B.tolist()):
            self.cache.lengths[start + row] += count
        return read

    def read(self, inputs: Inputs, layers: Collection[int]) -> dict[int, Tensor]:
        """The hidden states [B, N, D] of whole texts from position 0, in one forward. It serves no
        rows, and keeps none."""
        rows, longest = inputs.tokens_BN.shape
        if self.cache.rows:
            raise ValueError(
                "a model whose rows are running reads no other texts: make another one on the same network"
            )
        if longest > self.max_length:
            raise ValueError(f"a text of {longest} tokens is longer than the context of {self.max_length}")
        self.reserve(rows, longest)
        try:
            for _ in range(rows):
                self.cache.admit()
            return self.append(inputs, layers=layers).hidden
        finally:
            while self.cache.rows:
                self.release(self.cache.rows - 1)

    def score(self, tree: TokenTree, rows: Sequence[Row], layers: Collection[int] = ()) -> Scores:
        """One forward over all nodes of all rows. The nodes stay in scratch until `keep` says which were right.

        Rows must stand in slots 0 .. B - 1; node 0 of each is its newest token. A few committed
        tokens that the cache does not hold yet, such as a model above has placed, are read in the
        same forward.
        """
        self._align(rows)
        texts = [row.tokens[:-1] if self._behind(row, slot, SHORT) else None for slot, row in enumerate(rows)]
        read = self._catch_up(rows, texts, layers=layers)
        missing = [row.tokens[self.cache.lengths[slot] : -1] for slot, row in enumerate(rows)]
        if not any(missing):
            logits, hidden, best = self._read_tree(tree.tokens_BN, tree.topology, layers)
            return Scores(logits, hidden, best, read)
        leads = [len(part) for part in missing]
        tokens = [[*part, *nodes] for part, nodes in zip(missing, tree.tokens, strict=True)]
        longest = max(map(len, tokens))
        tokens_BN = torch.tensor([row + [0] * (longest - len(row)) for row in tokens], device=self.device)
        logits, hidden, best = self._read_tree(tokens_BN, tree.topology.behind(leads), layers)
        self._leads = leads
        nodes = _Nodes(leads, tree.nodes, self.device)
        for layer, states in hidden.items():
            self._lead(read, layer, states, leads)
        return Scores(
            nodes.of(logits),
            {layer: nodes.of(states) for layer, states in hidden.items()},
            None if best is None else nodes.of(best),
            read,
        )

    @staticmethod
    def _lead(before: dict[int, list[Tensor]], layer: int, states_BND: Tensor, leads: Sequence[int]) -> None:
        """Add the first states of each row to what was read before."""
        first = [row[:lead] for row, lead in zip(states_BND, leads, strict=True)]
        before[layer] = (
            [torch.cat(pair) for pair in zip(before[layer], first, strict=True)] if layer in before else first
        )

    def _read_tree(
        self, tokens_BN: Tensor, topology: Topology, layers: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor], Tensor | None]:
        paths = None if topology.is_chain else topology.paths_BNJ
        read = self._grow(tokens_BN, topology.depths_BN, paths, layers, np.asarray(topology.sizes))
        return read.logits_BNV, read.hidden, read.best_BN

    def next_scores(
        self, rows: Sequence[Row], layers: Collection[int] = (), asked: Sequence[bool] | None = None
    ) -> Scores:
        """Catch up with all committed tokens and score what comes next (N is 1): how a draft model
        begins a draft. The hidden states asked for are those of the newest token, and `before` it
        those of what was read on the way.

        asked: of which rows (all, if not given), one at least. The others are not read, and their scores are anything.
        """
        asked = [True] * len(rows) if asked is None else asked
        self._align(rows)
        texts = [
            row.tokens if one and self._behind(row, slot, SHORT) else None
            for slot, (row, one) in enumerate(zip(rows, asked, strict=True))
        ]
        before = self._catch_up(rows, texts, SHORT, layers)
        parts = [
            row.tokens[self.cache.lengths[slot] :] if one else []
            for slot, (row, one) in enumerate(zip(rows, asked, strict=True))
        ]
        read = self._commit(parts, layers=layers)
        if not layers:
            return Scores(read.logits_BNV, best_BN=read.best_BN)
        ends = [max(0, len(part) - 1) for part in parts]
        hidden = {layer: states[list(range(len(rows))), ends].unsqueeze(1) for layer, states in read.hidden.items()}
        for layer, states in read.hidden.items() if any(ends) else ():
            self._lead(before, layer, states, ends)
        return Scores(read.logits_BNV, hidden, read.best_BN, before)

    def grow(
        self,
        tokens_BN: Tensor,
        depths_BN: Ints,
        paths_BNJ: Paths | None = None,
        layers: Collection[int] = (),
        states_BND: Tensor | None = None,
        counts_B: Ints | None = None,
    ) -> Scores:
        """Read uncommitted tokens that follow those already in scratch, and score them.

        depths: 1 for children of the newest committed token, and so on. paths_BNJ: the scratch
        entries that each of them sees, in order of depth, itself last, padded with -1 (entries
        count from 0 behind a row's committed ones; the first of these N comes behind all that were
        read before); None: all up to itself (a chain). states_BND: as of `Inputs`. counts_B: how many
        of N each row has, None: all; the scores of the rest are anything.
        """
        read = self._grow(tokens_BN, depths_BN - 1, paths_BNJ, layers, counts_B, states_BND)
        return Scores(read.logits_BNV, read.hidden, read.best_BN)

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit these scratch entries of each row, in order, and forget the rest."""
        for slot, path in enumerate(paths):
            lead = self._leads[slot] if self._leads else 0
            entries = [*range(lead), *(lead + node for node in path)] if lead else path
            self.cache.keep(slot, [entry for entry in entries if entry < self._held])
        self._forget_scratch()

    def truncate(self, slot: int, length: int) -> None:
        """Forget everything from this length on."""
        self.cache.truncate(slot, length)
        self._forget_scratch()

    def _forget_scratch(self) -> None:
        self._held, self._leads = 0, []

    def _align(self, rows: Sequence[Row]) -> None:
        """Forget the scratch, and what the rows do not hold any more. The newest token is always read again."""
        self._forget_scratch()
        for slot, row in enumerate(rows):
            self.cache.truncate(slot, len(row.tokens) - 1)

    def _behind(self, row: Row, slot: int, allowed: int) -> bool:
        return len(row.tokens) - self.cache.lengths[slot] > allowed

    def _catch_up(
        self,
        rows: Sequence[Row],
        texts: Sequence[list[int] | None],
        leave: int = 0,
        layers: Collection[int] = (),
    ) -> dict[int, list[Tensor]]:
        """Read what is missing of these texts of rows (None: nothing), one row at a time, leaving at
        most `leave` tokens unread. Returns the hidden states asked for, [n, D] per layer and row, if
        anything was read."""
        parts: dict[int, list[list[Tensor]]] = {layer: [[] for _ in texts] for layer in layers}
        for slot, text in enumerate(texts):
            is_new = text is not None and not self.cache.lengths[slot] and not layers
            if text and is_new:
                self.prefixes.recall(rows[slot].params.tenant, text[: len(text) - leave], slot)
            while text is not None and (missing := len(text) - leave - self.cache.lengths[slot]) > 0:
                start = self.cache.lengths[slot]
                read = self._commit([text[start : start + min(CHUNK, missing)]], slot, layers)
                for layer, states in read.hidden.items():
                    parts[layer][slot].append(states[0])
            if text and is_new:
                self.prefixes.remember(rows[slot].params.tenant, text, slot, {})
        some = {layer: next((part for row in rows for part in row), None) for layer, rows in parts.items()}
        return {
            layer: [torch.cat(row) if row else first[:0] for row in parts[layer]]
            for layer, first in some.items()
            if first is not None
        }

    def _commit(self, parts: Sequence[list[int]], start: int = 0, layers: Collection[int] = ()) -> Read:
        """Read committed tokens of rows `start ..`, ragged, and score the last of each."""
        return self.append(Inputs.of_tokens(parts, self.device), start, layers)

    def _grow(
        self,
        tokens_BN: Tensor,
        offsets_BN: Ints,
        paths_BNJ: Paths | None,
        layers: Collection[int],
        counts_B: Ints | None = None,
        states_BND: Tensor | None = None,
    ) -> Read:
        feed = self._feed(tokens_BN, offsets_BN, paths_BNJ, counts_B)
        feed.states_BND = states_BND
        if self.network.windows:
            self._offsets = [*self._offsets, offsets_BN] if self._held else [offsets_BN]
            feed.scratch_BM = feed.lengths_B[:, None] + np.concatenate(self._offsets, 1)
        read = self._forward(feed, layers)
        self._held += tokens_BN.shape[1]
        return read

    def _forward(self, feed: Feed, layers: Collection[int]) -> Read:
        """The one place where logits come from, and where ids that are no tokens become impossible."""
        self.passes += 1
        read, ids = self.network.forward(feed, self.cache, layers), self.network.no_tokens
        if ids is None:
            return read
        read.logits_BNV.index_fill_(-1, ids, -torch.inf)
        if read.best_BN is None or not torch.isin(read.best_BN, ids).any():
            return read
        return replace(read, best_BN=read.logits_BNV.argmax(-1))

    def _feed(
        self,
        tokens_BN: Tensor,
        offsets_BN: Ints,
        paths_BNJ: Paths | None,
        counts_B: Ints | None,
        start: int = 0,
    ) -> Feed:
        """Tokens at `offsets` behind each row's committed text, to be written behind its scratch."""
        lengths = np.asarray(self.cache.lengths[start : start + tokens_BN.shape[0]])
        return Feed(
            tokens_BN=tokens_BN,
            lengths_B=lengths,
            where_BN=np.minimum(lengths[:, None] + offsets_BN, self.max_length - 1),
            start=start,
            held=self._held,
            paths_BNJ=paths_BNJ,
            counts_B=counts_B,
            dtype=self.network.dtype,
        )


class _Nodes:
    """Picks a tree's nodes out of a forward that read other tokens before them, `leads[b]` in row b."""

    def __init__(self, leads: Sequence[int], count: int, device: torch.device):
        self._same = leads[0] if len(set(leads)) == 1 else None
        self._rows = torch.arange(len(leads), device=device)[:, None]
        columns = np.asarray(leads)[:, None] + np.arange(count)
        self._columns, self._count = columns, count

    def of(self, read_BM: Tensor) -> Tensor:
        """[B, M, ...] -> [B, N, ...]; where a row has fewer nodes than N, anything."""
        if self._same is not None:
            return read_BM[:, self._same : self._same + self._count]
        columns = torch.from_numpy(np.minimum(self._columns, read_BM.shape[1] - 1)).to(read_BM.device)
        return read_BM[self._rows, columns]
