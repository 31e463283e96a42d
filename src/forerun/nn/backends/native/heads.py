"""Draft heads on native kernels: a whole static tree is one call, as a transformer's forward is (kernels/draft.cc).

Two kinds of heads share it. Independent ones (Medusa, arXiv 2401.10774) see a context vector alone,
so that all of them run at once; chained ones (Hydra, arXiv 2402.05109) see behind it the embedded
tokens of the path, so that a tree grows level by level.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from forerun.native.library import demand_fine, kernels
from forerun.native.matrix import Packed, padded
from forerun.native.records import FORMATS, HeadRecord, HeadsRecord, LevelRecord, Matrix, TreeRecord
from forerun.nn.backends.heads import HeadWeights
from forerun.nn.backends.native.arena import Arena
from forerun.ranktree import RankTree

KEPT = 256  # trees whose tables are remembered


class PackedHeads:
    """Draft heads for depths 1, 2, ... of a tree.

    Args:
        embedding: [V, D]. With it, the head for the children of a node reads the context and behind it the
            embeddings of the tokens from the root to that node; without it, the context alone.
        known: the tokens that vocabularies have rows for, ascending; None: all.
        dtype: of contexts and embedding, bf16 or fp32.
        weights: of the matrices packed here: bf16, fp32 or int8; None: `dtype`.

    Raises ValueError for matrices that do not fit together.
    """

    def __init__(
        self,
        heads: Sequence[HeadWeights],
        embedding: Tensor | None,
        dtype: torch.dtype,
        weights: torch.dtype | None = None,
        known: Tensor | None = None,
    ):
        self.dtype, self.weights = dtype, weights or dtype
        if dtype not in (torch.bfloat16, torch.float32) or self.weights not in FORMATS:
            raise ValueError(
                f"weights in {self.weights} for contexts in {dtype}: the kernels know bf16 and fp32, and int8 weights"
            )
        if known is not None and embedding is not None:
            # Drafted tokens are numbered by their places among the known ones, roots behind these by their ids.
            embedding = torch.cat((embedding[known], embedding))
        self._known = None if known is None else known.cpu()
        self.width, self.vocab_size = _checked(heads, embedding, known)
        self.embedding = None if embedding is None else embedding.detach().to(dtype).contiguous()
        self._packed = self._pack(heads)
        self._biases: list[Tensor] = []
        self._heads = (HeadRecord * len(heads))(*map(self._head, heads))
        self._given = [head.vocabulary for head in heads if isinstance(head.vocabulary, Packed)]  # kept alive
        place = None if self.embedding is None else self.embedding.data_ptr()
        tokens = self.vocab_size if self.embedding is None else len(self.embedding)
        self._record = HeadsRecord(len(heads), self.width, tokens, FORMATS[dtype], self._heads, place)
        self._plans: dict[int, _Tables] = {}

    @property
    def nbytes(self) -> int:
        """Memory of what was packed here, padding included."""
        return self._arena.used + sum(bias.nbytes for bias in self._biases)

    def draft(self, context_BD: Tensor, roots: Sequence[int], tree: RankTree) -> list[list[int]]:
        """The tokens of all nodes of `tree` for every row, the root first. Among equal logits the
        lower token comes first.

        A row's tokens do not depend on the rows beside it.
        """
        plan = self._plans.get(id(tree)) or self._plan(tree)
        rows = len(roots)
        if context_BD.shape != (rows, self.width):
            raise ValueError(f"contexts {list(context_BD.shape)} for {rows} rows of width {self.width}")
        contexts = context_BD.detach().to(self.dtype).contiguous()
        from_ = self._numbered(roots)
        tokens = torch.empty((rows, tree.size + 1), dtype=torch.int64)
        error = kernels().fr_draft(
            ctypes.byref(self._record),
            ctypes.byref(plan.record),
            contexts.data_ptr(),
            from_.ctypes.data,
            tokens.data_ptr(),
            rows,
            torch.get_num_threads(),
        )
        demand_fine(error)
        if self._known is not None:
            tokens = self._known[tokens.clamp_(max=len(self._known) - 1)]
            tokens[:, 0] = torch.tensor(roots)
        found: list[list[int]] = tokens.tolist()
        return found

    def _numbered(self, roots: Sequence[int]) -> np.ndarray:
        """The roots as the kernels know them; heads that see no tokens are not told."""
        if self._known is None:
            return np.asarray(roots, np.int64)
        if self.embedding is None:
            return np.zeros(len(roots), np.int64)
        return np.asarray(roots, np.int64) + len(self._known)

    def _plan(self, tree: RankTree) -> _Tables:
        if tree.depth > len(self._heads):
            raise ValueError(f"a tree of depth {tree.depth} for {len(self._heads)} heads: take a shallower one")
        if tree.widest > self.vocab_size:
            raise ValueError(f"a tree of rank {tree.widest - 1} for {self.vocab_size} tokens: take a narrower one")
        if len(self._plans) >= KEPT:
            self._plans.clear()
        self._plans[id(tree)] = plan = _Tables(tree)
        return plan

    # ---- packing

    def _pack(self, heads: Sequence[HeadWeights]) -> dict[_Key, Packed]:
        """Every different matrix once."""
        matrices = {_key(*parts): parts for head in heads for parts in _matrices(head)}
        self._arena = Arena(sum(padded(self._size(*parts), 64) for parts in matrices.values()))
        return {key: self._filled(*parts) for key, parts in matrices.items()}

    def _size(self, *parts: Tensor) -> int:
        return Packed.bytes_for(self.weights, parts[0].shape[0], parts[0].shape[1], len(parts) > 1)

    def _filled(self, *parts: Tensor) -> Packed:
        """A matrix, or the gates and the values of a gated one."""
        out, in_ = parts[0].shape
        packed = Packed.at(self._arena.take(self._size(*parts)), self._arena, self.weights, out, in_, len(parts) > 1)
        for part, weight in enumerate(parts):
            packed.fill(weight.detach(), 0, part)
        return packed

    def _matrix(self, packed: Packed, *biases: Tensor | None) -> Matrix:
        """A packed matrix with these biases (gated: two) instead of its own or on top of it."""
        record = Matrix.from_buffer_copy(packed.record)
        if all(bias is None for bias in biases):
            return record
        biased = Packed.at(record.data, self._arena, self.weights, record.out, record.in_, bool(record.gated), True)
        assert biased.bias is not None
        for part, bias in enumerate(biases):
            if bias is not None:
                biased.fill_bias(bias.detach(), 0, part)
        if packed.bias is not None:
            biased.bias += packed.bias
        self._biases.append(biased.bias)
        record.bias = biased.bias.data_ptr()
        return record

    def _head(self, head: HeadWeights) -> HeadRecord:
        packed, given = self._packed, head.vocabulary
        if head.through is None:
            first = self._matrix(packed[_key(head.first)], head.first_bias)
        else:
            first = self._matrix(packed[_key(head.first, head.through)], head.first_bias, head.through_bias)
        vocabulary = given if isinstance(given, Packed) else packed[_key(given)]
        blocks = (Matrix * len(head.blocks))(
            *(self._matrix(packed[_key(weight)], bias) for weight, bias in head.blocks)
        )
        return HeadRecord(first, blocks, len(blocks), self._matrix(vocabulary, head.vocabulary_bias))


class _Tables:
    """A tree as the kernels read it."""

    def __init__(self, tree: RankTree):
        self.tree = tree  # alive, so that nothing else gets its id
        self._tables = [np.array(tree.parents, np.int32)]
        self._levels = (LevelRecord * tree.depth)(*self._level_records())
        self.record = TreeRecord(tree.size + 1, tree.depth, self._tables[0].ctypes.data, self._levels)

    def _level_records(self) -> Iterator[LevelRecord]:
        parents = 1
        for level in self.tree.levels:
            grown = np.full(len(level.ranks), -1, np.int32)
            grown[level.grows] = np.arange(len(level.grows))
            tables = [
                np.searchsorted(level.parents, np.arange(parents + 1)).astype(np.int32),
                level.ranks.astype(np.int32),
                grown,
            ]
            self._tables += tables
            places = (table.ctypes.data for table in tables)
            yield LevelRecord(level.first, len(level.ranks), parents, level.widest, *places)
            parents = len(level.grows)


# ---- what is packed, and what fits together

_Key = tuple[tuple[object, ...], ...]


def _key(*parts: Tensor) -> _Key:
    """The same for the same memory."""
    return tuple((part.data_ptr(), part.dtype, tuple(part.shape), part.stride()) for part in parts)


def _matrices(head: HeadWeights) -> Iterator[tuple[Tensor, ...]]:
    """What is packed together: the first two matrices of a head, and every other one alone."""
    yield (head.first,) if head.through is None else (head.first, head.through)
    for weight, _ in head.blocks:
        yield (weight,)
    if isinstance(head.vocabulary, Tensor):
        yield (head.vocabulary,)


def _shape(given: Tensor | Packed) -> tuple[int, ...]:
    return (given.out, int(given.record.in_)) if isinstance(given, Packed) else tuple(given.shape)


def _checked(heads: Sequence[HeadWeights], embedding: Tensor | None, known: Tensor | None) -> tuple[int, int]:
    """Width and vocabulary of all heads. Raises ValueError where something does not fit."""
    if not heads:
        raise ValueError("no heads draft nothing: give at least one")
    vocabulary, width = _shape(heads[0].vocabulary)
    if known is not None and len(known) != vocabulary:
        raise ValueError(f"{len(known)} tokens are known, and the vocabularies have {vocabulary} rows")
    if embedding is not None and embedding.shape != (vocabulary if known is None else len(embedding), width):
        raise ValueError(f"an embedding {list(embedding.shape)} for heads over {vocabulary} tokens of width {width}")
    formats = {head.vocabulary.record.format if isinstance(head.vocabulary, Packed) else None for head in heads}
    if len(formats) > 1:
        raise ValueError("vocabularies of different number formats: give all heads packed ones, or none")
    for number, head in enumerate(heads):
        inputs = width if embedding is None else (number + 2) * width
        if head.through is None and inputs != width:
            raise ValueError(f"head {number} reads {inputs} numbers and gives {width}: it needs a matrix `through`")
        if isinstance(head.vocabulary, Packed) and head.vocabulary.record.gated:
            raise ValueError(f"the vocabulary of head {number} is a gated matrix: give a plain one")
        for name, given, shape in _expected(head, inputs, width, vocabulary):
            if given is not None and _shape(given) != shape:
                raise ValueError(f"{name} of head {number} is {list(_shape(given))} and not {list(shape)}")
    return width, vocabulary


def _expected(
    head: HeadWeights, inputs: int, width: int, vocabulary: int
) -> Iterator[tuple[str, Tensor | Packed | None, tuple[int, ...]]]:
    yield "first", head.first, (width, inputs)
    yield "first_bias", head.first_bias, (width,)
    yield "through", head.through, (width, inputs)
    yield "through_bias", head.through_bias, (width,)
    for number, (weight, bias) in enumerate(head.blocks):
        yield f"block {number}", weight, (width, width)
        yield f"the bias of block {number}", bias, (width,)
    yield "vocabulary", head.vocabulary, (vocabulary, width)
    yield "vocabulary_bias", head.vocabulary_bias, (vocabulary,)
