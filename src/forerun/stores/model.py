"""What the model said before, across requests.

The texts of a tenant stand one behind the other in one suffix automaton, with a separator between them that is never
proposed, so that no draft runs from one text into the next. Nothing of one tenant is ever looked up for another.
"""

from __future__ import annotations

import warnings
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from forerun.errors import DrafterError
from forerun.row import Row
from forerun.stores.automaton import ROOT, SEPARATOR
from forerun.stores.follower import Automaton, Follower, automaton_of, follower_of
from forerun.stores.growth import Weights
from forerun.stores.said import Said, SaidFile
from forerun.stores.store import Draft, Limits, Store, View

SAID: Weights = ((-2.07, 0.76, 0.48, -1.13), (-3.25, 0.22, -0.01, 0.72), (-3.26, -0.01, -0.06, 0.51))
"""For what was said to others: short matches mean less than in a text's own past, for a large store
matches everything. Fitted to 1,632 answers of the reference target (0.4 M tokens) after as many
others, `benchmarks/lookup.py --fit --answers`."""
LEFT = 0.75
"""What share of a full store is left when the texts that were not used for longest go: then the
automata are built anew, which takes about as long as reading what is left, so it should be rare."""
FOUND_AGAIN = 32
"""Tokens at the end of a row that are looked up again when the store has changed: longer matches grow from there."""
TRUST = 0.25
"""How much a row that ends moves the odds that its tenant's next rows start with."""


class _Entry(NamedTuple):
    tenant: str
    tokens: bytes  # int32: small, and a key of a dict

    @property
    def size(self) -> int:
        """Tokens, the separator behind them included."""
        return len(self.tokens) // 4 + 1

    @property
    def ids(self) -> array[int]:
        return array("i", self.tokens)


class _Memory:
    """The texts of one tenant in an automaton. version: another one whenever the automaton has changed."""

    def __init__(self, automaton: Automaton, odds: Sequence[float] = (0.0,) * 9):
        self.automaton, self.odds, self.version = automaton, list(odds), 0
        self._starts: list[int] = []
        self._keys: list[int] = []
        self._size = 0

    def add(self, key: int, text: _Entry) -> None:
        ids = text.ids
        ids.append(SEPARATOR)
        self.automaton.extend(ids)
        self._starts.append(self._size)
        self._keys.append(key)
        self._size += text.size

    def text_at(self, end: int) -> int:
        """The key of the text in which the first `end` tokens end."""
        return self._keys[bisect_right(self._starts, end - 1) - 1]

    def learn(self, odds: Sequence[float]) -> None:
        """A row ended with these odds."""
        self.odds = [old + TRUST * (new - old) for old, new in zip(self.odds, odds, strict=True)]


