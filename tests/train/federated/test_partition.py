"""Who gets which samples."""

from __future__ import annotations

import numpy as np
import pytest

from forerun.errors import TrainingError
from forerun.train.federated.partition import dirichlet_partition, shard_partition

LABELS = np.repeat(np.arange(6), 50)


def test_dirichlet_parts_are_disjoint_complete_large_enough_and_the_same_again() -> None:
    parts = dirichlet_partition(LABELS, 5, 0.1, min_size=20, seed=3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(300))
    assert min(map(len, parts)) >= 20
    again = dirichlet_partition(LABELS, 5, 0.1, min_size=20, seed=3)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))
    other = dirichlet_partition(LABELS, 5, 0.1, min_size=20, seed=4)
    assert any(not np.array_equal(one, two) for one, two in zip(parts, other, strict=True))


def test_a_small_alpha_makes_clients_differ() -> None:
    def largest_share(alpha: float) -> float:
        parts = dirichlet_partition(LABELS, 5, alpha, seed=0)
        return float(np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts]))

    assert largest_share(0.1) > 0.45 > 0.25 > largest_share(100.0)


def test_balance_keeps_anybody_from_taking_it_all() -> None:
    def longest(balance: bool) -> float:
        draws = [dirichlet_partition(LABELS, 5, 0.1, 1, balance, seed) for seed in range(10)]
        return float(np.mean([max(map(len, parts)) for parts in draws]))

    assert longest(True) < longest(False)


def test_what_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(TrainingError, match="are not 100 for each of 5"):
        dirichlet_partition(LABELS, 5, 0.1, min_size=100)
    with pytest.raises(TrainingError, match="larger alpha"):
        dirichlet_partition(LABELS, 5, 0.01, min_size=60)


def test_shards_keep_neighbours_together() -> None:
    parts = shard_partition(100, 4, 20, seed=0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100)) and [len(part) for part in parts] == [25] * 4
    assert all((np.diff(part) == 1).mean() >= 0.75 for part in parts)
    with pytest.raises(TrainingError, match="cannot be dealt"):
        shard_partition(100, 30, 20)
