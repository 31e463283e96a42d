"""Max-Gram: the longest earlier match, by hand and by brute force; the repository's behaviour, by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import TableNetwork, engine_of, plain
from forerun.drafters.maxgram import History, MaxGram, Successors, chain, repository_chain
from forerun.drafting.drafter import Context
from forerun.drafting.workshop import Workshop, build
from forerun.errors import DrafterError
from forerun.model import Model
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.stores import index

NONE = Successors()
NEXT = Successors([(token + 1) % 10 for token in range(10)])
relaxed = settings(deadline=None)
TEXTS = st.integers(1, 5).flatmap(lambda kinds: st.lists(st.integers(0, kinds - 1), min_size=1, max_size=60))


def clean(
    tokens: Sequence[int], count: int, table: Successors = NONE, occurrence: str = "newest", **rest: int
) -> list[int]:
    return chain(History(), tokens, rest.pop("firm", len(tokens)), count, table, occurrence, **rest)


# ---- the hand cases of the paper's repository


def test_a_match_that_runs_into_the_end() -> None:
    text = [1, 2, 3, 4, 9, 2, 3]
    assert repository_chain([], text, 5, NEXT) == [4, 9, 2, 3, 4, 9, 1, 2], "overshoots, and wraps around"
    assert clean(text, 5) == [4, 9, 2, 3, 4]


def test_no_repeat_is_filled_from_the_table() -> None:
    assert repository_chain([], [7, 8], 4, NEXT) == clean([7, 8], 4, NEXT) == [9, 0, 1, 2]
    assert repository_chain([], [7, 8], 4, NONE) == clean([7, 8], 4, NONE) == []


def test_a_match_with_nothing_behind_it() -> None:
    assert repository_chain([], [5, 5], 3, NEXT) == [6, 7, 8]
    assert clean([5, 5], 3, NEXT) == [5, 5, 5]


def test_the_leftmost_of_equals() -> None:
    text = [1, 2, 1, 3, 1]
    assert repository_chain([], text, 1, NEXT) == clean(text, 1, occurrence="leftmost") == [2]
    assert clean(text, 1) == [3]


def test_a_longer_match_is_better_than_an_earlier_one() -> None:
    text = [1, 2, 1, 3, 2, 1]
    assert repository_chain([], text, 1, NEXT) == clean(text, 1, occurrence="leftmost") == [3]


def test_the_prompt_counts_twice_in_the_repository() -> None:
    assert repository_chain([4, 5], [4, 5], 2, NEXT)[0] == 4, "the copy wraps from the prompt to the text"
    assert repository_chain([1], [1, 2], 2, Successors([3] * 10)) == [3, 3]


# ---- the match


def brute_force(text: Sequence[int], firm: int, occurrence: str) -> tuple[int, int]:
    """Length of the longest end of `text` that came before in its firm part, and the position behind its place."""
    for length in range(len(text), 0, -1):
        places = [s for s in range(firm - length) if list(text[s : s + length]) == list(text[-length:])]
        if places:
            return length, (places[0] if occurrence == "leftmost" else places[-1]) + length
    return 0, -1


@relaxed
@given(TEXTS, st.integers(0, 5), st.sampled_from(["newest", "leftmost"]))
def test_the_match_is_that_of_brute_force(tokens: list[int], tentative: int, occurrence: str) -> None:
    firm = max(1, len(tokens) - tentative)
    text = History()
    text.read(tokens, firm)
    length, behind = brute_force(tokens, firm, occurrence)
    assert text.match(tokens[firm:]) == length
    if length:
        assert text.place(tokens[-length:], occurrence) == behind
        assert chain(text, tokens, firm, 1, NONE, occurrence) == [tokens[behind]]


@relaxed
@given(TEXTS, st.integers(1, 12), st.sampled_from(["newest", "leftmost"]))
def test_a_copy_goes_on_as_it_began(tokens: list[int], count: int, occurrence: str) -> None:
    drafted = clean(tokens, count, occurrence=occurrence)
    length, behind = brute_force(tokens, len(tokens), occurrence)
    assert len(drafted) == (count if length else 0)
    whole = tokens + drafted
    assert not length or all(whole[behind + n] == token for n, token in enumerate(drafted))


def test_bytes_that_are_no_tokens_are_no_place() -> None:
    """0x01000000 and 0x00000001 hold each other's bytes across a border."""
    text = [1 << 24, 1, 1 << 24, 0, 1, 7, 1 << 24, 0, 9, 1]
    for occurrence in ("newest", "leftmost"):
        length, behind = brute_force(text, len(text), occurrence)
        assert (length, clean(text, 1, occurrence=occurrence)) == (1, [text[behind]])


def test_the_fewest_tokens_that_must_match() -> None:
    assert clean([1, 2, 3, 2], 2, min_match=2) == []
    assert clean([1, 2, 3, 1, 2], 2, min_match=2) == [3, 1]


