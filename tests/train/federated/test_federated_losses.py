"""The objectives of CreamFL, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from forerun.train.federated.aggregation import gca_aggregate, gca_scores, gca_weights
from forerun.train.federated.losses import (
    contrast,
    inter_modal_loss,
    intra_modal_loss,
    kd_loss,
    margin_loss,
    pair_losses,
    soft_contrastive_loss,
)

Z = torch.tensor([[0.8, 0.6]])
O = torch.tensor([[0.6, 0.8]])  # noqa: E741
FIRST = torch.tensor([0])


def test_intra_by_hand() -> None:
    assert intra_modal_loss(Z, torch.eye(2)[:1], O, 0.5).item() == pytest.approx(0.865893, abs=1e-6)


def test_inter_by_hand() -> None:
    assert inter_modal_loss(Z, torch.eye(2), FIRST, 0.5).item() == pytest.approx(0.513015, abs=1e-6)


def test_both_weighted_by_hand() -> None:
    both = contrast({"image": Z}, {"image": torch.eye(2), "text": torch.eye(2)}, {"image": O}, FIRST, (True, True), 0.5)
    assert 0.5 * both.item() == pytest.approx(0.689454, abs=1e-6)


def test_a_client_of_both_modalities_sums_inter_and_averages_intra() -> None:
    z, o = {"image": Z, "text": O}, {"image": O, "text": Z}
    both = {"image": torch.eye(2), "text": torch.eye(2)}
    inter = inter_modal_loss(Z, torch.eye(2), FIRST) + inter_modal_loss(O, torch.eye(2), FIRST)
    intra = (intra_modal_loss(Z, torch.eye(2)[:1], O) + intra_modal_loss(O, torch.eye(2)[:1], Z)) / 2
    assert torch.allclose(contrast(z, both, o, FIRST, (True, False)), inter)
    assert torch.allclose(contrast(z, both, o, FIRST, (False, True)), intra)


def test_intra_is_ln_2_where_both_are_as_near() -> None:
    assert intra_modal_loss(Z, O, O).item() == pytest.approx(math.log(2))


def test_no_gradient_reaches_what_others_said() -> None:
    z, g, h, o = (torch.eye(2).clone().requires_grad_() for _ in range(4))
    (intra_modal_loss(z, g, o) + inter_modal_loss(z, h, torch.arange(2)) + kd_loss(z, g)).backward()
    assert z.grad is not None and z.grad.abs().sum() > 0
    assert g.grad is None and h.grad is None and o.grad is None


@pytest.mark.parametrize(
    ("square", "is_matched", "loss"), [(0.4, True, 1.6e-5), (0.4, False, 11.0263), (2.0, False, 4.0e-6)]
)
def test_soft_contrastive_pairs_by_hand(square: float, is_matched: bool, loss: float) -> None:
    x, y = torch.zeros(2, 1), torch.tensor([[square**0.5], [square**0.5]])
    assert pair_losses(x, y, 15, 15)[0, 0 if is_matched else 1].item() == pytest.approx(loss, rel=0.03)


@pytest.mark.parametrize("column", [0, 1])
def test_a_distance_of_one_is_where_soft_contrast_decides(column: int) -> None:
    assert pair_losses(torch.zeros(2, 1), torch.ones(2, 1), 15, 15)[0, column].item() == pytest.approx(0.6931, abs=1e-4)


def test_soft_contrastive_is_the_sum_of_both_directions() -> None:
    x, y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    there, back = pair_losses(x, y, 15, 15).sum(), pair_losses(y, x, 15, 15).sum()
    assert torch.allclose(soft_contrastive_loss(x, y), there + back)


@pytest.mark.parametrize(("kind", "loss"), [("mse", 0.153214), ("l2", 0.553560)])
def test_distillation_by_hand(kind: str, loss: float) -> None:
    server = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    clients = torch.stack([torch.eye(2), server])
    aggregate = gca_aggregate(clients, gca_weights(torch.stack([gca_scores(z, torch.eye(2)) for z in clients])))
    assert kd_loss(server, aggregate, kind).item() == pytest.approx(loss, abs=1e-6)


def test_an_unknown_distillation_is_refused() -> None:
    with pytest.raises(ValueError, match="mse, l2"):
        kd_loss(Z, O, "l3")


def test_the_margin_asks_for_more_than_the_right_class() -> None:
    weight, labels = 9 * torch.eye(2), torch.tensor([0])

    def loss(lead: float) -> Tensor:
        return margin_loss(torch.tensor([[lead, 0.0]]), labels, weight)

    assert loss(4.0).item() == pytest.approx(math.log(2), abs=1e-4), "a lead of four is a draw"
    assert margin_loss(torch.tensor([[4.0, 0.0]]), labels, torch.ones(2, 2)) > loss(4.0) + 0.3, "classes alike cost"
