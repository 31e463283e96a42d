"""A row's place in an automaton: it reads the row's text, learns how well the automaton foretells it, and drafts.

`follower_of` and `automaton_of` give the native version where there are kernels, else the readable one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Protocol

from forerun.native.library import is_there
from forerun.stores.automaton import REACH, ROOT, Cursor, Outlook, SuffixAutomaton
from forerun.stores.growth import OWN_TEXT, STUDIED, Odds, Weights, grow
from forerun.stores.store import Draft, Limits


class Automaton(Protocol):
    """What `SuffixAutomaton` and its native twin have in common; see there."""

    def __len__(self) -> int: ...
    @property
    def states(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def match(self) -> Cursor: ...
    def append(self, token: int) -> None: ...
    def extend(self, tokens: Iterable[int]) -> None: ...
    def advance(self, cursor: Cursor, token: int) -> Cursor: ...
    def walk(self, cursor: Cursor, tokens: Sequence[int]) -> Cursor: ...
    def outlook(self, cursor: Cursor) -> Outlook: ...
    def end(self, cursor: Cursor) -> int: ...
    def continuations(self, cursor: Cursor, count: int, shortest: int = 1) -> list[int]: ...


class Follower(Protocol):
    """cursor: where the firm tokens lead in an automaton that is not the row's own. odds: as `Odds.values`."""

    cursor: Cursor

    @property
    def odds(self) -> list[float]: ...

    def read(self, tokens: Sequence[int]) -> None:
        """The row goes on with these tokens, for good."""

    def draft(self, tokens: Sequence[int], firm: int, root: int, limits: Limits) -> Draft:
        """Read the first `firm` of the tokens, follow the others, which may be taken back, and grow
        a tree below `root`, the last token of the row."""


def automaton_of(reach: int = REACH) -> Automaton:
    """An empty automaton."""
    if is_there():
        from forerun.stores.native import NativeAutomaton

        return NativeAutomaton(reach=reach)
    return SuffixAutomaton(reach=reach)


def follower_of(
    automaton: Automaton, own: bool, weights: Weights = OWN_TEXT, odds: Sequence[float] = (0.0,) * 9
) -> Follower:
    """own: what is read is appended to the automaton; otherwise it is only followed there. odds: to start with."""
    if isinstance(automaton, SuffixAutomaton):
        return PlainFollower(automaton, own, weights, odds)
    from forerun.stores.native import NativeAutomaton, NativeFollower

    assert isinstance(automaton, NativeAutomaton)
    return NativeFollower(automaton, own, weights, odds)


class PlainFollower:
    """The readable version."""

    def __init__(self, automaton: SuffixAutomaton, own: bool, weights: Weights, odds: Sequence[float]):
        self.automaton, self.cursor = automaton, ROOT
        self._own, self._odds = own, Odds(weights, odds)

    @property
    def odds(self) -> list[float]:
        return self._odds.values

    def read(self, tokens: Sequence[int]) -> None:
        automaton = self.automaton
        if self._own:
            new = max(0, len(tokens) - STUDIED)
            automaton.extend(islice(tokens, new))
            for token in tokens[new:]:
                self._learn(automaton.match, token)
                automaton.append(token)
        else:
            for token in tokens:
                self._learn(self.cursor, token)
                self.cursor = automaton.advance(self.cursor, token)

    def _learn(self, cursor: Cursor, token: int) -> None:
        if cursor.length:
            self._odds.learn(cursor.length, self.automaton.outlook(cursor), token)

    def draft(self, tokens: Sequence[int], firm: int, root: int, limits: Limits) -> Draft:
        self.read(tokens[:firm])
        cursor = self.automaton.walk(self.automaton.match if self._own else self.cursor, tokens[firm:])
        return grow(self.automaton, self._odds, root, cursor, limits)
