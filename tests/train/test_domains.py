"""Kinds of answers, mixed by how hard they are."""

from __future__ import annotations

import numpy as np
import pytest

from forerun.train.answers import Answers
from forerun.train.distill import Sample
from forerun.train.domains import Domains, reweighted


def test_shares_by_hand() -> None:
    found = reweighted(np.array([0.5, 0.5]), np.array([0.2, -0.1]))
    assert found.tolist() == pytest.approx([0.574435, 0.425565], abs=5e-7)
    kept = reweighted(np.array([0.3, 0.7]), np.array([1.0, 1.0]))
    assert kept.tolist() == pytest.approx([0.3, 0.7], abs=1e-4), "who is equally far behind keeps his share"


def test_no_kind_is_ever_lost_and_harder_ones_come_more_often() -> None:
    kinds = [Answers([Sample((kind,), (kind,) * 4)] * 40, rows=2, length=8) for kind in (1, 2)]
    domains = Domains.of(kinds)

    def share() -> float:
        return float(np.mean([domains.batch(number).tokens_BN[0, 0] == 2 for number in range(400)]))

    assert share() == pytest.approx(0.5, abs=0.1)
    domains.learn([0.0, 1.0])
    assert share() == pytest.approx(np.e / (1 + np.e), abs=0.1)
    for _ in range(100):
        domains.learn([0.0, 50.0])
    assert domains.shares[0] >= 4e-5 and domains.shares.sum() == pytest.approx(1)
