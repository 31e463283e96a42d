"""Data: what is drawn, what is read in its published layout, and who gets which."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parties import world

from forerun.errors import TrainingError
from forerun.train.federated import shapes
from forerun.train.federated.folders import ag_news, captioned, cifar100
from forerun.train.federated.networks import split as words_of
from forerun.train.federated.tasks import Labelled, Pairs
from forerun.train.federated.world import Folders, Shares, drawn, of_digits, of_folders, split

Image = pytest.importorskip("PIL.Image")


# ---- shapes and captions


def test_the_same_seed_draws_the_same() -> None:
    one, other, third = (drawn(6, 3, 4, 4, seed) for seed in (0, 0, 1))
    assert one.public.version == other.public.version != third.public.version
    assert one.test.texts == other.test.texts and np.array_equal(one.pairs.images, other.pairs.images)


def test_five_ways_and_a_small_vocabulary() -> None:
    rng = np.random.default_rng(0)
    scene = shapes.scenes(1, rng)[0]
    assert len({shapes.caption(scene, way, rng) for way in range(5)}) == 5
    seen = shapes.scenes(400, rng)
    vocabulary = {word for n, one in enumerate(seen) for word in words_of(shapes.caption(one, n % 5, rng))}
    assert 50 < len(vocabulary) < 90


def test_pictures_show_what_their_scene_says() -> None:
    def shown(**given: int) -> np.ndarray:
        scene = shapes.Scene(**({"shape": 1, "colour": 0, "size": 1, "position": 0, "texture": 0} | given))
        return shapes.draw(scene, np.random.default_rng(0)).astype(float)

    red = shown()
    assert red[0, :16, :16].mean() > red[1, :16, :16].mean() + 20, "red, top left"
    assert abs(red[0, 16:, 16:].mean() - shapes.GROUND) < 3, "and nothing else"
    assert shown(position=3)[0, 16:, 16:].mean() > shapes.GROUND + 20
    assert shown(size=0)[0].mean() < red[0].mean() < shown(texture=1)[0].mean()
    different = [shown(shape=shape) for shape in range(len(shapes.SHAPES))]
    gaps = [abs(a - b).max() for n, a in enumerate(different) for b in different[:n]]
    assert min(gaps) > 100


def test_clients_have_what_the_public_set_lacks() -> None:
    known = {word for text in world().public.texts for word in words_of(text)}
    private = {word for text in world().texts[0].items for word in words_of(text)}
    assert {"painted", "kind"} & private and not {"painted", "kind"} & known
    assert len(world().test.texts) == 5 * len(world().test.images)


def test_everything_is_given_out_once() -> None:
    parts = split(world(), {"image": 2, "text": 2, "both": 2}, Shares(alpha=1.0, least=4, shards=2), 0)
    assert list(parts) == ["image0", "image1", "text0", "text1", "both0", "both1"]
    sizes = [len(part.texts) if isinstance(part, Pairs) else len(part.labels) for part in parts.values()]
    assert sum(sizes[:2]) == sum(sizes[2:4]) == sum(sizes[4:]) == 24
    capped = split(world(), {"image": 2, "text": 0, "both": 2}, Shares(alpha=1.0, least=4, shards=2, most=5), 0)
    sizes = [len(part.texts) if isinstance(part, Pairs) else len(part.labels) for part in capped.values()]
    assert max(sizes) <= 5
    with pytest.raises(TrainingError, match="no clients"):
        split(world(), {"image": 0, "text": 0, "both": 0}, Shares(), 0)


# ---- published layouts


def picture(path: Path, colour: int, shape: tuple[int, int] = (12, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", shape, (colour, 0, 0)).save(path)


def coco(folder: Path, part: str = "train", count: int = 6) -> Path:
    images = [{"id": 10 - n, "file_name": f"{n}.png"} for n in range(count)]
    for n in range(count):
        picture(folder / f"{part}2017" / f"{n}.png", 20 * n)
    annotations = [{"image_id": 10 - n % count, "caption": f" caption {n % count} {n} "} for n in range(2 * count)]
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations}
    (folder / "annotations" / f"captions_{part}2017.json").write_text(json.dumps(content))
    return folder


def flickr(folder: Path) -> Path:
    images = []
    for n, part in enumerate(["train", "test", "restval", "val"]):
        picture(folder / "images" / f"{n}.jpg", 60 * n)
        sentences = [{"raw": f"sentence {n} {k}"} for k in range(5)]
        images.append({"filename": f"{n}.jpg", "split": part, "sentences": sentences})
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    return folder


def cifar(folder: Path, count: int = 12, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    data = np.arange(count * 3072, dtype=np.uint32).astype(np.uint8).reshape(count, 3072)
    content: Mapping[bytes, Any] = {b"data": data, b"fine_labels": [n % 3 for n in range(count)], b"filenames": [b"x"]}
    for part in ("train", "test"):
        (folder / part).write_bytes(pickle.dumps({**content, **{name.encode(): value for name, value in more.items()}}))
    return folder


def news(folder: Path, rows: list[list[str]] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for part in ("train", "test"):
        with (folder / f"{part}.csv").open("w", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows(rows or [[str(1 + n % 4), f"title {n}", f'it said "{n}"\\nand more'] for n in range(12)])
    return folder


def test_coco(tmp_path: Path) -> None:
    found = captioned(coco(tmp_path), "train", 4, most=2)
    assert found.images.shape == (2, 3, 4, 4) and found.images[0, 0, 0, 0] == 100, "by number: 5 is the file of id 5"
    assert found.texts == ["caption 5 5", "caption 5 11", "caption 4 4", "caption 4 10"]
    assert found.image_of.tolist() == [0, 0, 1, 1]


def test_flickr30k(tmp_path: Path) -> None:
    found = captioned(flickr(tmp_path), "train", 4)
    assert len(found.images) == 2 and found.texts[5] == "sentence 2 0" and found.image_of.tolist() == [0] * 5 + [1] * 5
    assert len(captioned(tmp_path, "test", 4).images) == 1


def test_cifar100(tmp_path: Path) -> None:
    found = cifar100(cifar(tmp_path / "c"), "train", most=5)
    assert found.items.shape == (5, 3, 32, 32) and found.labels.tolist() == [0, 1, 2, 0, 1] and found.classes == 100
    assert found.items[0, 1, 0, 0] == 1024 % 256 and found.items[0, 0, 1, 0] == 32


def test_ag_news(tmp_path: Path) -> None:
    found = ag_news(news(tmp_path / "n"), "train")
    assert found.labels.tolist() == [0, 1, 2, 3] * 3 and found.items[2] == 'title 2 it said "2" nand more'
    some = ag_news(tmp_path / "n", "train", most=5)
    assert len(some.labels) == 5 and all(
        some.labels[n] == int(text.split()[1]) % 4 for n, text in enumerate(some.items)
    )


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"pathlib\S*Path, and only arrays"):
        cifar100(cifar(tmp_path / "c", fine=Path("x")), "train")


@pytest.mark.parametrize(
    ("read", "sentence"),
    [
        (lambda folder: captioned(folder, "train", 4), "COCO.*Karpathy"),
        (lambda folder: cifar100(folder, "train"), "Python version"),
        (lambda folder: ag_news(folder, "train"), "AG News"),
        (lambda folder: ag_news(news(folder / "n", [["5", "a", "b"]]), "train"), "class from 1 to 4"),
        (lambda folder: captioned(coco(folder, count=0), "train", 4), "no train images"),
    ],
)
def test_what_is_not_there_or_something_else_is_said(read: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=sentence):
        read(tmp_path)


def test_a_missing_picture_is_said(tmp_path: Path) -> None:
    (coco(tmp_path) / "train2017" / "3.png").unlink()
    with pytest.raises(TrainingError, match=r"3\.png cannot be read as a picture"):
        captioned(tmp_path, "train", 4)


@pytest.mark.parametrize("private", [True, False])
def test_a_world_of_folders(private: bool, tmp_path: Path) -> None:
    coco(tmp_path / "pairs"), coco(tmp_path / "pairs", "val", 2)
    other = flickr(tmp_path / "flickr") if private else None
    folders = Folders(tmp_path / "pairs", other, cifar(tmp_path / "c"), news(tmp_path / "n"), 4)
    found = of_folders(folders, 4, 0, 0, 0 if private else 2, 0)
    assert len(found.public.ids) == 4 and len(found.test.images) == 2 and len(found.test.texts) == 4
    assert len(found.pairs.images) == 2 and found.images[0].classes == 100 and found.texts[1].classes == 4
    captions = {f"caption {n}" for n in (5, 4, 3, 2)}
    assert {text.rpartition(" ")[0] for text in found.public.texts} == captions, "one of each image"
    if not private:
        assert {text.rpartition(" ")[0] for text in found.pairs.texts} == {"caption 1", "caption 0"}


def test_digits_are_captioned_by_rule() -> None:
    pytest.importorskip("sklearn")
    found = of_digits(40, 20, 30, 24, 0)
    assert found.public.images.shape == (40, 3, 32, 32) and len(found.test.texts) == 100
    images, texts = found.images[0], found.texts[0]
    assert isinstance(images, Labelled) and images.classes == texts.classes == 10
    from forerun.train.federated.digits import NAMES

    assert all(NAMES[label] in text for text, label in zip(texts.items, texts.labels, strict=True))
    with pytest.raises(TrainingError, match="1797 digits"):
        of_digits(1000, 400, 400, 0, 0)
