"""The tensors of a model, wherever they lie, by the names that Hugging Face gives them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from forerun.sources.folder import Stored, opened, stored

FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor, from `begin` on."""

    name: str
    begin: int
    rows: Tensor


class Weights(Protocol):
    """All methods raise CheckpointError for files that are damaged or of a kind that is not known."""

    @property
    def bytes(self) -> int:
        """Of all files."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What a model that is made out of this one is written in."""
        ...

    def stored(self) -> dict[str, Stored]:
        """The shapes of all tensors, and the formats in which `pieces` gives them."""
        ...

    def pieces(self, names: Collection[str]) -> Iterator[Piece]:
        """These tensors, piece by piece: no more than one is in memory. Those that are not there are left out."""
        ...


def whole(weights: Weights, name: str) -> Tensor:
    """One tensor."""
    return torch.cat([piece.rows for piece in weights.pieces((name,))])


@dataclass(frozen=True)
class SafeTensors:
    """Files of safetensors. A piece is a tensor."""

    files: Sequence[Path]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    @property
    def dtype(self) -> torch.dtype:
        formats = {tensor.dtype for tensor in self.stored().values()}
        return FORMATS.get(formats.pop(), torch.float32) if len(formats) == 1 else torch.float32

    def stored(self) -> dict[str, Stored]:
        return stored(self.files)

    def pieces(self, names: Collection[str]) -> Iterator[Piece]:
        """A file is mapped anew for each tensor, or all of it would stay in memory."""
        for path in self.files:
            with opened(path) as file:
                held = [name for name in file.keys() if name in names]  # noqa: SIM118 (not a dict)
            for name in held:
                with opened(path) as file:
                    yield Piece(name, 0, file.get_tensor(name))
