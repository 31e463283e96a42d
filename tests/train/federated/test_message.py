"""What travels: rows by ids, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parties import Listening, federation, tiny, world

from forerun.errors import TrainingError
from forerun.train.federated.public import Message, PublicSet, guarded

IDS = np.array([5, 3, 9])
ROWS = np.array([[0.5, 0.0], [0.0, 0.3], [0.6, 0.8]], np.float32)


def message(ids: np.ndarray = IDS, rows: np.ndarray = ROWS) -> Message:
    return Message("v", ids, {"image": rows})


def test_messages_hold_a_row_for_every_public_item_and_scalars_alone() -> None:
    engine = Listening(tiny())
    federation(engine).update(0)
    assert len(engine.messages) == 5, "the server's, and one of every client"
    public = set(world().public.ids.tolist())
    for one in engine.messages:
        assert vars(one).keys() == {"version", "ids", "rows", "figures"}
        assert set(one.ids.tolist()) == public and one.rows.keys() <= {"image", "text"}
        assert all(rows.shape == (24, 8) for rows in one.rows.values())
        assert one.figures.keys() <= {"loss"} and all(isinstance(value, float) for value in one.figures.values())


def test_rows_go_by_their_ids() -> None:
    order = np.array([2, 0, 1])
    rows, sent = message(IDS[order], ROWS[order]).about(np.array([3, 4, 5]))["image"]
    assert sent.tolist() == [True, False, True]
    assert torch.allclose(rows, torch.tensor([[0.0, 0.3], [0.0, 0.0], [0.5, 0.0]]))


def test_a_row_that_is_not_finite_is_not_there() -> None:
    bad = ROWS.copy()
    bad[0, 1], bad[1, 0] = np.nan, np.inf
    rows, sent = message(rows=bad).about(IDS)["image"]
    assert sent.tolist() == [False, False, True] and torch.equal(rows[:2], torch.zeros(2, 2))


def test_nobody_counts_for_more_by_being_longer() -> None:
    rows, _ = message(rows=1000 * ROWS).about(IDS)["image"]
    assert torch.allclose(rows.norm(dim=-1), torch.ones(3))
    assert torch.allclose(message().about(IDS)["image"][0], torch.from_numpy(ROWS)), "shorter ones stay as they are"


def test_who_says_nothing_is_not_there() -> None:
    assert Message("v", IDS[:0], {"image": ROWS[:0]}).about(IDS) == {}


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (Message("w", IDS, {}), "public set w, and not of v"),
        (message(rows=ROWS[:2]), r"rows of 'image' are \(2, 2\)"),
        (message(rows=np.zeros((3, 4), np.float32)), "of width 2"),
        (Message("v", IDS, {"sound": ROWS}), "rows of 'sound'"),
    ],
)
def test_what_speaks_of_other_things_is_refused(said: Message, sentence: str) -> None:
    message().demand("v", 2)
    with pytest.raises(TrainingError, match=sentence):
        said.demand("v", 2)


def test_half_precision_halves_what_travels() -> None:
    sizes = [Listening(tiny(half=half)) for half in (False, True)]
    figures = []
    for engine, half in zip(sizes, (False, True), strict=True):
        found = federation(engine, half=half)
        found.update(0)
        figures.append(found.validate())
    rows, ids = 24 * 8 * 4, 24 * 8
    assert figures[0]["down_bytes"] == 4 * (2 * rows + ids), "two modalities to every client"
    assert figures[0]["up_bytes"] == (1 + 1 + 2 + 2) * rows + 4 * (ids + 8), "what each has, ids, and a loss"
    assert figures[1]["down_bytes"] == 4 * (rows + ids)


def test_clipping_and_noise() -> None:
    rows = torch.tensor([[0.6, 0.8], [0.3, 0.4]])
    clipped = guarded(rows, 0.5, 0.0, np.random.default_rng(0))
    assert torch.allclose(clipped, torch.tensor([[0.3, 0.4], [0.3, 0.4]]))
    wide = torch.zeros(2000, 8)
    noisy = guarded(wide, 0.0, 0.2, np.random.default_rng(0))
    assert noisy.std().item() == pytest.approx(0.2, rel=0.05) and guarded(wide, 0, 0, np.random.default_rng(0)) is wide


# ---- the public set


def public(order: list[int], texts: tuple[str, ...] = ("a", "b", "c")) -> PublicSet:
    images = np.arange(3 * 12, dtype=np.uint8).reshape(3, 3, 2, 2)
    return PublicSet(np.array([7, 2, 4])[order], images[order], [texts[place] for place in order])


def test_its_version_knows_the_items_and_not_their_order() -> None:
    assert public([0, 1, 2]).version == public([2, 0, 1]).version
    assert public([0, 1, 2]).version != public([0, 1, 2], ("a", "b", "d")).version
    assert public([0, 1, 2]).places(np.array([4, 7])).tolist() == [2, 0]


def test_what_is_no_public_set_is_refused() -> None:
    with pytest.raises(TrainingError, match="an id of its own"):
        PublicSet(np.array([1, 1]), np.zeros((2, 3, 2, 2), np.uint8), ["a", "b"])
    with pytest.raises(TrainingError, match="has no item 5"):
        public([0, 1, 2]).places(np.array([4, 5]))
