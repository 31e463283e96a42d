"""The set that everybody knows, and what is said about it: all that travels between server and clients.

A message holds one row of width D for every item it speaks of, and scalars. It holds no weights, and nothing of
anybody's own data. Rows go by the items' ids, never by their place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from forerun.errors import TrainingError

IMAGE, TEXT = "image", "text"
OTHER = {IMAGE: TEXT, TEXT: IMAGE}
Ids = NDArray[np.int64]
Images = NDArray[np.uint8]
"""[N, 3, height, width]."""


@dataclass(frozen=True)
class PublicSet:
    """Pairs of an image and a text, each with an id that stays, in any order. TrainingError if ids are not unique, or
    not as many as images and texts."""

    ids: Ids
    images: Images
    texts: Sequence[str]

    def __post_init__(self) -> None:
        if len({len(self.ids), len(self.images), len(self.texts)}) > 1 or len(np.unique(self.ids)) < len(self.ids):
            raise TrainingError(
                f"a public set needs an id of its own for each image and text, and this one has {len(self.ids)} ids"
                f" ({len(np.unique(self.ids))} different), {len(self.images)} images and {len(self.texts)} texts"
            )

    @cached_property
    def encoded(self) -> dict[Any, Tensor]:
        """Its inputs as parties need them, each of them once, for whoever shares this process."""
        return {}

    @cached_property
    def version(self) -> str:
        """A digest of all items, in whatever order: who has another one speaks of other things."""
        digest = hashlib.sha256()
        for place in np.argsort(self.ids):
            digest.update(self.ids[place].tobytes() + self.images[place].tobytes() + self.texts[place].encode() + b"\0")
        return digest.hexdigest()[:16]

    def places(self, ids: Ids) -> Ids:
        """Where these items stand. TrainingError for an id that is not here."""
        order = np.argsort(self.ids)
        found = order[np.searchsorted(self.ids[order], ids).clip(max=len(order) - 1)]
        is_other = self.ids[found] != ids
        if is_other.any():
            raise TrainingError(
                f"the public set {self.version} has no item {ids[is_other][0]}: give everybody the same one"
            )
        return np.asarray(found, np.int64)


@dataclass(frozen=True)
class Message:
    """What somebody says of public items. version: of the public set. rows: [len(ids), D] by modality, fp32 or fp16; a
    row that is not finite is one that is not there. figures: numbers beside it."""

    version: str
    ids: Ids
    rows: Mapping[str, NDArray[np.floating[Any]]]
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of ids, rows and figures."""
        return int(self.ids.nbytes + sum(rows.nbytes for rows in self.rows.values()) + 8 * len(self.figures))

    def demand(self, version: str, width: int) -> None:
        """TrainingError unless it speaks of that public set, in rows of that width."""
        if self.version != version:
            raise TrainingError(f"it speaks of the public set {self.version}, and not of {version}: use the same one")
        for name, rows in self.rows.items():
            if name not in OTHER or rows.shape != (len(self.ids), width):
                raise TrainingError(
                    f"its rows of {name!r} are {rows.shape}: rows are of {' or '.join(OTHER)}, one for each of the"
                    f" {len(self.ids)} ids, of width {width}"
                )

    def about(self, ids: Ids) -> dict[str, tuple[Tensor, Tensor]]:
        """By modality: fp32 rows [N, D] of these items, in this order, and which are there [N]; the others are zero.

        No row is longer than 1, or whoever sends long ones would count for more.
        """
        order = np.argsort(self.ids, kind="stable")
        places = np.searchsorted(self.ids[order], ids).clip(max=max(0, len(order) - 1))
        if not len(order):
            return {}
        found = order[places]
        is_known = self.ids[found] == ids
        return {name: _sound(rows[found].astype(np.float32), is_known) for name, rows in self.rows.items()}


def _sound(rows_ND: NDArray[np.float32], is_known_N: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    rows, sent = torch.from_numpy(rows_ND), torch.from_numpy(is_known_N & np.isfinite(rows_ND).all(-1))
    rows = torch.where(sent[:, None], rows, 0.0)
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1.0), sent


def guarded(rows_ND: Tensor, clip: float, noise: float, rng: np.random.Generator) -> Tensor:
    """Rows shortened to `clip` at most (0: as they are), with Gaussian noise of this deviation on every number.

    It makes rows say less about single inputs. How much less nobody has proved here: it is no claim of differential
    privacy, which would need an account over all rounds."""
    if clip:
        rows_ND = rows_ND * (clip / rows_ND.norm(dim=-1, keepdim=True).clamp_min(clip))
    if noise:
        rows_ND = rows_ND + torch.from_numpy(rng.normal(0, noise, rows_ND.shape)).float()
    return rows_ND
