"""What a head's law costs against the token that came and against the target's law, with its gradient in one go.

    text       -log q(token)
    teacher    -sum p log q                the cross-entropy with the target's law p
    distance   sum |q - p|                 twice the chance that a token drawn from q is rejected

A row of logits is as long as the vocabulary, so every pass over all of them goes through the main memory. Here a few
rows at a time are finished while they are in the cache, and what is kept for the way back is the gradient itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forerun.drafting.trained import Weights

IN_CACHE = 1 << 18
"""Logits that are worked on at a time."""


def losses(logits: Tensor, target_logits: Tensor | None, labels: Tensor, weights: Weights) -> Tensor:
    """The weighted sum of the terms of every row, fp32 [R]. logits: [R, V]; target_logits: [R, V], not moved, None
    where no term asks for the target's law; labels: [R]."""
    found: Tensor = _Losses.apply(logits, target_logits, labels, weights)  # type: ignore[no-untyped-call]
    return found


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_logits: Tensor | None, labels: Tensor, weights: Weights) -> Tensor:
        found = logits.new_empty(len(logits), dtype=torch.float32)
        slopes = torch.empty_like(logits)
        rows = max(1, IN_CACHE // logits.shape[1])
        for begin in range(0, len(logits), rows):
            part = slice(begin, begin + rows)
            theirs = None if target_logits is None else target_logits[part]
            found[part], slopes[part] = _of_some(logits[part], theirs, labels[part], weights)
        ctx.save_for_backward(slopes)
        return found

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * upstream[0].to(slopes.dtype)[:, None], None, None, None


def _of_some(logits: Tensor, theirs: Tensor | None, labels: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """Losses [R] and their gradients [R, V]."""
    log_probs = logits.float().log_softmax(-1)
    probs, own = log_probs.exp(), labels[:, None]
    loss = -weights.text * log_probs.gather(1, own)[:, 0]
    slope = probs * (weights.text + weights.teacher)
    slope.scatter_add_(1, own, slope.new_full(own.shape, -weights.text))
    if theirs is not None:
        target_probs = theirs.float().softmax(-1)
        loss -= weights.teacher * torch.linalg.vecdot(target_probs, log_probs)
        slope -= weights.teacher * target_probs
        if weights.distance:
            apart = probs - target_probs
            loss += weights.distance * apart.abs().sum(-1)
            signs = apart.sign_()
            slope += weights.distance * probs * (signs - torch.linalg.vecdot(probs, signs)[:, None])
    return loss, slope
