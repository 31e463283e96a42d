"""Two samples of short texts: are they from one law? Pure functions of arrays.

The test is a permutation test. If the two arms follow the same law, their samples can be relabelled at random, and the
observed distance is one of many equally likely ones. Every place of every prompt gives one distance; each is
standardised by its own relabelled distances, and the largest of all is compared with the largest of every relabelling
(Westfall and Young's max-T), so that looking in many places does not raise the rate of false alarms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

CLASSES = 24
"""Outcomes that are told apart; the rarer ones are one class."""
LONGEST = 3
"""Beginnings of up to so many tokens are compared as a whole, too: a wrong law may show in pairs alone."""
CHUNK = 500


@dataclass(frozen=True)
class Outcome:
    """One comparison. distance: total variation, in [0, 1]. p: adjusted for all comparisons made
    together. detectable: a true distance that the test would have called with a probability of
    about 0.84."""

    distance: float
    p: float
    detectable: float


def places(length: int) -> list[slice]:
    """What is compared of texts of this length: every token alone, and the beginnings."""
    return [slice(n, n + 1) for n in range(length)] + [slice(0, n) for n in range(2, min(length, LONGEST) + 1)]


def compare(
    pairs: Sequence[tuple[Ints, Ints]], level: float, rng: np.random.Generator, permutations: int | None = None
) -> list[list[Outcome]]:
    """Compare the arms of every pair, each [samples, length]; per pair one outcome per place.

    level: the probability at which a difference will be called; it sets how many permutations are
    needed, and `detectable`.
    """
    permutations = permutations or max(2000, round(10 / level))
    observed, chance = [], []
    for left, right in pairs:
        tables = [_classes(left[:, span], right[:, span]) for span in places(left.shape[1])]
        sizes = (len(left), len(right))
        observed.append(_distances(_true_labels(sizes), tables, sizes)[0])
        chance.append(_relabelled(tables, sizes, permutations, rng))
    return _grouped(_outcomes(np.concatenate(observed), np.concatenate(chance, 1), level), [len(o) for o in observed])


def distance(left: Ints, right: Ints) -> float:
    """Total variation between two samples [n, length] of outcomes, the rarest pooled."""
    sizes = (len(left), len(right))
    return float(_distances(_true_labels(sizes), [_classes(left, right)], sizes)[0, 0])


def _outcomes(observed: Floats, chance: Floats, level: float) -> list[Outcome]:
    """observed [F], chance [P, F]."""
    mean, spread = chance.mean(0), chance.std(0)
    scale = np.where(spread > 0, spread, np.inf)
    largest = ((chance - mean) / scale).max(1)
    score = (observed - mean) / scale
    count = (largest[:, None] >= score - 1e-9).sum(0)
    critical = np.quantile(largest, 1 - level)
    return [
        Outcome(float(value), float((1 + hits) / (1 + len(largest))), float(m + (critical + 1) * s))
        for value, hits, m, s in zip(observed, count, mean, spread, strict=True)
    ]


def _classes(left: Ints, right: Ints) -> NDArray[np.float32]:
    """One-hot classes [n + m, classes] of both arms' outcomes (rows): the most frequent ones, and one for the rest.

    The choice depends on both arms together, so relabelling does not change it.
    """
    _, codes = np.unique(np.concatenate((left, right)), axis=0, return_inverse=True)
    codes = codes.reshape(-1)
    frequency = np.bincount(codes)
    order = np.argsort(-frequency, kind="stable")
    number = np.full(len(frequency), CLASSES)
    number[order[:CLASSES]] = np.arange(min(CLASSES, len(order)))
    table: NDArray[np.float32] = np.eye(CLASSES + 1, dtype=np.float32)[number[codes]]
    return table


def _true_labels(sizes: tuple[int, int]) -> NDArray[np.float32]:
    """[1, n + m]: 1 for the left arm."""
    return np.repeat(np.asarray([1, 0], dtype=np.float32), sizes)[None]


def _relabelled(
    tables: Sequence[NDArray[np.float32]], sizes: tuple[int, int], count: int, rng: np.random.Generator
) -> Floats:
    """The distances [count, F] of random relabellings; one relabelling serves all places of a prompt."""
    total, parts = sum(sizes), []
    for start in range(0, count, CHUNK):
        luck = rng.random((min(CHUNK, count - start), total))
        chosen = np.argpartition(luck, sizes[0] - 1, axis=1)[:, : sizes[0]]
        labels = np.zeros(luck.shape, dtype=np.float32)
        np.put_along_axis(labels, chosen, 1, axis=1)
        parts.append(_distances(labels, tables, sizes))
    return np.concatenate(parts)


def _distances(labels: NDArray[np.float32], tables: Sequence[NDArray[np.float32]], sizes: tuple[int, int]) -> Floats:
    """Total variation [P, F] for every labelling [P, n + m] and every table of classes."""
    found = []
    for table in tables:
        left = labels @ table
        right = table.sum(0) - left
        found.append(0.5 * np.abs(left / sizes[0] - right / sizes[1]).sum(1))
    return np.stack(found, 1).astype(np.float64)


def _grouped(outcomes: Sequence[Outcome], sizes: Sequence[int]) -> list[list[Outcome]]:
    ends = np.cumsum(sizes).tolist()
    return [list(outcomes[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
