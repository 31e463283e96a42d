"""Building a corpus: texts, sorted so that a drafter finds the places that end like its row in one binary search.

A corpus is ONE safetensors file, which is read memory-mapped and never as a whole:

    tokens   U16, or I32 where the vocabulary has more than 65,535 tokens: the documents one behind the other,
             each followed by the separator, whose id is the size of the vocabulary (so no text contains it)
    order    I32: every position that has a token behind it in its document, sorted by the text that ends there,
             read backwards: by (t[p], t[p-1], t[p-2], ...), `depth` tokens deep or deeper, a document's start
             being less than any token. Ties go by position
    starts   I32 [vocabulary + 1]: how many entries of `order` end in a smaller token than each, so that those
             that end in token t are starts[t] .. starts[t + 1]
    bigram   I32 [vocabulary]: the token that came most often after each (the smaller id of equals), -1 where
             none ever did

    metadata: format "forerun corpus", version "2", vocabulary (its size), depth, documents (how many), and
             fingerprint (of the tokenizer's vocabulary, empty if it is not known)

Positions that end in the same k tokens are one interval of `order`, and that of k + 1 lies inside
that of k. So what a suffix array answers after two binary searches per length is here one search
and a few steps outwards (REST, He et al. 2024, keeps a suffix array and asks it length by length).
A token takes 6 bytes, or 8.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forerun.errors import ForerunError
from forerun.files import whole

FORMAT, VERSION = "forerun corpus", "2"
DEPTH = 32
"""How many tokens of a context are compared. A longer match says no more about what follows."""
MOST_TOKENS = 2**31 - 1
DTYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "I32": np.dtype("<i4")}

Ints = NDArray[Any]
Watch = Callable[[int, int], None]
"""Told after every round of sorting: how many are done, of how many."""


@dataclass(frozen=True)
class Contents:
    """The parts of a corpus, in memory."""

    tokens: Ints
    order: Ints
    starts: Ints
    bigram: Ints
    vocabulary: int
    documents: int

    @property
    def size(self) -> int:
        """Tokens, the separators not counted."""
        return len(self.tokens) - self.documents

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.tokens, self.order, self.starts, self.bigram))


def build(documents: Iterable[Sequence[int] | Ints], vocabulary: int, watch: Watch = lambda *_: None) -> Contents:
    """Sort documents of token ids. Empty ones are left out.

    Takes about 40 bytes of memory per token while it sorts. Raises ForerunError for ids outside the
    vocabulary, for no text at all, and for more than 2,147,483,647 tokens.
    """
    tokens, count = _joined(documents, vocabulary)
    order = _order(tokens, vocabulary, watch)
    return Contents(tokens, order, _starts(tokens, vocabulary), _bigram(tokens, vocabulary), vocabulary, count)


def _joined(documents: Iterable[Sequence[int] | Ints], vocabulary: int) -> tuple[Ints, int]:
    kind, parts, size = (np.uint16 if vocabulary <= 65535 else np.int32), [], 0
    for number, document in enumerate(documents, start=1):
        if not len(document):
            continue
        ids = np.asarray(document, np.int64)
        if ids.min() < 0 or ids.max() >= vocabulary:
            wrong = int(ids[(ids < 0) | (ids >= vocabulary)][0])
            raise ForerunError(
                f"text {number} holds the token {wrong}, and the vocabulary has {vocabulary}: use the tokenizer that"
                " made it"
            )
        size += len(ids) + 1
        if size > MOST_TOKENS:
            raise ForerunError(f"these texts have more than {MOST_TOKENS:,} tokens: build several stores")
        part = np.empty(len(ids) + 1, kind)
        part[:-1], part[-1] = ids, vocabulary
        parts.append(part)
    if not parts:
        raise ForerunError("these texts have no tokens at all: name files with text in them")
    return np.concatenate(parts), len(parts)


def _order(tokens: Ints, separator: int, watch: Watch) -> Ints:
    """Prefix doubling (Manber and Myers 1990), backwards: the rank of 2 k tokens is that of the
    last k and the k before."""
    before = _before(tokens, separator)
    reach = 4 if separator < 2**15 - 1 else 2  # tokens that fit into one key of 63 bits
    rounds, done = (DEPTH // reach).bit_length() + 1, 0
    keys = _first_keys(tokens, before, reach)
    while True:
        ranks = _ranks(keys)
        watch(done := done + 1, rounds)
        if reach >= DEPTH:
            break
        keys = ranks.astype(np.int64) << 32
        keys[reach:] |= np.where(before[reach:] >= reach, ranks[:-reach] + 1, 0)
        reach *= 2
    keys = ranks.astype(np.int64) << 31
    del ranks
    keys |= np.arange(len(tokens))  # ties by position
    keys = keys[_has_next(tokens, separator)]
    keys.sort()
    watch(rounds, rounds)
    return (keys & MOST_TOKENS).astype(np.int32)


def _before(tokens: Ints, separator: int) -> Ints:
    """How many tokens of its document come before each position; at most DEPTH."""
    places = np.arange(len(tokens), dtype=np.int32)
    starts = np.zeros(len(tokens), np.int32)
    starts[1:] = np.where(tokens[:-1] == separator, places[1:], 0)
    places -= np.maximum.accumulate(starts)
    return np.minimum(places, DEPTH).astype(np.uint8)


def _has_next(tokens: Ints, separator: int) -> Ints:
    """Where a token of the same document follows."""
    is_text: Ints = np.not_equal(tokens, separator)
    is_text[:-1] &= is_text[1:]
    is_text[-1] = False
    return is_text


def _first_keys(tokens: Ints, before: Ints, reach: int) -> Ints:
    """The last `reach` tokens of every position as one number, the newest on top; 0 stands for a document's start."""
    bits = 62 // reach
    keys = np.zeros(len(tokens), np.int64)
    for back in range(reach):
        there = np.where(before[back:] >= back, tokens[: len(tokens) - back].astype(np.int64) + 1, 0)
        keys[back:] |= there << bits * (reach - 1 - back)
    return keys


