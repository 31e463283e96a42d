"""How often the right partner is among the first k that are found, from images to texts and back.

Recalls are shares in functions, and percent in `figures`, as the field's tables have them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KS = (1, 5, 10)
BLOCK = 1024


def ranks(q_QD: Tensor, g_GD: Tensor, q_ids_Q: Tensor, g_ids_G: Tensor) -> Tensor:
    """Where the first item of a query's own id stands among all by similarity, [Q] from 1. Of what is equally similar
    the others come first: a model that finds everything alike finds nothing. A query without a partner: G + 1."""
    found = []
    for start in range(0, len(q_QD), BLOCK):
        similar_XG = q_QD[start : start + BLOCK] @ g_GD.T
        is_own_XG = q_ids_Q[start : start + BLOCK, None] == g_ids_G
        best_X1 = similar_XG.masked_fill(~is_own_XG, -torch.inf).amax(-1, keepdim=True)
        found.append(1 + ((similar_XG >= best_X1) & ~is_own_XG).sum(-1))
        found[-1][~is_own_XG.any(-1)] = len(g_GD) + 1
    return torch.cat(found)


def recall_at_k(
    q_QD: Tensor, g_GD: Tensor, q_ids_Q: Tensor, g_ids_G: Tensor, ks: Sequence[int] = KS
) -> dict[int, float]:
    """For every k the share of queries that have an item of their own id among the k most similar."""
    rank_Q = ranks(q_QD, g_GD, q_ids_Q, g_ids_G)
    return {k: float((rank_Q <= k).double().mean()) for k in ks}


def figures(images_ID: Tensor, texts_TD: Tensor, image_of_T: Tensor, folds: int = 5) -> dict[str, float]:
    """Percent of both directions: i2t_r1, t2i_r5 and so on over all images, i2t_r1_fold and t2i_r1_fold as the mean of
    so many folds of images with their texts, and r1_sum, the sum of all four R@1. image_of_T: the image of each text.

    The field's "5K" is all, its "1K" five folds. 1 fold: the folds are all, which then counts twice in r1_sum.
    """
    image_I = torch.arange(len(images_ID))
    found = _both(images_ID, texts_TD, image_I, image_of_T, KS)
    parts = [part for part in image_I.tensor_split(min(folds, len(images_ID))) if len(part)]
    in_parts = []
    for part in parts:
        of_part = torch.isin(image_of_T, part)
        in_parts.append(_both(images_ID[part], texts_TD[of_part], part, image_of_T[of_part], (1,)))
    for name in ("i2t_r1", "t2i_r1"):
        found[f"{name}_fold"] = sum(one[name] for one in in_parts) / len(in_parts)
    found["r1_sum"] = sum(found[name] for name in ("i2t_r1_fold", "t2i_r1_fold", "i2t_r1", "t2i_r1"))
    return found


def _both(
    images_ID: Tensor, texts_TD: Tensor, image_I: Tensor, image_of_T: Tensor, ks: Sequence[int]
) -> dict[str, float]:
    i2t = recall_at_k(images_ID, texts_TD, image_I, image_of_T, ks)
    t2i = recall_at_k(texts_TD, images_ID, image_of_T, image_I, ks)
    return {f"{way}_r{k}": 100 * one[k] for way, one in (("i2t", i2t), ("t2i", t2i)) for k in ks}
