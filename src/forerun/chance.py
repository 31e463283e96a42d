"""Random streams: one per row and purpose, made by hashing, so that no row can disturb another.

A number is a function of (seed, purpose, place): no state, no order of calls, no dependence on the batch. Two places matter:

- the last word on the token at position t uses the place t. Plain decoding and speculative decoding of a deterministic tree
  therefore draw the same token from the same law: equal seeds give equal text, with and without a drafter;
- a drafter must never see a number twice. Its keys contain the row's step count (`Dice.deeper`), because a token that was
  drafted and thrown away has already told the drafter's stopping rule about its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]


class Purpose(IntEnum):
    """What a stream is for; streams of different purposes are independent."""

    ACCEPT = 1
    TOKEN = 2
    DRAFT = 3
    SAMPLE = 4


class Chance(Protocol):
    """What acceptance may ask of luck. Tests answer these questions in every possible way."""

    def coin(self, prob_BX: Tensor, place_BX: Ints, attempt_BX: Ints | None = None) -> Tensor:
        """True [B, X] with these probabilities; `place` counts tokens after node 0's, `attempt` the siblings tried there."""

    def token(self, law_BXV: Tensor, place_BX: Ints) -> Tensor:
        """A token [B, X] from each (unnormalised) law; equal rows and places give equal luck."""


class Dice:
    """The chance of real runs: uniform numbers hashed from each row's key and absolute position."""

    def __init__(self, keys: Words, positions: Sequence[int], purposes: tuple[Purpose, Purpose]):
        self._keys = keys
        self._base = np.asarray(positions, dtype=np.int64)[:, None]
        self._coin, self._token = purposes

    def row(self, index: int) -> Dice:
        """The dice of one row alone."""
        return Dice(self._keys[index : index + 1], self._base[index].tolist(), (self._coin, self._token))

    def coin(self, prob_BX: Tensor, place_BX: Ints, attempt_BX: Ints | None = None) -> Tensor:
        return self._uniform(self._coin, place_BX, attempt_BX).to(prob_BX.device) < prob_BX

    def token(self, law_BXV: Tensor, place_BX: Ints) -> Tensor:
        return pick(law_BXV, self._uniform(self._token, place_BX, None))

    def _uniform(self, purpose: Purpose, place_BX: Ints, attempt_BX: Ints | None) -> Tensor:
        words = mix(self._keys, int(purpose))[:, None]
        words = mix(words, (self._base + place_BX).astype(np.uint64))
        if attempt_BX is not None:
            words = mix(words, attempt_BX.astype(np.uint64))
        return torch.from_numpy(uniform(words))


def final_dice(keys: Words, positions: Sequence[int]) -> Dice:
    """The dice that settle the user's tokens; `positions` is the place of the first token after node 0, per row."""
    return Dice(keys, positions, (Purpose.ACCEPT, Purpose.TOKEN))


def draft_dice(keys: Words, path: Sequence[Ints | int]) -> Dice:
    """The dice of a drafter; `path` (step, level, round ...) makes them fresh on every use."""
    for word in path:
        keys = mix(keys, np.asarray(word).astype(np.uint64))
    keys = mix(keys, int(Purpose.DRAFT))
    return Dice(keys, [0] * len(keys), (Purpose.ACCEPT, Purpose.TOKEN))


def key_of(seed: int, sample: int = 0) -> int:
    """The 64-bit key of a row: its request's seed and the number of the sample."""
    word = mix(np.array([seed & (2**64 - 1)], dtype=np.uint64), int(Purpose.SAMPLE))
    return int(mix(word, sample)[0])


def mix(words: Words, value: Words | NDArray[np.uint64] | int) -> Words:
    """Fold a value into 64-bit words: SplitMix64's finaliser (Steele et al. 2014) over a multiply-add."""
    value = np.asarray(value, dtype=np.uint64)
    z = words * np.uint64(0xD1342543DE82EF95) + value * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x632BE59BD9B4E019)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(words: Words) -> NDArray[np.float64]:
    """Numbers in [0, 1) from the upper 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def pick(law_BXV: Tensor, uniform_BX: Tensor) -> Tensor:
    """The token at which the running sum of a law passes a uniform share of its total. Never one of probability zero."""
    sums = law_BXV.double().cumsum(-1)
    total = sums[..., -1:]
    mark = uniform_BX.to(sums.device).unsqueeze(-1) * total
    # Rounding may lift the mark to the total itself; the last token that still adds to the sum is the right one then.
    mark = torch.minimum(mark, torch.nextafter(total, torch.zeros_like(total)))
    # A law that is no law (a row that is padded, a broken model) still must not name a token that does not exist.
    return torch.searchsorted(sums, mark, right=True).squeeze(-1).clamp(max=law_BXV.shape[-1] - 1)
