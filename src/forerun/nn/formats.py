"""What number format each matrix of a transformer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

LAYER = ("qkv", "out", "gate_up", "down")
"""The matrices of a layer."""


@dataclass(frozen=True)
class Formats:
    """One format for all matrices, and exceptions by name: "head", "embedding", a matrix of every
    layer ("down"), or of one layer, which counts most ("3.down").

    An embedding is looked up and never multiplied, so it is a float: the network's own where it is no exception.

    Raises ValueError for other names.
    """

    default: torch.dtype
    exceptions: Mapping[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in self.exceptions.items():
            layer, _, matrix = name.rpartition(".")
            if not (name in ("head", "embedding", *LAYER) or (layer.isdecimal() and matrix in LAYER)):
                raise ValueError(
                    f"there is no matrix {name!r}: name one of head, embedding, {', '.join(LAYER)}, or 3.down"
                )
            if name == "embedding" and not dtype.is_floating_point:
                raise ValueError(f"an embedding is not multiplied and cannot be {dtype}: choose a float")

    @staticmethod
    def of(weights: torch.dtype | Formats) -> Formats:
        """A dtype stands for all matrices."""
        return weights if isinstance(weights, Formats) else Formats(weights)

    def layer(self, index: int, matrix: str) -> torch.dtype:
        """Of a matrix of one layer."""
        return self.exceptions.get(f"{index}.{matrix}", self.exceptions.get(matrix, self.default))

    @property
    def head(self) -> torch.dtype:
        return self.exceptions.get("head", self.default)

    def embedding(self, dtype: torch.dtype) -> torch.dtype:
        """dtype: the network's own."""
        return self.exceptions.get("embedding", dtype)

    def __str__(self) -> str:
        names = [f"{name} {_word(dtype)}" for name, dtype in self.exceptions.items()]
        return ", ".join([_word(self.default), *names])


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
