"""Laws are those of transformers, at every node of a tree, and meaningless requests are refused in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from enumeration import one_law
from forerun.accept.judge import judge, node_scores
from forerun.chance import key_of
from forerun.drafting.growth import draft_laws
from forerun.errors import RequestError
from forerun.row import Row, final_chance
from forerun.sampling import SYNONYMS, Prefix, SamplingParams, edited, laws
from forerun.tree import TokenTree

CPU = torch.device("cpu")
VOCAB = 7


def theirs(logits_V: Tensor, prefix: Sequence[int], params: SamplingParams) -> Tensor:
    """What transformers samples from, its own processors in its own order (generation/utils.py,
    _get_logits_processor)."""
    from transformers import generation as g

    steps: list[Callable[[Tensor, Tensor], Tensor]] = []
    if params.logit_bias:
        steps.append(g.SequenceBiasLogitsProcessor({(token,): float(b) for token, b in params.logit_bias.items()}))
    if params.repetition_penalty != 1:
        steps.append(g.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps += params.processors
    steps.append(g.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(g.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(g.TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(g.MinPLogitsWarper(params.min_p))
    ids, scores = torch.tensor([list(prefix)]), logits_V[None].float()
    for step in steps:
        scores = step(ids, scores)
    return scores.softmax(-1)[0]


def ours(logits_V: Tensor, prefix: Sequence[int], params: SamplingParams) -> Tensor:
    scores = logits_V[None].float()
    if params.edits_scores:
        scores = edited(scores, params, [Prefix(list(prefix), 1)])
    return laws(scores[None], [params])[0, 0]


logits = st.lists(
    st.one_of(st.sampled_from([0.0, 1.0, -2.0, -math.inf]), st.floats(-8, 8, width=32)), min_size=VOCAB, max_size=VOCAB
).filter(lambda values: any(value > -math.inf for value in values))
prefixes = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(
    logits,
    prefixes,
    st.sampled_from([0.2, 0.7, 1.0, 2.5]),
    st.sampled_from([0, 1, 2, 4, VOCAB, 99]),
    st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    st.sampled_from([1.0, 0.5, 1.3, 4.0]),
    st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-math.inf, -1.5, 0.25, 3.0]), max_size=2),
)
def test_laws_are_those_of_transformers(
    values: list[float],
    prefix: list[int],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    bias: dict[int, float],
) -> None:
    if all(value == -math.inf or bias.get(token) == -math.inf for token, value in enumerate(values)):
        return  # nothing may be said at all
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
        logit_bias=bias,
    )
    scores = torch.tensor(values)
    own, other = ours(scores, prefix, params), theirs(scores, prefix, params)
    torch.testing.assert_close(own.sort().values, other.sort().values, rtol=1e-5, atol=1e-7)
    free = ours(scores, prefix, replace(params, top_k=0, top_p=1.0, min_p=0.0))
    differing = free[~torch.isclose(own, other, rtol=1e-5, atol=1e-7)]
    assert not len(differing) or differing.max() - differing.min() < 1e-6, "of tokens equally likely, any may be left"


def test_a_bias_counts_before_a_penalty_as_in_transformers() -> None:
    """A bias that lifts a seen token above zero is divided by the penalty, not multiplied before."""
    params = SamplingParams(temperature=1.0, repetition_penalty=2.0, logit_bias={0: 4.0})
    scores = torch.tensor([-1.0, 0.0, 0.5])
    assert edited(scores[None], params, [Prefix([0], 1)])[0].tolist() == [1.5, 0.0, 0.5]
    torch.testing.assert_close(ours(scores, [0], params), theirs(scores, [0], params))


@settings(max_examples=60, deadline=None)
@given(
    prefixes,
    prefixes,
    st.floats(-2, 2).map(lambda x: round(x, 2)),
    st.floats(-2, 2).map(lambda x: round(x, 2)),
    st.integers(0, 99),
)
def test_presence_and_frequency_penalties_count_the_output_alone(
    prompt: list[int], output: list[int], presence: float, frequency: float, seed: int
) -> None:
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    scores = torch.from_numpy(np.random.default_rng(seed).normal(size=VOCAB)).float()
    expected = [
        float(scores[token]) - frequency * output.count(token) - presence * (token in output) for token in range(VOCAB)
    ]
    found = edited(scores[None], params, [Prefix(prompt + output, len(prompt))])[0]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_editing_leaves_the_models_own_logits_alone() -> None:
    scores = torch.zeros(1, 3)
    edited(scores, SamplingParams(logit_bias={1: 5.0}, presence_penalty=1.0), [Prefix([0, 1], 1)])
    assert scores.tolist() == [[0.0, 0.0, 0.0]]


# ---- rows and nodes


def rng_logits(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).double()


def test_greedy_rows_are_certain_of_their_best_token_the_first_of_equals() -> None:
    scores = torch.tensor([[[1.0, 3.0, 3.0]], [[1.0, 3.0, 3.0]]])
    law = laws(scores, [SamplingParams(), SamplingParams(temperature=1.0)])
    assert law[0, 0].tolist() == [0, 1, 0]
    torch.testing.assert_close(law[1], scores[1].softmax(-1))
    assert laws(scores, [SamplingParams()] * 2)[:, 0].tolist() == [[0, 1, 0]] * 2


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                SamplingParams(),
                SamplingParams(temperature=0.7),
                SamplingParams(temperature=1.0, top_k=2),
                SamplingParams(temperature=2.0, top_p=0.6),
                SamplingParams(temperature=1.0, min_p=0.3),
                SamplingParams(temperature=1.0, top_k=3, top_p=0.8, min_p=0.1),
            ]
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 99),
)
def test_each_row_of_a_batch_has_the_law_it_would_have_alone(params: list[SamplingParams], seed: int) -> None:
    scores = rng_logits(seed, len(params), 3, VOCAB)
    together = laws(scores, params)
    for row, one in enumerate(params):
        torch.testing.assert_close(together[row], laws(scores[row : row + 1], [one])[0], rtol=0, atol=0)
    assert together.dtype == torch.float64


def test_laws_keep_the_precision_of_the_scores_and_have_at_least_fp32() -> None:
    for given_dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert laws(torch.zeros(1, 1, 3, dtype=given_dtype), [SamplingParams(temperature=1.0)]).dtype == expected


def test_the_coldest_temperature_still_gives_a_law() -> None:
    law = one_law(torch.tensor([-90.0, 80.0, 79.0]), SamplingParams(temperature=1e-5))
    assert law.tolist() == [0, 1, 0]


class NoRepeat:
    """A processor in transformers' protocol: forbids the newest token, and likes tokens by the length of the prefix."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        assert ids.dtype == torch.int64 and scores.shape == (1, VOCAB)
        scores = scores + 0.1 * ids.shape[1] * torch.arange(VOCAB, dtype=scores.dtype)
        return scores.index_fill(1, ids[0, -1:], -math.inf)


