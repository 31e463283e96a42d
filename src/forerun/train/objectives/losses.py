"""What a head's law costs against the token that came and against the target's law, with its gradient in one go.

    text       -log q(token)
    teacher    -sum p log q                the cross-entropy with the target's law p
    distance   sum |q - p|                 twice the chance that a token drawn from q is rejected
    lk         l KL(p || q) + (1 - l) sum |q - p| / 2,  l = exp(-lk * sum min(p, q))
                                           far from the target like the divergence, close to it like the distance; l is
                                           no path of the gradient (LK, second-hand: block.md, section 3)

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


def losses(logits: Tensor, target_logits: Tensor | None, labels: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """The weighted sum of the terms of every row, fp32 [R], and log q(token), [R], which moves nothing.

    logits: [R, V]; target_logits: [R, V], not moved, None where no term asks for the target's law; labels: [R].
    """
    found: tuple[Tensor, Tensor] = _Losses.apply(logits, target_logits, labels, weights)  # type: ignore[no-untyped-call]
    return found


def paced(log_probs_KP: Tensor, valid_KP: Tensor) -> Tensor:
    """How much each head counts at each place, [K, P]: as far as the ones before it are likely to be right (D-PACE).

    w_j = sum over m >= j of the product of q_i for i <= m, where q_i is the probability of the token, halfway to 1.
    """
    likely = (0.5 * log_probs_KP.exp() + 0.5) * valid_KP
    return likely.cumprod(0).flip(0).cumsum(0).flip(0)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target_logits: Tensor | None, labels: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        found, said = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
        slopes = torch.empty_like(logits)
        rows = max(1, IN_CACHE // logits.shape[1])
        for begin in range(0, len(logits), rows):
            part = slice(begin, begin + rows)
            theirs = None if target_logits is None else target_logits[part].float().softmax(-1)
            found[part], said[part], slopes[part] = _of_some(logits[part], theirs, labels[part], weights)
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(said)
        return found, said

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * upstream[0].to(slopes.dtype)[:, None], None, None, None


def _of_some(
    logits: Tensor, target_probs: Tensor | None, labels: Tensor, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [R], the tokens' log-probabilities [R], and the gradient of the losses [R, V]."""
    log_probs = logits.float().log_softmax(-1)
    probs, own = log_probs.exp(), labels[:, None]
    said = log_probs.gather(1, own)[:, 0]
    loss, slope = -weights.text * said, probs * weights.text
    slope.scatter_add_(1, own, slope.new_full(own.shape, -weights.text))
    if target_probs is None:
        return loss, said, slope
    apart = probs - target_probs
    teacher, distance = (loss.new_full(loss.shape, one) for one in (weights.teacher, weights.distance))
    far = apart.abs().sum(-1)
    if weights.lk:
        mix = (-weights.lk * (1 - far / 2)).exp()
        teacher, distance = teacher + mix, distance + (1 - mix) / 2
        loss = loss + mix * torch.special.xlogy(target_probs, target_probs).sum(-1)  # a divergence, not a cross-entropy
    loss = loss - teacher * torch.linalg.vecdot(target_probs, log_probs) + distance * far
    slope += teacher[:, None] * apart
    signs = apart.sign_()
    slope += distance[:, None] * probs * (signs - torch.linalg.vecdot(probs, signs)[:, None])
    return loss, said, slope
