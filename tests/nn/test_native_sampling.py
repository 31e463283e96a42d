"""Laws, draws and acceptance of the kernels are those of the torch forms.

Draws and verdicts have the same bits, given a law. Laws let the same tokens through and differ by roundings; they have
the same bits on every instruction set, beside any rows, and with any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from drafters.heading import PROMPTS, lively, relative
from forerun.accept import exact
from forerun.accept.exact import Verdict, match, sample_and_match, sample_choices, traversal_in_torch
from forerun.chance import Dice, Purpose, draft_dice, final_dice, key_of, pick_in_torch, running_sums
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.model import Model
from forerun.native import library
from forerun.native import sampling as native
from forerun.sampling import SamplingParams, laws_in_torch
from forerun.tree import Drawn, TokenTree, Topology
from nn.kernel_oracles import REASON, instructions, same, some_examples, threads

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

CPU = torch.device("cpu")
INFINITY, NAN = float("inf"), float("nan")
PLAIN: native.Filter = (0.8, 0, 1.0, 0.0)
FILTERS: list[native.Filter] = [
    PLAIN,
    (0.0, 0, 1.0, 0.0),
    (1e-5, 0, 1.0, 0.0),
    (2.5, 1, 1.0, 0.0),
    (0.8, 50, 1.0, 0.0),
    (0.8, 400, 1.0, 0.0),
    (0.8, 0, 0.9, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 0.999, 0.0),
    (0.8, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 1.0),
    (0.7, 50, 0.8, 0.02),
    (0.7, 0, 0.8, 0.02),
]
VOCABULARIES = (1, 2, 15, 64, 65, 300, 1111)
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module", params=library.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instructions(request.param) as there:
        if not there:
            pytest.skip(f"this processor has no {request.param}")
        yield request.param


def logits_of(seed: int, *shape: int, kind: str = "smooth") -> Tensor:
    """Smooth, with many equals, or with some that are forbidden."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape) * 3
    if kind == "equals":
        values = values.round()
    if kind == "forbidden":
        values = np.where(rng.random(shape) < 0.7, -np.inf, values)
        values[..., 0] = 0
    return torch.from_numpy(values.astype(np.float32))


def is_clear(scores_V: Tensor, wanted: native.Filter) -> bool:
    """No token stands so near to a threshold that roundings decide."""
    temperature, top_k, top_p, min_p = wanted
    law = laws_in_torch(scores_V[None, None].double(), [(temperature, top_k, 1.0, 0.0)])[0, 0]
    sums, shares = law.sort().values.cumsum(0), law / law.max()
    near = (sums - (1 - top_p)).abs() < 1e-6
    return not (top_p < 1 and near.any()) and not (min_p < 1 and ((shares - min_p).abs() < 1e-6).any() and min_p > 0)


# ---- laws


@some_examples
@given(
    wanted=st.sampled_from(FILTERS),
    vocabulary=st.sampled_from(VOCABULARIES),
    kind=st.sampled_from(["smooth", "equals", "forbidden"]),
    seed=seeds,
)
@example(wanted=(0.8, 50, 1.0, 0.0), vocabulary=1111, kind="equals", seed=0)
@example(wanted=(0.8, 400, 1.0, 0.0), vocabulary=1111, kind="equals", seed=0)
@example(wanted=(0.8, 400, 1.0, 0.0), vocabulary=1111, kind="forbidden", seed=0)
@example(wanted=(0.8, 0, 0.9, 0.0), vocabulary=1111, kind="smooth", seed=0)
@example(wanted=(0.7, 50, 0.8, 0.02), vocabulary=1111, kind="smooth", seed=0)
def test_laws_are_those_of_the_torch_form(
    isa: str, wanted: native.Filter, vocabulary: int, kind: str, seed: int
) -> None:
    scores = logits_of(seed, 1, 1, vocabulary, kind=kind)
    assume(is_clear(scores[0, 0], wanted))
    found, expected = native.laws(scores, [wanted]), laws_in_torch(scores, [wanted])
    assert ((found > 0) == (expected > 0)).all()
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("count", [4, 20, 100])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.95])
def test_of_equal_tokens_the_first_are_dropped(share: float, count: int) -> None:
    scores = torch.zeros(1, 1, count)
    found, expected = (form(scores, [(1.0, 0, share, 0.0)]) for form in (native.laws, laws_in_torch))
    assert found.nonzero().tolist() == expected.nonzero().tolist()
    assert found[0, 0, -1] > 0 and (found[0, 0, 0] == 0) == (count * (1 - share) >= 1)


