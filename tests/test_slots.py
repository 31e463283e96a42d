"""What is kept per row moves as the rows do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.slots import Slots, moves


def test_the_last_row_fills_the_hole() -> None:
    slots = Slots("abcd")
    assert slots.release(1) == "b" and slots == ["a", "d", "c"]
    assert slots.release(2) == "c" and slots == ["a", "d"]
    assert slots.admit("e") == 2 and slots == ["a", "d", "e"]


def test_ready_rows_stay_in_front() -> None:
    slots = Slots("abcDE")
    assert slots.release(0, ready=3) == "a" and slots == ["c", "b", "E", "D"]


@pytest.mark.parametrize("slot", [0, 3])
def test_a_slot_that_was_never_opened_is_left_alone(slot: int) -> None:
    assert Slots[str]().release(slot) is None
    assert Slots("abc").release(3) is None


@given(st.integers(1, 8), st.data())
def test_rows_stay_dense_and_ready_ones_in_front(rows: int, data: st.DataObject) -> None:
    """Only the row that leaves is gone, and no row moves from or to a place beside the two borders and the hole."""
    ready = data.draw(st.integers(1, rows))
    slot = data.draw(st.integers(0, ready - 1))
    before = list(range(rows))
    slots = Slots(before)
    assert slots.release(slot, ready) == slot
    assert sorted(slots) == [row for row in before if row != slot]
    assert all(row < ready for row in slots[: ready - 1]) and all(row >= ready for row in slots[ready - 1 :])
    moved = {place for place in range(rows - 1) if slots[place] != place}
    assert moved == {hole for _, hole in moves(rows, slot, ready)} <= {slot, ready - 1}
