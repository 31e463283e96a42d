"""A suffix automaton: every substring of a text, found again in constant time per token, while the text grows.

Blumer et al. 1985 (online construction), with one addition: every state knows which token came
after it last, and how many times in a row. A *state* stands for all substrings that end at the same
places of the text; its edges lead to the tokens that follow there. The *suffix link* of a state
leads to its longest suffix that also occurs elsewhere, so a walk along the links meets every
suffix, from long to short.

Appending costs O(1) amortised: one to two microseconds in plain Python, for text of any kind. A
text of n tokens has at most 2 n - 1 states. A state takes 29 bytes, and a dict if it has several
edges: together 125 to 145 bytes per token of source code, 100 to 160 of random tokens, 290 of
random bits, the worst text known (`benchmarks/lookup.py` measures both). Where there are native
kernels, kernels/automaton.cc is used instead: the same states in less than half the memory and a
twentieth of the time.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

REACH = 16
"""How many suffixes, from the longest on, have their statistics brought up to date by a token, and
are asked for continuations. Bounds the work where the text repeats itself without end; source code
needs two on average."""


SEPARATOR = 2**31 - 1
"""A token that stands between texts, where one automaton holds several. It is never proposed."""


class Cursor(NamedTuple):
    """A place in the automaton: a state, and how many of the last tokens read it stands for (0: none, at the root).

    Good until the next token is appended.
    """

    state: int
    length: int


ROOT = Cursor(0, 0)


class Outlook(NamedTuple):
    """What is known about the next token. newest: the one that came last (-1: none). run: how many
    times in a row it came, 1 to 255. branches: whether other tokens have come here as well."""

    newest: int
    run: int
    branches: bool


class SuffixAutomaton:
    """The substrings of `tokens` (integers from 0 to 2**31 - 1), and what came after each of them.

    Per state: `_length` of its longest substring, suffix `_link`, `_newest` edge and its `_target`,
    `_run` of that edge, and the first `_end` of its substrings: how many tokens had been read then.
    `_edges` holds all edges of a state that has several, the newest last, and None for the others.
    """

    def __init__(self, tokens: Iterable[int] = (), reach: int = REACH):
        self._length, self._link = array("i", (0,)), array("i", (-1,))
        self._newest, self._target = array("i", (-1,)), array("i", (-1,))
        self._run, self._end = bytearray(1), array("i", (0,))
        self._edges: list[dict[int, int] | None] = [None]
        self._last = 0
        self._reach = reach
        self.extend(tokens)

    def __len__(self) -> int:
        """Tokens read."""
        return self._length[self._last]

    @property
    def states(self) -> int:
        return len(self._edges)

    @property
    def nbytes(self) -> int:
        """Memory in bytes, the integers inside the dicts included. O(states): for statistics, not for loops."""
        tables = (self._length, self._link, self._newest, self._target, self._run, self._end, self._edges)
        branching = [edges for edges in self._edges if edges is not None]
        return sum(map(sys.getsizeof, tables)) + sum(sys.getsizeof(edges) + 28 * len(edges) for edges in branching)

    # ---- growing

    def append(self, token: int) -> None:
        """Read one more token."""
        self.extend((token,))

    def extend(self, tokens: Iterable[int]) -> None:
        """Read more tokens."""
        length, link, newest, target = self._length, self._link, self._newest, self._target
        run, end, edges = self._run, self._end, self._edges
        for token in tokens:
            state, found, current = self._last, -1, len(edges)
            length.append(length[state] + 1)
            link.append(0)
            newest.append(-1)
            target.append(-1)
            run.append(0)
            end.append(length[current])
            edges.append(None)
            while state >= 0:  # every suffix that was never followed by this token is now
                if newest[state] == token:
                    found = target[state]
                    break
                branches = edges[state]
                if branches is not None:
                    found = branches.get(token, -1)
                    if found >= 0:
                        break
                    branches[token] = current
                elif newest[state] >= 0:
                    edges[state] = {newest[state]: target[state], token: current}
                newest[state], target[state], run[state] = token, current, 1
                state = link[state]
            self._last = current
            if found >= 0:
                if length[found] != length[state] + 1:
                    found = self._split(found, state, token)
                link[current] = found
                self._note(state, token)

    def _split(self, whole: int, state: int, token: int) -> int:
        """The shorter substrings of `whole`, which just ended at one more place than the longer
        ones, as a state of their own.

        They are reached from `state` and its suffixes by `token`.
        """
        part, branches = len(self._edges), self._edges[whole]
        self._length.append(self._length[state] + 1)
        self._link.append(self._link[whole])
        self._newest.append(self._newest[whole])
        self._target.append(self._target[whole])
        self._run.append(self._run[whole])
        self._end.append(self._end[whole])
        self._edges.append(None if branches is None else branches.copy())
        self._link[whole] = part
        while state >= 0 and self._step(state, token) == whole:
            branches = self._edges[state]
            if branches is not None:
                branches[token] = part
            if self._newest[state] == token:
                self._target[state] = part
            state = self._link[state]
        return part

    def _note(self, state: int, token: int) -> None:
        """`token` came once more after `state` and its suffixes."""
        newest, run, link = self._newest, self._run, self._link
        for _ in range(self._reach):
            if state <= 0:
                return
            if newest[state] != token:
                branches = self._edges[state]
                assert branches is not None
                newest[state], run[state] = token, 1
                branches[token] = self._target[state] = branches.pop(token)
            elif run[state] < 255:
                run[state] += 1
            state = link[state]

    def _step(self, state: int, token: int) -> int:
        """Where the edge `token` of a state leads, -1 if there is none."""
        if self._newest[state] == token:
            return self._target[state]
        branches = self._edges[state]
        return -1 if branches is None else branches.get(token, -1)

    # ---- looking up

    @property
    def match(self) -> Cursor:
        """The longest end of the text that has occurred before."""
        state = self._link[self._last]
        return Cursor(state, self._length[state]) if state > 0 else ROOT

    def advance(self, cursor: Cursor, token: int) -> Cursor:
        """The longest end of what the cursor has read, and `token` behind it, that occurs in the
        text before its last token.

        So there is always a token to follow, unless the length is 0. Reads only: for drafts, and for tokens that may be
        taken back.
        """
        state, length = cursor
        found = self._step(state, token)
        while found < 0:
            state = self._link[state]
            if state < 0:
                return ROOT
            length = self._length[state]
            found = self._step(state, token)
        if found == self._last:  # only the whole text has nothing behind it
            found = self._link[found]
            return Cursor(found, self._length[found])
        return Cursor(found, length + 1)

    def walk(self, cursor: Cursor, tokens: Iterable[int]) -> Cursor:
        """`advance` by several tokens."""
        for token in tokens:
            cursor = self.advance(cursor, token)
        return cursor

    def outlook(self, cursor: Cursor) -> Outlook:
        """What came after this place."""
        state = cursor.state
        return Outlook(self._newest[state], self._run[state], self._edges[state] is not None)

    def end(self, cursor: Cursor) -> int:
        """How many tokens had been read when what the cursor stands for ended for the first time."""
        return self._end[cursor.state]

    def continuations(self, cursor: Cursor, count: int, shortest: int = 1) -> list[int]:
        """At most `count` different tokens that came after this place: the newest first, and after
        those of the whole match those of its shorter and shorter suffixes, of `shortest` (at least
        1) tokens or more."""
        found: list[int] = []
        for token in self._followers(cursor.state, shortest):
            if token not in found:
                found.append(token)
                if len(found) >= count:
                    break
        return found

    def _followers(self, state: int, shortest: int) -> Iterator[int]:
        for _ in range(self._reach):
            if self._length[state] < shortest:
                return
            branches = self._edges[state]
            if branches is not None:
                yield from reversed(branches)
            elif self._newest[state] >= 0:
                yield self._newest[state]
            state = self._link[state]
