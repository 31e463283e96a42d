"""The losses of heads against the definitions, whose gradients autograd finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drafters.heading import noise
from forerun.drafting.trained import Weights
from forerun.train.objectives import losses as module
from forerun.train.objectives.losses import losses, paced

KINDS = {
    "text": Weights(),
    "teacher": Weights(text=0.0, teacher=1.0),
    "distance": Weights(text=0.0, distance=1.0),
    "lk": Weights(text=0.0, lk=3.0),
    "all": Weights(text=0.3, teacher=0.2, distance=0.9, lk=10.0),
}
ROWS, VOCAB = 7, 30


def slow(logits: Tensor, target_logits: Tensor, labels: Tensor, weights: Weights) -> Tensor:
    """Row by row, as the module's text has it."""
    rows = []
    for ours, theirs, label in zip(logits, target_logits, labels, strict=True):
        q, p = ours.softmax(-1), theirs.softmax(-1)
        terms = -weights.text * q[label].log() - weights.teacher * (p * q.log()).sum()
        terms = terms + weights.distance * (q - p).abs().sum()
        if weights.lk:
            mix = (-weights.lk * torch.minimum(p, q).sum()).exp().detach()
            terms = terms + mix * (p * (p / q).log()).sum() + (1 - mix) * (q - p).abs().sum() / 2
        rows.append(terms)
    return torch.stack(rows)


@pytest.mark.parametrize("weights", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("closeness", [0.0, 0.9], ids=["far", "close"])
def test_losses_and_gradients_are_those_of_the_definition(
    weights: Weights, closeness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are worked on at a time."""
    monkeypatch.setattr(module, "IN_CACHE", 3 * VOCAB)
    theirs = noise(ROWS, VOCAB, seed=1).double() * 2
    ours = (closeness * theirs + noise(ROWS, VOCAB, seed=2)).requires_grad_()
    labels, upstream = torch.arange(ROWS), noise(ROWS, seed=3).double()
    found, said = losses(ours, theirs, labels, weights)
    expected = slow(ours, theirs, labels, weights)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(said.double(), ours.log_softmax(-1)[labels, labels], atol=1e-5, rtol=1e-5)
    (slope,) = torch.autograd.grad((found * upstream).sum(), ours)
    (right,) = torch.autograd.grad((expected * upstream).sum(), ours)
    torch.testing.assert_close(slope, right, atol=1e-5, rtol=1e-4)


def test_without_the_targets_law_the_text_alone_counts() -> None:
    logits, labels = noise(ROWS, VOCAB), torch.arange(ROWS)
    found, said = losses(logits, None, labels, Weights(text=2.0))
    torch.testing.assert_close(found, -2 * said)


def test_a_head_counts_as_far_as_those_before_it_are_likely_to_be_right() -> None:
    """By hand: probabilities 1, 0 and 1 halfway to 1 are 1, 1/2 and 1; the last column ends after two tokens."""
    log_probs = torch.tensor([[0.0, 0.0], [-1e9, 0.0], [0.0, 0.0]])
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    expected = torch.tensor([[1 + 0.5 + 0.5, 1 + 1], [0.5 + 0.5, 1], [0.5, 0]])
    torch.testing.assert_close(paced(log_probs, valid), expected)
