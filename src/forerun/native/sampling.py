"""Laws, draws and acceptance without torch's parallel operations, which wait for threads over tables of a few rows.

The torch forms in `sampling`, `chance` and `accept/exact` say what is meant, and run where `fits` says no. Draws and
verdicts have the same bits; laws are within some units of the last place, and let the same tokens through.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forerun.native.library import demand_fine, is_there, kernels, quick
from forerun.native.records import FilterRecord, ProposalRecord

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Filter = tuple[float, int, float, float]
"""Temperature (0: the best token alone), top-k, top-p, min-p."""

SERIAL = 1 << 20
"""Entries of a table that one thread goes over sooner than several have been started and have met again."""


@dataclass(frozen=True)
class Drafts:
    """Trees to be judged, [B, N] each, and the uniform numbers that settle them.

    token_luck: of the token behind a node of this depth. coin_luck: of the node.
    """

    sizes: Sequence[int]
    parents_BN: Ints
    tokens_BN: Tensor
    token_luck_BN: Floats
    coin_luck_BN: Floats | None = None


@lru_cache(maxsize=1)
def is_quick() -> bool:
    """Whether there are kernels for this processor; the portable ones are no faster than torch."""
    return is_there() and kernels().fr_isa_best() > 0


def fits(table: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether this table may be handed to the functions below: fp32 on the CPU, or one of these dtypes."""
    return table.dtype in (torch.float32, *dtypes) and table.device.type == "cpu" and is_quick()


def laws(scores_BNV: Tensor, filters: Sequence[Filter]) -> Tensor:
    """The law of every node, [B, N, V], fp32; one filter per row."""
    scores, (rows, count, vocabulary) = scores_BNV.contiguous(), scores_BNV.shape
    found, (library, threads) = torch.empty_like(scores), _runner(scores.numel())
    library.fr_laws(scores.data_ptr(), _filters(tuple(filters)), rows, count, vocabulary, found.data_ptr(), threads)
    return found


def pick(laws_XV: Tensor, shares_X: Tensor) -> Tensor:
    """The token at which the running sum of each law passes a share of its total, in the shape of the shares."""
    laws, shares = laws_XV.contiguous(), shares_X.double().contiguous()
    found, (library, threads) = torch.empty(shares.shape, dtype=torch.int64), _runner(laws.numel())
    library.fr_pick(
        laws.data_ptr(),
        laws.dtype == torch.float64,
        shares.numel(),
        laws.shape[-1],
        shares.data_ptr(),
        found.data_ptr(),
        threads,
    )
    return found


def uniform(
    keys: Sequence[int], positions: Sequence[int], purpose: int, places_BX: Ints, attempts_BX: Ints | None
) -> Tensor:
    """Numbers in [0, 1), [B, X]: `chance.uniform` of what is hashed from a row's key, the purpose and the place."""
    (rows, columns), places = places_BX.shape, np.ascontiguousarray(places_BX)
    attempts = None if attempts_BX is None else np.ascontiguousarray(attempts_BX)
    found = torch.empty((rows, columns), dtype=torch.float64)
    quick().fr_uniform(
        (ctypes.c_uint64 * rows)(*keys),
        (ctypes.c_int64 * rows)(*positions),
        purpose,
        places.ctypes.data,
        None if attempts is None else attempts.ctypes.data,
        rows,
        columns,
        found.data_ptr(),
    )
    return found


def match(drafts: Drafts, scores_BNV: Tensor, filters: Sequence[Filter], laws_BNV: Tensor | None) -> Verdicts:
    """Descend to the child that carries the token drawn behind its parent. laws_BNV: where the laws of the nodes that
    were asked go, fp32."""
    verdicts, scores, vocabulary = Verdicts(drafts), scores_BNV.contiguous(), scores_BNV.shape[-1]
    library, threads = _runner(scores.numel())
    library.fr_match(
        ctypes.byref(verdicts.record),
        scores.data_ptr(),
        _filters(tuple(filters)),
        vocabulary,
        None if laws_BNV is None else laws_BNV.data_ptr(),
        threads,
    )
    return verdicts


def verify(drafts: Drafts, laws_BNV: Tensor, draft_laws_BNV: Tensor, drawn_BN: NDArray[np.uint8]) -> Verdicts:
    """Traversal verification: both laws in one dtype, fp32 or fp64. IndexError for a token outside the vocabulary."""
    verdicts, laws, draft_laws = Verdicts(drafts), laws_BNV.contiguous(), draft_laws_BNV.contiguous()
    library, threads = _runner(laws.numel())
    error = library.fr_verify(
        ctypes.byref(verdicts.record),
        laws.data_ptr(),
        draft_laws.data_ptr(),
        np.ascontiguousarray(drawn_BN).ctypes.data,
        laws.dtype == torch.float64,
        laws.shape[-1],
        threads,
    )
    demand_fine(error)
    return verdicts


class Verdicts:
    """What the kernels say: per row the nodes kept, node 0 first, and the token after them."""

    def __init__(self, drafts: Drafts):
        rows, nodes = drafts.parents_BN.shape
        self._sizes = (ctypes.c_int64 * rows)(*drafts.sizes)
        self._drafts = drafts
        self._kept = np.empty((rows, nodes), np.int64)
        self._next = np.empty(rows, np.int64)
        luck = drafts.coin_luck_BN
        self.record = ProposalRecord(
            rows,
            nodes,
            ctypes.addressof(self._sizes),
            drafts.parents_BN.ctypes.data,
            drafts.tokens_BN.data_ptr(),
            drafts.token_luck_BN.ctypes.data,
            None if luck is None else luck.ctypes.data,
            self._kept.ctypes.data,
            self._next.ctypes.data,
        )

    @property
    def kept(self) -> list[list[int]]:
        return [row[: row.index(-1)] if row[-1] < 0 else row for row in self._kept.tolist()]

    @property
    def next_tokens(self) -> list[int]:
        return self._next.tolist()


def _runner(entries: int) -> tuple[ctypes.CDLL, int]:
    """The kernels for a table of so many entries, and threads: the interpreter's lock is kept where they are few."""
    return (quick(), 1) if entries < SERIAL else (kernels(), torch.get_num_threads())


@lru_cache(maxsize=256)
def _filters(filters: tuple[Filter, ...]) -> ctypes.Array[FilterRecord]:
    return (FilterRecord * len(filters))(*(FilterRecord(*one) for one in filters))