def tree_of_paths() -> tuple[TokenTree, Row]:
    params = SamplingParams(
        temperature=0.8,
        repetition_penalty=1.4,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={2: 1.5},
        processors=(NoRepeat(),),
    )
    row = Row([3, 4, 5, 3], prompt_length=2, params=params, key=key_of(1), limit=99)
    tree = TokenTree.of([[3, 1, 2, 5, 1, 0]], [[-1, 0, 0, 1, 2, 3]], CPU)
    return tree, row


def test_every_node_is_edited_with_its_own_path() -> None:
    tree, row = tree_of_paths()
    scores = rng_logits(0, 1, tree.nodes, VOCAB)
    found = node_scores(tree, scores, [row])
    for node in range(tree.nodes):
        path = [int(tree.tokens_BN[0, n]) for n in tree.topology.path(0, node)[1:]]
        alone = edited(scores[0, node : node + 1], row.params, [Prefix(row.tokens + path, 2)])
        torch.testing.assert_close(found[0, node], alone[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_editing_a_tree_leaves_the_models_own_logits_alone(dtype: torch.dtype) -> None:
    """Log-probabilities are reported of them, and stopping rules see them."""
    tree, row = tree_of_paths()
    logits = rng_logits(0, 1, tree.nodes, VOCAB).to(dtype)
    before = logits.clone()
    assert not (node_scores(tree, logits, [row]) == before).all()
    draft_laws(logits[:, :1], [row], [[[]]])
    assert (logits == before).all()


def test_a_best_token_that_is_known_is_used_where_nothing_edits_the_scores() -> None:
    tree, _ = tree_of_paths()
    plain_row = Row([3, 4, 5, 3], 2, SamplingParams(), key_of(1), 99)
    biased_row = Row([3, 4, 5, 3], 2, SamplingParams(logit_bias={2: 99.0}), key_of(1), 99)
    logits, known = rng_logits(0, 1, tree.nodes, VOCAB), torch.full((1, tree.nodes), 4)
    for row, expected in ((plain_row, 4), (biased_row, 2)):
        verdict = judge(tree, logits, [row], final_chance([row]), known).verdict
        assert verdict.next_tokens == [expected]
    silent = judge(tree, logits, [plain_row], final_chance([plain_row]))
    told = judge(tree, logits, [plain_row], final_chance([plain_row]), logits.argmax(-1))
    assert silent.verdict == told.verdict


def test_rows_that_ask_for_nothing_and_padding_stay_as_they_are() -> None:
    _, row = tree_of_paths()
    wide = TokenTree.of([[3, 1], [3, 1, 2, 2]], [[-1, 0], [-1, 0, 1, 1]], CPU)
    quiet = Row([3], 1, SamplingParams(), 0, 9)
    scores = rng_logits(1, 2, 4, VOCAB)
    found = node_scores(wide, scores, [row, quiet])
    assert (found[1] == scores[1]).all() and (found[0, 2:] == scores[0, 2:]).all()
    assert not (found[0, :2] == scores[0, :2]).all()


def test_a_grammar_is_not_asked_about_texts_that_it_forbids() -> None:
    """A drafter may propose what a grammar excludes. Plain decoding never gets there, so the grammar need not know."""
    asked = []

    def grammar(ids: Tensor, scores: Tensor) -> Tensor:
        text = ids[0].tolist()
        asked.append(text)
        assert 2 not in text, "2 was forbidden from the beginning"
        return scores.index_fill(1, torch.tensor([2]), -math.inf)

    params = SamplingParams(processors=(grammar,))
    tree = TokenTree.of([[0, 1, 2, 3, 4]], [[-1, 0, 0, 2, 1]], CPU)  # node 3 stands below the forbidden node 2
    scores = rng_logits(2, 1, 5, VOCAB)
    found = node_scores(tree, scores, [Row([0], 1, params, 0, 9)])
    assert asked == [[0], [0, 1], [0, 1, 4]]
    assert (found[0, [0, 1, 4], 2] == -math.inf).all()


# ---- refusals


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -5},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e-40},
        {"temperature": 1.0, "top_k": -1},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1},
        {"temperature": 1.0, "top_p": math.nan},
        {"temperature": 1.0, "min_p": -0.1},
        {"temperature": 1.0, "min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: math.inf}},
        {"n": 0},
        {"n": 3},
        {"logprobs": -1},
        {"stop": ""},
        {"stop": ["end", ""]},
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"temperature": "hot"},
        {"max_new_tokens": 2.5},
        {"top_k": 1.5, "temperature": 1.0},
        {"n": True},
        {"seed": "seven"},
        {"logprobs": 1.5},
        {"stop": [7]},
        {"stop": None},
        {"stop_token_ids": 3},
        {"stop_token_ids": ["</s>"]},
        {"logit_bias": {"5": 1.0}},
        {"logit_bias": [5]},
        {"processors": [3]},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_with_one_sentence(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams.of(values)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 160
    assert next(reversed(values)) in message or next(iter(values)) in message or "stop string" in message


def test_numbers_of_numpy_are_numbers() -> None:
    SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), stop_token_ids=np.array([1, 2]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "near"), [("temprature", "temperature"), ("max_token", "max_tokens"), ("topk", "top_k")]
)
def test_an_unknown_name_is_answered_with_the_nearest_that_exists(name: str, near: str) -> None:
    with pytest.raises(RequestError, match=f"did you mean {near}"):
        SamplingParams.of({name: 1})