class ModelStore(Store):
    """At most `capacity` tokens that the model said, over all tenants, a separator behind every text included.

    When there are more, the texts that were neither said nor of any use (tokens drafted from them
    were right) for longest go. A text that is said again word for word is not stored again. Of a
    text longer than the capacity its end is stored. A text is added when its row is closed. Threads
    may share a store.

    path: a file (see `said`) that is read, and goes on with every text; it is written anew when it
    holds more than twice the capacity. The order of use is not kept in it. It is this store's alone
    until `shut`, or until nobody has the store any more: a file that another store uses is refused
    (DrafterError). vocabulary: its size, which a path needs; tokenizer: any fingerprint of it; a
    file of another one is refused (DrafterError), for its tokens would mean something else, or
    nothing.
    """

    name = "model"
    remembers = True

    def __init__(
        self,
        capacity: int,
        path: Path | None = None,
        *,
        vocabulary: int | None = None,
        tokenizer: str | None = None,
        make: Callable[[], Automaton] = automaton_of,
    ):
        if not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 2:
            raise DrafterError(f"a model store holds a whole number of tokens, at least 2, not {capacity!r}")
        self._capacity, self._make, self._lock = capacity, make, Lock()
        self._texts: OrderedDict[int, _Entry] = OrderedDict()  # the least recently used first
        self._keys: dict[_Entry, int] = {}
        self._memories: dict[str, _Memory] = {}
        self._size = self._next_key = self._version = 0
        self._file: SaidFile | None = None
        if path is not None:
            if vocabulary is None:
                raise DrafterError(f"{path} may hold tokens that the model does not have: give the vocabulary's size")
            self._file = SaidFile(Path(path), vocabulary, tokenizer)
            self._load(self._file.load())
        self._opened_with = self._next_key

    def __len__(self) -> int:
        """Tokens held, separators included."""
        return self._size

    @property
    def nbytes(self) -> int:
        """Memory of the automata and the texts, in bytes."""
        with self._lock:
            memories = sum(memory.automaton.nbytes for memory in self._memories.values())
            return memories + sum(len(text.tokens) for text in self._texts.values())

    # ---- rows

    def open(self, row: Row) -> View:
        return ModelView(self, row)

    def close(self, row: Row, view: View) -> None:
        """What the row said is known from now on."""
        assert isinstance(view, ModelView)
        firm = len(row.tokens) - row.tentative
        with self._lock:
            view.finish(row.tokens, firm)
            said = row.tokens[row.prompt_length : firm][1 - self._capacity :]
            if said and self._add(_Entry(row.params.tenant, array("i", said).tobytes())):
                self._write(lambda file: file.append(Said(row.params.tenant, said)))

    def reset(self, tenant: str | None = None) -> None:
        """Forget everything, or what was said to one tenant; in the file too."""
        with self._lock:
            self._forget(tenant)
            self._write(lambda file: file.rewrite(self._said()))

    def rewind(self) -> None:
        """Back to what the file held, as far as it was not dropped for want of room; the file too."""
        with self._lock:
            new = [key for key in self._texts if key >= self._opened_with]
            tenants = {self._drop(key).tenant for key in new}
            for tenant in tenants:
                self._memories.pop(tenant, None)
            self._build(tenants & {text.tenant for text in self._texts.values()})
            if new:
                self._write(lambda file: file.rewrite(self._said()))

    def shut(self) -> None:
        """Write to the file no more, and leave it to others; what was said is still known here."""
        with self._lock:
            if self._file is not None:
                self._file.shut()
                self._file = None

    # ---- what views ask, under the lock

    @property
    def lock(self) -> Lock:
        return self._lock

    def memory(self, tenant: str) -> _Memory | None:
        return self._memories.get(tenant)

    def use(self, key: int) -> None:
        """Tokens from this text were right. It may have gone, if reading the others again was interrupted."""
        if key in self._texts:
            self._texts.move_to_end(key)

    # ---- texts

    def _add(self, text: _Entry) -> bool:
        """False: it is there already."""
        known = self._keys.get(text)
        if known is not None:
            self._texts.move_to_end(known)
            return False
        key = self._keep(text)
        if text.tenant not in self._make_way():
            self._grow(text.tenant, [(key, text)])
        return True

    def _keep(self, text: _Entry) -> int:
        key = self._next_key
        self._next_key += 1
        self._texts[key] = text
        self._keys[text] = key
        self._size += text.size
        return key

    def _drop(self, key: int) -> _Entry:
        text = self._texts.pop(key)
        del self._keys[text]
        self._size -= text.size
        return text

    def _make_way(self) -> set[str]:
        """The tenants whose texts had to be read again, because there were too many."""
        tenants: set[str] = set()
        if self._size > self._capacity:
            while self._size > LEFT * self._capacity and len(self._texts) > 1:
                tenants.add(self._drop(next(iter(self._texts))).tenant)
            self._build(tenants)
            if self._file is not None and self._file.tokens > 2 * self._capacity:
                self._write(lambda file: file.rewrite(self._said()))
        return tenants

    def _build(self, tenants: Iterable[str]) -> None:
        """Read the texts of these tenants again, the most recently used last."""
        left: dict[str, list[tuple[int, _Entry]]] = {tenant: [] for tenant in tenants}
        for key, text in self._texts.items():
            if text.tenant in left:
                left[text.tenant].append((key, text))
        for tenant, texts in left.items():
            before = self._memories.pop(tenant, None)
            if texts:
                self._grow(tenant, texts, before.odds if before else (0.0,) * 9)

    def _grow(self, tenant: str, texts: Iterable[tuple[int, _Entry]], odds: Sequence[float] = (0.0,) * 9) -> None:
        memory = self._memories.get(tenant)
        try:
            if memory is None:
                memory = self._memories[tenant] = _Memory(self._make(), odds)
            self._version += 1
            memory.version = self._version
            for key, text in texts:
                memory.add(key, text)
        except MemoryError:  # an automaton that could not grow is of no use: what it held goes
            self._forget(tenant)
            warnings.warn(
                "there was no memory for what the model said, and it is forgotten: give the store a smaller capacity",
                RuntimeWarning,
                stacklevel=4,
            )

    def _forget(self, tenant: str | None) -> None:
        gone = [key for key, text in self._texts.items() if tenant is None or text.tenant == tenant]
        for key in gone:
            self._drop(key)
        for name in list(self._memories) if tenant is None else [tenant]:
            self._memories.pop(name, None)

    # ---- the file

    def _load(self, texts: Sequence[Said]) -> None:
        for said in texts:
            text = _Entry(said.tenant, array("i", said.tokens[1 - self._capacity :]).tobytes())
            if text in self._keys:
                self._texts.move_to_end(self._keys[text])
            elif text.tokens:
                self._keep(text)
                while self._size > self._capacity:
                    self._drop(next(iter(self._texts)))
        self._build({text.tenant for text in self._texts.values()})
        if self._file is not None and self._file.tokens > 2 * self._capacity:
            self._write(lambda file: file.rewrite(self._said()))

    def _said(self) -> list[Said]:
        return [Said(text.tenant, text.ids) for text in self._texts.values()]

    def _write(self, work: Callable[[SaidFile], None]) -> None:
        """A file that cannot be written is no reason to stop generating: it is left as it is from then on."""
        if self._file is None:
            return
        try:
            work(self._file)
        except OSError as error:
            path = self._file.path
            self._file.shut()
            self._file = None
            warnings.warn(
                f"what the model says is no longer written to {path} ({error.strerror}): make room or name another"
                " file, "
                "and start again",
                RuntimeWarning,
                stacklevel=3,
            )


