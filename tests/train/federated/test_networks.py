"""Encoders, words, and what parties learn on their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from forerun.errors import CheckpointError, TrainingError
from forerun.train.federated.networks import BUCKETS, Towers, Words, encoder
from forerun.train.federated.tasks import Classify, Labelled, Pairs, Retrieve

WORDS = Words(["red", "green"])
BOTH = {"image": "conv:4x8", "text": "gru:6"}


def pictures(count: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def test_words_that_are_not_public_share_buckets() -> None:
    rows = WORDS.encode(["Red, green!", "a RED thing", ""])
    assert rows.shape == (3, 3) and rows[0].tolist() == [1, 2, 0] and rows[2].tolist() == [0, 0, 0]
    assert rows[1, 1] == 1 and 3 <= rows[1, 0] < len(WORDS) == 3 + BUCKETS
    assert Words.of(["b a", "a c"], most=2).known == ("a", "b")


@pytest.mark.parametrize("architecture", ["conv:4", "conv:4x8x8", "gru:6", "bag:6"])
def test_a_row_is_the_same_beside_any_others(architecture: str) -> None:
    name = "image" if architecture.startswith("conv") else "text"
    towers = Towers({name: architecture}, 8, WORDS)
    inputs = (
        torch.from_numpy(pictures(5)) if name == "image" else WORDS.encode(["red", "a red one and more", "", "b", "c"])
    )
    rows = towers.embed(name, inputs)
    assert rows.shape == (5, 8) and torch.allclose(rows.norm(dim=-1), torch.ones(5), atol=1e-6)
    alone = inputs[:1] if name == "image" else WORDS.encode(["red"])
    assert torch.allclose(towers.embed(name, alone), rows[:1], atol=1e-6)


def test_order_is_read_by_gru_and_not_by_bag() -> None:
    for architecture, alike in (("gru:6", False), ("bag:6", True)):
        one, other = Towers({"text": architecture}, 8, WORDS).embed_texts(["red green", "green red"])
        assert torch.allclose(one, other, atol=1e-6) == alike


def test_where_a_thing_is_can_be_seen() -> None:
    images = np.zeros((2, 3, 32, 32), np.uint8)
    images[0, :, 4:10, 4:10] = images[1, :, 20:26, 20:26] = 255
    one, other = Towers({"image": "conv:4x8"}, 8, WORDS).embed_images(torch.from_numpy(images))
    assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("word", ["conv", "conv:", "conv:4x", "conv:0", "gru:4x4", "gru:x", "lstm:4"])
def test_what_is_no_architecture_is_refused(word: str) -> None:
    with pytest.raises(TrainingError, match="is no architecture"):
        encoder(word, 8, WORDS)


def test_an_architecture_of_the_other_modality_is_refused() -> None:
    with pytest.raises(TrainingError, match="'gru:4' reads no images"):
        Towers({"image": "gru:4"}, 8, WORDS)


def test_towers_are_the_same_when_read_again(tmp_path: Path) -> None:
    towers = Towers(BOTH, 8, WORDS, seed=3)
    towers.save(tmp_path / "towers")
    again = Towers.load(tmp_path / "towers")
    assert torch.equal(again.embed_texts(["red thing"]), towers.embed_texts(["red thing"]))
    with pytest.raises(CheckpointError, match="holds no towers"):
        Towers.load(tmp_path)


def test_a_seed_is_a_start_and_leaves_other_luck_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    one, other, third = (Towers(BOTH, 8, WORDS, seed).encoders["text"].out.weight for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected) and torch.equal(one, other) and not torch.equal(one, third)


# ---- tasks


def test_labels_stay_with_their_texts_in_any_batch() -> None:
    """The authors' code sorts a batch's texts and not its labels."""
    texts, labels = ["red a b c d", "green", "red x y", "green z"], np.array([0, 1, 0, 1])
    towers = Towers({"text": "bag:6"}, 8, WORDS)
    own = Labelled(texts, labels, 2)
    task = Classify(own, own, towers)
    whole = task.loss(towers, torch.arange(4))
    singles = torch.stack([task.loss(towers, torch.tensor([n])) for n in (3, 1, 0, 2)])
    assert torch.allclose(singles.mean(), whole) and torch.allclose(
        task.loss(towers, torch.tensor([2, 0, 3, 1])), whole
    )


@pytest.mark.parametrize("margin", [False, True])
def test_classes_are_learnt(margin: bool) -> None:
    own = Labelled(["red one", "a green", "red two", "green b"] * 4, np.array([0, 1, 0, 1] * 4), 2)
    towers = Towers({"text": "bag:6"}, 8, WORDS)
    task = Classify(own, own, towers, margin)
    adam = torch.optim.Adam([*towers.parameters(), *task.parameters()], lr=0.02)
    for _ in range(30):
        adam.zero_grad()
        task.loss(towers, torch.arange(16)).backward()
        adam.step()
    assert task.figures(towers)["accuracy"] == 100


def test_pairs_keep_their_partners_in_any_part_and_batch() -> None:
    pairs = Pairs(pictures(3), ["a", "b", "c", "d"], np.array([0, 0, 1, 2]))
    part = pairs.part(np.array([1, 3]))
    assert part.texts == ["b", "d"] and part.image_of.tolist() == [0, 1]
    assert np.array_equal(part.images, pairs.images[[0, 2]])
    towers = Towers(BOTH, 8, WORDS)
    task = Retrieve(pairs, pairs, towers, folds=1)
    one, other = (task.loss(towers, torch.tensor(order)) for order in ([0, 2, 3], [3, 0, 2]))
    assert torch.allclose(one, other) and task.loss(towers, torch.tensor([2])).isfinite()
