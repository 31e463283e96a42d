"""Key/value storage for many rows of different lengths.

A cache owns two tensors per layer, [slots, capacity, kv_heads, head_dim]. A slot's entries below
`lengths[slot]` are committed: entry s holds the token at position s. The entries above are scratch:
the nodes of the tree being scored, in feeding order. `keep` turns one path of the scratch into
committed entries; whatever is not kept is simply overwritten later.

    slot   | committed 0 .. length-1 | scratch: node, node, node | never written |
    owner  | the row                 | the step under way        |               |

Slots are dense: rows 0 .. n-1 are live, so a batch is always a slice and the committed part is
never copied in the loop. Only `release` moves a row (the last one, into the hole), and only
`reserve` allocates, both between steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.nn.feed import Feed
from forerun.slots import Slots, moves


@dataclass(frozen=True)
class CacheShape:
    """layers, key/value heads per layer, width of one head (elements)."""

    layers: int
    kv_heads: int
    head_dim: int


class Cache:
    """See the module's text. `lengths[slot]` counts committed tokens, `scratch` the uncommitted ones beside them."""

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.lengths: Slots[int] = Slots()
        self.capacity = 0
        self._slots = 0
        self._store: Tensor | None = None

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values."""
        return 2 * self.shape.layers * self.shape.kv_heads * self.shape.head_dim * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return 0 if self._store is None else self._store.nbytes

    @property
    def rows(self) -> int:
        """Live slots."""
        return len(self.lengths)

    @property
    def slots(self) -> int:
        """Slots allocated."""
        return self._slots

    @torch.inference_mode(False)  # rows are moved and released outside of it too
    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for `slots` rows of `capacity` entries (scratch included). Allocates only when either grows."""
        if slots <= self._slots and capacity <= self.capacity:
            return
        slots, capacity = max(slots, self._slots), max(capacity, self.capacity)
        shape = self.shape
        # Poison would hide nothing here: unwritten entries are masked, but 0 * NaN is NaN, so they must be finite.
        store = torch.zeros(
            (shape.layers, 2, slots, capacity, shape.kv_heads, shape.head_dim), dtype=self.dtype, device=self.device
        )
        if self._store is not None:
            for slot, length in enumerate(self.lengths):
                store[:, :, slot, :length] = self._store[:, :, slot, :length]
        self._store, self._slots, self.capacity = store, slots, capacity

    def admit(self) -> int:
        """Open the next slot, empty. Returns its number."""
        if self.rows >= self._slots:
            raise ValueError("the cache has no free slot: reserve one first")
        return self.lengths.admit(0)

    def release(self, slot: int, ready: int | None = None) -> None:
        """Close a slot and keep the others dense, as `Slots.release` says."""
        if slot >= self.rows:
            return
        for source, hole in moves(self.rows, slot, ready):
            assert self._store is not None
            length = self.lengths[source]
            self._store[:, :, hole, :length] = self._store[:, :, source, :length]
        self.lengths.release(slot, ready)

    def append(self, layer: int, feed: Feed, k_BNHE: Tensor, v_BNHE: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's keys and values where `feed` says; return views [B, span, H, E] of what may be read."""
        assert self._store is not None
        keys, values = self._store[layer, 0, feed.rows], self._store[layer, 1, feed.rows]
        if feed.begin is not None:
            entries = slice(feed.begin, feed.begin + k_BNHE.shape[1])
            keys[:, entries], values[:, entries] = k_BNHE, v_BNHE
        else:
            rows = torch.arange(k_BNHE.shape[0], device=keys.device)[:, None]
            keys[rows, feed.at_BN], values[rows, feed.at_BN] = k_BNHE.to(keys.dtype), v_BNHE.to(values.dtype)
        return keys[:, : feed.span], values[:, : feed.span]

    def extend(self, slot: int, entries: Tensor) -> None:
        """Commit these entries behind those of a slot, [layers, 2, n, kv_heads, head_dim]."""
        length = self.lengths[slot]
        self.store[:, :, slot, length : length + entries.shape[2]] = entries
        self.lengths[slot] = length + entries.shape[2]

    def keep(self, slot: int, scratch: list[int]) -> None:
        """Commit these scratch entries of a slot, in order, and forget the others. `scratch` ascends."""
        length = self.lengths[slot]
        first = next((i for i, node in enumerate(scratch) if node != i), len(scratch))
        if first < len(scratch):
            assert self._store is not None
            source = torch.tensor([length + node for node in scratch[first:]], device=self.device)
            self._store[:, :, slot, length + first : length + len(scratch)] = self._store[:, :, slot, source]
        self.lengths[slot] = length + len(scratch)

    def truncate(self, slot: int, length: int) -> None:
        """Forget committed tokens from `length` on."""
        self.lengths[slot] = min(self.lengths[slot], length)

    @property
    def store(self) -> Tensor:
        """All of it, [layers, 2, slots, capacity, kv_heads, head_dim]; another tensor after `reserve` has allocated."""
        assert self._store is not None
        return self._store

    def entries(self, slot: int) -> Tensor:
        """The committed entries of a slot, [layers, 2, length, kv_heads, head_dim] (a view)."""
        assert self._store is not None
        return self._store[:, :, slot, : self.lengths[slot]]
