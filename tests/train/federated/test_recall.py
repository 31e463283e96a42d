"""Recall in both directions, several texts per image, and the sum that papers report."""

from __future__ import annotations

import pytest
import torch

from forerun.train.federated.recall import figures, recall_at_k

IMAGES = torch.eye(2)
TEXTS = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
IMAGE_OF = torch.tensor([0, 0, 1])  # the second text describes the first image, and looks like the second


def test_r1_sum_is_the_sum_of_its_four_terms() -> None:
    found = figures(IMAGES, TEXTS, IMAGE_OF, folds=2)
    assert (found["i2t_r1"], found["t2i_r1"]) == pytest.approx((100, 200 / 3))
    assert (found["i2t_r1_fold"], found["t2i_r1_fold"]) == (100, 100), "in folds of one image nothing is confused"
    assert found["r1_sum"] == pytest.approx(100 + 200 / 3 + 100 + 100)


def test_any_text_of_the_image_counts() -> None:
    far = torch.tensor([[0.9, 0.1], [0.6, 0.8], [0.0, 1.0]])
    assert recall_at_k(IMAGES, far, torch.arange(2), IMAGE_OF, (1, 2)) == {1: 1.0, 2: 1.0}
    wrong = torch.tensor([[0.0, 1.0], [0.1, 0.9], [1.0, 0.0]])
    assert recall_at_k(IMAGES, wrong, torch.arange(2), IMAGE_OF, (1, 2, 3)) == {1: 0.0, 2: 0.5, 3: 1.0}


def test_who_finds_everything_alike_finds_nothing() -> None:
    alike = torch.ones(4, 2)
    assert recall_at_k(alike, alike, torch.arange(4), torch.arange(4), (1, 4)) == {1: 0.0, 4: 1.0}


def test_a_query_without_a_partner_is_a_miss() -> None:
    assert recall_at_k(IMAGES, IMAGES, torch.tensor([7, 1]), torch.arange(2), (1, 2)) == {1: 0.5, 2: 0.5}


def test_folds_are_easier_than_all() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 4, generator=generator)
    texts = images.repeat_interleave(5, 0) + 0.7 * torch.randn(200, 4, generator=generator)
    found = figures(images, texts, torch.arange(40).repeat_interleave(5), folds=5)
    assert found["i2t_r1_fold"] > found["i2t_r1"] and found["t2i_r1_fold"] > found["t2i_r1"]
    assert found["i2t_r1"] <= found["i2t_r5"] <= found["i2t_r10"]
