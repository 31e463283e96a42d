"""A suffix automaton: every substring of a text, found again in constant time per token, while the text grows.

Blumer et al. 1985 (online construction), with one addition: every state knows which token came after it last, and how many
times in a row. A *state* stands for all substrings that end at the same places of the text; its edges lead to the tokens
that follow there. The *suffix link* of a state leads to its longest suffix that also occurs elsewhere, so a walk along the
links meets every suffix, from long to short.

Appending costs O(1) amortised: about a microsecond on one core for text of any kind, in plain Python. A text of n tokens has
at most 2 n - 1 states. A state takes 25 bytes, and those with several edges a dict: 80 to 120 bytes per token for source
code, under 250 for random digits of two to five kinds (`benchmarks/lookup.py` measures both).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator
from typing import NamedTuple

REACH = 16
"""Suffixes per token whose statistics are kept up to date, from the longest on. Bounds the work of one token where the text
repeats itself without end; source code needs two on average."""


class Cursor(NamedTuple):
    """A place in the automaton: a state, and how many of the last tokens read it stands for (0: none, at the root).

    Good until the next token is appended.
    """

    state: int
    length: int


class Outlook(NamedTuple):
    """What is known about the next token. newest: the one that came last (-1: none). run: how many times in a row it came,
    1 to 255. branches: whether other tokens have come here as well."""

    newest: int
    run: int
    branches: bool


class SuffixAutomaton:
    """The substrings of `tokens` (integers from 0 to 2**31 - 1), and what came after each of them.

    Per state: `_length` of its longest substring, suffix `_link`, `_newest` edge and its `_target`, `_run` of that edge.
    `_edges` holds all edges of a state that has several, the newest last, and None for the others.
    """

    def __init__(self, tokens: Iterable[int] = (), reach: int = REACH):
        self._length, self._link = array("i", (0,)), array("i", (-1,))
        self._newest, self._target = array("i", (-1,)), array("i", (-1,))
        self._run = bytearray(1)
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
        tables = (self._length, self._link, self._newest, self._target, self._run, self._edges)
        branching = [edges for edges in self._edges if edges is not None]
        return sum(map(sys.getsizeof, tables)) + sum(sys.getsizeof(edges) + 28 * len(edges) for edges in branching)

    # ---- growing

    def append(self, token: int) -> None:
        """Read one more token."""
        self.extend((token,))

    def extend(self, tokens: Iterable[int]) -> None:
        """Read more tokens."""
        length, link, newest, target = self._length, self._link, self._newest, self._target
        run, edges = self._run, self._edges
        for token in tokens:
            last, current = self._last, len(edges)
            self._open(length[last] + 1, 0, -1, -1, 0, None)
            state, found = last, -1
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
            if found >= 0:
                link[current] = found if length[found] == length[state] + 1 else self._split(found, state, token)
                self._refresh(state, token)
            self._last = current
