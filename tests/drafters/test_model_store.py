"""The model store: what was said is found again, by nobody else, in bounded memory, and after a restart."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fakes import TableNetwork, engine_of, plain
from forerun.drafting.drafter import Context, Drafter
from forerun.errors import DrafterError
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.slots import Slots
from forerun.stores.automaton import SEPARATOR, SuffixAutomaton
from forerun.stores.follower import Automaton, automaton_of
from forerun.stores.model import LEFT, ModelStore
from forerun.stores.said import SaidFile
from forerun.stores.store import Draft, Limits, View
from forerun.tree import TokenTree

relaxed = settings(deadline=None)
LIMITS = Limits(nodes=16, depth=16, min_match=1, cost=1e-9)
A, B = list(range(100, 140)), list(range(200, 240))
LARGE = 10_000


def row_of(prompt: Sequence[int], output: Sequence[int] = (), tenant: str = "") -> Row:
    params = SamplingParams(temperature=0, tenant=tenant)
    return Row([*prompt, *output], len(prompt), params, key=0, limit=100_000)


def say(store: ModelStore, output: Sequence[int], tenant: str = "", prompt: Sequence[int] = (1,)) -> None:
    """A row comes, says this, and ends."""
    row = row_of(prompt, tenant=tenant)
    view = store.open(row)
    row.tokens += output
    store.close(row, view)


def draft(store: ModelStore, text: Sequence[int], tenant: str = "", limits: Limits = LIMITS) -> Draft:
    """What a new row with this prompt is told."""
    view = store.open(row_of(text, tenant=tenant))
    return view.draft(text, len(text), limits)


def chain(found: Draft) -> list[int]:
    """The first child of node 0, its first child, and so on."""
    said, node = [], 0
    while node in found.parents[1:]:
        node = found.parents.index(node)
        said.append(found.tokens[node])
    return said


def knows(store: ModelStore, text: Sequence[int], tenant: str = "") -> bool:
    return chain(draft(store, text[:8], tenant))[:4] == list(text[8:12])


def nothing(found: Draft) -> bool:
    return (found.parents, found.survival) == ([-1], [1.0])


# ---- what is found


def test_a_cold_store_is_silent_and_a_warm_one_says_it_again() -> None:
    store = ModelStore(LARGE)
    assert nothing(draft(store, A[:8]))
    say(store, A)
    assert chain(draft(store, A[:8])) == A[8:24]
    assert len(store) == len(A) + 1


def test_only_the_output_is_stored() -> None:
    store = ModelStore(LARGE)
    say(store, B, prompt=A)
    assert knows(store, B)
    assert not knows(store, A)


def test_what_is_tentative_was_not_said() -> None:
    store = ModelStore(LARGE)
    row = row_of([1], A)
    row.tentative = 20
    store.close(row, store.open(row))
    assert len(store) == 20 + 1


def test_a_row_that_said_nothing_leaves_nothing() -> None:
    store = ModelStore(LARGE)
    say(store, [])
    assert len(store) == 0


def test_a_text_that_is_said_again_is_stored_once() -> None:
    store = ModelStore(LARGE)
    for _ in range(5):
        say(store, A)
    assert len(store) == len(A) + 1


@relaxed
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=6), st.integers(0, 2**32))
def test_every_path_was_said_in_one_piece(texts: list[list[int]], seed: int) -> None:
    store, luck = ModelStore(LARGE), random.Random(seed)
    for text in texts:
        say(store, text)
    prompt = [luck.randrange(4) for _ in range(10)]
    found = draft(store, prompt, limits=Limits(30, 10, 1, 1e-9))
    assert SEPARATOR not in found.tokens
    assert all(node < len(found.tokens) for node in found.parents)
    paths = [list[int]()]
    for token, parent in zip(found.tokens[1:], found.parents[1:], strict=True):
        paths.append([*paths[parent], token])
        before = prompt + paths[-1]
        assert any(inside(text, before[-2:]) for text in texts), "it came there behind the token before it"
    assert all(found.survival[node] <= found.survival[parent] for node, parent in enumerate(found.parents) if node)


def inside(text: Sequence[int], pattern: Sequence[int]) -> bool:
    return any(list(text[start : start + len(pattern)]) == list(pattern) for start in range(len(text)))


def test_no_draft_runs_from_one_text_into_the_next() -> None:
    store = ModelStore(LARGE)
    say(store, A)
    say(store, B)
    assert chain(draft(store, A[-8:-4])) == A[-4:]
    assert nothing(draft(store, A[-8:]))


def test_nothing_follows_what_ends_the_text() -> None:
    store = ModelStore(LARGE)
    say(store, A)
    ending = Limits(16, 16, 1, 1e-3, frozenset({A[10]}))
    assert chain(draft(store, A[:8], limits=ending)) == A[8:11]


def test_vocabularies_beyond_16_bits() -> None:
    store, text = ModelStore(LARGE), [70_000, 200_000, 2**31 - 2, 65_536] * 2
    say(store, text)
    assert chain(draft(store, text[:3], limits=LIMITS))[:1] == [65_536]


def test_a_view_follows_its_row_and_what_others_say_meanwhile() -> None:
    store = ModelStore(LARGE)
    row = row_of([1])
    view = store.open(row)
    assert nothing(view.draft(row.tokens, 1, LIMITS))
    row.tokens += A[:8]
    assert nothing(view.draft(row.tokens, len(row.tokens), LIMITS))
    say(store, A)
    assert chain(view.draft(row.tokens, len(row.tokens), LIMITS)) == A[8:24]
    say(store, B)
    row.tokens += A[8:10]
    assert chain(view.draft(row.tokens, len(row.tokens), LIMITS)) == A[10:26]


def test_tentative_tokens_are_followed_but_not_kept() -> None:
    store = ModelStore(LARGE)
    say(store, A)
    say(store, B)
    view, text = store.open(row_of(A[:8])), [*A[:8], *B[:8]]
    assert chain(view.draft(text, 8, LIMITS)) == B[8:24]
    view.forget(8)
    assert chain(view.draft([*A[:8], A[8]], 8, LIMITS)) == A[9:25]
    assert chain(view.draft(A[:6], 6, LIMITS)) == A[6:22], "a text that shrinks after all is found again"


def test_odds_are_handed_on() -> None:
    """Behind 1 comes something new every time, so what came last is never right, and rows that come later know it."""
    store = ModelStore(LARGE)
    first = [token for number in range(20) for token in (1, 1000 + number)]
    say(store, first)
    bold = draft(store, [5, 1]).survival[1]
    for row in range(1, 6):
        say(store, [token + 100 * row * (token > 1) for token in first])
    assert draft(store, [5, 1]).survival[1] < 0.9 * bold
    store.reset()
    say(store, first)
    assert draft(store, [5, 1]).survival[1] == bold


# ---- tenants


def test_tenants_see_nothing_of_each_other() -> None:
    store = ModelStore(LARGE)
    say(store, A, "ann")
    say(store, B, "bob")
    assert knows(store, A, "ann")
    assert knows(store, B, "bob")
    for tenant, foreign in (("ann", B), ("bob", A), ("", A), ("", B)):
        assert nothing(draft(store, foreign[:8], tenant))


@relaxed
@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 3), min_size=1, max_size=20)), max_size=8))
def test_another_tenant_changes_no_draft(said: list[tuple[bool, list[int]]]) -> None:
    shared, alone = ModelStore(LARGE), ModelStore(LARGE)
    for mine, text in said:
        say(shared, text, "me" if mine else "other")
        if mine:
            say(alone, text, "me")
    for text in ([0, 1], [2], [3, 3, 1]):
        assert draft(shared, text, "me") == draft(alone, text, "me")


def test_reset_forgets_one_tenant_or_all() -> None:
    store = ModelStore(LARGE)
    for tenant in ("ann", "bob"):
        say(store, A, tenant)
    view = store.open(row_of(A[:8], tenant="ann"))
    assert not nothing(view.draft(A[:8], 8, LIMITS))
    store.reset("ann")
    assert nothing(view.draft(A[:8], 8, LIMITS))
    assert not knows(store, A, "ann")
    assert knows(store, A, "bob")
    say(store, A, "ann")
    assert not nothing(view.draft(A[:8], 8, LIMITS))
    store.reset()
    assert len(store) == 0
    assert not knows(store, A, "bob")


# ---- how much is kept


def text_of(number: int, length: int = 20) -> list[int]:
    return list(range(100 * number, 100 * number + length))


def test_the_least_recently_used_goes() -> None:
    """Four texts of 20 tokens, 21 with the separator, fit into 84; with a fifth all but 63 go: the two oldest."""
    store = ModelStore(84)
    for number in range(4):
        say(store, text_of(number))
    assert len(store) == 84
    say(store, text_of(0))  # used: 1, 2, 3, 0
    say(store, text_of(4))
    assert len(store) == 63
    assert [knows(store, text_of(number)) for number in range(5)] == [True, False, False, True, True]


def test_a_text_is_used_when_its_tokens_are_accepted() -> None:
    store = ModelStore(84)
    for number in range(4):
        say(store, text_of(number))
    row = row_of(text_of(1)[:8])
    view = store.open(row)
    assert chain(view.draft(row.tokens, 8, LIMITS)) == text_of(1)[8:]
    view.accepted(3)
    row.tokens += [*text_of(1)[8:11], 7]
    view.draft(row.tokens, len(row.tokens), LIMITS)  # used: 0, 2, 3, 1
    say(store, text_of(4))
    assert [knows(store, text_of(number)) for number in range(5)] == [False, True, False, True, True]


def test_what_was_accepted_last_is_told_at_the_close() -> None:
    store = ModelStore(84)
    for number in range(4):
        say(store, text_of(number))
    row = row_of(text_of(0)[:8])
    view = store.open(row)
    view.draft(row.tokens, 8, LIMITS)
    view.accepted(2)
    row.tokens += text_of(0)[8:10]
    store.close(row, view)  # 3 more tokens: 1 and 2 go
    assert [knows(store, text_of(number)) for number in range(4)] == [True, False, False, True]


def test_of_a_text_that_is_too_long_the_end_is_kept() -> None:
    store = ModelStore(20)
    say(store, A)
    assert len(store) == 20
    assert knows(store, A[-19:])
    assert not knows(store, A[:20])


@pytest.mark.parametrize("make", [SuffixAutomaton, automaton_of])
def test_memory_is_bounded(make: type[SuffixAutomaton]) -> None:
    store, luck, largest = ModelStore(2000, make=make), random.Random(0), 0
    for number in range(300):
        say(store, [luck.randrange(50) for _ in range(luck.randint(1, 90))], tenant=str(number % 3))
        assert len(store) <= 2000
        largest = max(largest, store.nbytes)
    assert len(store) >= LEFT * 2000 - 91
    assert largest <= 400 * 2000


def test_a_tenant_without_texts_takes_no_memory() -> None:
    store = ModelStore(100)
    for number in range(50):
        say(store, text_of(number), tenant=str(number))
    assert len(store._memories) <= 4


@pytest.mark.parametrize("capacity", [0, 1, -5, 2.5, True, "many"])
def test_a_wrong_capacity_is_named(capacity: int) -> None:
    with pytest.raises(DrafterError, match=rf"at least 2, not {capacity!r}$"):
        ModelStore(capacity)


def test_threads_may_share_a_store() -> None:
    store, wrong = ModelStore(3000), list[str]()

    def work(tenant: str, base: int) -> None:
        try:
            for number in range(60):
                text = [base + token for token in text_of(number, 40)]
                say(store, text, tenant)
                found = draft(store, text[:8], tenant)
                if any(not base <= token < base + 10_000 for token in found.tokens):
                    wrong.append(tenant)
        except Exception as error:
            wrong.append(repr(error))

    threads = [Thread(target=work, args=(str(k % 2), 10_000 * (k % 2))) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(store) <= 3000


def test_without_memory_the_store_forgets_and_goes_on() -> None:
    class Poor(SuffixAutomaton):
        def extend(self, tokens: Sequence[int]) -> None:  # type: ignore[override]
            if 666 in list(tokens):
                raise MemoryError
            super().extend(tokens)

    store = ModelStore(LARGE, make=Poor)
    say(store, A, "ann")
    say(store, B, "bob")
    with pytest.warns(RuntimeWarning, match="smaller capacity"):
        say(store, [1, 666], "ann")
    assert not knows(store, A, "ann")
    assert knows(store, B, "bob")
    say(store, A, "ann")
    assert knows(store, A, "ann")


@relaxed
@given(st.integers(0, 2**32))
def test_native_and_readable_automata_make_the_same_store(seed: int) -> None:
    luck, stores = random.Random(seed), [ModelStore(600, make=make) for make in (SuffixAutomaton, automaton_of)]
    rows: list[tuple[Row, list[View]]] = []
    for _ in range(60):
        if len(rows) < 3:
            row = row_of([luck.randrange(4) for _ in range(luck.randint(1, 40))], tenant=luck.choice("ab"))
            rows.append((row, [store.open(row) for store in stores]))
        row, views = luck.choice(rows)
        drafts = [view.draft(row.tokens, len(row.tokens), LIMITS) for view in views]
        assert drafts[0] == drafts[1]
        row.tokens += [luck.randrange(4) for _ in range(luck.randint(1, 20))]
        if luck.random() < 0.5:
            for view in views:
                view.accepted(1)
        if luck.random() < 0.3:
            for store, view in zip(stores, views, strict=True):
                store.close(row, view)
            rows.remove((row, views))
    assert list(stores[0]._texts.values()) == list(stores[1]._texts.values())


# ---- the file


open_stores: dict[Path, ModelStore] = {}


def kept(path: Path, capacity: int = LARGE, vocabulary: int = 100_000, tokenizer: str | None = None) -> ModelStore:
    """A store that remembers here; the one before leaves the file to it."""
    if path in open_stores:
        open_stores.pop(path).shut()
    store = open_stores[path] = ModelStore(capacity, path, vocabulary=vocabulary, tokenizer=tokenizer)
    return store


def copy(path: Path) -> Path:
    """Of a file that is in use."""
    path.with_name("copy").write_bytes(path.read_bytes())
    return path.with_name("copy")


def test_a_store_goes_on_after_a_restart(tmp_path: Path) -> None:
    path, large = tmp_path / "said", [99_999, 70_000, 65_536] * 4
    store = kept(path)
    for text, tenant in ((A, "ann"), (B, "bob"), (large, "ann"), (A, "ann")):
        say(store, text, tenant)
    again = kept(path)
    assert len(again) == len(store)
    assert knows(again, A, "ann")
    assert knows(again, B, "bob")
    assert not knows(again, B, "ann")
    for text in (A[:3], large[:4]):
        assert draft(again, text, "ann") == draft(kept(path), text, "ann")
        assert chain(draft(again, text, "ann")) == chain(draft(store, text, "ann"))


def test_the_format(tmp_path: Path) -> None:
    path = tmp_path / "said"
    say(kept(path, tokenizer="abc"), [1, 2], "ann")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"forerun": "said", "version": 1, "vocabulary": 100_000, "tokenizer": "abc"},
        {"tenant": "ann", "tokens": [1, 2]},
    ]
    assert path.stat().st_mode & 0o077 == 0, "what was said is nobody else's business"


@pytest.mark.parametrize("cut", range(1, 12, 3))
def test_a_text_cut_short_by_a_crash_is_ignored_and_the_next_one_is_not_harmed(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "said"
    store = kept(path)
    say(store, A)
    say(store, B)
    path.write_bytes(path.read_bytes()[:-cut])
    store = kept(path)
    assert (knows(store, A), knows(store, B)) == (True, False)
    say(store, B)
    store = kept(path)
    assert (knows(store, A), knows(store, B)) == (True, True)


def test_an_empty_file_is_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "said"
    path.touch()
    say(kept(path), A)
    assert knows(kept(path), A)


HEADER = '{"forerun":"said","version":1,"vocabulary":100000,"tokenizer":"abc"}\n'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("hello", "its first line is not the header"),
        ("\n", "its first line is not the header"),
        ("[1]\n", "its first line is not the header"),
        ('{"forerun":"distilled","version":1}\n', "its first line is not the header"),
        (HEADER.replace('"version":1', '"version":2'), "it is of version 2, and this is 1"),
        (HEADER.replace("100000", "4096"), "its vocabulary is 4096, and here it is 100000"),
        (HEADER.replace("abc", "xyz"), "its tokenizer is 'xyz', and here it is 'abc'"),
    ],
)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "said"
    path.write_text(content)
    with pytest.raises(DrafterError) as caught:
        kept(path, tokenizer="abc")
    assert str(caught.value).startswith(f"{path} is no file of what this model said: {reason}")
    assert str(caught.value).endswith("; name another file, or remove this one")
    assert path.read_text() == content


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[" * 100_000,
        '{"tenant":1,"tokens":[1]}',
        '{"tenant":"","tokens":7}',
        '{"tenant":"","tokens":[1,100000]}',
        '{"tenant":"","tokens":[-1]}',
        '{"tenant":"","tokens":[1.5]}',
        '{"tenant":"","tokens":[true]}',
    ],
)
def test_a_line_that_is_no_text_is_skipped(tmp_path: Path, line: str) -> None:
    path, good = tmp_path / "said", json.dumps({"tenant": "", "tokens": A})
    path.write_text(HEADER + f"{good}\n{line}\n{good.replace('1', '2')}\n")
    with pytest.warns(RuntimeWarning, match=r"said: 1 of 3 lines are no texts .* the first one is line 3: remove them"):
        store = kept(path)
    assert knows(store, A)
    assert line in path.read_text()


def test_of_a_text_for_which_there_is_no_room_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "said", os.write
    store = kept(path)
    say(store, A)
    before = path.read_bytes()
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:9]))
    with pytest.warns(RuntimeWarning, match="no longer written to .*No space left"):
        say(store, B)
    assert path.read_bytes() == before


def test_a_file_belongs_to_one_store(tmp_path: Path) -> None:
    path = tmp_path / "said"
    first = kept(path, capacity=84)
    code = "import sys, pathlib; from forerun.stores.model import ModelStore as M;"
    code += "M(84, pathlib.Path(sys.argv[1]), vocabulary=100_000)"
    for number in range(12):  # it is written anew in between
        say(first, text_of(number))
        with pytest.raises(
            DrafterError, match="said is in use by another engine, or another process: end that one, or"
        ):
            ModelStore(84, path, vocabulary=100_000)
    assert (
        "is in use by another"
        in subprocess.run([sys.executable, "-c", code, path], capture_output=True).stderr.decode()
    )
    first.shut()
    say(first, A)
    second = ModelStore(84, path, vocabulary=100_000)
    assert knows(second, text_of(11)) and not knows(second, A)
    del second
    assert len(ModelStore(84, path, vocabulary=100_000))


def test_an_interrupted_store_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(tenants: object) -> None:
        raise KeyboardInterrupt

    store = ModelStore(84)
    for number in range(4):
        say(store, text_of(number))
    row = row_of(text_of(0)[:8])
    view = store.open(row)
    view.draft(row.tokens, 8, LIMITS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "_build", interrupted)
        say(store, text_of(4))
    view.accepted(3)
    row.tokens += text_of(0)[8:11]
    view.draft(row.tokens, len(row.tokens), LIMITS)
    say(store, text_of(5))
    assert knows(store, text_of(5))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "said"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(DrafterError, match="its first line is not the header"):
        kept(path)


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DrafterError, match=r"cannot be used for what the model said \(.*\): name another file"):
        kept(tmp_path / "nowhere" / "said")
    with pytest.raises(DrafterError, match="cannot be used"):
        kept(tmp_path)
    for place in (Path("/dev/null"), tmp_path / "a\0b"):
        with pytest.raises(
            DrafterError, match=r"^[^\0]* cannot be used for what the model said \(.*\): name another file"
        ):
            kept(place)
    with pytest.raises(DrafterError, match="give the vocabulary's size"):
        ModelStore(10, tmp_path / "said")


def test_a_file_that_can_no_longer_be_written_stops_nobody(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "said"
    path.parent.mkdir()
    store = kept(path)
    path.unlink()
    path.parent.rmdir()
    with pytest.warns(RuntimeWarning, match="no longer written"):
        say(store, A)
    say(store, B)
    assert knows(store, A)
    assert knows(store, B)


def test_a_file_that_has_grown_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "said"
    store = kept(path)
    for number in range(20):
        say(store, text_of(number))
    before = path.read_bytes()
    kept(path, capacity=20 * 21)
    assert path.read_bytes() == before
    small = kept(path, capacity=84)
    assert len(path.read_bytes().splitlines()) == 1 + 4
    assert [knows(small, text_of(number)) for number in (0, 15, 16, 19)] == [False, False, True, True]
    assert not list(tmp_path.glob("*.partial"))
    for number in range(40):
        say(small, text_of(number))
        assert SaidFile(copy(path), 100_000, None).load()
    assert path.stat().st_size < len(before), "while it is in use, too"


def test_reset_forgets_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "said"
    store = kept(path)
    say(store, A, "ann")
    say(store, B, "bob")
    store.reset("ann")
    assert "ann" not in path.read_text()
    again = kept(copy(path))
    assert (knows(again, A, "ann"), knows(again, B, "bob")) == (False, True)
    store.reset()
    assert len(kept(path)) == 0


# ---- in the engine


class FromStore(Drafter):
    """Drafts from the store alone."""

    name, max_nodes = "from store", 8

    def __init__(self, store: ModelStore):
        self.store = store
        self._rows: Slots[tuple[Row, View]] = Slots()

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        self._rows.admit((row, self.store.open(row)))

    def release(self, slot: int) -> None:
        gone = self._rows.release(slot)
        if gone is not None:
            self.store.close(*gone)

    def propose(self, context: Context) -> TokenTree:
        limits = [
            Limits(min(8, *context.budgets), depth, 1, 0.02, row.ends) for (row, _), depth in self._paired(context)
        ]
        drafts = [
            view.draft(row.tokens, len(row.tokens), within)
            for (row, view), within in zip(self._rows, limits, strict=True)
        ]
        return TokenTree.of([one.tokens for one in drafts], [one.parents for one in drafts], context.device)

    def _paired(self, context: Context) -> list[tuple[tuple[Row, View], int]]:
        return list(zip(self._rows, context.depths, strict=True))


@pytest.mark.parametrize("make", [SuffixAutomaton, automaton_of])
def test_poison_changes_nothing_but_the_drafts(make: type[Automaton]) -> None:
    target, luck = TableNetwork(vocab_size=5, seed=3, order=2), random.Random(0)
    store = ModelStore(4000, make=make)
    for _ in range(40):
        say(store, [luck.randrange(5) for _ in range(60)])
    prompts = [[1, 2, 3, 1, 2], [4], [0, 0, 0, 0], [1, 2, 3, 1, 2]]
    engine = engine_of(target, FromStore(store), max_rows=2)
    for _ in range(2):
        outputs = engine.generate(prompts, SamplingParams(temperature=0, max_new_tokens=90))
        assert [output.token_ids for output in outputs] == [plain(target, prompt, 90) for prompt in prompts]
    assert outputs[0].stats.tokens_per_step > 3, "the second time it had heard the answer"
