"""The tensors of a GGUF file as floats: each is mapped, and its blocks become numbers a few rows at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from forerun.errors import CheckpointError
from forerun.sources.folder import Stored
from forerun.sources.gguf.architecture import FREQUENCIES, published
from forerun.sources.gguf.head import Head, Held, package
from forerun.sources.weights import Piece

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS = tuple("Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS".split())
"""Formats of blocks, which become fp32."""
NUMBERS = 1 << 22
"""In a piece: 16 MiB of fp32."""


@dataclass(frozen=True)
class GgufWeights:
    """heads: of attention, by the published endings of the names of tensors whose rows are permuted for llama.cpp."""

    head: Head
    heads: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.head.files)

    @property
    def dtype(self) -> torch.dtype:
        """bf16, unless all matrices have one other float format."""
        formats = {held.format for held in self._named.values() if len(held.shape) > 1}
        return FLOATS.get(formats.pop(), torch.bfloat16) if len(formats) == 1 else torch.bfloat16

    @cached_property
    def _named(self) -> dict[str, Held]:
        return {published(name): held for name, held in self.head.tensors.items() if name != FREQUENCIES}

    def stored(self) -> dict[str, Stored]:
        for name, held in self.head.tensors.items():
            if held.format not in FLOATS and not (held.format in BLOCKS and len(held.shape) == 2):
                raise CheckpointError(
                    f"{held.path} has {name} {list(held.shape)} in the format {held.format}, and vectors are read in"
                    f" {', '.join(FLOATS)}, matrices in {', '.join(BLOCKS)} too: take the model in one of these"
                )
        return {
            name: Stored(held.shape, held.format if held.format in FLOATS else "F32")
            for name, held in self._named.items()
        }

    def pieces(self, names: Collection[str]) -> Iterator[Piece]:
        for name, held in self._named.items():
            if name in names:
                yield from self._pieces(name, held)

    def _pieces(self, name: str, held: Held) -> Iterator[Piece]:
        count, columns = held.shape[0], prod(held.shape[1:])
        data = np.memmap(held.path, np.uint8, "r", held.offset, (count, held.nbytes // max(1, count)))
        order = self._order(name, count)
        step = max(1, NUMBERS // max(1, columns))
        for begin in range(0, count, step):
            rows = data[begin : begin + step] if order is None else data[order[begin : begin + step]]
            yield Piece(name, begin, _floats(rows, held.format).reshape(-1, *held.shape[1:]))

    def _order(self, name: str, count: int) -> np.ndarray | None:
        """Which row of the file is which of the published tensor: in a head the file has 0, n, 1, n + 1 ... of 2n."""
        heads = next((heads for ending, heads in self.heads.items() if ending in name), None)
        if not heads or count % (2 * heads):
            return None
        return np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).ravel()


def _floats(rows: np.ndarray, format_: str) -> Tensor:
    """Rows of bytes as rows of numbers."""
    if format_ in FLOATS:
        return torch.frombuffer(bytearray(rows.tobytes()), dtype=FLOATS[format_])
    gguf = package()
    with np.errstate(all="ignore"):  # what a block says is not ours to judge
        found = gguf.quants.dequantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType[format_])
    return torch.from_numpy(found)
