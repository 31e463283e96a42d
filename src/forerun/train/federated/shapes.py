"""Shapes and captions: small pictures of one or two coloured shapes, and sentences about them. Drawn here, from a seed.

A scene is all that a picture shows; the seed of its noise makes it a picture. A caption tells the first shape, which is
the nearer one, and the background; the second shape may be told, too. There are five ways to put it, and synonyms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forerun.train.federated.public import Images

SIZE = 32
SHAPES = (
    ("circle", "disc"),
    ("square", "box"),
    ("triangle", "wedge"),
    ("cross", "plus"),
    ("diamond", "rhombus"),
    ("ring", "hoop"),
)
COLOURS = (
    ("red", "crimson"),
    ("green", "emerald"),
    ("blue", "azure"),
    ("yellow", "golden"),
    ("purple", "violet"),
    ("white", "pale"),
)
SIZES = (("small", "little"), ("large", "big"))
POSITIONS = (
    ("top left", "upper left"),
    ("top right", "upper right"),
    ("bottom left", "lower left"),
    ("bottom right", "lower right"),
)
TEXTURES = (("plain", "empty"), ("striped", "lined"), ("dotted", "spotted"))
WAYS = (
    "a {size} {colour} {shape} in the {position} on a {texture} background",
    "there is a {colour} {shape} , {size} , at the {position} over {texture} ground",
    "{texture} picture with one {size} {shape} that is {colour} , {position}",
    "the {position} shows some {size} {shape} painted {colour} before {texture} paper",
    "{colour} {shape} of {size} kind placed {position} , {texture} behind it",
)
SECOND = (" and a {colour} {shape}", " beside a {shape} in {colour}")
PAINT = np.array([(220, 40, 40), (40, 180, 60), (50, 80, 230), (230, 210, 50), (150, 60, 190), (245, 245, 245)])
GROUND, INK = 70, 110
"""How bright backgrounds are, and what is drawn on them."""


@dataclass(frozen=True)
class Scene:
    """Numbers into the tuples above. second: the shape and colour of another thing, in the opposite corner."""

    shape: int
    colour: int
    size: int
    position: int
    texture: int
    second: tuple[int, int] | None = None


def scenes(
    count: int, rng: np.random.Generator, textures: tuple[int, ...] = (0, 1, 2), pairs: float = 0.5
) -> list[Scene]:
    """So many at random, on these backgrounds; a share `pairs` of them with a second thing."""
    found = []
    for _ in range(count):
        shape, colour, size, position = (int(rng.integers(len(all))) for all in (SHAPES, COLOURS, SIZES, POSITIONS))
        other = (int(rng.integers(len(SHAPES))), int(rng.integers(len(COLOURS))))
        texture = textures[int(rng.integers(len(textures)))]
        found.append(Scene(shape, colour, size, position, texture, other if rng.random() < pairs else None))
    return found


def draw(scene: Scene, rng: np.random.Generator) -> Images:
    """The picture, [3, 32, 32] bytes, somewhere near its corner, with noise."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    ground = np.full((SIZE, SIZE), GROUND, np.float32)
    if scene.texture == 1:
        ground[(y.astype(int) % 6) < 2] = INK
    elif scene.texture == 2:
        ground[(y.astype(int) % 6 < 2) & (x.astype(int) % 6 < 2)] = INK
    picture = np.repeat(ground[None], 3, 0)
    if scene.second is not None:
        _paint(picture, scene.second, 3 - scene.position, 4.0, (y, x), rng)
    _paint(picture, (scene.shape, scene.colour), scene.position, (4.0, 6.5)[scene.size], (y, x), rng)
    return (picture + rng.normal(0, 8, picture.shape)).clip(0, 255).astype(np.uint8)


Grid = tuple[NDArray[np.float32], NDArray[np.float32]]


def _paint(
    picture: NDArray[np.float32],
    thing: tuple[int, int],
    position: int,
    radius: float,
    grid: Grid,
    rng: np.random.Generator,
) -> None:
    row, column = divmod(position, 2)
    dy = (grid[0] - 8 - 15 * row - rng.uniform(-1, 1)) / radius
    dx = (grid[1] - 8 - 15 * column - rng.uniform(-1, 1)) / radius
    far = np.hypot(dx, dy)
    masks = (
        far < 1,
        np.maximum(abs(dx), abs(dy)) < 0.85,
        (dy < 0.8) & (dy > 2 * abs(dx) - 1),
        (np.minimum(abs(dx), abs(dy)) < 0.3) & (np.maximum(abs(dx), abs(dy)) < 1),
        abs(dx) + abs(dy) < 1.1,
        (far < 1.05) & (far > 0.6),
    )
    picture[:, masks[thing[0]]] = PAINT[thing[1]][:, None]


def caption(scene: Scene, way: int, rng: np.random.Generator, synonyms: float = 0.5) -> str:
    """One of the `WAYS` to put it. synonyms: how often each word is the rarer one."""

    def word(names: tuple[str, str]) -> str:
        return names[int(rng.random() < synonyms)]

    parts = {"shape": SHAPES[scene.shape], "colour": COLOURS[scene.colour], "size": SIZES[scene.size]}
    parts |= {"position": POSITIONS[scene.position], "texture": TEXTURES[scene.texture]}
    said = WAYS[way].format(**{name: word(names) for name, names in parts.items()})
    if scene.second is not None:
        shape, colour = word(SHAPES[scene.second[0]]), word(COLOURS[scene.second[1]])
        said += SECOND[way % len(SECOND)].format(shape=shape, colour=colour)
    return said


def pictures(shown: list[Scene], rng: np.random.Generator) -> Images:
    """[len(shown), 3, 32, 32]."""
    return np.stack([draw(scene, rng) for scene in shown]) if shown else np.zeros((0, 3, SIZE, SIZE), np.uint8)