def test_tentative_tokens_are_followed_and_taken_back() -> None:
    text = History()
    assert chain(text, [1, 2, 3, 4, 2, 3], 4, 2, NONE) == [4, 2]
    assert chain(text, [1, 2, 3, 4, 6, 7, 6], 4, 2, NONE) == [], "6 7 is not firm, so it is no place to copy from"
    assert chain(text, [1, 2, 3, 4, 6, 7, 6], 7, 2, NONE) == [7, 6]
    text.forget(3)
    assert chain(text, [1, 2, 3, 2], 4, 1, NONE) == [3]


def test_a_damaged_table_names_no_token_outside_the_vocabulary() -> None:
    assert Successors([5, -7, 1]).fill(2, 4) == [1]
    assert Successors([5, -7, 1]).fill(0, 4) == [] == Successors([1]).fill(9, 4)


# ---- the drafter


def row_of(tokens: Sequence[int], ends: frozenset[int] = frozenset()) -> Row:
    return Row(list(tokens), 1, SamplingParams(temperature=0), key=0, limit=1000, ends=ends)


def proposed(drafter: MaxGram, row: Row, budget: int = 64, depth: int = 64) -> list[int]:
    tree = drafter.propose(Context([row], [budget], [depth], torch.device("cpu")))
    return list(tree.tokens[0][: tree.sizes[0]])[1:]


def fresh(row: Row, budget: int = 64, depth: int = 64, length: int = 5, compat: bool = False) -> list[int]:
    drafter = MaxGram(length, NEXT, compat=compat)
    drafter.admit(row, {})
    return proposed(drafter, row, budget, depth)


def test_a_chain_has_its_length_and_keeps_to_budget_and_depth() -> None:
    text = [1, 2, 3, 4, 9, 2, 3]
    assert fresh(row_of(text)) == [4, 9, 2, 3, 4]
    assert fresh(row_of(text), budget=3) == fresh(row_of(text), depth=3) == [4, 9, 2]
    assert fresh(row_of(text), depth=0) == []
    assert len(fresh(row_of([1, *text]), compat=True)) > 5, "the repository overshoots"
    assert MaxGram(5, NEXT, compat=True).max_nodes == 9


@pytest.mark.parametrize("compat", [False, True])
def test_nothing_follows_an_end(compat: bool) -> None:
    assert fresh(row_of([1, 2, 3, 4, 9, 2, 3], frozenset([9])), compat=compat) == [4, 9]
    assert fresh(row_of([1, 2, 3, 4, 9, 2, 3], frozenset([3])), compat=compat) == []


def test_a_released_slot_takes_the_last_row() -> None:
    drafter, rows = MaxGram(2, NONE), [row_of([n, n + 1, n]) for n in (1, 3, 5)]
    for row in rows:
        drafter.admit(row, {})
    drafter.release(0)
    rows = [rows[2], rows[1]]
    tree = drafter.propose(Context(rows, [9, 9], [9, 9], torch.device("cpu")))
    assert [list(tokens) for tokens in tree.tokens] == [[5, 6, 5], [3, 4, 3]]


@pytest.mark.parametrize("drafter", ["maxgram", {"drafter": "maxgram", "compat": True}])
def test_greedy_text_is_that_of_plain_decoding(drafter: object) -> None:
    target = TableNetwork(vocab_size=5, seed=3, order=2)
    (output,) = engine_of(target, drafter).generate([[1, 2]], SamplingParams(temperature=0, max_new_tokens=90))
    assert output.token_ids == plain(target, [1, 2], 90)
    assert output.stats.tokens_per_step > 1.5


def workshop() -> Workshop:
    return Workshop(Model(TableNetwork(vocab_size=10), 1), {}.__getitem__)


def test_it_is_built_by_name_with_the_table_of_a_store(tmp_path: Path) -> None:
    index.write(index.build([[1, 2, 3, 4]], 10), tmp_path / "text.store")
    drafter = build({"drafter": "maxgram", "length": 3, "store": str(tmp_path / "text.store")}, workshop())
    assert isinstance(drafter, MaxGram)
    row = row_of([2])
    drafter.admit(row, {})
    assert proposed(drafter, row) == [3, 4]
    index.write(index.build([[1, 2]], 11), tmp_path / "other.store")
    with pytest.raises(DrafterError, match="vocabulary of 11 tokens and the target one of 10"):
        build({"drafter": "maxgram", "store": str(tmp_path / "other.store")}, workshop())


@pytest.mark.parametrize(
    ("setting", "value"),
    [("length", 0), ("length", True), ("min_match", 1.5), ("occurrence", "oldest"), ("compat", 1), ("store", 3)],
)
def test_a_wrong_setting_is_named(setting: str, value: object) -> None:
    with pytest.raises(DrafterError, match=rf"^maxgram: {setting} is .*, not {value!r}$"):
        build({"drafter": "maxgram", setting: value}, workshop())
