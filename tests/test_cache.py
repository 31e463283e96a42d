"""The cache against a list of lists: any order of admissions, feeds, keeps, cuts, departures and growth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forerun.nn.cache import Cache, CacheShape
from forerun.nn.feed import Feed

CPU = torch.device("cpu")
SHAPE = CacheShape(layers=2, kv_heads=2, head_dim=3)
CAPACITY = 24
"""Entries per slot that the machine plans with."""


def entry(token: int, layer: int, side: int) -> torch.Tensor:
    """What is stored for a token: another number in every layer, side (key, value), head and dimension."""
    return token * 100 + layer * 50 + side * 20 + torch.arange(6, dtype=torch.float32).view(2, 3)


class CacheMachine(RuleBasedStateMachine):
    """`rows[slot]` are the committed tokens, `scratch[slot]` the ones beside them that may still be kept."""

    @initialize(slots=st.integers(0, 3), capacity=st.integers(1, CAPACITY))
    def begin(self, slots: int, capacity: int) -> None:
        self.cache = Cache(SHAPE, torch.float32, CPU)
        self.rows: list[list[int]] = []
        self.scratch: list[list[int]] = []
        self.count = 0
        self.cache.reserve(slots, capacity)

    def tokens(self, count: int) -> list[int]:
        self.count += count
        return list(range(self.count - count, self.count))

    @rule(slots=st.integers(0, 5), capacity=st.integers(1, CAPACITY))
    def reserve(self, slots: int, capacity: int) -> None:
        grows = slots > self.cache.slots or capacity > self.cache.capacity
        self.cache.reserve(slots, capacity)
        assert self.cache.slots >= slots and self.cache.capacity >= capacity
        if grows:
            self.scratch = [[] for _ in self.rows]

    @rule()
    def admit(self) -> None:
        if self.cache.rows == self.cache.slots:
            with pytest.raises(ValueError, match="reserve"):
                self.cache.admit()
            self.cache.reserve(self.cache.rows + 1, 1)
            self.scratch = [[] for _ in self.rows]
        assert self.cache.admit() == len(self.rows)
        self.rows.append([])
        self.scratch.append([])

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), count=st.integers(1, 4))
    def feed(self, data: st.DataObject, count: int) -> None:
        """Tokens for a run of slots, behind what is committed and in scratch (the same number for
        all, as `Model` does)."""
        start = data.draw(st.integers(0, len(self.rows) - 1))
        stop = data.draw(st.integers(start + 1, len(self.rows)))
        chosen = range(start, stop)
        held = data.draw(st.integers(0, min(len(self.scratch[slot]) for slot in chosen)))
        begins = [len(self.rows[slot]) + held for slot in chosen]
        self.cache.reserve(0, max(begins) + count)
        at = np.asarray(begins)[:, None] + np.arange(count)
        feed = Feed(
            tokens_BN=torch.tensor([self.tokens(count) for _ in chosen]),
            lengths_B=np.asarray(begins) - held,
            where_BN=at,
            start=start,
            held=held,
        )
        for layer in range(SHAPE.layers):
            stored = [
                torch.stack([torch.stack([entry(t, layer, side) for t in row]) for row in feed.tokens_BN.tolist()])
                for side in (0, 1)
            ]
            views = self.cache.append(layer, feed, *stored)
            for side, view in enumerate(views):
                assert view.shape[:2] == (len(chosen), feed.span)
                for index, slot in enumerate(chosen):
                    assert (view[index, at[index]] == stored[side][index]).all()
                    for place, token in enumerate(self.rows[slot]):
                        assert (view[index, place] == entry(token, layer, side)).all()
        for slot, new in zip(chosen, feed.tokens_BN.tolist(), strict=True):
            self.scratch[slot] = [*self.scratch[slot][:held], *new]

    @precondition(lambda self: any(self.scratch))
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from([slot for slot, some in enumerate(self.scratch) if some]))
        some = self.scratch[slot]
        path = sorted(data.draw(st.sets(st.integers(0, len(some) - 1))))
        self.cache.keep(slot, path)
        self.rows[slot] += [some[node] for node in path]
        self.scratch[slot] = []

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), length=st.integers(0, CAPACITY))
    def truncate(self, data: st.DataObject, length: int) -> None:
        slot = data.draw(st.integers(0, len(self.rows) - 1))
        self.cache.truncate(slot, length)
        if length < len(self.rows[slot]):
            self.scratch[slot] = []
        del self.rows[slot][length:]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.integers(0, len(self.rows) - 1))
        self.cache.release(slot)
        last = self.rows.pop()
        if slot < len(self.rows):
            self.rows[slot] = last
        self.scratch = [[] for _ in self.rows]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release_among_the_ready(self, data: st.DataObject) -> None:
        """The last ready row fills the hole, and the very last row the place that this one leaves."""
        ready = data.draw(st.integers(1, len(self.rows)))
        slot = data.draw(st.integers(0, ready - 1))
        self.cache.release(slot, ready)
        self.rows[slot] = self.rows[ready - 1]
        self.rows[ready - 1] = self.rows[-1]
        self.rows.pop()
        self.scratch = [[] for _ in self.rows]

    @invariant()
    def the_committed_entries_are_those_of_the_rows(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.cache.rows == len(self.rows) and self.cache.lengths == [len(row) for row in self.rows]
        for slot, row in enumerate(self.rows):
            if row:
                expected = torch.stack(
                    [
                        torch.stack([torch.stack([entry(token, layer, side) for token in row]) for side in (0, 1)])
                        for layer in range(SHAPE.layers)
                    ]
                )
                assert (self.cache.entries(slot) == expected).all()


CacheMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestCacheAgainstLists = CacheMachine.TestCase


def test_nothing_is_allocated_that_is_there_already() -> None:
    cache = Cache(SHAPE, torch.float32, CPU)
    assert cache.nbytes == 0
    cache.reserve(3, 10)
    assert cache.nbytes == 2 * 2 * 3 * 10 * 2 * 3 * 4
    slot = cache.admit()
    before = cache.entries(slot).data_ptr()
    for slots, capacity in ((3, 10), (1, 10), (3, 1)):
        cache.reserve(slots, capacity)
    assert cache.entries(slot).data_ptr() == before


def test_what_was_never_written_is_finite() -> None:
    """Entries that nobody may see are multiplied by zero, and zero times NaN is NaN."""
    cache = Cache(SHAPE, torch.float32, CPU)
    cache.reserve(2, 64)
    cache.admit()
    feed = Feed(
        tokens_BN=torch.zeros(1, 1, dtype=torch.int64),
        lengths_B=np.asarray([63]),
        where_BN=np.asarray([[63]]),
    )
    keys, values = cache.append(0, feed, torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3))
    assert np.isfinite(keys.numpy()).all() and np.isfinite(values.numpy()).all()
