"""Block drafters on native kernels (kernels/block.cc): a call reads what was verified, another grows the trees."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_double, c_int32, c_int64, c_void_p
from dataclasses import replace
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from forerun.native.library import demand_fine, kernels
from forerun.native.matrix import Packed
from forerun.native.records import (
    FORMATS,
    BlockRecord,
    BlockStatesRecord,
    BlockTreesRecord,
    BlockWishRecord,
    TransformerRecord,
    cache_record,
)
from forerun.nn.backends.blocks import BestTree, BlockWeights, TreeLimits
from forerun.nn.cache import Cache

SPARE = 16
"""Roots of a call that are no known tokens. What more there are is asked about in further calls."""
IMPOSSIBLE = -1e9
"""The logit of what is never proposed."""
NOTHING = TreeLimits(0, 0, 0.0)


class Stack(Protocol):
    """Packed layers that have borrowed the target's vocabulary: embedding and head."""

    dtype: torch.dtype
    record: TransformerRecord
    norms: dict[str, Tensor]

    def turn_up_to(self, length: int) -> None:
        """Have rotary tables for so many positions."""

    def borrow(self, embedding: Tensor, head: Packed) -> None:
        """Read and score tokens with these."""


class PackedBlocks:
    """A `BlockNetwork`.

    Args:
        block: its weights, apart from its layers.
        stack: these, packed.
        weights: of the matrices packed here: bf16, fp32 or int8. The tables of the term are never int8.

    The kernels know no temperature: the weights of the last norm and of the term hold it.

    Raises ValueError for matrices that do not fit together.
    """

    def __init__(self, block: BlockWeights, stack: Stack, weights: torch.dtype):
        _check(block, stack.record.vocabulary, stack.record.width)
        self.count, self.vocab_size, self._stack = block.count, stack.record.vocabulary, stack
        self._fuse = Packed.of(block.fuse.detach(), weights)
        self._norm, self._mask = (part.detach().float().contiguous() for part in (block.fuse_norm, block.mask))
        self._record = BlockRecord(ctypes.pointer(stack.record), self._fuse.record, count=block.count)
        self._record.fuse_norm, self._record.mask = self._norm.data_ptr(), self._mask.data_ptr()
        self._temperature = block.temperature
        stack.norms["final_norm"].div_(block.temperature)
        if block.before is not None and block.behind is not None:
            self._before = block.before.detach().to(stack.dtype).contiguous()
            behind = block.behind.detach() / block.temperature
            self._behind = Packed.of(behind, stack.dtype if weights == torch.int8 else weights)
            self._record.rank, self._record.before = block.before.shape[1], self._before.data_ptr()
            self._record.behind = self._behind.record

    # ---- reading

    def read(self, cache: Cache, start: int, states: Sequence[Tensor]) -> None:
        """See `BlockNetwork.read`."""
        width = int(self._fuse.record.in_)
        if any(part.dim() != 2 or part.shape[1] != width for part in states):
            raise ValueError(f"states {[list(part.shape) for part in states]}: they are {width} wide")
        counts = [len(part) for part in states]
        if not any(counts):
            return
        dtype = torch.bfloat16 if states[0].dtype == torch.bfloat16 else torch.float32
        parts = [part.detach().to(dtype).contiguous() for part in states]
        ints, rows = c_int32 * len(parts), range(len(parts))
        record = BlockStatesRecord(
            len(parts),
            start,
            FORMATS[dtype],
            ints(*(cache.lengths[start + row] for row in rows)),
            ints(*counts),
            (c_void_p * len(parts))(*(part.data_ptr() for part in parts)),
        )
        self._call(kernels().fr_block_read, record, cache)
        for row, count in enumerate(counts):
            cache.lengths[start + row] += count

    # ---- drafting

    def logits(self, cache: Cache, roots: Sequence[int], asked: Sequence[bool] | None = None) -> Tensor:
        """See `BlockNetwork.logits`. asked: of which rows; others get zeros."""
        logits = torch.empty((len(roots), self.count, self.vocab_size))
        one = TreeLimits(1, 1, 0.0)
        wish = _wish(cache, roots, [one if yes else NOTHING for yes in asked or [True] * len(roots)])
        self._call(kernels().fr_block_score, wish, cache, logits.data_ptr())
        return logits if self._temperature == 1 else logits.mul_(self._temperature)

    def grow(self, cache: Cache, roots: Sequence[int], limits: Sequence[TreeLimits]) -> list[BestTree]:
        """See `BlockNetwork.grow`. Of equal paths the shallower comes first, then that of the better ranks."""
        rows, room = len(roots), 1 + max(one.nodes for one in limits)
        sizes, tokens = (c_int32 * rows)(), (c_int64 * (rows * room))()
        parents, log_probs = (c_int32 * (rows * room))(), (c_double * (rows * room))()
        trees = BlockTreesRecord(room, sizes, tokens, parents, log_probs)
        self._call(kernels().fr_block_grow, _wish(cache, roots, limits), cache, ctypes.addressof(trees))
        parts = [slice(row * room, row * room + size) for row, size in enumerate(sizes)]
        return [BestTree(tokens[part], parents[part], log_probs[part]) for part in parts]

    def _call(self, function: Callable[..., int], asked: ctypes.Structure, cache: Cache, *into: int) -> None:
        self._stack.turn_up_to(cache.capacity)
        records = (self._record, asked, cache_record(cache.store))
        demand_fine(function(*map(ctypes.byref, records), *into, torch.get_num_threads()))


