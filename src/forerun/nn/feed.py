"""What goes into a network's forward and what comes out: the seam between `Model` and any network."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from forerun.chance import Ints
from forerun.tree import Paths


@dataclass
class Feed:
    """N tokens for each of the slots `start .. start + B`, to be written behind what the slots hold.

    tokens_BN: int64. states_BND: the inputs themselves instead of the tokens' embeddings; of
    `tokens_BN` only the shape counts then. lengths_B: committed entries of each slot; held: scratch
    entries behind them that earlier feeds wrote, the same number in every row. where_BN: the
    positions of the tokens in their texts. paths_BNJ: the scratch entries (numbers among the M =
    held + N that there are now) that a token sees, in order of depth, itself the last, and -1
    behind that (int32; a parent has the smaller number); None: all up to itself. counts_B: the
    tokens of each row that are not padding (None: all N). last_B: if given, only the token at this
    index of each row is scored ([B, 1, V] logits). scratch_BM: the positions of all uncommitted
    tokens, for sliding windows (None: these tokens are all there are).

    The other properties say the same thing in the words of networks that want masks; they are made when asked for.
    """

    tokens_BN: Tensor
    lengths_B: Ints
    where_BN: Ints
    start: int = 0
    held: int = 0
    paths_BNJ: Paths | None = None
    counts_B: Ints | None = None
    last_B: Ints | None = None
    dtype: torch.dtype = torch.float32
    scratch_BM: Ints | None = None
    states_BND: Tensor | None = None
    _biases: dict[int | None, Tensor | None] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.tokens_BN.device

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.tokens_BN.shape[0])

    @property
    def span(self) -> int:
        """Entries [0, span) of the slots are read."""
        return int(self.lengths_B.max()) + self.held + self.tokens_BN.shape[1]

    @property
    def begin(self) -> int | None:
        """The first entry written to, where it is the same in all rows, so that a slice will do."""
        first = int(self.lengths_B[0])
        return first + self.held if bool((self.lengths_B == first).all()) else None

    @cached_property
    def at_BN(self) -> Tensor:
        """The cache entry every token writes to."""
        return self._tensor(self._entries())

    @cached_property
    def positions_BN(self) -> Tensor:
        """`where_BN` as a tensor."""
        return self._tensor(self.where_BN)

    @cached_property
    def visible_BNS(self) -> Tensor | None:
        """Which entries of [0, span) a token sees, or None when every token sees all of them."""
        if self.paths_BNJ is not None:
            return self._tensor(self._tree_mask(self.paths_BNJ))
        if self.begin is not None and self.tokens_BN.shape[1] == 1:
            return None
        return self._tensor(np.arange(self.span) <= self._entries()[:, :, None])

    def wanted(self, x_BND: Tensor) -> Tensor:
        """The states to score: all, or each row's last."""
        if self.last_B is None:
            return x_BND
        rows = torch.arange(x_BND.shape[0], device=x_BND.device)
        return x_BND[rows, self._tensor(self.last_B)].unsqueeze(1)

    def bias(self, window: int | None = None) -> Tensor | None:
        """Additive attention bias [B, N, S]: 0 where a token may look, -inf elsewhere; None if it may look anywhere.

        With a window w, a token at position p sees positions p - w + 1 .. p (the Mistral convention).
        """
        if window not in self._biases:
            self._biases[window] = self._make_bias(window)
        return self._biases[window]

    def _make_bias(self, window: int | None) -> Tensor | None:
        visible = self.visible_BNS
        if window is not None and self.span > window:
            visible = self._within(window) if visible is None else visible & self._within(window)
        if visible is None:
            return None
        zero = torch.zeros((), dtype=self.dtype, device=visible.device)
        return torch.where(visible, zero, float("-inf"))

    def _within(self, window: int) -> Tensor:
        """Committed entry s stands at position s; scratch entries stand where the model says."""
        places = np.arange(self.span)[None].repeat(len(self.lengths_B), 0)
        positions = self.where_BN if self.scratch_BM is None else self.scratch_BM
        first = self.held + self.tokens_BN.shape[1] - positions.shape[1]
        entries = self.lengths_B[:, None] + first + np.arange(positions.shape[1])
        np.put_along_axis(places, entries, positions, 1)
        return self._tensor(places[:, None, :] > self.where_BN[:, :, None] - window)

    def _entries(self) -> Ints:
        return self.lengths_B[:, None] + self.held + np.arange(self.tokens_BN.shape[1])

    def _tree_mask(self, paths_BNJ: Paths) -> np.ndarray:
        """[B, N, span]: a token sees its row's committed entries, and of the scratch behind them
        what its path names."""
        rows, count, _ = paths_BNJ.shape
        scratch = self.held + count
        sees_BNM = np.zeros((rows, count, scratch + 1), np.bool_)  # the last column takes the padding
        np.put_along_axis(sees_BNM, np.where(paths_BNJ < 0, scratch, paths_BNJ), True, 2)
        mask = np.arange(self.span) < np.broadcast_to(self.lengths_B[:, None, None], (rows, count, 1))
        for row, length in enumerate(self.lengths_B.tolist()):
            mask[row, :, length : length + scratch] = sees_BNM[row, :, :scratch]
        return mask

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


@dataclass(slots=True)
class Read:
    """logits [B, N, V] (or [B, 1, V]) and the hidden states asked for, [B, N, D] each; padding holds anything finite.

    best_BN: the token of the largest logit (the first of equals), where the network knows it already.
    """

    logits_BNV: Tensor
    hidden: dict[int, Tensor]
    best_BN: Tensor | None = None
