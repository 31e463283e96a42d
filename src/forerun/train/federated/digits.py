"""The handwritten digits that come with scikit-learn, captioned by rule: real images, and nothing to download."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forerun.errors import TrainingError
from forerun.train.federated.public import Images
from forerun.train.federated.tasks import Labelled, Pairs

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WAYS = (
    "a {slant} {digit} in {weight} strokes , {width}",
    "the digit {digit} , {width} and {slant} , written {weight}",
    "{weight} handwriting of a {width} {digit} that is {slant}",
    "someone wrote {digit} : {slant} , {weight} , {width}",
    "number {digit} , {weight} {slant} and {width}",
)
SCALE = 4
"""From 8 x 8 to 32 x 32 pixels."""


def digits() -> tuple[Images, NDArray[np.int64], list[list[str]]]:
    """All 1,797: images [N, 3, 32, 32], which digits they are, and five captions of each.

    A caption tells the digit, and how it is written compared with the others of its kind: light or heavy, wide or
    narrow, leaning left, upright or leaning right. Raises TrainingError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise TrainingError(
            "the digits come with scikit-learn: install it with pip install 'forerun[images]'"
        ) from None
    found = load_digits()
    ink, labels = np.asarray(found.images, np.float64), np.asarray(found.target, np.int64)
    bytes_NHW = (ink * 255 / 16).astype(np.uint8).repeat(SCALE, 1).repeat(SCALE, 2)
    mass, width, slant = _measures(ink)
    captions = []
    for label, *ranks in zip(labels, *(_rank(values, labels) for values in (mass, width, slant)), strict=True):
        words = {
            "digit": NAMES[label],
            "weight": ("light", "medium", "heavy")[_third(ranks[0])],
            "width": ("narrow", "normal", "wide")[_third(ranks[1])],
            "slant": ("leaning left", "upright", "leaning right")[_third(ranks[2])],
        }
        captions.append([way.format(**words) for way in WAYS])
    return np.repeat(bytes_NHW[:, None], 3, 1), labels, captions


Values = NDArray[np.float64]


def _measures(ink_NHW: Values) -> tuple[Values, Values, Values]:
    """Ink, how far it spreads sideways, and how far its upper part stands to the right of its lower part."""
    row, column = np.mgrid[: ink_NHW.shape[1], : ink_NHW.shape[2]]
    mass = ink_NHW.sum((1, 2))
    middle = (ink_NHW * column).sum((1, 2)) / mass
    across = column - middle[:, None, None]
    down = row - ((ink_NHW * row).sum((1, 2)) / mass)[:, None, None]
    spread = np.sqrt((ink_NHW * across**2).sum((1, 2)) / mass)
    return mass, spread, -(ink_NHW * across * down).sum((1, 2)) / mass


def _rank(values: Values, labels: NDArray[np.int64]) -> Values:
    """Where each stands among those of its label, from 0 to below 1."""
    found = np.zeros(len(values))
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        found[own[np.argsort(values[own], kind="stable")]] = np.arange(len(own)) / len(own)
    return found


def _third(rank: float) -> int:
    return int(3 * rank)


def parts(sizes: dict[str, int], seed: int) -> dict[str, tuple[Pairs, Labelled, Labelled]]:
    """Disjoint parts of so many images each: with all captions, as images with labels, and as texts with labels."""
    images, labels, captions = digits()
    if sum(sizes.values()) > len(labels):
        raise TrainingError(f"there are {len(labels)} digits, and {sum(sizes.values())} are asked for: ask for fewer")
    order, found, begin = np.random.default_rng([seed, 78]).permutation(len(labels)), {}, 0
    for name, size in sizes.items():
        own = order[begin : begin + size]
        own = own[np.argsort(labels[own], kind="stable")]  # so that shards differ
        begin += size
        texts = [caption for number in own for caption in captions[number]]
        pairs = Pairs(images[own], texts, np.repeat(np.arange(size), len(WAYS)))
        first = [captions[number][place % len(WAYS)] for place, number in enumerate(own)]
        both = Labelled(images[own], labels[own], 10), Labelled(first, labels[own], 10)
        found[name] = (pairs, *both)
    return found
