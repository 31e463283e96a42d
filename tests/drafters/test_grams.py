"""Hierarchy Drafting's table: least recently used goes first, rows become trees."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.stores.grams import Grams, GramShape, GramStore, table_of
from forerun.stores.store import Draft, Limits

PAPER = GramShape()
WIDE = Limits(nodes=64, depth=16, min_match=1, cost=1e-6)


def row_of(tokens: Sequence[int], tentative: int = 0) -> Row:
    return Row(list(tokens), 1, SamplingParams(temperature=0), key=0, limit=1000, tentative=tentative)


def drafted(text: Sequence[int], shape: GramShape = PAPER, limits: Limits = WIDE) -> Draft:
    return GramStore(shape).open(row_of(text)).draft(text, len(text), limits)


def leaves(draft: Draft) -> list[list[int]]:
    """The paths to the nodes without children, in node order."""
    found = []
    for node in range(1, len(draft.tokens)):
        if node not in draft.parents:
            path = []
            while node:
                path.insert(0, draft.tokens[node])
                node = draft.parents[node]
            found.append(path)
    return found


def test_the_least_recently_touched_goes_first() -> None:
    table = Grams(2)
    for gram in "abac":
        table.touch(7, (ord(gram),))
    assert table.rows(7) == [(ord("a"),), (ord("c"),)]
    assert table.rows(8) == () and len(table) == 2


PROMPT = [1, 2, 3, 4, 5, 1, 2, 3, 4, 6]


def test_every_gram_of_the_prompt_is_touched() -> None:
    table = GramStore().open(row_of(PROMPT)).table  # type: ignore[attr-defined]
    assert table.rows(1) == [(2, 3, 4, 5), (2, 3, 4, 6)]
    assert table.rows(2) == [(3, 4, 5, 1)]


def test_the_newest_row_comes_first_and_in_the_repository_the_oldest() -> None:
    few = Limits(nodes=4, depth=4, min_match=1, cost=1e-6)
    assert leaves(drafted([*PROMPT, 1], limits=few)) == [[2, 3, 4, 6]]
    assert leaves(drafted([*PROMPT, 1], GramShape(compat=True), few)) == [[2, 3, 4, 5]]
    assert leaves(drafted([*PROMPT, 1], GramShape(rows=1))) == [[2, 3, 4, 6]]


def test_rows_that_begin_alike_share_their_nodes() -> None:
    draft = drafted([*PROMPT, 1])
    assert draft.tokens == [1, 2, 3, 4, 6, 5]
    assert draft.parents == [-1, 0, 1, 2, 3, 3]


def test_the_model_tier_counts_responses() -> None:
    table = table_of([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5]])
    assert table.rows(1) == [(2, 3, 4, 5)] and table.rows(2) == [(3, 4, 5, 6)]
    assert len(table_of([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5]], most=1)) == 1
    often, twice = [1, 2, 3, 4, 5], [1, 9, 9, 9, 9]
    table = table_of([twice * 5, often, often], GramShape(width=1))
    assert table.rows(1) == [(2, 3, 4, 5)], "a gram counts once per response"
    store = GramStore(table=table)
    assert leaves(store.open(row_of([8])).draft([8, 1], 2, WIDE)) == [[2, 3, 4, 5]]


def test_tentative_tokens_are_followed_and_not_learned() -> None:
    view = GramStore(GramShape(length=2)).open(row_of([1, 2, 1]))
    assert leaves(view.draft([1, 2, 1, 3, 1], 3, WIDE)) == [[2]]
    view.forget(3)
    assert leaves(view.draft([1, 2, 1, 3, 1], 5, WIDE)) == [[3], [2]]
    view.forget(2)
    assert leaves(view.draft([1, 2, 1], 2, WIDE)) == [[2]]


def test_nothing_follows_an_end_and_one_token_is_all_that_matches() -> None:
    ends = Limits(64, 16, 1, 1e-6, frozenset([3]))
    assert leaves(drafted([*PROMPT, 1], limits=ends)) == [[2, 3]]
    assert leaves(drafted([*PROMPT, 3], limits=ends)) == []
    assert leaves(drafted([*PROMPT, 1], limits=Limits(64, 16, 2, 1e-6))) == []


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(0, 9),
    st.integers(0, 5),
    st.sampled_from([0, 0.1]),
)
def test_trees_are_valid(text: list[int], nodes: int, depth: int, cost: float) -> None:
    draft = drafted(text, GramShape(length=4), Limits(nodes, depth, 1, cost))
    assert draft.tokens[0] == text[-1] and len(draft.tokens) <= nodes + 1
    assert len(set(zip(draft.parents, draft.tokens, strict=True))) == len(draft.tokens)
    assert all(len(path) <= depth for path in leaves(draft))
    for node, survival in enumerate(draft.survival):
        below = [s for s, parent in zip(draft.survival, draft.parents, strict=True) if parent == node]
        assert sum(below) <= survival and all(share > cost for share in below)


@pytest.mark.parametrize("step", [1, 3])
def test_a_row_grows_as_if_it_had_been_read_at_once(step: int) -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2, 1]
    view = GramStore(GramShape(length=3)).open(row_of(text[:3]))
    for end in range(3, len(text) + 1, step):
        view.draft(text[:end], end, WIDE)
    assert view.draft(text, len(text), WIDE) == drafted(text, GramShape(length=3))
