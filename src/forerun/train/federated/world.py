"""All data of a federation, and who has which: the public set, what clients have of their own, and what tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forerun.errors import TrainingError
from forerun.train.federated import shapes
from forerun.train.federated.partition import dirichlet_partition, shard_partition
from forerun.train.federated.public import PublicSet
from forerun.train.federated.tasks import Labelled, Pairs


@dataclass(frozen=True)
class World:
    """images, texts: what clients of one modality learn from, and its test. pairs: of clients that have both."""

    public: PublicSet
    test: Pairs
    images: tuple[Labelled, Labelled]
    texts: tuple[Labelled, Labelled]
    pairs: Pairs


@dataclass(frozen=True)
class Shares:
    """Who has what. alpha: of Dirichlet, for classes; least: samples of a client; shards: of pairs, for each client
    that has both; most: samples of a client, 0: all that fall to it."""

    alpha: float = 0.1
    least: int = 10
    shards: int = 10
    most: int = 0


def drawn(public: int, test: int, own: int, paired: int, seed: int) -> World:
    """Shapes and captions. own: of images and of texts, for clients of one modality; paired: for those of both.

    Private images have striped and dotted backgrounds alone. Public captions are put in the first three of five ways,
    mostly without synonyms; private texts in the other two.
    """
    parts = [np.random.default_rng([seed, 77, number]) for number in range(6)]
    seen = shapes.scenes(public, parts[0])
    public_texts = [shapes.caption(scene, int(parts[0].integers(3)), parts[0], 0.2) for scene in seen]
    everything = PublicSet(np.arange(public), shapes.pictures(seen, parts[0]), public_texts)
    return World(
        everything,
        _paired(shapes.scenes(test, parts[1]), 5, parts[1]),
        (_of_shape(own, parts[2]), _of_shape(test, parts[3])),
        (_of_colour(own, parts[4]), _of_colour(test, parts[3])),
        _by_corner(paired, parts[5]),
    )


def _paired(seen: list[shapes.Scene], ways: int, rng: np.random.Generator) -> Pairs:
    texts = [shapes.caption(scene, way, rng) for scene in seen for way in range(ways)]
    return Pairs(shapes.pictures(seen, rng), texts, np.repeat(np.arange(len(seen)), ways))


def _of_shape(count: int, rng: np.random.Generator) -> Labelled:
    seen = shapes.scenes(count, rng, textures=(1, 2), pairs=0)
    return Labelled(shapes.pictures(seen, rng), np.array([scene.shape for scene in seen]), len(shapes.SHAPES))


def _of_colour(count: int, rng: np.random.Generator) -> Labelled:
    seen = shapes.scenes(count, rng)
    texts = [shapes.caption(scene, 3 + int(rng.integers(2)), rng) for scene in seen]
    return Labelled(texts, np.array([scene.colour for scene in seen]), len(shapes.COLOURS))


def _by_corner(count: int, rng: np.random.Generator) -> Pairs:
    """In the order of positions, so that shards differ."""
    seen = sorted(shapes.scenes(count, rng), key=lambda scene: scene.position)
    texts = [shapes.caption(scene, int(rng.integers(5)), rng) for scene in seen]
    return Pairs(shapes.pictures(seen, rng), texts, np.arange(count))


def split(world: World, counts: Mapping[str, int], shares: Shares, seed: int) -> dict[str, Labelled | Pairs]:
    """What each client has, by its name: image0, text0, both0 and so on. counts: clients of each kind."""
    found: dict[str, Labelled | Pairs] = {}
    for kind, whole in (("image", world.images[0]), ("text", world.texts[0])):
        if counts[kind]:
            parts = dirichlet_partition(whole.labels, counts[kind], shares.alpha, shares.least, seed=seed)
            found |= {f"{kind}{n}": whole.part(_some(part, shares.most, seed)) for n, part in enumerate(parts)}
    if counts["both"]:
        shards = counts["both"] * shares.shards
        parts = shard_partition(len(world.pairs.texts), counts["both"], min(shards, len(world.pairs.texts)), seed)
        found |= {f"both{n}": world.pairs.part(_some(part, shares.most, seed)) for n, part in enumerate(parts)}
    if not found:
        raise TrainingError("there are no clients: give some of image, text or both")
    return found


def _some(part: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    if not most or len(part) <= most:
        return part
    return np.sort(np.random.default_rng(seed).choice(part, most, replace=False))
