"""Whether heads still say what they said, after they went from one layout to another."""

from __future__ import annotations

from collections.abc import Sequence

from forerun.drafting.checkpoint import DEFAULT_TREE
from forerun.layouts.exchange import Heads
from forerun.nn.network import Network
from forerun.train.answers import Answers
from forerun.train.distill import Sample
from forerun.train.ranks import projected, ranks_of
from forerun.train.teacher import Teacher


def tokens_per_step(heads: Heads, network: Network, samples: Sequence[Sample]) -> float:
    """As projected on the target's answers, for the small tree of heads that were never calibrated."""
    module = heads.module().to(device=network.device, dtype=network.dtype)
    whole = Answers(samples, rows=1, length=network.max_length, holdout=len(samples) + 1)
    tree = DEFAULT_TREE.within(module.count, DEFAULT_TREE.size) or DEFAULT_TREE
    return projected(ranks_of(module, Teacher(network), samples, whole), tree)
