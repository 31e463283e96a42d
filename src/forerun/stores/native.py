"""The native automaton (kernels/automaton.cc) behind the same seams as the readable one."""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Iterable, Sequence
from ctypes import c_double, c_int32, c_int64
from typing import NoReturn

from forerun.native.library import kernels, quick
from forerun.native.records import CursorRecord, ViewRecord
from forerun.stores.automaton import REACH, Cursor, Outlook
from forerun.stores.growth import STUDIED, Weights, priors
from forerun.stores.store import Draft, Limits

FEW = 64
"""So many tokens are handed over in a buffer that is there already."""
BAD_PLACE, NO_MEMORY = 2, 4
ALWAYS = 2**31 - 1


def fail(error: int) -> NoReturn:
    """Raise what an `fr_error` means."""
    if error == NO_MEMORY:
        raise MemoryError("there is no memory for more text to look up")
    if error == BAD_PLACE:
        raise ValueError("a place of another automaton, a tree of fewer than 0 nodes, or a match of fewer than 1 token")
    raise ValueError("tokens are numbers from 0 to 2**31 - 1")


class NativeAutomaton:
    """`SuffixAutomaton`, see there: 50 to 75 bytes and 0.05 to 0.2 microseconds per token (`benchmarks/lookup.py`).

    One thread at a time. When memory runs out (MemoryError), it is empty.
    """

    def __init__(self, tokens: Iterable[int] = (), reach: int = REACH):
        self.handle = kernels().fr_automaton_new(min(reach, ALWAYS))
        if not self.handle:
            fail(NO_MEMORY)
        weakref.finalize(self, kernels().fr_automaton_free, self.handle).atexit = False
        self.extend(tokens)

    def __len__(self) -> int:
        return self._sizes()[0]

    @property
    def states(self) -> int:
        return self._sizes()[1]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self._sizes()[2]

    def _sizes(self) -> list[int]:
        sizes = (c_int64 * 3)()
        quick().fr_automaton_size(self.handle, sizes)
        return list(sizes)

    def append(self, token: int) -> None:
        self.extend((token,))

    def extend(self, tokens: Iterable[int]) -> None:
        """OverflowError, ValueError: these are not tokens."""
        new = tokens if isinstance(tokens, array) and tokens.typecode == "i" else array("i", tokens)
        address, count = new.buffer_info()
        library = quick() if count <= FEW else kernels()
        if error := library.fr_automaton_extend(self.handle, address, count):
            fail(error)

    @property
    def match(self) -> Cursor:
        found = CursorRecord()
        quick().fr_automaton_match(self.handle, ctypes.byref(found))
        return Cursor(found.state, found.length)

    def advance(self, cursor: Cursor, token: int) -> Cursor:
        return self.walk(cursor, (token,))

    def walk(self, cursor: Cursor, tokens: Sequence[int]) -> Cursor:
        """`advance` by several tokens."""
        place, read = CursorRecord(*cursor), array("i", tokens)
        if error := quick().fr_automaton_advance(self.handle, ctypes.byref(place), *read.buffer_info()):
            fail(error)
        return Cursor(place.state, place.length)

    def outlook(self, cursor: Cursor) -> Outlook:
        newest, run, branches, _ = self._about(cursor)
        return Outlook(newest, run, bool(branches))

    def end(self, cursor: Cursor) -> int:
        return self._about(cursor)[3]

    def _about(self, cursor: Cursor) -> list[int]:
        found = (c_int32 * 4)()
        if error := quick().fr_automaton_outlook(self.handle, ctypes.byref(CursorRecord(*cursor)), found):
            fail(error)
        return list(found)

    def continuations(self, cursor: Cursor, count: int, shortest: int = 1) -> list[int]:
        found, place = (c_int32 * count)(), CursorRecord(*cursor)
        continuations = quick().fr_automaton_continuations
        many = continuations(self.handle, ctypes.byref(place), count, shortest, found)
        if many < 0:
            fail(-many)
        return found[:many]


class NativeFollower:
    """`Follower`, see there: one call per draft."""

    def __init__(self, automaton: NativeAutomaton, own: bool, weights: Weights, odds: Sequence[float]):
        self.automaton, self._prior = automaton, priors(weights)  # the record has only their addresses
        self._record = ViewRecord(
            automaton=automaton.handle,
            prior=self._prior.buffer_info()[0],
            odds=(c_double * 9)(*odds),
            own=own,
            studied=STUDIED if own else ALWAYS,
        )
        self._view, self._new = ctypes.byref(self._record), (c_int32 * FEW)()
        self._draft, self._next = quick().fr_view_draft, quick().fr_view_next
        self._limits: Limits | None = None

    def _keep_to(self, limits: Limits) -> None:
        """The limits go into the record when they change."""
        record, room = self._record, limits.nodes + 1
        record.nodes, record.depth, record.min_match = limits.nodes, min(limits.depth, ALWAYS), limits.min_match
        record.cost, record.ends_count = limits.cost, len(limits.ends)
        if room > record.room:
            self._tokens, self._parents, self._survival = (c_int32 * room)(), (c_int32 * room)(), (c_double * room)()
            record.room = room
            record.tokens = ctypes.addressof(self._tokens)
            record.parents = ctypes.addressof(self._parents)
            record.survival = ctypes.addressof(self._survival)
        self._ends = (c_int32 * len(limits.ends))(*limits.ends)
        record.ends = ctypes.addressof(self._ends)
        self._limits = limits

    @property
    def cursor(self) -> Cursor:
        return Cursor(self._record.cursor.state, self._record.cursor.length)

    @cursor.setter
    def cursor(self, cursor: Cursor) -> None:
        self._record.cursor = CursorRecord(*cursor)

    @property
    def odds(self) -> list[float]:
        return list(self._record.odds)

    def read(self, tokens: Sequence[int]) -> None:
        new = array("i", tokens)
        library = quick() if len(new) <= FEW else kernels()
        if error := library.fr_view_read(self._view, new.buffer_info()[0], len(new)):
            fail(error)

    def draft(self, tokens: Sequence[int], firm: int, root: int, limits: Limits) -> Draft:
        if limits is not self._limits:
            self._keep_to(limits)
        count = len(tokens)
        if count == 1 == firm and tokens[0] == root:  # a step that accepted nothing
            grown = self._next(self._view, root)
        elif count <= FEW:
            self._new[:count] = list(tokens)
            grown = self._draft(self._view, self._new, firm, count - firm, root)
        else:
            many = array("i", tokens)
            grown = kernels().fr_view_draft(self._view, many.buffer_info()[0], firm, count - firm, root)
        if grown == 1:
            return Draft([root], [-1], [1.0])
        if grown < 0:
            fail(-grown)
        return Draft(self._tokens[:grown], self._parents[:grown], self._survival[:grown])
