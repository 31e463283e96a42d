"""Text from outside, such as code or documents, kept in a file (`index` tells its layout) and read memory-mapped.

Whatever a corpus holds, it changes what is proposed and never what is said.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from ctypes import c_double, c_int32
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from forerun.errors import DrafterError
from forerun.native.library import is_there, quick
from forerun.native.records import CorpusDraftRecord, CorpusRecord, CorpusWishRecord
from forerun.row import Row
from forerun.stores.index import DTYPES, FORMAT, VERSION
from forerun.stores.places import ENOUGH, PLACES, WEIGHTS, Found, Numbers, Trust, grow
from forerun.stores.store import Draft, Limits, Store, View

LONGEST_HEADER = 1_000_000
PENDING = 64
"""Predictions that wait for their token. More than a verified drafter ever commits tentatively is not worth keeping."""


@dataclass(frozen=True)
class Corpus:
    """A corpus file. Its four arrays are mapped, not read."""

    path: Path
    tokens: NDArray[Any]
    order: NDArray[Any]
    starts: NDArray[Any]
    bigram: NDArray[Any]
    vocabulary: int
    depth: int
    documents: int
    fingerprint: str

    @staticmethod
    def open(path: str | Path) -> Corpus:
        """Raises DrafterError for a file that is missing, cut short, damaged, or something else.

        Only the header is looked at. Nothing that the numbers behind it may be can do harm
        (`places`, `kernels/corpus.cc`).
        """
        path = Path(path)
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                described, begin = _header(path, file.read(8 + LONGEST_HEADER))
        except OSError as error:
            raise DrafterError(
                f"cannot read the store {path} ({error.strerror}): build one with forerun index"
            ) from None
        except ValueError:
            raise DrafterError(f"{str(path)!r} cannot name a store: build one with forerun index") from None
        try:
            return _mapped(path, described, begin, size)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise _damaged(path) from None

    @property
    def size(self) -> int:
        """Tokens, the separators not counted."""
        return len(self.tokens) - self.documents

    @property
    def numbers(self) -> Numbers:
        return Numbers(self.tokens.data, self.order.data, self.starts.data, self.vocabulary)

    def demand_fit(self, vocabulary: int, fingerprint: str = "") -> None:
        """Refuse a corpus of other tokens than the target's. fingerprint: of the target's
        tokenizer, empty if not known."""
        if self.vocabulary != vocabulary:
            raise DrafterError(
                f"{self.path} has a vocabulary of {self.vocabulary} tokens and the target one of {vocabulary}:"
                " index the texts again with the target as --tokenizer"
            )
        if fingerprint and self.fingerprint and fingerprint != self.fingerprint:
            raise DrafterError(
                f"{self.path} was made with another tokenizer than the target's: index the texts again with the"
                " target as"
                " --tokenizer"
            )


def _damaged(path: Path) -> DrafterError:
    return DrafterError(f"the store {path} is cut short or damaged: build it again with forerun index")


def _header(path: Path, start: bytes) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of itself, and where its numbers begin."""
    length = int.from_bytes(start[:8], "little")
    foreign = DrafterError(f"{path} is not a store of text: build one with forerun index")
    if len(start) < 8 or not 2 <= length <= LONGEST_HEADER:
        raise foreign
    if len(start) < 8 + length:
        raise _damaged(path)
    try:
        described = json.loads(start[8 : 8 + length])
        meta = described["__metadata__"]
        is_ours = meta["format"] == FORMAT
    except (ValueError, KeyError, TypeError, RecursionError):
        raise foreign from None
    if not is_ours:
        raise foreign
    if meta.get("version") != VERSION:
        raise DrafterError(
            f"the store {path} is of version {meta.get('version')}, and {VERSION} can be read: build it again with"
            " forerun index"
        )
    return described, 8 + length


def _mapped(path: Path, described: dict[str, Any], begin: int, size: int) -> Corpus:
    meta = described["__metadata__"]
    vocabulary, documents, depth = (int(meta[name]) for name in ("vocabulary", "documents", "depth"))
    parts = {name: _part(path, described[name], begin, size) for name in ("tokens", "order", "starts", "bigram")}
    tokens, order, starts, bigram = parts.values()
    expected = [DTYPES["U16" if vocabulary <= 65535 else "I32"], *[DTYPES["I32"]] * 3]
    is_whole = (
        [part.dtype for part in parts.values()] == expected
        and len(starts) - 1 == len(bigram) == vocabulary
        and documents > 0 < depth <= 1024
        and len(order) == len(tokens) - 2 * documents >= 0
        and int(tokens[-1]) == vocabulary
    )
    if not is_whole:
        raise _damaged(path)
    return Corpus(path, tokens, order, starts, bigram, vocabulary, depth, documents, str(meta.get("fingerprint", "")))