class ModelView:
    """A row's place among what the model said to its tenant. Its output teaches the odds; its
    prompt, which nobody said, is followed only."""

    def __init__(self, store: ModelStore, row: Row):
        self._store, self._tenant = store, row.params.tenant
        self._known = len(row.tokens) - row.tentative
        self._reader: Follower | None = None
        self._automaton: Automaton | None = None  # the reader's
        self._odds: Sequence[float] | None = None  # of a reader that is gone
        self._version = 0
        self._drafted = self._right = 0

    def draft(self, tokens: Sequence[int], firm: int, limits: Limits) -> Draft:
        with self._store.lock:
            reader = self._ready(tokens, firm)
            known, self._known, self._drafted = self._known, firm, len(tokens)
            if reader is None:
                return Draft([tokens[-1]], [-1], [1.0])
            return reader.draft(tokens[known:], firm - known, tokens[-1], limits)

    def forget(self, length: int) -> None:
        if self._known > length:
            self._known, self._version = length, 0
        if self._drafted + self._right > length:
            self._right = 0

    def accepted(self, count: int) -> None:
        """The text they came from is told at the next draft, when they are known."""
        self._right = count

    def finish(self, tokens: Sequence[int], firm: int) -> None:
        """Learn from the last tokens and hand on what was learned. Under the store's lock."""
        reader, memory = self._ready(tokens, firm), self._store.memory(self._tenant)
        if reader is not None and memory is not None:
            reader.read(tokens[self._known : firm])
            memory.learn(reader.odds)
        self._known = firm

    def _ready(self, tokens: Sequence[int], firm: int) -> Follower | None:
        """The reader, where the tokens known so far lead in the automaton of today; None: the tenant has none."""
        self.forget(firm)
        memory = self._store.memory(self._tenant)
        if memory is None:
            if self._reader is not None:
                self._odds, self._reader, self._automaton = self._reader.odds, None, None
            self._version = self._right = 0
            return None
        if self._version != memory.version:
            self._find_again(memory, tokens)
        reader = self._reader
        if self._right and reader is not None:
            right, self._right = tokens[self._known : self._drafted + self._right], 0
            cursor = memory.automaton.walk(reader.cursor, right)
            if cursor.length:
                self._store.use(memory.text_at(memory.automaton.end(cursor)))
        return reader

    def _find_again(self, memory: _Memory, tokens: Sequence[int]) -> None:
        if memory.automaton is not self._automaton:
            odds = self._odds or memory.odds if self._reader is None else self._reader.odds
            self._reader = follower_of(memory.automaton, False, SAID, odds)
            self._automaton = memory.automaton
        assert self._reader is not None
        near = tokens[max(0, self._known - FOUND_AGAIN) : self._known]
        self._reader.cursor = memory.automaton.walk(ROOT, near)
        self._version = memory.version
