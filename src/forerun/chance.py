"""Random streams: one per row and purpose, made by hashing, so that no row can disturb another.

A number is a function of (seed, purpose, place): no state, no order of calls, no dependence on the
batch. Three places matter:

- the last word on the token at position t uses the place t. Plain decoding and speculative decoding of a
  deterministic tree therefore draw the same token from the same law: equal seeds give equal text, with and
  without a drafter;
- the coins of a step are thrown at the place where it begins, each with a number of its own: acceptance looks at
  coins of tokens that it then does not keep, and the next step must not see these again;
- a drafter must never see a number twice. Its keys contain the row's step count (`Dice.deeper`), because a
  token that was drafted and thrown away has already told the drafter's stopping rule about its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forerun.native import sampling as native

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
        """True [B, X] with these probabilities; `place` counts tokens after node 0's, `attempt` tells
        the coins of one place apart."""

    def token(self, law_BXV: Tensor, place_BX: Ints) -> Tensor:
        """A token [B, X] from each (unnormalised) law; equal rows and places give equal luck."""


class Dice:
    """The chance of real runs: uniform numbers hashed from each row's key and absolute position."""

    def __init__(self, keys: Sequence[int], positions: Sequence[int]):
        self._keys, self._positions = keys, positions

    def row(self, index: int) -> Dice:
        """The dice of one row alone."""
        return Dice(self._keys[index : index + 1], self._positions[index : index + 1])

    def coin(self, prob_BX: Tensor, place_BX: Ints, attempt_BX: Ints | None = None) -> Tensor:
        return self.uniform(Purpose.ACCEPT, place_BX, attempt_BX).to(prob_BX.device) < prob_BX

    def token(self, law_BXV: Tensor, place_BX: Ints) -> Tensor:
        return pick(law_BXV, self.uniform(Purpose.TOKEN, place_BX))

    def uniform(self, purpose: Purpose, place_BX: Ints, attempt_BX: Ints | None = None) -> Tensor:
        """The numbers behind coins and tokens, [B, X], on the host."""
        if native.is_quick():
            return native.uniform(self._keys, self._positions, int(purpose), place_BX, attempt_BX)
        return self.uniform_in_python(purpose, place_BX, attempt_BX)

    def uniform_in_python(self, purpose: Purpose, place_BX: Ints, attempt_BX: Ints | None = None) -> Tensor:
        words = [
            [mix(mix(key, int(purpose)), position + place) for place in places]
            for key, position, places in zip(self._keys, self._positions, place_BX.tolist(), strict=True)
        ]
        if attempt_BX is not None:
            words = [list(map(mix, row, attempts)) for row, attempts in zip(words, attempt_BX.tolist(), strict=True)]
        return torch.from_numpy(np.array([[uniform(word) for word in row] for row in words]))


def final_dice(keys: Sequence[int], positions: Sequence[int]) -> Dice:
    """The dice that settle the user's tokens; `positions` is the place of the first token after node 0, per row."""
    return Dice(keys, positions)


def draft_dice(keys: Sequence[int], steps: Sequence[int], path: Sequence[int]) -> Dice:
    """The dice of a drafter; each row's step and `path` (level, round ...) make them fresh on every use."""
    words = list(map(mix, keys, steps))
    for value in (*path, int(Purpose.DRAFT)):
        words = [mix(word, value) for word in words]
    return Dice(words, [0] * len(words))


def key_of(seed: int, sample: int = 0) -> int:
    """The 64-bit key of a row: its request's seed and the number of the sample."""
    return mix(mix(seed, int(Purpose.SAMPLE)), sample)


_64_BITS = 2**64 - 1


def mix(word: int, value: int) -> int:
    """Fold a value into a 64-bit word: SplitMix64's finaliser (Steele et al. 2014) over a multiply-add."""
    z = (word * 0xD1342543DE82EF95 + value * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _64_BITS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _64_BITS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _64_BITS
    return z ^ (z >> 31)


def uniform(word: int) -> float:
    """A number in [0, 1) from the upper 53 bits."""
    return (word >> 11) * 2.0**-53


def pick(law_BXV: Tensor, uniform_BX: Tensor) -> Tensor:
    """The token at which the running sum of a law passes a uniform share of its total. Never one of
    probability zero."""
    if native.fits(law_BXV, torch.float64):
        return native.pick(law_BXV, uniform_BX)
    return pick_in_torch(law_BXV, uniform_BX)


def pick_in_torch(law_BXV: Tensor, uniform_BX: Tensor) -> Tensor:
    """The same on any device, and what is meant."""
    sums = running_sums(law_BXV)
    # Uniform numbers end at 1 - 2**-53, and that times a total, rounded, is the number before the
    # total: never the total itself.
    mark = uniform_BX.to(sums.device).unsqueeze(-1) * sums[..., -1:]
    # A law that is no law (a row that is padded, a broken model) still must not name a token that does not exist.
    return torch.searchsorted(sums, mark, right=True).squeeze(-1).clamp_(max=law_BXV.shape[-1] - 1)


SUMS = 64
"""Numbers that are summed up one after the other, before the sums of such blocks are: many blocks can be
summed up at the same time."""


def running_sums(values: Tensor) -> Tensor:
    """Over the last dimension in fp64, in the order of the kernels (`SUMS`)."""
    *shape, size = values.shape
    if size <= SUMS:
        return values.cumsum(-1, dtype=torch.float64)
    padded = torch.nn.functional.pad(values.double(), (0, -size % SUMS))
    within = padded.view(*shape, padded.shape[-1] // SUMS, SUMS).cumsum(-1)
    before = within[..., -1].cumsum(-1).roll(1, -1)
    before[..., 0] = 0
    return (before.unsqueeze(-1) + within).flatten(-2)[..., :size].contiguous()
