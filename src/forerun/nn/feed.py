"""What goes into a network's forward and what comes out: the seam between `Model` and any network."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Feed:
    """Tokens for slots `start .. start + B`, N each, and where they stand.

    tokens_BN, positions_BN: int64. at_BN: the cache entry every token writes to (int64); `begin`: the first of them where
    all rows write to the same entries, so that a slice will do. span: entries [0, span) of the slots are read.
    visible_BNS: which of them a token sees (bool), or None when every token sees all of them. dtype: of the bias that is
    made from it. last_B: if given, only the token at this index of each row is scored ([B, 1, V] logits). scratch: entries
    and positions [B, M] of all uncommitted tokens, these and earlier ones (for sliding windows; None: these alone).
    """

    tokens_BN: Tensor
    positions_BN: Tensor
    start: int
    at_BN: Tensor
    span: int
    visible_BNS: Tensor | None
    dtype: torch.dtype
    last_B: Tensor | None = None
    scratch: tuple[Tensor, Tensor] | None = None
    begin: int | None = None
    _biases: dict[int | None, Tensor | None] = field(default_factory=dict)

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.tokens_BN.shape[0])

    def wanted(self, x_BND: Tensor) -> Tensor:
        """The states to score: all, or each row's last."""
        if self.last_B is None:
            return x_BND
        return x_BND[torch.arange(x_BND.shape[0], device=x_BND.device), self.last_B].unsqueeze(1)

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
        places = torch.arange(self.span, device=self.positions_BN.device).repeat(self.tokens_BN.shape[0], 1)
        entries, positions = self.scratch or (self.at_BN, self.positions_BN)
        places.scatter_(1, entries, positions)
        return places[:, None, :] > self.positions_BN[:, :, None] - window


@dataclass(slots=True)
class Read:
    """logits [B, N, V] (or [B, 1, V]) in the network's dtype, and the hidden states asked for, [B, N, D] each."""

    logits_BNV: Tensor
    hidden: dict[int, Tensor]
