"""Max-Gram (Chen et al. 2023, "Cascade Speculative Drafting"): a chain of exactly so many tokens,
copied from the row's own text.

Copied is what followed the longest earlier match of the text's end, and the copy runs on into the
draft itself; where nothing matches, a table names the token that follows most often. Every token is
certain to its drafter, and none costs a model: the lowest level of a cascade, which is asked again
and again behind tokens that may be taken back.

A suffix automaton knows the longest match, a scan of bytes finds its place. Both read firm text
only: tentative tokens are followed, and copied where a copy runs on into them, but no match begins
among them.

The authors' repository behaves otherwise at the edges (`repository_chain`): its text holds the
prompt twice and lacks the last token, a second search overshoots, the place is always the leftmost.
`compat: true` does all of that, slowly.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.method import Method
from forerun.drafting.settings import demand_count, setting
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError
from forerun.row import Row
from forerun.slots import Slots
from forerun.stores.follower import automaton_of
from forerun.tree import TokenTree

OCCURRENCES = ("newest", "leftmost")
BYTES = 4


class Successors:
    """The most frequent successor of every token of a vocabulary. Where none is known a number outside of it stands."""

    def __init__(self, successors: Sequence[int] = ()):
        self._successors = successors

    def after(self, token: int) -> int:
        """-1 where none is known."""
        known = len(self._successors)
        successor = int(self._successors[token]) if 0 <= token < known else -1
        return successor if successor < known else -1

    def fill(self, last: int, count: int) -> list[int]:
        """At most `count` tokens behind `last`, each after the one before."""
        filled: list[int] = []
        while len(filled) < count:
            last = self.after(last)
            if last < 0:
                break
            filled.append(last)
        return filled


class History:
    """The firm text of one row, and where its ends came before."""

    def __init__(self) -> None:
        self._automaton, self._bytes, self._known = automaton_of(), bytearray(), 0

    def read(self, tokens: Sequence[int], firm: int) -> None:
        """Catch up with the first `firm` tokens."""
        self.forget(firm)
        fresh = array("i", tokens[self._known : firm])
        self._automaton.extend(fresh)
        self._bytes += fresh.tobytes()
        self._known = firm

    def forget(self, length: int) -> None:
        """Start again if more than `length` tokens were read."""
        if self._known > length:
            self._automaton, self._bytes, self._known = automaton_of(), bytearray(), 0

    def match(self, tentative: Sequence[int]) -> int:
        """How many tokens, at the end of the firm text with `tentative` behind it, came before in the firm text."""
        return self._automaton.walk(self._automaton.match, tentative).length

    def place(self, end: Sequence[int], occurrence: str) -> int:
        """The position behind the newest or leftmost place of `end` that has a firm token behind it."""
        wanted, text, stop = array("i", end).tobytes(), self._bytes, len(self._bytes) - BYTES
        if occurrence == "leftmost":
            found = text.find(wanted, 0, stop)
            while found > 0 and found % BYTES:
                found = text.find(wanted, found + 1, stop)
        else:
            found = text.rfind(wanted, 0, stop)
            while found > 0 and found % BYTES:
                found = text.rfind(wanted, 0, found + len(wanted) - 1)
        return found // BYTES + len(end)


def chain(
    text: History,
    tokens: Sequence[int],
    firm: int,
    count: int,
    table: Successors,
    occurrence: str = "newest",
    min_match: int = 1,
) -> list[int]:
    """`count` tokens that may follow; fewer where neither the text nor the table knows more."""
    text.read(tokens, firm)
    length = text.match(tokens[firm:])
    if length < min_match:
        return table.fill(tokens[-1], count)
    source = text.place(tokens[-length:], occurrence)
    copied = list(tokens[source : source + count])
    while len(copied) < count:
        copied.append(copied[source + len(copied) - len(tokens)])
    return copied


def repository_chain(prompt: Sequence[int], sequence: Sequence[int], count: int, table: Successors) -> list[int]:
    """What `mag.py` of the authors' repository returns (commit 05b22e1), peculiarities and all; up
    to 2 `count` - 1 tokens."""
    extended = list(sequence)
    extended += _after_leftmost([*prompt, *sequence[:-1]], extended, count)
    if len(extended) - len(sequence) < count:
        extended += _after_leftmost([*extended[:-1], *extended[:-1]], extended, count)
    extended += table.fill(extended[-1], count - (len(extended) - len(sequence)))
    return extended[len(sequence) :]


def _after_leftmost(text: Sequence[int], sequence: Sequence[int], count: int) -> list[int]:
    """What follows the leftmost of the places in `text` that end in most tokens of `sequence`."""
    places = [place for place, token in enumerate(text) if token == sequence[-1]]
    if not places:
        return []
    for back in range(1, len(sequence)):
        longer = [place for place in places if place >= back and text[place - back] == sequence[-1 - back]]
        if not longer:
            break
        places = longer
    return list(text[places[0] + 1 : places[0] + 1 + count])


class MaxGram(Drafter):
    """Proposes a chain, up to a token that ends the text."""

    name = "maxgram"

    def __init__(
        self, length: int, table: Successors, occurrence: str = "newest", min_match: int = 1, compat: bool = False
    ):
        self.length, self._table, self._occurrence, self._min_match = length, table, occurrence, min_match
        self._compat = compat
        self.max_nodes = 2 * length - 1 if compat else length
        self._texts: Slots[History] = Slots()

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        text = History()
        if not self._compat:
            text.read(row.tokens, len(row.tokens) - row.tentative)
        self._texts.admit(text)

    def release(self, slot: int) -> None:
        self._texts.release(slot)

    def retract(self, lengths: Sequence[int]) -> None:
        for text, length in zip(self._texts, lengths, strict=True):
            text.forget(length)

    def propose(self, context: Context) -> TokenTree:
        chains = [
            [row.tokens[-1], *self._chain(row, text, min(most))]
            for row, text, *most in zip(context.rows, self._texts, context.budgets, context.depths, strict=True)
        ]
        if all(len(tokens) == 1 for tokens in chains):
            return TokenTree.root([tokens[0] for tokens in chains], context.device)
        return TokenTree.of(chains, [list(range(-1, len(tokens) - 1)) for tokens in chains], context.device)

    def _chain(self, row: Row, text: History, most: int) -> list[int]:
        if most == 0 or row.tokens[-1] in row.ends:
            return []
        if self._compat:
            drafted = repository_chain(row.tokens[: row.prompt_length], row.tokens, self.length, self._table)
        else:
            firm, count = len(row.tokens) - row.tentative, min(self.length, most)
            drafted = chain(text, row.tokens, firm, count, self._table, self._occurrence, self._min_match)
        end = next((place for place, token in enumerate(drafted, start=1) if token in row.ends), most)
        return drafted[: min(end, most)]


@dataclass(frozen=True)
class Settings:
    """{"drafter": "maxgram", "length": 10, "store": null, "occurrence": "newest", "min_match": 1, "compat": false}"""

    length: int = setting(10, "Tokens of a chain.")
    store: str | None = setting(
        None,
        "A file of forerun index, whose table continues where nothing matches; without it nothing is proposed there.",
        "store",
    )
    occurrence: str = setting("newest", "newest or leftmost, where the longest match is in several places.")
    min_match: int = setting(1, "The fewest tokens that must match.")
    compat: bool = setting(False, "As the authors' repository, which takes no notice of occurrence and min_match.")

    def __post_init__(self) -> None:
        demand_count("maxgram", "length", self.length)
        demand_count("maxgram", "min_match", self.min_match)
        if self.occurrence not in OCCURRENCES:
            raise DrafterError(f"maxgram: occurrence is {' or '.join(OCCURRENCES)}, not {self.occurrence!r}")
        if not isinstance(self.compat, bool):
            raise DrafterError(f"maxgram: compat is true or false, not {self.compat!r}")
        if self.store is not None and not isinstance(self.store, str):
            raise DrafterError(f"maxgram: store is the path of a file of forerun index, not {self.store!r}")


def build(workshop: Workshop, settings: Settings) -> Drafter:
    table = _table(workshop, settings.store)
    return MaxGram(settings.length, table, settings.occurrence, settings.min_match, settings.compat)


def _table(workshop: Workshop, store: str | None) -> Successors:
    from forerun.stores.corpus import Corpus

    if store is None:
        return Successors()
    corpus = Corpus.open(store)
    corpus.demand_fit(workshop.target.vocab_size, workshop.tokenizer())
    return Successors(corpus.bigram.data)


METHOD = Method("maxgram", "The longest match in the text, copied.", Settings, build, grows="certain")