def test_zeros_of_either_sign_are_equal() -> None:
    scores = torch.tensor([[[0.0, -0.0, 0.0, -1.0]]])
    assert native.laws(scores, [(1.0, 1, 1.0, 0.0)])[0, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


def batch_of_everything() -> tuple[Tensor, list[native.Filter]]:
    parts = [logits_of(seed, len(FILTERS), 2, 1111, kind=kind) for seed, kind in enumerate(("smooth", "equals"))]
    return torch.cat(parts, 1), FILTERS


def test_laws_have_the_same_bits_everywhere(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every instruction set, alone, and on several threads."""
    scores, filters = batch_of_everything()
    found = native.laws(scores, filters)
    with instructions("portable"):
        assert same(found, native.laws(scores, filters))
    for row, one in enumerate(filters):
        assert same(found[row : row + 1, 1:2], native.laws(scores[row : row + 1, 1:2], [one]))
    monkeypatch.setattr(native, "SERIAL", 0)
    with threads(3):
        assert same(found, native.laws(scores, filters))


@pytest.mark.parametrize("wrong", [NAN, INFINITY, -INFINITY], ids=str)
@pytest.mark.parametrize("everything", [False, True])
def test_what_is_no_law_names_a_token_that_exists(isa: str, wrong: float, everything: bool) -> None:
    scores = logits_of(0, len(FILTERS), 1, 300)
    scores[..., slice(None) if everything else 7] = wrong
    law = native.laws(scores, FILTERS)
    tokens = native.pick(law, torch.full((len(FILTERS), 1), 0.5))
    assert ((tokens >= 0) & (tokens < 300)).all()


# ---- draws


@some_examples
@given(st.sampled_from(VOCABULARIES), st.sampled_from([torch.float32, torch.float64]), st.booleans(), seeds)
@example(65, torch.float32, True, 0)
def test_draws_are_those_of_the_torch_form(vocabulary: int, dtype: torch.dtype, sparse: bool, seed: int) -> None:
    """Also at the very borders between tokens, and at the ends."""
    rng = np.random.default_rng(seed)
    law = torch.from_numpy(rng.random((3, vocabulary)) * (rng.random((3, vocabulary)) < (0.2 if sparse else 1)))
    law[:, rng.integers(vocabulary)] = 0.5
    law = law.to(dtype)
    sums = running_sums(law)
    borders = (sums / sums[:, -1:]).clamp(max=1 - 2.0**-53)
    ends = torch.tensor([[0.0, 1 - 2.0**-53]] * 3, dtype=torch.float64)
    numbers = torch.cat([ends, borders, torch.from_numpy(rng.random((3, 20)))], 1)
    laws = law[:, None].expand(-1, numbers.shape[1], -1)
    found = native.pick(laws, numbers)
    assert found.tolist() == pick_in_torch(laws, numbers).tolist()
    assert (laws.gather(-1, found[..., None]) > 0).all()


def test_numbers_are_those_of_python() -> None:
    places, attempts = np.array([[0, 5, 2**40], [1, 0, 7]]), np.array([[3, 0, 2**50], [1, 1, 0]])
    for dice in (final_dice([key_of(-1), 2**64 - 1], [0, 9]), draft_dice([0, key_of(3)], [4, 5], [1 << 20])):
        for attempt in (None, attempts):
            for purpose in Purpose:
                found = dice.uniform(purpose, places, attempt)
                assert found.tolist() == dice.uniform_in_python(purpose, places, attempt).tolist()


# ---- acceptance


def drafts_of(seed: int, rows: int, vocabulary: int, is_chain: bool) -> tuple[TokenTree, Tensor]:
    """Trees of every kind, and a target that is somewhat like their drafter."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 7, rows)
    shapes = [(-1, *(node - 1 if is_chain else int(rng.integers(node)) for node in range(1, size))) for size in sizes]
    topology = Topology.of(shapes)
    logits = logits_of(seed, 2, rows, topology.nodes, vocabulary)
    draft, target = (
        laws_in_torch(part, [(1.0, 0, 0.9, 0.0)] * rows) for part in (logits[0], logits[0] + logits[1] / 3)
    )
    drawn = rng.choice(list(Drawn), (rows, topology.nodes)).astype(np.uint8)
    tokens = []
    for row, parents in enumerate(shapes):
        said = [0] * len(parents)
        for parent, children in topology.children[row].items():
            left = draft[row, parent].double().numpy().copy()
            if np.count_nonzero(left) < len(children):
                drawn[row, parent] = Drawn.WITH_REPLACEMENT
            for child in children:
                said[child] = int(rng.choice(vocabulary, p=left / left.sum()))
                left[said[child]] *= drawn[row, parent] == Drawn.WITH_REPLACEMENT
        tokens.append(said)
    return TokenTree(tokens, topology, CPU, drawn, draft), target


def dice_of(rows: int, seed: int) -> Dice:
    return final_dice([key_of(seed + row) for row in range(rows)], list(range(rows)))


@some_examples
@given(rows=st.integers(1, 5), vocabulary=st.sampled_from([2, 7, 64, 150]), is_chain=st.booleans(), seed=seeds)
@example(rows=5, vocabulary=150, is_chain=False, seed=0)
@example(rows=5, vocabulary=7, is_chain=False, seed=1)
@example(rows=4, vocabulary=150, is_chain=True, seed=2)
def test_verdicts_are_those_of_the_torch_form(isa: str, rows: int, vocabulary: int, is_chain: bool, seed: int) -> None:
    tree, target = drafts_of(seed, rows, vocabulary, is_chain)
    for wide in (False, True):
        laws = target.double() if wide else target
        for throw in range(4):
            dice = dice_of(rows, throw)
            assert exact._verified(tree, laws, dice) == traversal_in_torch(tree, laws, dice)


def test_certain_laws_that_agree_are_kept_and_others_are_not(isa: str) -> None:
    """Nothing is left of the target's law then, and it stands in."""
    certain = torch.zeros(1, 3, 70)
    certain[0, 0, 3] = certain[0, 1, 4] = certain[0, 2, 5] = 1
    for tokens, expected in (([9, 3, 4], Verdict([[0, 1, 2]], [5], [True])), ([9, 2, 4], Verdict([[0]], [3], [False]))):
        draft = certain.clone()
        draft[0, 0] = 0
        draft[0, 0, tokens[1]] = 1
        assert exact._verified(TokenTree.drawn_chain([tokens], draft), certain, dice_of(1, 0)) == expected


@some_examples
@given(st.integers(1, 5), st.sampled_from([2, 7, 150]), st.booleans(), seeds)
def test_sampling_and_matching_is_drawing_everywhere_and_matching(
    rows: int, vocabulary: int, is_chain: bool, seed: int
) -> None:
    drafted, _ = drafts_of(seed, rows, vocabulary, is_chain)
    tree = TokenTree(drafted.tokens, drafted.topology, CPU)
    scores = logits_of(seed + 1, rows, tree.nodes, vocabulary)
    filters, dice = [FILTERS[(seed + row) % len(FILTERS)] for row in range(rows)], dice_of(rows, seed)
    laws = native.laws(scores, filters)
    found, told = sample_and_match(tree, scores, filters, dice, tells_laws=True)
    assert found == match(tree, sample_choices(laws, tree, dice))
    assert found == sample_and_match(tree, scores, filters, dice, tells_laws=False)[0]
    assert told is not None
    for row, path in enumerate(found.kept):
        asked = torch.zeros(tree.nodes, dtype=torch.bool).index_fill(0, torch.tensor(path), True)
        assert same(told[row, asked], laws[row, asked]) and not told[row, ~asked].any()


def test_rows_fare_as_they_would_alone_on_any_threads(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, target = drafts_of(3, 9, 150, is_chain=False)
    together = exact._verified(tree, target, dice_of(9, 0))
    for row in range(9):
        dice, size = dice_of(9, 0).row(row), tree.sizes[row]
        assert tree.drawn_BN is not None and tree.laws_BNV is not None
        cut = slice(row, row + 1), slice(size)
        topology = Topology.of(tree.topology.parents[row : row + 1])
        one = TokenTree(tree.tokens[row : row + 1], topology, CPU, tree.drawn_BN[cut], tree.laws_BNV[cut])
        alone = exact._verified(one, target[cut], dice)
        assert (alone.kept[0], alone.next_tokens[0]) == (together.kept[row], together.next_tokens[row])
    monkeypatch.setattr(native, "SERIAL", 0)
    with threads(3):
        assert exact._verified(tree, target, dice_of(9, 0)) == together


def test_a_drafted_token_outside_the_vocabulary_is_an_error() -> None:
    law = torch.full((1, 2, 5), 0.2)
    for token in (-1, 5):
        with pytest.raises(IndexError, match="outside the vocabulary"):
            exact._verified(TokenTree.drawn_chain([[0, token]], law), law, dice_of(1, 0))


SAMPLED = [
    SamplingParams(temperature=0.8, seed=1, max_new_tokens=40),
    SamplingParams(temperature=1.2, top_k=5, top_p=0.9, min_p=0.02, seed=2, max_new_tokens=40),
    SamplingParams(max_new_tokens=40),
]


@pytest.mark.parametrize("drafter", ["none", "lookup", "small", "small, tree", "verified"])
def test_a_seed_says_the_same_with_and_without_the_kernels(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What roundings of laws can change is a token in millions."""
    kinds: dict[str, Any] = {
        "small": {"drafter": "small", "checkpoint": "MODEL"},
        "small, tree": {"drafter": "small", "checkpoint": "MODEL", "widths": [2, 2]},
        "verified": {"drafter": "verified", "checkpoint": "MODEL", "inner": "lookup"},
    }

    def said() -> list[list[int]]:
        made = build(kinds.get(drafter, drafter), Workshop(Model(lively(), 1), {"MODEL": relative()}.__getitem__))
        return [output.token_ids for output in Engine(lively(), made).generate(PROMPTS[:3], SAMPLED)]

    natively = said()
    monkeypatch.setattr(native, "is_quick", lambda: False)
    assert said() == natively
