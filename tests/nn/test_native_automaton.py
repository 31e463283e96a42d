"""The native automaton and its trees against the readable ones, bit for bit."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from array import array
from collections.abc import Sequence
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.native import library
from forerun.stores.automaton import ROOT, SEPARATOR, Cursor, SuffixAutomaton
from forerun.stores.follower import PlainFollower
from forerun.stores.growth import OWN_TEXT, STUDIED
from forerun.stores.store import Limits
from nn.kernel_oracles import EXAMPLES, some_examples

if not library.is_there():
    pytest.skip("there are no native kernels here", allow_module_level=True)
from forerun.stores.native import FEW, NativeAutomaton, NativeFollower

KINDS = (2, 3, 4, 6, 40, 300)
SPREAD = (1, 65_537, 7_158_277)
"""Between the numbers of neighbouring kinds: small numbers, large ones, and up to 2**31 - 2 for 300 kinds."""


def texts(most: int) -> st.SearchStrategy[list[int]]:
    return st.tuples(st.sampled_from(KINDS), st.sampled_from(SPREAD), st.integers(1, most), st.integers(0, 2**32)).map(
        lambda parts: some_text(*parts)
    )


def some_text(kinds: int, spread: int, count: int, seed: int) -> list[int]:
    """Random tokens, and copies of what came before."""
    luck, text = random.Random(seed), list[int]()
    while len(text) < count:
        if text and luck.random() < 0.3:
            start = luck.randrange(len(text))
            text += text[start : start + luck.randint(1, 20)]
        else:
            text += [spread * luck.randrange(kinds) for _ in range(luck.randint(1, 20))]
    return text[:count]


def assert_same_place(one: SuffixAutomaton, other: NativeAutomaton, cursor: Cursor) -> None:
    assert one.outlook(cursor) == other.outlook(cursor)
    assert one.end(cursor) == other.end(cursor)
    for count, shortest in ((1, 1), (3, 1), (3, 2), (400, 1)):
        assert one.continuations(cursor, count, shortest) == other.continuations(cursor, count, shortest)


def assert_same(one: SuffixAutomaton, other: NativeAutomaton, probe: Sequence[int]) -> None:
    """States are numbered alike, so every one of them can be asked."""
    assert (len(one), one.states, one.match) == (len(other), other.states, other.match)
    for state in range(1, one.states):
        assert_same_place(one, other, Cursor(state, one._length[state]))
    cursor, tokens = one.match, sorted(set(probe))
    for token in probe:
        cursor, before = one.advance(cursor, token), cursor
        assert other.advance(before, token) == cursor
        assert_same_place(one, other, cursor)
    assert [one.advance(one.match, token) for token in tokens] == [other.advance(other.match, t) for t in tokens]


# ---- the automaton


@some_examples
@given(texts(300), st.integers(1, 20), texts(30))
def test_states_are_the_same(text: list[int], reach: int, probe: list[int]) -> None:
    one, other = SuffixAutomaton(text, reach), NativeAutomaton(text, reach)
    assert_same(one, other, probe)
    assert other.states <= max(1, 2 * len(text) - 1) + (len(text) == 1)


@pytest.mark.parametrize("seed", range(EXAMPLES))
@pytest.mark.parametrize("kinds", [2, 4096])
def test_long_texts_grown_in_pieces_are_the_same(kinds: int, seed: int) -> None:
    luck = random.Random(seed)
    text = some_text(kinds, 1 + luck.choice((0, 500_000)), luck.randint(500, 2500), seed)
    cut = luck.randrange(len(text))
    other = NativeAutomaton(text[:cut])
    for token in text[cut : cut + 20]:
        other.append(token)
    other.extend(iter(text[cut + 20 :]))
    assert_same(SuffixAutomaton(text), other, text[: luck.randrange(60)])


def test_states_with_many_edges_keep_their_order() -> None:
    """1 is followed by up to 200 tokens, over and over, in another order; some of its longer forms split off it."""
    luck, text = random.Random(4), list[int]()
    for round_ in range(12):
        followers = [100 + kind for kind in range(200)]
        luck.shuffle(followers)
        for follower in followers[: 20 * (round_ + 1)]:
            text += [luck.randrange(3) + 2, 1, follower]
    assert_same(SuffixAutomaton(text), NativeAutomaton(text), [1, 150, 2, 1, 7])


def test_an_empty_automaton() -> None:
    assert_same(SuffixAutomaton(), NativeAutomaton(), [1, 2])
    assert NativeAutomaton().match == ROOT


def test_the_worst_text_reaches_the_bound() -> None:
    assert NativeAutomaton([0, *[1] * 49]).states == 2 * 50 - 1


@pytest.mark.parametrize(("kinds", "most"), [(1, 43), (2, 91), (5, 79), (4096, 94), (100_000, 75)])
def test_memory_is_linear(kinds: int, most: int) -> None:
    """`most`: bytes per token, about a quarter above what was measured."""
    luck = random.Random(0)
    text = [luck.randrange(kinds) for _ in range(200_000)]
    assert NativeAutomaton(text).nbytes <= most * len(text)
    assert NativeAutomaton(text[:4000]).nbytes <= most * 4000


@pytest.mark.parametrize("kinds", [2, 50, 100_000])
def test_a_text_of_200_000_tokens(kinds: int) -> None:
    luck = random.Random(kinds)
    text = [luck.randrange(kinds) for _ in range(200_000)]
    one, other = SuffixAutomaton(text), NativeAutomaton(text)
    assert (one.states, one.match) == (other.states, other.match)
    for state in luck.sample(range(1, one.states), 500):
        assert_same_place(one, other, Cursor(state, one._length[state]))


@pytest.mark.parametrize(("tokens", "error"), [([-1], ValueError), ([1, 2**31], OverflowError), (["a"], TypeError)])
def test_what_is_no_token_is_refused(tokens: list[int], error: type[Exception]) -> None:
    automaton = NativeAutomaton([1, 2, 1])
    with pytest.raises(error):
        automaton.extend(tokens)
    assert len(automaton) == 3
    with pytest.raises(error):
        automaton.advance(ROOT, tokens[-1])


@pytest.mark.parametrize("cursor", [Cursor(10**6, 1), Cursor(-5, 1), Cursor(1, -4)])
def test_a_place_of_nowhere_is_refused(cursor: Cursor) -> None:
    automaton = NativeAutomaton([1, 2, 1])
    for ask in (automaton.outlook, automaton.end, lambda place: automaton.continuations(place, 3)):
        with pytest.raises(ValueError, match="a place of another automaton"):
            ask(cursor)


def test_memory_is_given_back() -> None:
    """200 automata of 40,000 tokens would be 400 MB."""
    resource = pytest.importorskip("resource")
    text = array("i", some_text(40, 1, 40_000, 0))
    NativeAutomaton(text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200):
        NativeAutomaton(text)
    gc.collect()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


POOR = """
import resource
from array import array
from forerun.stores.native import NativeAutomaton
automaton = NativeAutomaton([1, 2, 1])
text = array("i", (i * i % 4001 for i in range(1_000_000)))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 8_000_000,) * 2)
try:
    automaton.extend(text)
