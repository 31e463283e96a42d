"""The table of Hierarchy Drafting (Cho et al. 2025): per token, what followed it, and what was
touched last is kept longest.

Two stores use it. In the context tier every row fills a table of its own from its text. The model
tier is one table for all rows, built from what the model said before. Both are asked with the row's
last token alone, which is cheap and blunt: a suffix automaton knows more, and this is here to be
measured against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from forerun.row import Row
from forerun.stores.store import Draft, Limits, Store, View

Gram = tuple[int, ...]
FALL = 0.5
"""A row's survival: what its elder siblings have left over, halved, at every depth. The table knows
no probabilities."""


@dataclass(frozen=True)
class GramShape:
    """length: tokens of a gram, its key included (the paper's N). width: most grams per key (G).
    rows: most of them drafted.

    compat: the repository's order, oldest first, which loses the best rows when the tree is full;
    else the newest first.
    """

    length: int = 5
    width: int = 7
    rows: int = 7
    compat: bool = False


class Grams:
    """Token -> at most `width` tuples, the one touched last at the end."""

    def __init__(self, width: int):
        self._width = width
        self._rows: dict[int, list[Gram]] = {}

    def touch(self, key: int, gram: Gram) -> None:
        """To the end with it; if there is no room, the first goes."""
        rows = self._rows.setdefault(key, [])
        if gram in rows:
            rows.remove(gram)
        elif len(rows) >= self._width:
            del rows[0]
        rows.append(gram)

    def rows(self, key: int) -> Sequence[Gram]:
        """Oldest first."""
        return self._rows.get(key, ())

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))


def grams_of(tokens: Sequence[int], length: int) -> Iterable[Gram]:
    """Every run of `length` tokens, from left to right."""
    return (tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1))


def table_of(responses: Iterable[Sequence[int]], shape: GramShape = GramShape(), most: int = 100_000) -> Grams:
    """The table of the model tier: the `most` grams that are in most responses, those of most responses touched last.

    Of equally frequent grams those found first are kept, and touched last.
    """
    responses_with: Counter[Gram] = Counter()
    for response in responses:
        responses_with.update(dict.fromkeys(grams_of(response, shape.length), 1))
    table = Grams(shape.width)
    for gram, _ in reversed(responses_with.most_common(most)):
        table.touch(gram[0], gram[1:])
    return table


def tree_of(root: int, rows: Iterable[Gram], limits: Limits) -> Draft:
    """Rows merged where they begin alike, one row after the other until the tree is full. Nothing follows an end."""
    draft, children = Draft([root], [-1], [1.0]), dict[tuple[int, int], int]()
    rest = [1.0]
    for row in rows if root not in limits.ends else ():
        node = 0
        for token in row[: limits.depth]:
            child = children.get((node, token), 0)
            if not child:
                share = rest[node] * FALL
                if share <= limits.cost or len(draft.tokens) > limits.nodes:
                    break
                child = children[node, token] = len(draft.tokens)
                rest[node] -= share
                rest.append(share)
                draft.tokens.append(token)
                draft.parents.append(node)
                draft.survival.append(share)
            node = child
            if token in limits.ends:
                break
    return draft


class GramStore(Store):
    """The context tier, or with a table the model tier."""

    def __init__(self, shape: GramShape = GramShape(), table: Grams | None = None):
        self.shape, self._table = shape, table
        self.name = "grams" if table is None else "model grams"

    def open(self, row: Row) -> View:
        if self._table is not None:
            return GramView(self.shape, self._table)
        view = OwnGramView(self.shape)
        view.read(row.tokens, len(row.tokens) - row.tentative)
        return view


class GramView:
    """Looks into a table that does not change."""

    def __init__(self, shape: GramShape, table: Grams):
        self.shape, self.table = shape, table

    def draft(self, tokens: Sequence[int], firm: int, limits: Limits) -> Draft:
        """The key is the last token, tentative or not. `min_match` above 1 finds nothing: one token
        is all that matches."""
        shape, key = self.shape, tokens[-1]
        rows = self.table.rows(key) if limits.min_match <= 1 else ()
        chosen = rows[: shape.rows] if shape.compat else list(reversed(rows))[: shape.rows]
        return tree_of(key, chosen, limits)

    def forget(self, length: int) -> None:
        """Nothing was learned from the row."""

    def accepted(self, count: int) -> None:
        """A table does not care."""


class OwnGramView(GramView):
    """Fills its table from the row's firm text."""

    def __init__(self, shape: GramShape):
        super().__init__(shape, Grams(shape.width))
        self._read = 0

    def read(self, tokens: Sequence[int], firm: int) -> None:
        """Every gram that ends in a token not read yet, and before `firm`."""
        self.forget(firm)
        start = max(0, self._read - self.shape.length + 1)
        for gram in grams_of(tokens[start:firm], self.shape.length):
            self.table.touch(gram[0], gram[1:])
        self._read = firm

    def draft(self, tokens: Sequence[int], firm: int, limits: Limits) -> Draft:
        self.read(tokens, firm)
        return super().draft(tokens, firm, limits)

    def forget(self, length: int) -> None:
        """Start again if more was read: what a touch displaced is gone."""
        if self._read > length:
            self.table, self._read = Grams(self.shape.width), 0
