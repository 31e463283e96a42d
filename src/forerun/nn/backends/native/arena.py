"""Memory for packed weights."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np

from forerun.native.matrix import padded

HUGE_PAGE = 2 << 20


class Arena:
    """One block of zeroed memory for all matrices of a model, on huge pages where the system has them."""

    def __init__(self, size: int):
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
        self._map = mmap.mmap(-1, max(size, 1) + HUGE_PAGE, **private)
        with suppress(AttributeError, OSError):  # a system without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.used = 0
        self._begin = padded(np.frombuffer(self._map, np.uint8).ctypes.data, HUGE_PAGE)

    def take(self, size: int) -> int:
        """The address of the next `size` bytes, on a cache line."""
        address = self._begin + self.used
        self.used += padded(size, 64)
        return address