except MemoryError as error:
    print(error, len(automaton), automaton.states)
automaton.extend([1, 2, 1])
print(automaton.match)
"""


def test_without_memory_there_is_an_error_and_an_empty_automaton() -> None:
    if sys.platform != "linux":
        pytest.skip("memory can be limited on Linux alone")
    run = subprocess.run([sys.executable, "-c", POOR], capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "there is no memory for more text to look up 0 1",
        "Cursor(state=1, length=1)",
    ], run.stderr


def test_different_automata_in_different_threads() -> None:
    made: dict[int, NativeAutomaton] = {}

    def make(seed: int) -> None:
        made[seed] = NativeAutomaton(some_text(6, 1, 20_000, seed))

    threads = [Thread(target=make, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, automaton in made.items():
        assert automaton.states == SuffixAutomaton(some_text(6, 1, 20_000, seed)).states


# ---- drafts

LIMITS = st.builds(
    Limits,
    nodes=st.integers(0, 20),
    depth=st.integers(0, 8),
    min_match=st.integers(1, 3),
    cost=st.sampled_from([1e-9, 1e-3, 0.05, 0.3]),
    ends=st.frozensets(st.integers(0, 4), max_size=3),
)


def steps(text: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """How many tokens become firm at a step, and how many follow them tentatively."""
    luck, found, firm = random.Random(seed), list[tuple[int, int]](), 0
    while firm < len(text):
        new = luck.choice((0, 1, 1, 1, 2, 5, 100, STUDIED + 50))
        firm = min(len(text), max(1, firm + new))
        found.append((firm, min(len(text) - firm, luck.choice((0, 0, 1, 4, FEW + 3)))))
    return found


@some_examples
@given(texts(900), st.integers(0, 2**32), LIMITS)
def test_drafts_from_the_own_text_are_the_same(text: list[int], seed: int, limits: Limits) -> None:
    one = PlainFollower(SuffixAutomaton(), True, OWN_TEXT, [0.0] * 9)
    other = NativeFollower(NativeAutomaton(), True, OWN_TEXT, [0.0] * 9)
    known = 0
    for firm, tentative in steps(text, seed):
        new, root = text[known : firm + tentative], text[firm + tentative - 1]
        assert one.draft(new, firm - known, root, limits) == other.draft(new, firm - known, root, limits)
        assert one.odds == other.odds, "to the last bit"
        known = firm
    assert len(one.automaton) == len(other.automaton) == len(text)


@some_examples
@given(st.lists(texts(200), max_size=5), texts(400), st.integers(0, 2**32), LIMITS)
def test_drafts_from_another_text_are_the_same(
    store: list[list[int]], text: list[int], seed: int, limits: Limits
) -> None:
    held = [token for one in store for token in [*one, SEPARATOR]]
    odds = [random.Random(seed).gauss(0, 0.3) for _ in range(9)]
    one = PlainFollower(SuffixAutomaton(held), False, OWN_TEXT, odds)
    other = NativeFollower(NativeAutomaton(held), False, OWN_TEXT, odds)
    known = 0
    for firm, tentative in steps(text, seed):
        new, root = text[known : firm + tentative], text[firm + tentative - 1]
        draft = one.draft(new, firm - known, root, limits)
        assert draft == other.draft(new, firm - known, root, limits)
        assert SEPARATOR not in draft.tokens
        assert (one.odds, one.cursor) == (other.odds, other.cursor)
        known = firm


def test_a_view_refuses_what_is_no_token_and_goes_on() -> None:
    reader = NativeFollower(NativeAutomaton(), True, OWN_TEXT, [0.0] * 9)
    limits = Limits(8, 8, 1, 0.05)
    reader.read([1, 2, 3, 1])
    with pytest.raises(ValueError, match="tokens are numbers"):
        reader.draft([-5], 1, 1, limits)
    assert reader.draft([2], 1, 2, limits).tokens[:2] == [2, 3]
