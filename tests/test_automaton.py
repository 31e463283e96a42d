"""The suffix automaton against the slow obvious search."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forerun.stores.automaton import ROOT, Cursor, SuffixAutomaton

ENDLESS = 10**9
relaxed = settings(deadline=None)


def long_text(seed: int) -> list[int]:
    """Up to 200 tokens of 2 to 9 kinds: long enough that every place has been met several times."""
    luck = random.Random(seed)
    kinds = luck.randint(2, 9)
    return [luck.randrange(kinds) for _ in range(luck.randint(1, 200))]


SHORT = st.integers(2, 5).flatmap(lambda kinds: st.lists(st.integers(0, kinds - 1), max_size=60))
TEXTS = SHORT | st.integers(0, 2**32).map(long_text)


def string(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def longest(text: list[int], tail: list[int]) -> int:
    """Length of the longest end of text + tail that occurs in the text before its last token."""
    whole, earlier = string(text + tail), string(text[:-1])
    return next((k for k in range(len(whole), 0, -1) if whole[-k:] in earlier), 0)


def followers(text: list[int], pattern: list[int]) -> list[int]:
    """The token after each occurrence of the pattern in the text, the newest first."""
    k = len(pattern)
    return [text[end] for end in range(len(text) - 1, k - 1, -1) if text[end - k : end] == pattern]


def continuations(text: list[int], pattern: list[int]) -> list[int]:
    """Different followers of the pattern, then of its shorter ends."""
    ends = [pattern[start:] for start in range(len(pattern))]
    return list(dict.fromkeys(token for end in ends for token in followers(text, end)))


@relaxed
@given(TEXTS)
def test_the_match_is_the_longest_end_that_occurred_before(text: list[int]) -> None:
    automaton = SuffixAutomaton(reach=ENDLESS)
    for count, token in enumerate(text, 1):
        automaton.append(token)
        assert automaton.match.length == longest(text[:count], [])


@relaxed
@given(TEXTS, st.lists(st.integers(0, 5), max_size=12))
def test_a_cursor_follows_tokens_that_were_not_appended(text: list[int], tail: list[int]) -> None:
    automaton = SuffixAutomaton(text, reach=ENDLESS)
    cursor = automaton.match
    for count in range(len(tail) + 1):
        assert cursor.length == longest(text, tail[:count])
        pattern = (text + tail[:count])[len(text) + count - cursor.length :]
        assert automaton.continuations(cursor, 9) == continuations(text, pattern)
        if count < len(tail):
            cursor = automaton.advance(cursor, tail[count])
    assert len(automaton) == len(text)


@relaxed
@given(TEXTS)
def test_the_outlook_tells_the_newest_follower_its_run_and_whether_there_are_others(text: list[int]) -> None:
    automaton = SuffixAutomaton(text, reach=ENDLESS)
    cursor = automaton.match
    came = followers(text, text[len(text) - cursor.length :]) if cursor.length else []
    if came:
        run = next((place for place, token in enumerate(came) if token != came[0]), len(came))
        assert automaton.outlook(cursor) == (came[0], run, len(set(came)) > 1)
        assert automaton.continuations(cursor, 1) == came[:1]


@relaxed
@given(TEXTS, st.integers(0, 3))
def test_a_short_reach_changes_the_statistics_but_invents_nothing(text: list[int], reach: int) -> None:
    automaton = SuffixAutomaton(text, reach)
    cursor = automaton.match
    assert cursor.length == longest(text, [])
    pattern = text[len(text) - cursor.length :]
    found = automaton.continuations(cursor, 6)
    assert len(found) == len(set(found))
    assert set(found) <= set(continuations(text, pattern))
    if cursor.length:
        assert automaton.outlook(cursor).newest in followers(text, pattern)


@relaxed
@given(TEXTS, st.integers(0, 60))
def test_appending_in_pieces_or_at_once_is_the_same(text: list[int], cut: int) -> None:
    pieces = SuffixAutomaton(text[:cut])
    pieces.extend(text[cut:])
    assert vars(pieces) == vars(SuffixAutomaton(text))


@relaxed
@given(TEXTS.filter(lambda text: len(text) > 1))
def test_there_are_at_most_two_states_per_token(text: list[int]) -> None:
    assert SuffixAutomaton(text).states <= 2 * len(text) - 1


def test_the_worst_text_reaches_the_bound() -> None:
    assert SuffixAutomaton([0, *[1] * 49]).states == 2 * 50 - 1


def test_a_follower_that_comes_again_is_the_newest_again() -> None:
    automaton = SuffixAutomaton([1, 2, 90, 1, 3, 91, 1, 2, 92, 1])
    assert automaton.continuations(automaton.match, 3) == [2, 3]
    automaton.extend([3, 93, 1, 4, 94, 1])
    assert automaton.continuations(automaton.match, 3) == [4, 3, 2]
    assert automaton.outlook(automaton.match) == (4, 1, True)


def test_a_part_of_a_state_inherits_its_run() -> None:
    automaton = SuffixAutomaton([1, 2, 3, 90, 1, 2, 3, 91, 1, 2, 3, 92, 2])
    assert automaton.match.length == 1, "2 without 1 before it: a part of what was one state"
    assert automaton.outlook(automaton.match) == (3, 3, False)


def test_continuations_of_short_suffixes_can_be_left_out() -> None:
    automaton = SuffixAutomaton([7, 2, 5, 90, 1, 2, 3, 91, 1, 2])
    assert automaton.continuations(automaton.match, 4) == [3, 5]
    assert automaton.continuations(automaton.match, 4, shortest=2) == [3]


def test_an_empty_text_matches_nothing() -> None:
    automaton = SuffixAutomaton()
    assert (len(automaton), automaton.match, automaton.states) == (0, ROOT, 1)
    assert automaton.advance(ROOT, 7) == ROOT
    assert automaton.continuations(ROOT, 3) == []
    automaton.append(7)
    assert automaton.match == ROOT
    assert automaton.advance(ROOT, 7) == ROOT  # nothing has followed it yet


def test_a_token_that_never_occurred_ends_the_match() -> None:
    automaton = SuffixAutomaton([1, 2, 3, 1, 2])
    assert automaton.match.length == 2
    assert automaton.advance(automaton.match, 9) == ROOT


def test_any_vocabulary() -> None:
    text = [2**31 - 1, 70_000, 0, 2**31 - 1, 70_000]
    automaton = SuffixAutomaton(text)
    assert automaton.match.length == 2
    assert automaton.continuations(automaton.match, 2) == [0]


def test_runs_do_not_overflow() -> None:
    automaton = SuffixAutomaton([1, 2] * 400, reach=ENDLESS)
    assert automaton.outlook(automaton.advance(ROOT, 1)) == (2, 255, False)


def test_text_that_repeats_itself_without_end_is_followed_without_end() -> None:
    automaton = SuffixAutomaton(list(range(10)) * 1000)
    cursor, said = automaton.match, []
    for _ in range(25):
        said.append(automaton.outlook(cursor).newest)
        cursor = automaton.advance(cursor, said[-1])
    assert said == [token % 10 for token in range(25)]
    assert isinstance(cursor, Cursor)


@pytest.mark.parametrize(("kinds", "most"), [(1, 40), (2, 320), (5, 260), (4096, 160), (100_000, 160)])
def test_memory_is_linear(kinds: int, most: int) -> None:
    """`most`: bytes per token, about a quarter above what was measured."""
    luck = random.Random(0)
    text = [luck.randrange(kinds) for _ in range(16_000)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        automaton = SuffixAutomaton(text)
        traced = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert traced <= most * len(text)
    assert automaton.nbytes == pytest.approx(traced, rel=0.2)
    assert SuffixAutomaton(text[:4000]).nbytes <= most * 4000