def test_a_name_like_nothing_known_is_answered_with_all_there_are() -> None:
    with pytest.raises(RequestError, match="there are: max_new_tokens, temperature"):
        SamplingParams.of({"zzz": 1})


def test_one_stop_string_is_as_good_as_a_list() -> None:
    assert SamplingParams(stop="end").stop == ("end",)


def test_the_processors_of_transformers_fit() -> None:
    params = SamplingParams(temperature=1.0, processors=[transformers.NoRepeatNGramLogitsProcessor(2)])
    assert one_law(edited(torch.zeros(1, VOCAB), params, [Prefix([1, 2, 1], 3)])[0], params)[2] == 0


def test_parameters_come_as_a_record_a_mapping_or_by_name() -> None:
    assert SamplingParams.of() == SamplingParams.of(None) == SamplingParams()
    warm = SamplingParams(max_new_tokens=4, temperature=0.7)
    assert SamplingParams.of({"max_new_tokens": 4, "temperature": 0.7}) == warm
    assert SamplingParams.of(max_new_tokens=4, temperature=0.7) == warm
    assert SamplingParams.of({"max_new_tokens": 9}, max_new_tokens=4, temperature=0.7) == warm
    assert SamplingParams.of(SamplingParams(temperature=0.7), max_tokens=4) == warm
    assert SamplingParams.of(warm) is warm


