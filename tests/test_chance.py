"""Random streams: functions of (key, purpose, place) and of nothing else, and as good as independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from forerun.chance import Dice, Purpose, draft_dice, final_dice, key_of, mix, pick, uniform
from forerun.row import Row, draft_chance, final_chance
from forerun.sampling import SamplingParams

KEYS = [key_of(seed) for seed in range(40)]
mixed, uniforms = np.vectorize(mix, otypes=[np.uint64]), np.vectorize(uniform, otypes=[np.float64])
LAW = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


def numbers(dice: Dice, rows: int, places: Sequence[int]) -> Tensor:
    """The uniform numbers behind `token`, to three digits: the token of a law of 1,000 equal tokens."""
    return dice.token(torch.ones(rows, len(places), 1000), np.array([places] * rows))


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(8)), st.integers(1, 8))
def test_numbers_do_not_depend_on_the_batch(order: list[int], count: int) -> None:
    chosen = order[:count]
    all_numbers = numbers(final_dice(KEYS[:8], list(range(8))), 8, [0, 1, 2])
    assert (numbers(final_dice([KEYS[row] for row in chosen], chosen), count, [0, 1, 2]) == all_numbers[chosen]).all()


def test_numbers_do_not_depend_on_what_was_asked_before() -> None:
    dice = final_dice(KEYS[:2], [5, 5])
    before = numbers(dice, 2, [3])
    dice.coin(torch.full((2, 7), 0.5), np.arange(14).reshape(2, 7), np.ones((2, 7), dtype=np.int64))
    assert (numbers(dice, 2, [3]) == before).all()
    assert (numbers(dice, 2, [9, 3])[:, 1:] == before).all()


def test_a_place_counts_from_the_position_of_the_row() -> None:
    """What is settled at a position of the text has the same luck however many tokens come in one step."""
    assert (numbers(final_dice(KEYS[:1], [10]), 1, [4]) == numbers(final_dice(KEYS[:1], [14]), 1, [0])).all()


def test_the_dice_of_one_row_are_those_of_the_batch() -> None:
    dice = final_dice(KEYS[:3], [1, 2, 3])
    assert (numbers(dice.row(1), 1, [0, 5]) == numbers(dice, 3, [0, 5])[1:2]).all()


def test_equal_rows_and_places_have_equal_luck_and_others_do_not() -> None:
    dice = final_dice([KEYS[0], KEYS[0], KEYS[1]], [0, 0, 0])
    drawn = numbers(dice, 3, [2, 2, 3])
    assert (drawn[0] == drawn[1]).all() and (drawn[:, 0] == drawn[:, 1]).all()
    assert (drawn[0] != drawn[2]).all() and (drawn[:, 1] != drawn[:, 2]).all()


def coins_of(dice: Dice, count: int, attempt: int | None = None) -> list[bool]:
    places = np.arange(count)[None]
    attempts = None if attempt is None else np.full((1, count), attempt)
    return dice.coin(torch.full((1, count), 0.5), places, attempts)[0].tolist()


def test_coins_tokens_attempts_drafts_and_samples_have_streams_of_their_own() -> None:
    final = final_dice(KEYS[:1], [0])
    draft = draft_dice(KEYS[:1], [0], [])
    streams = [
        coins_of(final, 64),
        coins_of(final, 64, 0),
        coins_of(final, 64, 1),
        coins_of(draft, 64, 0),
        coins_of(final_dice([key_of(0, 1)], [0]), 64),
        (numbers(final, 1, range(64))[0] < 500).tolist(),
        (numbers(draft, 1, range(64))[0] < 500).tolist(),
    ]
    for index, one in enumerate(streams):
        for other in streams[:index]:
            assert 16 < sum(a == b for a, b in zip(one, other, strict=True)) < 48


def test_draft_dice_are_fresh_for_every_step_level_and_round() -> None:
    paths = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0), (1 << 20,), (0, 1 << 20)]
    drawn = {path: tuple(numbers(draft_dice(KEYS[:1], path[:1], path[1:]), 1, range(6))[0].tolist()) for path in paths}
    assert len(set(drawn.values())) == len(paths)


def test_a_rows_draft_dice_change_with_its_step_and_its_final_dice_with_its_length() -> None:
    def row(step: int, length: int) -> Row:
        return Row([0] * length, 1, SamplingParams(), key_of(3), 99, step)

    drafts = {tuple(numbers(draft_chance([row(step, 5)], (0,)), 1, range(6))[0].tolist()) for step in range(50)}
    assert len(drafts) == 50
    assert (numbers(draft_chance([row(2, 5)], (0,)), 1, [0]) == numbers(draft_chance([row(2, 7)], (0,)), 1, [0])).all()
    assert (numbers(final_chance([row(0, 5)]), 1, [2]) == numbers(final_chance([row(9, 7)]), 1, [0])).all()


def test_seeds_and_samples_have_keys_of_their_own() -> None:
    keys = {key_of(seed, sample) for seed in (-1, 0, 1, 2, 2**63, 2**64 - 2) for sample in range(50)}
    assert len(keys) == 6 * 50
    assert key_of(5) == key_of(5 + 2**64)


def test_the_streams_are_what_they_have_always_been() -> None:
    """Equal seeds give equal text, from one release to the next."""
    assert key_of(5, 1) == 6356993637754342050
    assert final_dice([key_of(5, 1)], [3]).uniform(Purpose.TOKEN, np.array([[0, 4]])).tolist() == [
        [0.705003739973206, 0.18005444191044917]
    ]
    coins = draft_dice([7], [2], [0, 1]).uniform(Purpose.ACCEPT, np.array([[1]]), np.array([[6]]))
    assert coins.tolist() == [[0.2737453366227873]]


def test_numbers_are_uniform() -> None:
    for values in (
        uniforms(mixed(mixed(KEYS, int(Purpose.TOKEN))[:, None], np.arange(2500)[None])).ravel(),
        uniforms(mixed(np.arange(100_000), 1)),
        uniforms(mixed(0, np.arange(100_000))),
    ):
        assert values.min() >= 0 and values.max() < 1
        assert stats.chisquare(np.histogram(values, 100, (0, 1))[0]).pvalue > 1e-3


@pytest.mark.parametrize("what", ["places", "attempts", "steps", "seeds", "samples", "purposes"])
def test_neighbours_are_independent(what: str) -> None:
    """Pairs of numbers whose names differ in one word, on a 10 x 10 board. The seeds are fixed, so is the outcome."""
    count = np.arange(40_000)
    key = mix(7, int(Purpose.SAMPLE))
    if what == "places":
        one, other = mixed(key, count), mixed(key, count + 1)
    elif what == "attempts":
        one, other = mixed(mixed(key, count), 0), mixed(mixed(key, count), 1)
    elif what == "steps":
        one, other = (mixed(mixed(mixed(key, count + step), 0), 3) for step in (0, 1))
    elif what == "seeds":
        one, other = (mixed(mixed(count + seed, 2), 5) for seed in (0, 1))
    elif what == "samples":
        one, other = (mixed(mixed(mixed(count, 4), sample), 2) for sample in (0, 1))
    else:
        one, other = (mixed(mixed(key, purpose), count) for purpose in (1, 2))
    board, *_ = np.histogram2d(uniforms(one), uniforms(other), 10, ((0, 1), (0, 1)))
    assert stats.chisquare(board.ravel()).pvalue > 1e-3


def test_coins_and_tokens_follow_their_laws() -> None:
    dice, places = final_dice(KEYS, list(range(40))), np.tile(np.arange(500) * 50, (40, 1))
    tokens = dice.token(LAW.expand(40, 500, 4), places)
    observed = torch.bincount(tokens.ravel(), minlength=4).numpy()
    assert stats.chisquare(observed, LAW.numpy() * 20_000).pvalue > 1e-3
    heads = int(dice.coin(torch.full((40, 500), 0.3), places).sum())
    assert stats.binomtest(heads, 20_000, 0.3).pvalue > 1e-3


def test_coins_are_certain_at_the_ends() -> None:
    dice, places = final_dice(KEYS, [0] * 40), np.tile(np.arange(100), (40, 1))
    assert not dice.coin(torch.zeros(40, 100), places).any()
    assert dice.coin(torch.ones(40, 100), places).all()


# ---- pick

LAST = 1 - 2.0**-53
"""The largest number that dice can throw."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("number", [0.0, 2.0**-53, 0.5, LAST], ids=str)
@pytest.mark.parametrize(
    "law", [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0.5, 0, 0.5, 0], [0.1] * 10, [1e-30, 1, 1e-30]], ids=str
)
def test_pick_never_gives_what_cannot_be(law: list[float], number: float, dtype: torch.dtype) -> None:
    token = int(pick(torch.tensor([[law]], dtype=dtype), torch.tensor([[number]], dtype=torch.float64)))
    assert law[token] > 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1)), min_size=1, max_size=8).filter(any),
    st.one_of(st.just(0.0), st.just(LAST), st.floats(0, LAST)),
    st.sampled_from([1.0, 1e-3, 250.0]),
)
def test_pick_gives_the_token_whose_share_holds_the_number(law: list[float], number: float, scale: float) -> None:
    uniform = torch.tensor([[number]], dtype=torch.float64)
    token = int(pick(torch.tensor([[law]], dtype=torch.float64) * scale, uniform))
    shares = np.cumsum(law) / sum(law)
    assert law[token] > 0
    assert (shares[token - 1] if token else 0.0) - 1e-9 <= number <= shares[token] + 1e-9


def test_pick_of_a_law_that_is_none_still_names_a_token() -> None:
    """Rows that are only carried along may have anything in their padding."""
    for nonsense in ([0.0, 0.0], [float("nan")] * 2):
        token = int(pick(torch.tensor([[nonsense]]), torch.tensor([[0.5]], dtype=torch.float64)))
        assert 0 <= token < 2