class KnownBlocks:
    """A `BlockNetwork` that proposes some tokens alone.

    The kernels are told of tokens by their places among the known ones. Behind these there is room for roots that are
    none of them: a call fills in what is read of those, and their logits make them impossible.
    """

    def __init__(self, block: BlockWeights, stack: Stack, embedding: Tensor, head: Tensor, weights: torch.dtype):
        assert block.known is not None
        known = block.known.cpu()
        self.count, self.vocab_size = block.count, len(known)
        self._known: list[int] = known.tolist()
        self._places = {token: place for place, token in enumerate(self._known)}
        bias = torch.zeros(len(known) + SPARE)
        bias[len(known) :] = IMPOSSIBLE
        self._filled = [(embedding, _with_room(embedding[known], stack.dtype))]
        stack.borrow(self._filled[0][1], Packed.of(_with_room(head[known], head.dtype), weights, bias))
        if block.before is not None and block.behind is not None:
            before = _with_room(block.before[known], stack.dtype)
            self._filled.append((block.before, before))
            block = replace(block, before=before, behind=_with_room(block.behind, block.behind.dtype))
        self._inner = PackedBlocks(block, stack, weights)

    def read(self, cache: Cache, start: int, states: Sequence[Tensor]) -> None:
        """See `BlockNetwork.read`."""
        self._inner.read(cache, start, states)

    def logits(self, cache: Cache, roots: Sequence[int]) -> Tensor:
        """See `BlockNetwork.logits`."""
        logits = torch.zeros((len(roots), self.count, self.vocab_size))
        for places, asked in self._calls(roots):
            logits += self._inner.logits(cache, places, asked)[..., : self.vocab_size]
        return logits

    def grow(self, cache: Cache, roots: Sequence[int], limits: Sequence[TreeLimits]) -> list[BestTree]:
        """See `BlockNetwork.grow`."""
        trees = [BestTree([root], [-1], [0.0]) for root in roots]
        wishes = [replace(one, least=max(one.least, IMPOSSIBLE / 2)) for one in limits]
        for places, asked in self._calls(roots):
            some = [one if yes else NOTHING for one, yes in zip(wishes, asked, strict=True)]
            for row, tree in enumerate(self._inner.grow(cache, places, some)):
                if asked[row]:
                    tokens = [roots[row], *(self._known[place] for place in tree.tokens[1:])]
                    trees[row] = replace(tree, tokens=tokens)
        return trees

    def _calls(self, roots: Sequence[int]) -> Iterator[tuple[list[int], list[bool]]]:
        """The places of roots, and of which rows they are asked: all of them, one call after the other."""
        waiting = set(range(len(roots)))
        while waiting:
            places, asked, spare = [0] * len(roots), [False] * len(roots), len(self._known)
            for row in sorted(waiting):
                place = self._places.get(roots[row])
                if place is None:
                    if spare == len(self._known) + SPARE:
                        continue
                    place, spare = spare, spare + 1
                    for table, filled in self._filled:
                        filled[place] = table[roots[row]]
                places[row], asked[row] = place, True
                waiting.remove(row)
            yield places, asked


def _with_room(known: Tensor, dtype: torch.dtype) -> Tensor:
    """These rows, and empty ones behind them for roots that are none of the known tokens."""
    table = known.new_zeros((len(known) + SPARE, known.shape[1]), dtype=dtype)
    table[: len(known)] = known.detach()
    return table


def _wish(cache: Cache, roots: Sequence[int], limits: Sequence[TreeLimits]) -> BlockWishRecord:
    """What is asked about every row, as the kernels read it."""
    rows = len(roots)
    if len(limits) != rows or rows > cache.rows:
        raise ValueError(f"{rows} roots and {len(limits)} limits for the {cache.rows} rows of a cache")
    ints = c_int32 * rows
    return BlockWishRecord(
        rows,
        ints(*islice(cache.lengths, rows)),
        (c_int64 * rows)(*roots),
        ints(*(one.nodes for one in limits)),
        ints(*(one.depth for one in limits)),
        (c_double * rows)(*(one.least for one in limits)),
    )


def _check(block: BlockWeights, vocabulary: int, width: int) -> None:
    """Raises ValueError where something does not fit."""
    if (block.before is None) != (block.behind is None):
        raise ValueError("the term of the token above has two tables: give both, or none")
    expected = {"mask": (width,), "fuse_norm": (width,), "fuse": (width, block.fuse.shape[-1])}
    if block.before is not None:
        expected |= dict.fromkeys(("before", "behind"), (vocabulary, block.before.shape[-1]))
    for name, shape in expected.items():
        found = tuple(getattr(block, name).shape)
        if found != shape:
            raise ValueError(f"{name} is {list(found)} and not {list(shape)}")