def _ranks(keys: Ints) -> Ints:
    """Which of the different keys, in order, each is."""
    order = np.argsort(keys)
    there = keys[order]
    fresh = np.zeros(len(keys), np.int32)
    np.not_equal(there[1:], there[:-1], out=fresh[1:], casting="unsafe")
    ranks = np.empty(len(keys), np.int32)
    ranks[order] = np.cumsum(fresh, dtype=np.int32)
    return ranks


def _starts(tokens: Ints, vocabulary: int) -> Ints:
    starts = np.zeros(vocabulary + 1, np.int32)
    counts = np.bincount(tokens[_has_next(tokens, vocabulary)], minlength=vocabulary)
    np.cumsum(counts, out=starts[1:], dtype=np.int32)
    return starts


def _bigram(tokens: Ints, vocabulary: int) -> Ints:
    places = np.flatnonzero(_has_next(tokens, vocabulary))
    pairs, counts = np.unique(tokens[places].astype(np.int64) * vocabulary + tokens[places + 1], return_counts=True)
    best = np.lexsort((-pairs, counts))  # within every first token the last written wins: most often, then smaller
    table = np.full(vocabulary, -1, np.int32)
    table[pairs[best] // vocabulary] = pairs[best] % vocabulary
    return table


# ---- the file


def write(contents: Contents, path: Path, fingerprint: str = "") -> None:
    """Write a corpus beside its place and rename it, so that nobody ever finds half a file. Raises ForerunError."""
    parts = {name: getattr(contents, name) for name in ("order", "starts", "bigram", "tokens")}
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "vocabulary": str(contents.vocabulary),
        "depth": str(DEPTH),
        "documents": str(contents.documents),
        "fingerprint": fingerprint,
    }
    try:
        with whole(path) as file:
            file.write(_header(parts, meta))
            for part in parts.values():
                file.write(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).data)
    except OSError as error:
        raise ForerunError(f"cannot write {path} ({error.strerror}): make room, or name another place") from None


def _header(parts: Mapping[str, Ints], meta: Mapping[str, str]) -> bytes:
    """As safetensors has it, padded so that the numbers behind it are aligned; those of four bytes come first."""
    described: dict[str, Any] = {"__metadata__": dict(meta)}
    end = 0
    for name, part in parts.items():
        kind = "U16" if part.dtype.itemsize == 2 else "I32"
        described[name] = {"dtype": kind, "shape": list(part.shape), "data_offsets": [end, end := end + part.nbytes]}
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def is_store(path: Path) -> bool:
    """Whether a file begins like one that `write` wrote, in any version. Raises OSError."""
    with path.open("rb") as file:
        return file.read(8 + len(_BEGIN))[8:] == _BEGIN


_BEGIN = b'{"__metadata__":{"format":"%s",' % FORMAT.encode()
