"""The request's own text, prompt and output: the most local store."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from forerun.row import Row
from forerun.stores.follower import Automaton, automaton_of, follower_of
from forerun.stores.store import Draft, Limits, Store, View


class ContextStore(Store):
    """Every row looks into its own text."""

    name = "context"

    def __init__(self, make: Callable[[], Automaton] = automaton_of):
        self._make = make

    def open(self, row: Row) -> View:
        view = ContextView(self._make)
        view.read(row.tokens, len(row.tokens) - row.tentative)
        return view


class ContextView:
    """What is known of one row: its firm tokens, and how well they could have been foretold."""

    def __init__(self, make: Callable[[], Automaton] = automaton_of):
        self._make = make
        self._restart()

    def _restart(self) -> None:
        self.automaton = self._make()
        self._reader, self._known = follower_of(self.automaton, own=True), 0

    def read(self, tokens: Sequence[int], firm: int) -> None:
        """Catch up with the first `firm` tokens of the row."""
        self.forget(firm)
        try:
            self._reader.read(tokens[self._known : firm])
        except MemoryError:  # what was read is lost
            self._restart()
            raise
        self._known = firm

    def forget(self, length: int) -> None:
        """Start again if more than `length` tokens were read: an automaton cannot shrink. Firm tokens do not either."""
        if self._known > length:
            self._restart()

    def draft(self, tokens: Sequence[int], firm: int, limits: Limits) -> Draft:
        """What follows the firm tokens is read with a cursor only."""
        known = self._known
        if known > firm:
            self._restart()
            known = 0
        try:
            draft = self._reader.draft(tokens[known:], firm - known, tokens[-1], limits)
        except MemoryError:  # what was read is lost
            self._restart()
            raise
        self._known = firm
        return draft

    def accepted(self, count: int) -> None:
        """The text itself will tell."""
