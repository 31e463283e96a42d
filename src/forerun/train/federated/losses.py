"""What clients and server of CreamFL minimise. Rows are unit vectors of width D; B are a batch, P the public set.

A client's own representation of item k is z, its representation by the model as the round began is o; the server's are
g (the same modality) and h (the other one). No gradient reaches g, h or o.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

KD_LOSSES = ("mse", "l2")
MARGIN = 4.0
"""What an example's own logit is lowered by in `margin_loss`."""
ORTHOGONAL = 0.5
"""The weight of the classes' independence in `margin_loss`."""


def inter_modal_loss(z_BD: Tensor, h_PD: Tensor, index_B: Tensor, tau: float = 0.5) -> Tensor:
    """How far each row is from telling its partner of the other modality, `h_PD[index_B]`, from all others."""
    return F.cross_entropy(z_BD @ h_PD.detach().T / tau, index_B)


def intra_modal_loss(z_BD: Tensor, g_BD: Tensor, o_BD: Tensor, tau: float = 0.5) -> Tensor:
    """How far each row is from the consensus, seen from where the client was when the round began. ln 2: as far."""
    logits_B2 = torch.stack([(z_BD * g_BD.detach()).sum(-1), (z_BD * o_BD.detach()).sum(-1)], -1) / tau
    return -logits_B2.log_softmax(-1)[:, 0].mean()


def pair_losses(x_BD: Tensor, y_BD: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """Of every pair, [B, B]: -log of the probability that it matches where it does (the diagonal), else that it does
    not. s = b - a * distance, and the probability is e^s / (e^s + e^-s)."""
    squares_BB = (x_BD[:, None] - y_BD[None]).square().sum(-1)
    s_BB = b - a * (squares_BB + 1e-6).sqrt()
    sign_BB = 1 - 2 * torch.eye(len(x_BD), len(y_BD), dtype=s_BB.dtype, device=s_BB.device)
    return F.softplus(2 * sign_BB * s_BB)


def soft_contrastive_loss(x_BD: Tensor, y_BD: Tensor, a: Tensor | float = 15.0, b: Tensor | float = 15.0) -> Tensor:
    """The sum (not the mean) over all pairs, once from x to y and once from y to x, which is the same again."""
    return 2 * pair_losses(x_BD, y_BD, a, b).sum()


def margin_loss(logits_BC: Tensor, labels_B: Tensor, weight_CD: Tensor) -> Tensor:
    """Cross-entropy with a margin, and classes that are to be independent of each other. weight_CD: of the classes, not
    negative."""
    own_BC = F.one_hot(labels_B, logits_BC.shape[-1])
    classes_C = torch.arange(len(weight_CD), device=weight_CD.device)
    independence = F.cross_entropy(weight_CD @ weight_CD.T, classes_C)
    return F.cross_entropy(logits_BC - MARGIN * own_BC, labels_B) + ORTHOGONAL * independence


def kd_loss(out_BD: Tensor, target_BD: Tensor, kind: str = "mse") -> Tensor:
    """How far the server is from the aggregate. "mse": the mean over all entries, as in the authors' code; "l2": the
    mean distance, as in the paper, which is a number about D times as large."""
    difference_BD = out_BD - target_BD.detach()
    if kind == "mse":
        return difference_BD.square().mean()
    if kind == "l2":
        distance_B: Tensor = difference_BD.norm(dim=-1)
        return distance_B.mean()
    raise ValueError(f"there is no kd_loss {kind!r}: choose one of {', '.join(KD_LOSSES)}")


def contrast(
    z: Mapping[str, Tensor],
    g_all: Mapping[str, Tensor],
    o: Mapping[str, Tensor],
    index_B: Tensor,
    terms: tuple[bool, bool],
    tau: float = 0.5,
) -> Tensor:
    """Both contrasts of a client, over the modalities it has. g_all: the server's rows of the whole set, by modality;
    index_B: which of them the batch is. terms: whether inter and intra count.

    Inter is summed over modalities; intra is the mean over the rows of all of them.
    """
    total = torch.zeros(())
    if terms[0]:
        for name, rows_BD in z.items():
            for other in g_all.keys() - {name}:
                total = total + inter_modal_loss(rows_BD, g_all[other], index_B, tau)
    if terms[1]:
        own = {name: g_all[name][index_B] for name in z}
        z_BD, g_BD, o_BD = (torch.cat([rows[name] for name in z]) for rows in (z, own, o))
        total = total + intra_modal_loss(z_BD, g_BD, o_BD, tau)
    return total
