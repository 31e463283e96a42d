"""Slots: rows stand densely, 0 .. n - 1, so that a batch is always a slice. Whoever keeps something per row keeps it in
`Slots` and moves it by the same rule: a row is admitted at the end, and the last one fills the hole of one that leaves.
"""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def moves(rows: int, slot: int, ready: int | None = None) -> list[tuple[int, int]]:
    """What moves where when one of so many rows leaves this slot: (from, to), in this order. The
    last place is free then.

    With `ready`, rows 0 .. ready - 1 stay in front of the rest: the last ready row moves into the
    hole, and the very last row into the place that this one leaves.
    """
    found = []
    for source in sorted({rows - 1, (ready or rows) - 1}):
        if source != slot:
            found.append((source, slot))
        slot = source
    return found


class Slots(list[T]):
    """One thing per row, in slot order."""

    def admit(self, item: T) -> int:
        """Take the next slot; returns its number."""
        self.append(item)
        return len(self) - 1

    def release(self, slot: int, ready: int | None = None) -> T | None:
        """Close a slot as `moves` says; returns what stood there. A slot that was never opened is left alone (None)."""
        if slot >= len(self):
            return None
        gone = self[slot]
        for source, hole in moves(len(self), slot, ready):
            self[hole] = self[source]
        self.pop()
        return gone
