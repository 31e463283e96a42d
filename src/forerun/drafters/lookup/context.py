"""The request's own text, prompt and output: the most local store."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from forerun.automaton import SuffixAutomaton
from forerun.drafters.lookup.growth import Odds, grow
from forerun.drafters.lookup.store import Draft, Limits, View
from forerun.row import Row

STUDIED = 256
"""Of a long text that is read at once, such as a prompt, only this many tokens at its end teach the odds."""


class ContextStore:
    """Every row looks into its own text."""

    name = "context"

    def open(self, row: Row) -> View:
        view = ContextView()
        view.read(row.tokens, len(row.tokens) - row.tentative)
        return view

    def close(self, row: Row, view: View) -> None:
        """Nothing outlives the row."""


class ContextView:
    """What is known of one row: its firm tokens, and how well they could have been foretold."""

    def __init__(self) -> None:
        self.automaton, self.odds = SuffixAutomaton(), Odds()

    def read(self, tokens: Sequence[int], firm: int) -> None:
        """Catch up with the first `firm` tokens of the row."""
        self.forget(firm)
        known, automaton = len(self.automaton), self.automaton
        if firm - known > STUDIED:
            automaton.extend(islice(tokens, known, firm - STUDIED))
            known = firm - STUDIED
        for token in tokens[known:firm]:
            match = automaton.match
            if match.length:
                self.odds.learn(match.length, automaton.outlook(match), token)
            automaton.append(token)

    def forget(self, length: int) -> None:
        """Start again if more than `length` tokens were read: an automaton cannot shrink. Firm tokens do not either."""
        if len(self.automaton) > length:
            self.automaton, self.odds = SuffixAutomaton(), Odds()

    def draft(self, tokens: Sequence[int], firm: int, limits: Limits) -> Draft:
        """What follows the firm tokens is read with a cursor only."""
        self.read(tokens, firm)
        cursor = self.automaton.match
        for token in tokens[firm:]:
            cursor = self.automaton.advance(cursor, token)
        return grow(self.automaton, self.odds, tokens[-1], cursor, limits)

    def accepted(self, count: int) -> None:
        """The text itself will tell."""
