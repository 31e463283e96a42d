"""One representation of every public item from those that clients sent: global-local contrastive aggregation (GCA), and
the plainer ways it is compared with.

C clients, N items, width D. A client need not have sent every item: `sent_CN` says which. No similarity matrix of the
whole set is ever in memory: 50,000 items would need 10 GB for each client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = 1024
WAYS = ("gca", "mean", "variance", "rank")


def gca_scores(
    z_ND: Tensor, other_ND: Tensor, block: int = BLOCK, include_positive: bool = True, tau: float = 1.0
) -> Tensor:
    """How well each row finds its partner among the server's rows of the other modality, [N]: z.t_k / tau less the
    log-sum-exp over all t_j / tau.

    include_positive: j = k is one of them, as in the authors' code; ValueError if it is not and there is no other.
    """
    if not include_positive and len(other_ND) < 2:
        raise ValueError("a public set of one item has no other item to be told from: keep include_positive")

    def scores(start: int, rows_XD: Tensor, own_X: Tensor) -> Tensor:
        total_X = torch.full_like(own_X, -torch.inf)
        for first, logits_XY in _similarities(rows_XD, other_ND, block):
            if not include_positive:
                own_XY = _is_own(start, len(rows_XD), first, logits_XY.shape[1])
                logits_XY = logits_XY.masked_fill(own_XY, -torch.inf * tau)
            total_X = torch.logaddexp(total_X, (logits_XY / tau).logsumexp(-1))
        return own_X / tau - total_X

    return _by_rows(scores, z_ND, other_ND, block)


def gca_weights(scores_CN: Tensor, sent_CN: Tensor | None = None) -> Tensor:
    """Softmax over clients, for every item; 0 for what was not sent, and for an item that nobody sent."""
    if sent_CN is not None:
        scores_CN = scores_CN.masked_fill(~sent_CN, -torch.inf)
    return scores_CN.softmax(0).nan_to_num(0.0)


def gca_aggregate(rows_CND: Tensor, weights_CN: Tensor) -> Tensor:
    """The weighted sum of clients' rows, [N, D]. It is not of unit length again."""
    return torch.einsum("cnd,cn->nd", rows_CND, weights_CN)


def weights_of(
    way: str,
    rows_CND: Tensor,
    sent_CN: Tensor,
    other_ND: Tensor,
    include_positive: bool = True,
    tau: float = 1.0,
    top: int = 10,
) -> Tensor:
    """What each client's rows count, [C, N], in one of the `WAYS`. other_ND: the server's rows of the other modality.

    "gca"; "mean": all alike; "variance": of the row's similarities (FedET's confidence, in our reading); "rank": alike,
    where the partner is among the `top` most similar (FedGEMS' choice, in our reading).
    """
    if way == "gca":
        scores = [gca_scores(z, other_ND, include_positive=include_positive, tau=tau) for z in rows_CND]
        return gca_weights(torch.stack(scores), sent_CN)
    measures: dict[str, Callable[[Tensor], Tensor]] = {
        "mean": lambda z_ND: torch.ones(len(z_ND)),
        "variance": lambda z_ND: similarity_variance(z_ND, other_ND),
        "rank": lambda z_ND: (partner_ranks(z_ND, other_ND) <= top).float(),
    }
    share_CN = torch.stack([measures[way](z) for z in rows_CND]) * sent_CN
    return share_CN / share_CN.sum(0).clamp_min(torch.finfo(share_CN.dtype).tiny)


def similarity_variance(z_ND: Tensor, other_ND: Tensor, block: int = BLOCK) -> Tensor:
    """Of each row's similarities to all of the other modality, [N]: a row that is sure has few that are high."""

    def variance(start: int, rows_XD: Tensor, own_X: Tensor) -> Tensor:
        sums = torch.zeros(2, len(rows_XD), dtype=torch.float64)
        for _, logits_XY in _similarities(rows_XD, other_ND, block):
            sums += torch.stack([logits_XY.sum(-1), logits_XY.square().sum(-1)])
        mean_X, square_X = sums / len(other_ND)
        variance_X: Tensor = (square_X - mean_X.square()).clamp_min(0)
        return variance_X.to(own_X.dtype)

    return _by_rows(variance, z_ND, other_ND, block)


def partner_ranks(z_ND: Tensor, other_ND: Tensor, block: int = BLOCK) -> Tensor:
    """Where each row's partner stands among all of the other modality, [N] from 1; of equals it is the last."""

    def rank(start: int, rows_XD: Tensor, own_X: Tensor) -> Tensor:
        before_X = torch.zeros_like(own_X)
        for first, logits_XY in _similarities(rows_XD, other_ND, block):
            is_own_XY = _is_own(start, len(rows_XD), first, logits_XY.shape[1])
            before_X += ((logits_XY >= own_X[:, None]) & ~is_own_XY).sum(-1)
        return 1 + before_X

    return _by_rows(rank, z_ND, other_ND, block)


def _by_rows(of: Callable[[int, Tensor, Tensor], Tensor], z_ND: Tensor, other_ND: Tensor, block: int) -> Tensor:
    """`of` the first row's number, a block of rows, and their similarities to their partners."""
    blocks = [(start, z_ND[start : start + block], other_ND[start : start + block]) for start in _starts(z_ND, block)]
    return torch.cat([of(start, rows_XD, (rows_XD * own_XD).sum(-1)) for start, rows_XD, own_XD in blocks])


def _similarities(rows_XD: Tensor, other_ND: Tensor, block: int) -> Iterator[tuple[int, Tensor]]:
    """The number of the first column, and so many columns of the similarities, block by block."""
    return ((first, rows_XD @ other_ND[first : first + block].T) for first in _starts(other_ND, block))


def _starts(rows_ND: Tensor, block: int) -> range:
    return range(0, len(rows_ND), block)


def _is_own(start: int, rows: int, first: int, columns: int) -> Tensor:
    """Which similarities of a block are those of partners."""
    return torch.arange(start, start + rows)[:, None] == torch.arange(first, first + columns)
