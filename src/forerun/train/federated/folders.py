"""Data in its published layouts: images with captions (COCO, Flickr30k), CIFAR-100, AG News. Nothing is downloaded."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from forerun.errors import TrainingError
from forerun.train.federated.public import Images
from forerun.train.federated.tasks import Labelled, Pairs

COCO_SPLIT = ("train", "val", "test")
AG_CLASSES = 4
CIFAR_SIDE = 32


def captioned(folder: Path, split: str, size: int, most: int = 0) -> Pairs:
    """Images with all their captions. split: "train" or "test".

    Two layouts are known. COCO: annotations/captions_{train,val}*.json, with the images in folders of the same names
    (val is the test). Karpathy's, for Flickr30k and COCO: dataset*.json, with images in the folder or in images/.
    most: so many images, in the order of their numbers, and of the file; 0: all. size: pixels of the middle square that
    is left of every image.

    Raises TrainingError for a folder in another layout, or an image that is missing.
    """
    karpathy = sorted(folder.glob("dataset*.json"))
    found = _karpathy(folder, karpathy[0], split) if karpathy else _coco(folder, split)
    kept = list(found)[: most or None]
    if not kept:
        raise TrainingError(f"{folder} has no {split} images with captions: look at the file of its captions")
    texts = [text for _, captions in kept for text in captions]
    image_of = np.repeat(np.arange(len(kept)), [len(captions) for _, captions in kept])
    return Pairs(np.stack([image(path, size) for path, _ in kept]), texts, image_of)


Captioned = tuple[Path, list[str]]


def _coco(folder: Path, split: str) -> Iterator[Captioned]:
    which = "train" if split == "train" else "val"
    files = sorted((folder / "annotations").glob(f"captions_{which}*.json"))
    if not files:
        raise TrainingError(
            f"{folder} has neither annotations/captions_{which}*.json (COCO) nor dataset*.json (Karpathy's splits):"
            " name a folder in one of these layouts"
        )
    content = _json(files[0])
    try:
        captions: dict[int, list[str]] = {}
        for one in content["annotations"]:
            captions.setdefault(one["image_id"], []).append(str(one["caption"]).strip())
        place = folder / files[0].stem.removeprefix("captions_")
        for one in sorted(content["images"], key=lambda one: one["id"]):
            if one["id"] in captions:
                yield place / one["file_name"], captions[one["id"]]
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{files[0]} is no file of COCO captions ({error!r} is missing): name another") from None


def _karpathy(folder: Path, file: Path, split: str) -> Iterator[Captioned]:
    wanted = ("train", "restval") if split == "train" else (split,)
    try:
        for one in _json(file)["images"]:
            if one["split"] in wanted:
                inside = folder / "images" / one.get("filepath", "") / one["filename"]
                path = inside if inside.exists() else folder / one.get("filepath", "") / one["filename"]
                yield path, [str(sentence["raw"]).strip() for sentence in one["sentences"]]
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{file} is no file of Karpathy's splits ({error!r} is missing): name another") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read ({error}): put the published file there") from None


def image(path: Path, size: int) -> Images:
    """The middle square of a picture, [3, size, size] bytes. TrainingError where it cannot be read."""
    try:
        from PIL import Image
    except ImportError:
        raise TrainingError("pictures are read with Pillow: install it with pip install 'forerun[images]'") from None
    try:
        with Image.open(path) as opened:
            side = min(opened.size)
            left, top = ((length - side) // 2 for length in opened.size)
            square = opened.convert("RGB").resize((size, size), box=(left, top, left + side, top + side))
    except OSError as error:
        raise TrainingError(f"{path} cannot be read as a picture ({error}): put the published file there") from None
    return np.asarray(square, np.uint8).transpose(2, 0, 1)


def cifar100(folder: Path, split: str, most: int = 0) -> Labelled:
    """The Python version: files `train` and `test`, of images in rows and their fine labels."""
    path = folder / split
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="bytes").load()
        rows, labels = np.asarray(content[b"data"], np.uint8), np.asarray(content[b"fine_labels"], np.int64)
        images = rows.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE)
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise TrainingError(
            f"{path} cannot be read as CIFAR-100 ({error}): put the files of its Python version there"
        ) from None
    return Labelled(images[: most or None], labels[: most or None], 100)


class _Arrays(pickle.Unpickler):
    """Reads arrays alone: a pickle may otherwise run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, and only arrays are read")


def ag_news(folder: Path, split: str, most: int = 0) -> Labelled:
    """train.csv and test.csv: class from 1, title, description."""
    path = folder / f"{split}.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
        labels = np.array([int(row[0]) for row in rows], np.int64) - 1
        texts = [" ".join(row[1:]).replace("\\", " ") for row in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise TrainingError(f"{path} cannot be read as AG News ({error}): put the published file there") from None
    if not len(labels) or not ((labels >= 0) & (labels < AG_CLASSES)).all() or min(map(len, rows)) < 2:
        raise TrainingError(
            f"{path} is not AG News: its rows are a class from 1 to {AG_CLASSES}, a title, a description"
        )
    return _mixed(texts, labels, AG_CLASSES, most)


def _mixed(texts: Sequence[str], labels: np.ndarray, classes: int, most: int) -> Labelled:
    """So many of them, at random, but the same every time: a file may have its classes in order."""
    if not most or most >= len(labels):
        return Labelled(texts, labels, classes)
    chosen = np.sort(np.random.default_rng(0).choice(len(labels), most, replace=False))
    return Labelled(texts, labels, classes).part(chosen)