@pytest.mark.parametrize(("name", "ours"), sorted(SYNONYMS.items()))
def test_the_names_of_other_engines_are_understood(name: str, ours: str) -> None:
    value: Any = {"stop": "x", "processors": (edit_nothing,)}.get(ours, 3)
    wanted = SamplingParams(**{ours: value, "temperature": 1.0})
    assert SamplingParams.of({name: value, "temperature": 1.0}) == wanted
    assert SamplingParams.of(SamplingParams(temperature=1.0), **{name: value}) == wanted
    with pytest.raises(RequestError, match=f"another name of {ours}"):
        SamplingParams.of({name: value, ours: value})


def edit_nothing(tokens: Tensor, scores: Tensor) -> Tensor:
    return scores


@pytest.mark.parametrize("given", [4, "greedy", [SamplingParams()]])
def test_what_is_no_set_of_parameters_is_refused(given: Any) -> None:
    with pytest.raises(RequestError, match="sampling parameters cannot be"):
        SamplingParams.of(given)


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "processors"])
def test_what_can_be_read_only_once_is_refused(name: str) -> None:
    """Looked at, it would be empty when it is wanted."""
    with pytest.raises(RequestError, match=f"{name}=<generator"):
        SamplingParams.of({name: (one for one in ())})


# ---- processors that give back what is no law


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda scores: None, "returned NoneType"),
        (lambda scores: scores.numpy(), "returned ndarray"),
        (lambda scores: scores[0], r"returned a tensor \[7\].*\[1, 7\]"),
        (lambda scores: scores * math.nan, "returned nan"),
        (lambda scores: scores + torch.tensor([0, math.inf, 0, 0, 0, 0, 0]), "returned inf"),
    ],
    ids=["nothing", "an array", "another shape", "NaN", "infinity"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_processor_returns_is_a_law_or_refused(made: Any, words: str, temperature: float) -> None:
    """NaN was the first token, or the last row of the matrix, without a word."""

    def strange(ids: Tensor, scores: Tensor) -> Any:
        return made(scores)

    params = SamplingParams(processors=(strange,), temperature=temperature)
    with pytest.raises(RequestError, match=words):
        node_scores(TokenTree.root([0], CPU), rng_logits(0, 1, 1, VOCAB), [Row([0], 1, params, 0, 9)])