def _part(path: Path, described: dict[str, Any], begin: int, size: int) -> NDArray[Any]:
    dtype: np.dtype[Any] = DTYPES[described["dtype"]]
    (count,), (first, end) = described["shape"], described["data_offsets"]
    fits = 0 <= first <= end <= size - begin and end - first == count * dtype.itemsize
    if not fits or (begin + first) % dtype.itemsize:
        raise _damaged(path)
    if count == 0:  # an empty file part cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", begin + first, (int(count),))


class CorpusStore(Store):
    """Every row looks into the same corpus, and learns for itself how far to trust it."""

    name = "corpus"

    def __init__(self, corpus: Corpus):
        self.corpus = corpus

    def open(self, row: Row) -> View:
        return CorpusView(_search_in(self.corpus))


class _Guess(NamedTuple):
    """What was thought most probable at a position of the row."""

    position: int
    token: int
    length: int
    chance: float


class CorpusView:
    """What one row has shown of how well the corpus foretells it: only what it looked up teaches."""

    def __init__(self, search: _Search):
        self._search, self.trust = search, Trust()
        self._pending: list[_Guess] = []

    def draft(self, tokens: Sequence[int], firm: int, limits: Limits) -> Draft:
        """Tentative tokens are looked up like firm ones; they teach when they become firm."""
        self._learn(tokens, firm)
        found = self._search(tokens, self.trust, limits)
        here = len(tokens)
        self.forget(here)
        if self._pending and self._pending[-1].position == here:
            self._pending.pop()
        if found.first >= 0:
            self._pending = [*self._pending[-PENDING:], _Guess(here, found.first, found.length, found.chance)]
        return found.draft

    def _learn(self, tokens: Sequence[int], firm: int) -> None:
        while self._pending and self._pending[0].position < firm:
            guess = self._pending.pop(0)
            self.trust.learn(guess.length, guess.chance, tokens[guess.position] == guess.token)

    def forget(self, length: int) -> None:
        """A guess beyond `length` was made after other tokens."""
        while self._pending and self._pending[-1].position > length:
            self._pending.pop()

    def accepted(self, count: int) -> None:
        """The text itself will tell."""


# ---- searching


class _Search:
    """The readable form. One for every row."""

    def __init__(self, corpus: Corpus):
        self._corpus, self._depth = corpus.numbers, corpus.depth

    def __call__(self, tokens: Sequence[int], trust: Trust, limits: Limits) -> Found:
        return grow(self._corpus, tokens[-self._depth :], trust, limits)


class _NativeSearch(_Search):
    """The same in one call; records and buffers are kept from draft to draft."""

    def __init__(self, corpus: Corpus):
        super().__init__(corpus)
        size, entries, wide = len(corpus.tokens), len(corpus.order), corpus.tokens.dtype.itemsize == 4
        at = [part.ctypes.data for part in (corpus.tokens, corpus.order, corpus.starts)]
        self._kept, self._record = corpus, CorpusRecord(*at, size, entries, corpus.vocabulary, wide)
        self._wish, self._grown = CorpusWishRecord(places=PLACES, enough=ENOUGH), CorpusDraftRecord()
        self._wish.weights = ctypes.addressof(_WEIGHTS)
        self._end = (c_int32 * corpus.depth)()
        self._grow = quick().fr_corpus_grow
        self._records = [ctypes.byref(record) for record in (self._record, self._wish, self._grown)]
        self._limits: Limits | None = None
        self._trust: Trust | None = None

    def __call__(self, tokens: Sequence[int], trust: Trust, limits: Limits) -> Found:
        if limits is not self._limits:
            self._keep_to(limits)
        if trust is not self._trust:
            self._trust, self._wish.odds = trust, trust.odds.buffer_info()[0]
        length = min(len(tokens), self._depth)
        self._end[:length] = list(tokens[: -length - 1 : -1])
        record, wish, grown = self._records
        if self._grow(record, wish, self._end, length, tokens[-1], grown):
            raise MemoryError
        draft, count = self._grown, self._grown.nodes
        tree = Draft(self._tokens[:count], self._parents[:count], self._survival[:count])
        return Found(tree, draft.length, draft.first, draft.chance)

    def _keep_to(self, limits: Limits) -> None:
        """The limits go into the record when they change."""
        wish, grown, room = self._wish, self._grown, limits.nodes + 1
        wish.nodes, wish.depth, wish.min_match, wish.cost = limits.nodes, limits.depth, limits.min_match, limits.cost
        self._ends = (c_int32 * len(limits.ends))(*limits.ends)
        wish.ends, wish.end_count = ctypes.addressof(self._ends), len(limits.ends)
        self._tokens, self._parents, self._survival = (c_int32 * room)(), (c_int32 * room)(), (c_double * room)()
        grown.tokens, grown.parents = ctypes.addressof(self._tokens), ctypes.addressof(self._parents)
        grown.survival = ctypes.addressof(self._survival)
        self._limits = limits


_WEIGHTS = (c_double * 8)(*(number for row in WEIGHTS for number in row))


def _search_in(corpus: Corpus) -> _Search:
    return _NativeSearch(corpus) if is_there() else _Search(corpus)
