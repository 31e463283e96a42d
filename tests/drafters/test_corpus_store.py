"""Corpora: the order by brute force, the search by brute force, the kernel by the readable form; files that lie."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from forerun.errors import DrafterError, ForerunError
from forerun.native import library
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.sources.tokenizer import fingerprint_of
from forerun.stores import corpus as corpora
from forerun.stores import index, places
from forerun.stores.corpus import Corpus, CorpusStore, CorpusView
from forerun.stores.places import ENOUGH, PLACES, Trust
from forerun.stores.store import Draft, Limits

relaxed = settings(deadline=None)
KINDS = 3
DOCUMENTS = st.lists(st.lists(st.integers(0, KINDS - 1), max_size=50), min_size=1, max_size=6).filter(any)
LIMITS = st.builds(
    Limits,
    st.integers(0, 20),
    st.integers(0, 8),
    st.integers(1, 4),
    st.sampled_from([0.001, 0.05]),
    st.frozensets(st.integers(0, KINDS)),
)
WIDE = Limits(nodes=64, depth=16, min_match=1, cost=1e-4)


def stored(documents: Sequence[Sequence[int]], folder: Path, vocabulary: int = KINDS) -> Corpus:
    index.write(index.build(documents, vocabulary), folder / "text.store")
    return Corpus.open(folder / "text.store")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


def row_of(tokens: Sequence[int]) -> Row:
    return Row(list(tokens), 1, SamplingParams(temperature=0), key=0, limit=1000)


def ends_of(documents: Sequence[Sequence[int]]) -> list[tuple[list[int], int, int]]:
    """(text up to a token that another follows, newest first; its position in the store; the next token)."""
    found, begin = [], 0
    for document in filter(len, documents):
        found += [(list(document[n::-1]), begin + n, document[n + 1]) for n in range(len(document) - 1)]
        begin += len(document) + 1
    return found


# ---- building


@relaxed
@given(DOCUMENTS, st.sampled_from([KINDS, 40_000, 70_000, 200_000]))
def test_the_order_is_that_of_texts_read_backwards(documents: list[list[int]], vocabulary: int) -> None:
    made = index.build(documents, vocabulary)
    by_text = sorted((text[: index.DEPTH], position) for text, position, _ in ends_of(documents))
    assert made.order.tolist() == [position for _, position in by_text]
    assert made.size == sum(map(len, documents)) and made.documents == len(list(filter(None, documents)))
    assert made.tokens.dtype == (np.uint16 if vocabulary <= 65535 else np.int32)


@relaxed
@given(DOCUMENTS)
def test_the_table_has_the_most_frequent_successor(documents: list[list[int]]) -> None:
    pairs = [(text[0], after) for text, _, after in ends_of(documents)]
    expected = [
        max(range(KINDS), key=lambda after: (pairs.count((token, after)), -after))
        if any(first == token for first, _ in pairs)
        else -1
        for token in range(KINDS)
    ]
    assert index.build(documents, KINDS).bigram.tolist() == expected


def test_what_cannot_be_built_is_said() -> None:
    with pytest.raises(ForerunError, match=r"^text 2 holds the token 9, and the vocabulary has 9: "):
        index.build([[1], [8, 9]], 9)
    with pytest.raises(ForerunError, match=r"^these texts have no tokens at all: "):
        index.build([[], []], 9)


def test_too_many_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "MOST_TOKENS", 5)
    with pytest.raises(ForerunError, match=r"^these texts have more than 5 tokens: "):
        index.build([[1, 2], [1, 2, 3]], 9)


@pytest.mark.parametrize("vocabulary", [9, 70_000])
def test_progress_ends_where_it_said(vocabulary: int) -> None:
    told: list[tuple[int, int]] = []
    index.build([[1, 2, 3]], vocabulary, lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(1, len(told) + 1)) and told[-1][0] == told[-1][1]


# ---- the file


def test_a_file_is_a_safetensors_file(tmp_path: Path) -> None:
    corpus = stored([[0, 1, 2], [], [1, 1]], tmp_path)
    assert (corpus.vocabulary, corpus.size, corpus.documents, corpus.depth) == (3, 5, 2, 32)
    tensors = load_file(tmp_path / "text.store")
    assert tensors["tokens"].tolist() == corpus.tokens.tolist() == [0, 1, 2, 3, 1, 1, 3]
    assert tensors["order"].tolist() == corpus.order.tolist() and tensors["bigram"].tolist() == [1, 1, -1]
    assert tensors["starts"].tolist() == corpus.starts.tolist() == [0, 1, 3, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["text.store"]


def test_texts_of_one_token_have_nothing_to_follow(tmp_path: Path) -> None:
    corpus = stored([[1]], tmp_path)
    assert CorpusStore(corpus).open(row_of([1])).draft([1], 1, WIDE) == Draft([1], [-1], [1.0])


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ForerunError, match=r"^cannot write .*: make room, or name another place$"):
        index.write(index.build([[1, 2]], 3), tmp_path / "nowhere" / "text.store")
    (tmp_path / "text.store").mkdir()
    with pytest.raises(ForerunError, match="cannot write"):
        index.write(index.build([[1, 2]], 3), tmp_path / "text.store")
    assert [path.name for path in tmp_path.iterdir()] == ["text.store"]


def test_a_corpus_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.store"
    index.write(index.build([[1, 2]], 3), path, fingerprint_of({"a": 0, "b": 1}))
    corpus = Corpus.open(path)
    corpus.demand_fit(3)
    corpus.demand_fit(3, fingerprint_of({"b": 1, "a": 0}))
    with pytest.raises(DrafterError, match=r"vocabulary of 3 tokens and the target one of 4: "):
        corpus.demand_fit(4)
    with pytest.raises(DrafterError, match=r"another tokenizer"):
        corpus.demand_fit(3, fingerprint_of({"a": 1, "b": 0}))


def described(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewritten(content: bytes, **changes: dict) -> bytes:
    """The file with other entries in its header."""
    header, numbers = described(content)
    for name, change in changes.items():
        header[name].update(change)
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    return len(packed).to_bytes(8, "little") + packed + numbers


WRONG = {
    "empty": lambda content: b"",
    "text": lambda content: b"def main():\n    pass\n" * 9,
    "brackets": lambda content: (10**5).to_bytes(8, "little") + b"[" * 10**5,
    "half a header": lambda content: content[:40],
    "half": lambda content: content[: len(content) - 30],
    "another file": lambda content: rewritten(content, __metadata__={"format": "pt"}),
    "another version": lambda content: rewritten(content, __metadata__={"version": "1"}),
    "no number": lambda content: rewritten(content, __metadata__={"vocabulary": "many"}),
    "another vocabulary": lambda content: rewritten(content, __metadata__={"vocabulary": "4"}),
    "no documents": lambda content: rewritten(content, __metadata__={"documents": "0"}),
    "other documents": lambda content: rewritten(content, __metadata__={"documents": "1"}),
    "no depth": lambda content: rewritten(content, __metadata__={"depth": "0"}),
    "another type": lambda content: rewritten(content, order={"dtype": "F32"}),
    "too few starts": lambda content: rewritten(content, starts={"shape": [3], "data_offsets": [12, 24]}),
    "another shape": lambda content: rewritten(content, tokens={"shape": [3, 2]}),
    "a shape below zero": lambda content: rewritten(content, tokens={"shape": [-6]}),
    "offsets outside": lambda content: rewritten(content, bigram={"data_offsets": [10**15, 10**15 + 12]}),
    "offsets below zero": lambda content: rewritten(content, bigram={"data_offsets": [-12, 0]}),
    "offsets that are none": lambda content: rewritten(content, bigram={"data_offsets": "ab"}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_gets_one_sentence(wrong: str, tmp_path: Path) -> None:
    corpus = stored([[0, 1, 2], [1, 1]], tmp_path)
    corpus.path.write_bytes(WRONG[wrong](corpus.path.read_bytes()))
    with pytest.raises(DrafterError, match=r"^[^\n]*(build it again|build one) with forerun index$"):
        Corpus.open(corpus.path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DrafterError, match=r"^cannot read the store .*nothing .*: build one with forerun index$"):
        Corpus.open(tmp_path / "nothing")
    with pytest.raises(DrafterError, match=r"^[^\0]* cannot name a store: build one with forerun index$"):
        Corpus.open("a\0b")


# ---- searching


def both(corpus: Corpus) -> list[corpora._Search]:
    """The readable form, and the kernel where there is one."""
    return [corpora._Search(corpus), corpora._search_in(corpus)]


def numbers(corpus: Corpus) -> places.Numbers:
    return corpus.numbers


def common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@relaxed
@given(DOCUMENTS, st.lists(st.integers(0, KINDS - 1), min_size=1, max_size=8), st.integers(1, 3))
def test_the_longest_matches_are_found_and_as_many_as_are_enough(
    folder: Path, documents: list[list[int]], text: list[int], min_match: int
) -> None:
    found = places.places(numbers(stored(documents, folder)), text[::-1], min_match)
    matches = {position: common(before, text[::-1]) for before, position, _ in ends_of(documents)}
    useful = sorted((length for length in matches.values() if length >= min_match), reverse=True)
    assert all(matches[place.position] == place.length for place in found)
    assert len({place.position for place in found}) == len(found)
    lengths = [place.length for place in found]
    shortest = useful[ENOUGH - 1] if len(useful) >= ENOUGH else min_match
    wanted = [length for length in useful if length >= shortest]
    assert lengths == wanted[:PLACES]


def test_of_many_places_some_from_end_to_end_are_looked_at(tmp_path: Path) -> None:
    corpus = stored([[n % 50, 99, 60] for n in range(1000)], tmp_path, 100)
    found = places.places(numbers(corpus), [99], 1)
    assert len(found) == PLACES
    assert {corpus.tokens[place.position - 1] for place in found} == set(range(50))


@relaxed
@given(DOCUMENTS, st.lists(st.integers(0, KINDS), min_size=1, max_size=40), LIMITS)
def test_the_kernel_returns_what_the_readable_form_does(
    folder: Path, documents: list[list[int]], text: list[int], limits: Limits
) -> None:
    trust = Trust()
    trust.odds[0], trust.odds[3] = 0.7, -0.4
    for vocabulary in (KINDS, 70_000):
        slow, fast = (search(text, trust, limits) for search in both(stored(documents, folder, vocabulary)))
        assert slow == fast


def test_a_search_serves_rows_with_other_limits_and_another_trust(tmp_path: Path) -> None:
    corpus = stored([[0, 1, 2, 1, 0, 2] * 9], tmp_path)
    slow, fast = both(corpus)
    for nodes, odds, ends in ((3, 0.0, {2}), (40, 1.0, set()), (40, 1.0, {0, 1}), (1, -1.0, {0})):
        limits, trust = Limits(nodes, 8, 1, 0.001, frozenset(ends)), Trust()
        trust.odds[0] = odds
        assert slow([2, 0, 1], trust, limits) == fast([2, 0, 1], trust, limits)


def test_the_kernel_is_used_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = stored([[0, 1, 2]], tmp_path)
    if library._opened()[0] is not None:
        assert type(corpora._search_in(corpus)) is corpora._NativeSearch
    monkeypatch.setattr(library, "_opened", lambda: (None, "no"))
    assert type(corpora._search_in(corpus)) is corpora._Search


@relaxed
@given(DOCUMENTS, st.lists(st.integers(0, KINDS - 1), min_size=1, max_size=12), LIMITS)
def test_trees_are_valid_and_every_node_came_in_the_corpus(
    folder: Path, documents: list[list[int]], text: list[int], limits: Limits
) -> None:
    draft = CorpusStore(stored(documents, folder)).open(row_of(text)).draft(text, len(text), limits)
    assert (draft.tokens[0], draft.parents[0], draft.survival[0]) == (text[-1], -1, 1.0)
    assert len(draft.tokens) == len(draft.parents) == len(draft.survival) <= limits.nodes + 1
    assert len(set(zip(draft.parents, draft.tokens, strict=True))) == len(draft.tokens)
    assert draft.survival == sorted(draft.survival, reverse=True)
    paths: list[list[int]] = [[]]
    for node in range(1, len(draft.tokens)):
        parent = draft.parents[node]
        assert parent < node and limits.cost < draft.survival[node] <= draft.survival[parent]
        assert draft.tokens[parent] not in limits.ends
        paths.append([*paths[parent], draft.tokens[node]])
    for node, survival in enumerate(draft.survival):
        shares = [s for s, parent in zip(draft.survival, draft.parents, strict=True) if parent == node]
        assert sum(shares) <= survival + 1e-12
    for path in paths[1:]:
        assert len(path) <= limits.depth
        wanted = [*text[-limits.min_match :], *path]
        assert any(document[n : n + len(wanted)] == wanted for document in documents for n in range(len(document)))


def test_the_heavier_continuation_comes_first_and_documents_have_walls(tmp_path: Path) -> None:
    corpus = stored([[1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 6], [9, 2]], tmp_path, 10)
    draft = CorpusStore(corpus).open(row_of([1, 2])).draft([1, 2], 2, WIDE)
    assert draft.tokens[1] == 4 and set(draft.tokens[1:]) == {3, 4, 5, 6}
    assert CorpusStore(corpus).open(row_of([5])).draft([9, 2, 1, 5], 4, WIDE).tokens == [5], (
        "nothing follows a document's end"
    )


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_numbers_that_lie_do_no_harm(readable: bool, seed: int, tmp_path: Path) -> None:
    """Any bytes behind an honest header: drafts are nonsense of the vocabulary, or nothing."""
    luck = random.Random(seed)
    for vocabulary in (50, 70_000):
        corpus = stored([[luck.randrange(9) for _ in range(300)] for _ in range(3)], tmp_path, vocabulary)
        content = bytearray(corpus.path.read_bytes())
        begin = 8 + int.from_bytes(content[:8], "little")
        last = bytes(content[-4:])
        content[begin:] = luck.randbytes(len(content) - begin)
        content[-4:] = last
        corpus.path.write_bytes(bytes(content))
        search = both(Corpus.open(corpus.path))[not readable]
        for _ in range(50):
            draft = search([luck.randrange(9) for _ in range(20)], Trust(), WIDE).draft
            assert all(0 <= token < vocabulary for token in draft.tokens)


# ---- learning


def view_of(tmp_path: Path) -> CorpusView:
    corpus = stored([[1, 2, 3, 4, 5]] * 4, tmp_path, 10)
    view = CorpusStore(corpus).open(row_of([1]))
    assert isinstance(view, CorpusView)
    return view


def test_what_comes_teaches_what_was_looked_up(tmp_path: Path) -> None:
    view = view_of(tmp_path)
    first = view.draft([1, 2], 2, WIDE).survival[1]
    view.draft([1, 2, 3], 3, WIDE)
    assert view.trust.odds[0] > 0
    assert view.draft([1, 2, 9, 1, 2], 5, WIDE).survival[1] != first
    for _ in range(20):
        view.draft([1, 2], 2, WIDE)
        view.draft([1, 2, 9], 3, WIDE)
        view.forget(0)
    assert view.trust.odds[0] < 0
    assert view.draft([1, 2], 2, WIDE).survival[1] < first


def test_rows_learn_for_themselves(tmp_path: Path) -> None:
    store = CorpusStore(stored([[1, 2, 3]], tmp_path, 10))
    views = [store.open(row_of([1])) for _ in range(2)]
    views[0].draft([1], 1, WIDE)
    views[0].draft([1, 9], 2, WIDE)
    assert views[0].trust.odds != views[1].trust.odds  # type: ignore[attr-defined]


def test_tentative_tokens_teach_when_they_are_firm(tmp_path: Path) -> None:
    view = view_of(tmp_path)
    view.draft([1, 2, 3], 1, WIDE)
    assert not any(view.trust.odds)
    view.forget(1)
    view.draft([1, 9], 2, WIDE)
    assert not any(view.trust.odds), "the guess behind 1 2 3 went with them"
    view.draft([1, 9, 1], 2, WIDE)
    view.draft([1, 9, 1, 2], 4, WIDE)
    assert any(view.trust.odds)


def test_one_position_teaches_once(tmp_path: Path) -> None:
    once, twice = view_of(tmp_path), view_of(tmp_path)
    once.draft([1, 2], 2, WIDE)
    twice.draft([1, 2], 2, WIDE)
    twice.draft([1, 2], 2, WIDE)
    for view in (once, twice):
        view.draft([1, 2, 3], 3, WIDE)
    assert once.trust.odds == twice.trust.odds


def test_guesses_that_wait_are_few(tmp_path: Path) -> None:
    view, text = view_of(tmp_path), [1]
    for _ in range(3 * corpora.PENDING):
        text += [1, 2, 3]
        view.draft(text, 1, WIDE)
    assert len(view._pending) <= corpora.PENDING + 1
