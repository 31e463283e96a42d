"""What clients' rows count: by hand, block by block, and against clients that send noise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from forerun.train.federated.aggregation import (
    WAYS,
    gca_aggregate,
    gca_scores,
    gca_weights,
    partner_ranks,
    similarity_variance,
    weights_of,
)

A, B = torch.eye(2), torch.tensor([[0.6, 0.8], [0.8, 0.6]])


def some(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize(
    ("include", "scores", "weight", "row"),
    [(True, (-0.3133, -0.7981), 0.6189, (0.8476, 0.3049)), (False, (1.0, -0.2), 0.7685, (0.9074, 0.1852))],
)
def test_gca_by_hand(include: bool, scores: tuple[float, float], weight: float, row: tuple[float, float]) -> None:
    both = torch.stack([gca_scores(z, torch.eye(2), include_positive=include) for z in (A, B)])
    assert torch.allclose(both, torch.tensor(scores)[:, None].expand(2, 2), atol=1e-4)
    weights = gca_weights(both)
    assert torch.allclose(weights[:, 0], torch.tensor([weight, 1 - weight]), atol=1e-4)
    found = gca_aggregate(torch.stack([A, B]), weights)[0]
    assert torch.allclose(found, torch.tensor(row), atol=1e-4)
    if include:
        assert found.norm().item() == pytest.approx(0.9007, abs=1e-4), "not of unit length again"


@pytest.mark.parametrize(("tau", "weight"), [(0.5, 0.687), (0.07, 0.949)])
def test_a_low_temperature_decides_more(tau: float, weight: float) -> None:
    scores = torch.stack([gca_scores(z, torch.eye(2), tau=tau) for z in (A, B)])
    assert gca_weights(scores)[0, 0].item() == pytest.approx(weight, abs=1e-3)


@pytest.mark.parametrize("block", [1, 7, 30])
@pytest.mark.parametrize("include", [True, False])
def test_blocks_change_nothing(block: int, include: bool) -> None:
    z, other = some(2, 30, 8)
    logits = z @ other.T / 0.5
    dense = logits.masked_fill(torch.eye(30).bool() & (not include), -torch.inf)
    assert torch.allclose(gca_scores(z, other, block, include, 0.5), logits.diagonal() - dense.logsumexp(-1), atol=1e-6)
    plain = z @ other.T
    assert torch.allclose(similarity_variance(z, other, block), plain.var(-1, correction=0), atol=1e-6)
    above = (plain > plain.diagonal()[:, None]).sum(-1)
    assert torch.equal(partner_ranks(z, other, block), 1.0 + above)


def test_one_item_cannot_be_told_from_others() -> None:
    with pytest.raises(ValueError, match="include_positive"):
        gca_scores(some(1, 4), some(1, 4), include_positive=False)


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_any_way_are_shares_of_what_was_sent(way: str) -> None:
    rows, other = some(3, 12, 8), some(12, 8, seed=1)
    sent = torch.ones(3, 12, dtype=torch.bool)
    sent[0, :4], sent[:, 5] = False, False
    weights = weights_of(way, rows, sent, other, top=12)
    total = torch.ones(12)
    total[5] = 0
    assert (weights >= 0).all() and torch.allclose(weights.sum(0), total) and (weights[~sent] == 0).all()
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(weights_of(way, rows[order], sent[order], other, top=12), weights[order])


@pytest.mark.parametrize("way", WAYS)
def test_a_single_client_is_the_aggregate(way: str) -> None:
    rows, sent = some(1, 6, 8), torch.ones(1, 6, dtype=torch.bool)
    weights = weights_of(way, rows, sent, some(6, 8, seed=1), top=6)
    assert torch.allclose(gca_aggregate(rows, weights), rows[0], atol=1e-6)


def test_ranked_out_everywhere_nobody_counts() -> None:
    rows, sent = -some(1, 6, 8), torch.ones(1, 6, dtype=torch.bool)
    assert (weights_of("rank", rows, sent, some(6, 8), top=1) == 0).all()


@pytest.mark.parametrize("kind", ["noise", "swapped"])
def test_a_bad_client_counts_less_and_the_aggregate_is_better_than_the_mean(kind: str) -> None:
    truth = some(60, 16)
    rows = torch.stack([F.normalize(truth + 0.15 * torch.randn(60, 16, generator=g), dim=-1) for g in _generators(4)])
    rows[3] = some(60, 16, seed=9) if kind == "noise" else rows[3].roll(1, 0)
    sent = torch.ones(4, 60, dtype=torch.bool)
    found = {}
    for way in ("gca", "mean"):
        weights = weights_of(way, rows, sent, truth)
        found[way] = F.cosine_similarity(gca_aggregate(rows, weights), truth).mean()
        if way == "gca":
            assert weights[3].mean() < 0.2 < 0.26 < weights[:3].mean()
    assert found["gca"] > found["mean"]


def test_more_noise_counts_less() -> None:
    truth = some(60, 16)
    noise = [0.2, 0.4, 0.6, 0.8]
    rows = [truth + size * torch.randn(60, 16, generator=g) for size, g in zip(noise, _generators(4), strict=True)]
    weights = weights_of("gca", F.normalize(torch.stack(rows), dim=-1), torch.ones(4, 60, dtype=torch.bool), truth)
    mean = weights.mean(1).tolist()
    assert mean == sorted(mean, reverse=True) and mean[0] > 0.3 > 0.21 > mean[3]


def _generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + number) for number in range(count)]
