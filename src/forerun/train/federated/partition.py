"""Who has which samples. All functions give a list with the sorted sample numbers of each client, and the same again
for the same seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forerun.errors import TrainingError

Numbers = NDArray[np.int64]
TRIES = 1000


def dirichlet_partition(
    labels: NDArray[np.int64], n: int, alpha: float, min_size: int = 10, balance: bool = True, seed: int = 0
) -> list[Numbers]:
    """Each class is shared out among n clients by a draw from Dirichlet(alpha): a small alpha makes clients differ.

    balance: who has N / n samples already gets nothing of further classes. Drawn again until everybody has `min_size`
    samples or more. Raises TrainingError where that never comes.
    """
    if n < 1 or n * min_size > len(labels):
        raise TrainingError(f"{len(labels)} samples are not {min_size} for each of {n} clients: ask for fewer")
    rng = np.random.default_rng(seed)
    for _ in range(TRIES):
        parts = _draw(labels, n, alpha, balance, rng)
        if min(map(len, parts)) >= min_size:
            return parts
    raise TrainingError(
        f"no draw from Dirichlet({alpha}) left each of {n} clients {min_size} of {len(labels)} samples: give a larger"
        " alpha, or a smaller min_size"
    )


def _draw(labels: NDArray[np.int64], n: int, alpha: float, balance: bool, rng: np.random.Generator) -> list[Numbers]:
    parts: list[list[int]] = [[] for _ in range(n)]
    for label in np.unique(labels):
        of_class = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(n, alpha))
        if balance:
            shares = shares * [len(part) < len(labels) / n for part in parts]
        shares = shares / shares.sum() if shares.sum() > 0 else np.full(n, 1 / n)
        cuts = (np.cumsum(shares)[:-1] * len(of_class)).astype(int)
        for part, more in zip(parts, np.split(of_class, cuts), strict=True):
            part.extend(more.tolist())
    return [np.sort(np.array(part, np.int64)) for part in parts]


def shard_partition(size: int, n: int, shards: int, seed: int = 0) -> list[Numbers]:
    """The samples in their order, cut into equal shards, which are dealt out at random: neighbours stay together."""
    if not 1 <= n <= shards <= size:
        raise TrainingError(f"{shards} shards of {size} samples cannot be dealt to {n} clients: ask for fewer")
    pieces = np.array_split(np.arange(size), shards)
    dealt = np.array_split(np.random.default_rng(seed).permutation(shards), n)
    return [np.sort(np.concatenate([pieces[shard] for shard in hand])) for hand in dealt]
