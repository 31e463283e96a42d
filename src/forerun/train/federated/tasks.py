"""What a party learns on data of its own: to classify, or to find the text of an image and the image of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from forerun.train.federated import recall
from forerun.train.federated.losses import margin_loss, pair_losses, soft_contrastive_loss
from forerun.train.federated.networks import Towers, Words
from forerun.train.federated.public import IMAGE, TEXT, Images


@dataclass(frozen=True)
class Pairs:
    """Images and texts. image_of: which image each text is about, [len(texts)]."""

    images: Images
    texts: Sequence[str]
    image_of: NDArray[np.int64]

    @cached_property
    def encoded(self) -> dict[tuple[str, ...], Encoded]:
        """As encoders take them, once for each vocabulary: many clients may share a test."""
        return {}

    def part(self, numbers: NDArray[np.int64]) -> Pairs:
        """These texts with their images."""
        kept, image_of = np.unique(self.image_of[numbers], return_inverse=True)
        return Pairs(self.images[kept], [self.texts[number] for number in numbers], image_of.astype(np.int64))


@dataclass(frozen=True)
class Labelled:
    """Images or texts, each of one of so many classes."""

    items: Images | Sequence[str]
    labels: NDArray[np.int64]
    classes: int

    @property
    def modality(self) -> str:
        return IMAGE if isinstance(self.items, np.ndarray) else TEXT

    def part(self, numbers: NDArray[np.int64]) -> Labelled:
        items = self.items[numbers] if isinstance(self.items, np.ndarray) else [self.items[n] for n in numbers]
        return Labelled(items, self.labels[numbers], self.classes)


class Task(Protocol):
    """A module with parameters of its own, and data."""

    size: int
    """Samples."""

    def loss(self, towers: Towers, index_B: Tensor) -> Tensor:
        """On these samples."""

    def figures(self, towers: Towers) -> dict[str, float]:
        """On data that nobody learns from."""


def inputs_of(items: Images | Sequence[str], words: Words) -> Tensor:
    """As encoders take them."""
    return torch.from_numpy(items) if isinstance(items, np.ndarray) else words.encode(items)


class Classify(nn.Module):
    """margin: the loss of the authors' code (`losses.margin_loss`), instead of cross-entropy."""

    def __init__(self, own: Labelled, test: Labelled, towers: Towers, margin: bool = False, seed: int = 0):
        super().__init__()
        self.modality, self.margin, self.size = own.modality, margin, len(own.labels)
        self._inputs, self._labels = inputs_of(own.items, towers.words), torch.from_numpy(own.labels)
        self._test = inputs_of(test.items, towers.words), torch.from_numpy(test.labels)
        weight = torch.randn(own.classes, towers.width, generator=torch.Generator().manual_seed(seed))
        self.weight = nn.Parameter(weight / towers.width**0.5)

    def loss(self, towers: Towers, index_B: Tensor) -> Tensor:
        labels_B = self._labels[index_B]
        logits_BC = self.logits(towers(self.modality, self._inputs[index_B]))
        if self.margin:
            return margin_loss(logits_BC, labels_B, self.weight.clamp_min(0))
        return F.cross_entropy(logits_BC, labels_B)

    def logits(self, rows_BD: Tensor) -> Tensor:
        """Rows have length 1, so they are made longer first: by 128, as the authors do, or by 16."""
        return 128 * rows_BD @ self.weight.clamp_min(0).T if self.margin else 16 * rows_BD @ self.weight.T

    def figures(self, towers: Towers) -> dict[str, float]:
        inputs, labels = self._test
        found = self.logits(towers.embed(self.modality, inputs)).argmax(-1)
        return {"accuracy": 100 * float((found == labels).double().mean())}


class Retrieve(nn.Module):
    """Soft contrast over the pairs of a batch; its slope and offset are learnt, too."""

    def __init__(self, own: Pairs, test: Pairs, towers: Towers, folds: int = 5):
        super().__init__()
        self.size, self._folds = len(own.texts), folds
        self._own, self._test = (Encoded.of(pairs, towers.words) for pairs in (own, test))
        self.slope, self.offset = nn.Parameter(torch.tensor(15.0)), nn.Parameter(torch.tensor(15.0))

    def loss(self, towers: Towers, index_B: Tensor) -> Tensor:
        images = self._own.images[self._own.image_of[index_B]]
        x_BD, y_BD = towers(IMAGE, images), towers(TEXT, self._own.texts[index_B])
        return soft_contrastive_loss(x_BD, y_BD, self.slope, self.offset)

    @torch.no_grad()
    def figures(self, towers: Towers) -> dict[str, float]:
        """Recalls in percent, and the loss of a pair, balanced: as many that match as that do not."""
        images = towers.embed(IMAGE, self._test.images)
        texts = towers.embed(TEXT, self._test.texts)
        first = torch.from_numpy(np.unique(self._test.image_of.numpy(), return_index=True)[1])[:512]
        losses = pair_losses(images[self._test.image_of[first]], texts[first], self.slope, self.offset)
        matched = losses.diagonal().mean()
        others = (losses.sum() - losses.diagonal().sum()) / max(1, losses.numel() - len(losses))
        found = recall.figures(images, texts, self._test.image_of, self._folds)
        return {"loss": float((matched + others) / 2), **found}


@dataclass(frozen=True)
class Encoded:
    """Pairs as encoders take them."""

    images: Tensor
    texts: Tensor
    image_of: Tensor

    @classmethod
    def of(cls, pairs: Pairs, words: Words) -> Encoded:
        if words.known not in pairs.encoded:
            texts, image_of = words.encode(pairs.texts), torch.from_numpy(pairs.image_of)
            pairs.encoded[words.known] = cls(torch.from_numpy(pairs.images), texts, image_of)
        return pairs.encoded[words.known]
