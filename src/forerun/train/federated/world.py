"""All data of a federation, and who has which: the public set, what clients have of their own, and what tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forerun.errors import TrainingError
from forerun.train.federated import digits, shapes
from forerun.train.federated.folders import ag_news, captioned, cifar100
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


def of_digits(public: int, test: int, own: int, paired: int, seed: int) -> World:
    """Handwritten digits, each image in one part alone. Clients of one modality learn which digit it is."""
    found = digits.parts({"public": public, "test": test, "own": own, "paired": paired}, seed)
    pairs, images, texts = zip(*found.values(), strict=True)
    return World(
        _published(pairs[0], seed), pairs[1], (images[2], images[1]), (texts[2], texts[1]), _once(pairs[3], seed)
    )


@dataclass(frozen=True)
class Folders:
    """pairs: COCO or Flickr30k style, for the public set and the test; private_pairs: for clients that have both, else
    what the public set leaves. images: CIFAR-100. texts: AG News. The last two are read where somebody needs them."""

    pairs: Path
    private_pairs: Path | None
    images: Path
    texts: Path
    size: int


def of_folders(folders: Folders, public: int, test: int, own: int, paired: int, seed: int) -> World:
    """Sizes as for `drawn`; 0: all there are."""
    if folders.private_pairs is None:
        whole = captioned(folders.pairs, "train", folders.size, public + paired if public and paired else 0)
        is_public = whole.image_of < (public or len(whole.images) // 2)
        seen, rest = (whole.part(np.flatnonzero(which)) for which in (is_public, ~is_public))
    else:
        seen = captioned(folders.pairs, "train", folders.size, public)
        rest = captioned(folders.private_pairs, "train", folders.size, paired)
    tested = captioned(folders.pairs, "test", folders.size, test)
    images = cifar100(folders.images, "train", own), cifar100(folders.images, "test")
    texts = ag_news(folders.texts, "train", own), ag_news(folders.texts, "test")
    return World(_published(seen, seed), tested, images, texts, rest)


def _published(pairs: Pairs, seed: int) -> PublicSet:
    """A caption of each image."""
    once = _once(pairs, seed)
    return PublicSet(np.arange(len(once.texts)), once.images[once.image_of], once.texts)


def _once(pairs: Pairs, seed: int) -> Pairs:
    """One caption of each image, at random."""
    rng = np.random.default_rng([seed, 79])
    first = np.flatnonzero(np.diff(pairs.image_of, prepend=-1))
    counts = np.diff(first, append=len(pairs.image_of))
    return pairs.part(first + (rng.random(len(first)) * counts).astype(np.int64))


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
