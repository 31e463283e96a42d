"""What rows have read already, kept for rows whose texts begin alike.

Texts are cut into blocks of one length. A block is kept with the keys and values of its tokens, and
with the hidden states that somebody reads beside them; it hangs on the block before it:

    tenant ─ [system prompt] ─ [question, answer] ─ [next question]
                             └ [another question]

Whenever a path of blocks was of use it is touched from its end to its beginning. So what hangs on a
block is always older than the block itself, the oldest block of all has nothing behind it, and
forgetting the oldest leaves no hole.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

import torch
from torch import Tensor

from forerun.nn.cache import Cache

BLOCK = 32
"""Tokens of a block, at least. What lies behind a text's last whole block is read again."""

Place: TypeAlias = tuple[int | str, tuple[int, ...]]
"""The block before (its number; the tenant's name before the first one), and a block's own tokens."""


@dataclass(frozen=True)
class _Block:
    """entries: [layers, 2, n, kv_heads, head_dim]; states: [n, D] per layer."""

    number: int
    entries: Tensor
    states: Mapping[int, Tensor]

    @property
    def nbytes(self) -> int:
        return self.entries.nbytes + sum(states.nbytes for states in self.states.values())

    def copy(self) -> _Block:
        states = {layer: states.clone() for layer, states in self.states.items()}
        return _Block(self.number, self.entries.clone(memory_format=torch.contiguous_format), states)


class Prefixes:
    """The blocks of a cache, at most `bound` bytes of them (0: none is kept).

    grain: reading may go on behind any multiple of so many tokens with the bits that reading from
    the start would give (`Model.grain`); only texts that were read so may be remembered. layers:
    whose hidden states belong to a block. What is remembered is a copy, and so is what is recalled.
    """

    def __init__(self, cache: Cache, grain: int, bound: int, layers: Collection[int] = ()):
        self.bound, self.layers = bound, tuple(layers)
        self._cache, self._length = cache, math.lcm(grain, BLOCK)
        self._blocks: OrderedDict[Place, _Block] = OrderedDict()  # the oldest first
        self._numbers = count()

    @property
    def nbytes(self) -> int:
        """Of all keys, values and states that are kept."""
        return sum(block.nbytes for block in self._blocks.values())

    def clear(self) -> None:
        """Forget everything, such as when the network's weights have changed. Nothing is running."""
        self._blocks.clear()

    def whole(self, length: int) -> int:
        """How many of so many tokens lie in whole blocks."""
        return length // self._length * self._length

    def recall(self, tenant: str, tokens: Sequence[int], slot: int) -> dict[int, Tensor]:
        """Put into an empty slot what is known of a text that is to be read, as if it had been read there.
        Returns the states of that, [1, n, D] per layer; {} where nothing is known."""
        path: list[Place] = []
        for place in self._places(tenant, tokens, len(tokens)):
            if place not in self._blocks:
                break
            path.append(place)
        self._touch(path)
        blocks = [self._blocks[place] for place in path]
        for block in blocks:
            self._cache.extend(slot, block.entries)
        return {layer: torch.cat([block.states[layer] for block in blocks])[None] for layer in self.layers if blocks}

    def remember(
        self, tenant: str, tokens: Sequence[int], slot: int, states: Mapping[int, Tensor], since: int = 0
    ) -> None:
        """Keep a copy of what a slot holds of this text. states: of its tokens from number `since` on, [n, D] per
        layer; where they are missing, nothing is kept."""
        if not self.bound:
            return
        entries = self._cache.entries(slot)
        seen = [since + len(states[layer]) if layer in states else 0 for layer in self.layers]
        path: list[Place] = []
        for place in self._places(tenant, tokens, min(len(tokens), entries.shape[2], *seen)):
            begin = len(path) * self._length
            if place in self._blocks:
                self._blocks.move_to_end(place)
            elif begin < since:
                break
            else:
                some = {layer: states[layer][begin - since :][: self._length] for layer in self.layers}
                block = _Block(next(self._numbers), entries[:, :, begin : begin + self._length], some)
                if not self._make_room(block.nbytes, len(path)):
                    break
                self._blocks[place] = block.copy()
            path.append(place)
        self._touch(path)

    def _places(self, tenant: str, tokens: Sequence[int], length: int) -> Iterator[Place]:
        """Of the whole blocks among the first `length` tokens. Whoever asks for the next has found or put a block
        in the one before."""
        before: int | str = tenant
        for begin in range(0, self.whole(length), self._length):
            place = before, tuple(tokens[begin : begin + self._length])
            yield place
            before = self._blocks[place].number

    def _make_room(self, nbytes: int, path: int) -> bool:
        """For one block more behind a path of so many, which are the youngest; all blocks are of one size."""
        most = self.bound // nbytes
        while path < most <= len(self._blocks):
            self._blocks.popitem(last=False)
        return path < most

    def _touch(self, path: Sequence[Place]) -> None:
        for place in reversed(path):
            self._blocks.move_to_end(place)
