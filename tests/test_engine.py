"""The engine says what plain decoding says: token for token where that is certain, in law where it is not.

Every drafter that needs no more than tables is here, in all its shapes. `plain` is decoding without
engine, cache or tree; `one_law` and `plain_law` are sampling without them. The engine's own law is
enumerated: the same code with ideal dice.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

from enumeration import Luck, distance, ideal_dice, law_of, one_law, plain_law
from fakes import Near, TableNetwork, Wild, engine_of, plain
from forerun.chance import key_of
from forerun.drafters.verified import Verified
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.registry import REGISTRY, trained
from forerun.drafting.spec import describe
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.engine.requests import Output, Piece
from forerun.errors import DrafterError, RequestError
from forerun.model import Model
from forerun.sampling import Prefix, SamplingParams, edited
from forerun.tree import Drawn, TokenTree

VOCAB = 4
SMALL = {"drafter": "small", "checkpoint": "small"}
MIDDLE = {"drafter": "verified", "checkpoint": "middle"}
LOOKUP = {"drafter": "lookup", "cost": 0.08}
"""Runs are compared here: the clock must have no say in what is proposed."""

DRAFTERS: dict[str, Any] = {
    "none": "none",
    "lookup": LOOKUP,
    "maxgram": {"drafter": "maxgram", "length": 5},
    "maxgram, as published": {"drafter": "maxgram", "length": 4, "compat": True},
    "small": {**SMALL, "length": 4},
    "small, fixed": {**SMALL, "stopping": {"rule": "fixed", "most": 3}},
    "small, confidence": {**SMALL, "stopping": {"rule": "confidence", "threshold": 0.6, "most": 6}},
    "small, cumulative": {**SMALL, "stopping": {"rule": "cumulative", "threshold": 0.3, "most": 6}},
    "small, tree": {**SMALL, "tree": {"width": 3, "depth": 3, "nodes": 7}},
    "small, sampled tree": {**SMALL, "widths": [2, 2, 1]},
    "verified, none": {**MIDDLE, "inner": "none", "length": 3},
    "verified, lookup": {**MIDDLE, "inner": "lookup", "length": 4},
    "verified, maxgram": {**MIDDLE, "inner": "maxgram", "length": 6},
    "verified, chain": {**MIDDLE, "inner": {**SMALL, "length": 2}, "length": 4},
    "verified, tree": {**MIDDLE, "inner": {**SMALL, "tree": {"width": 2, "depth": 2, "nodes": 4}}, "length": 3},
    "verified, sampled tree": {**MIDDLE, "inner": {**SMALL, "widths": [2, 1]}, "length": 3},
    "three models": {
        **MIDDLE,
        "inner": {"drafter": "verified", "checkpoint": "low", "inner": {**SMALL, "length": 2}, "length": 3},
        "length": 5,
    },
    "verified, lenient": {**MIDDLE, "inner": {**SMALL, "length": 3}, "length": 3, "leniency": 3},
    "cascade, vertical": {
        "drafter": "cascade",
        "models": ["middle", "small"],
        "k": [[2, 2, 3], [0, 1, 3], [0, 0, 3]],
        "last": "lookup",
    },
    "cascade, lenient": {
        "drafter": "cascade",
        "models": ["middle"],
        "k": [[2, 3], [0, 4]],
        "last": "lookup",
        "leniency": 2,
    },
    "cascade, horizontal": {
        "drafter": "cascade",
        "parts": [
            {**MIDDLE, "inner": {**SMALL, "length": 1}, "length": 1, "until": 2},
            {**SMALL, "widths": [2, 1], "until": 4},
            {**LOOKUP, "until": 6},
        ],
    },
    "hierarchy": {"drafter": "hierarchy", "cost": 0.08},
    "hierarchy, nothing pays": {"drafter": "hierarchy", "cost": 0.9},
    "fallback": {"drafter": "fallback", "sources": [LOOKUP, "small:small"]},
    "fallback, enough": {"drafter": "fallback", "sources": [LOOKUP, {**SMALL, "length": 3}, LOOKUP], "enough": 3},
    "auto": "auto",
    "switch": {"drafter": "switch", "parts": [LOOKUP, {**SMALL, "length": 3}]},
    "switch in a model": {**MIDDLE, "inner": {"drafter": "switch", "parts": ["small:small", LOOKUP]}},
    "fallback in a model": "verified:middle(lookup | verified:low(small:small))",
}
DETERMINISTIC = ("hierarchy", "lookup", "maxgram", "small, tree")
REMEMBERING = {"auto", "hierarchy", "hierarchy, nothing pays", "switch"}
"""What these propose depends on earlier requests too, on when their stores were last of use, or on what steps took."""
every_drafter = pytest.mark.parametrize("name", DRAFTERS)


@cache
def tables(
    vocab: int = VOCAB, order: int = 12, sharpness: float = 1.5, max_length: int = 4096
) -> dict[str, TableNetwork]:
    """A target and three draft models, each further from it. The prefixes are long enough that
    greedy texts do not repeat."""
    target = TableNetwork(vocab, 3, order, sharpness, max_length)
    noise = {"middle": 0.4, "low": 0.6, "small": 0.8}
    return {"target": target, **{name: Near(target, share, seed) for seed, (name, share) in enumerate(noise.items())}}


def engine(name: str | Drafter, networks: dict[str, TableNetwork] | None = None, **options: Any) -> Engine:
    networks = networks or tables()
    return engine_of(networks["target"], name if isinstance(name, Drafter) else DRAFTERS[name], networks, **options)


PROMPTS = [[0], [1, 2, 3], [2] * 9, [3, 0, 1, 2, 3, 0, 1], [1, 1], [0, 3, 0], [2, 1, 0, 3, 2], [3, 3, 3, 3]]


def test_every_drafter_of_the_registry_is_tested_here() -> None:
    """Drafters with trained heads read the target's hidden states, and have files of their own."""
    tested = {describe(spec)["drafter"] for spec in DRAFTERS.values()}
    assert tested | set(trained()) == set(REGISTRY)


# ---- greedy


@every_drafter
def test_greedy_text_is_that_of_plain_decoding(name: str) -> None:
    """Three hundred tokens; the thousand of the reference family are in test_reference.py."""
    (output,) = engine(name).generate([PROMPTS[1]], SamplingParams(max_new_tokens=300))
    assert output.token_ids == plain(tables()["target"], PROMPTS[1], 300)
    assert output.finish_reason == "length" and output.stats.exact


@every_drafter
@pytest.mark.parametrize("max_rows", [8, 3])
def test_rows_of_a_batch_say_what_they_say_alone(name: str, max_rows: int) -> None:
    """Eight prompts of different lengths that end at different times, with room for all or for three."""
    counts = [150, 1, 120, 40, 7, 60, 90, 2] if max_rows == 8 else [30, 1, 90, 40, 7, 9, 20, 2]
    outputs = engine(name, max_rows=max_rows).generate(
        PROMPTS, [SamplingParams(max_new_tokens=count) for count in counts]
    )
    for prompt, count, output in zip(PROMPTS, counts, outputs, strict=True):
        assert output.token_ids == plain(tables()["target"], prompt, count)
    assert [output.prompt_index for output in outputs] == list(range(8))


def run_staggered(one: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> dict[int, list[int]]:
    """A new request at every second step."""
    found: dict[int, list[int]] = {}
    waiting = list(zip(prompts, params, strict=True))
    for step in range(10_000):
        if waiting and step % 2 == 0:
            prompt, wishes = waiting.pop(0)
            found |= {number: [] for number in one.add(prompt, wishes)}
        for piece in one.step():
            found[piece.request] += piece.token_ids
        if not waiting and one.is_idle:
            break
    return found


@every_drafter
def test_rows_may_come_while_others_run(name: str) -> None:
    prompts = [[*prompt, *([1, 2, 3] * 300 if index == 2 else [])] for index, prompt in enumerate(PROMPTS)]
    params = [SamplingParams(max_new_tokens=20 + index) for index in range(8)]
    found = run_staggered(engine(name, max_rows=4), prompts, params)
    for (_, said), prompt, wishes in zip(sorted(found.items()), prompts, params, strict=True):
        assert said == plain(tables()["target"], prompt, wishes.max_new_tokens)


# ---- sampled: rows are independent of one another, and of deterministic drafters


def forbid_repeats(ids: Tensor, scores: Tensor) -> Tensor:
    """A processor that looks at the whole prefix: the newest token may not come again."""
    return scores.index_fill(1, ids[0, -1:], -math.inf)


WISHES = [
    SamplingParams(temperature=0.9, seed=1, max_new_tokens=40),
    SamplingParams(max_new_tokens=30),
    SamplingParams(temperature=1.2, top_k=3, seed=2, max_new_tokens=35),
    SamplingParams(temperature=1.0, top_p=0.8, presence_penalty=0.4, frequency_penalty=0.1, seed=3, max_new_tokens=25),
    SamplingParams(temperature=0.8, repetition_penalty=1.3, logit_bias={2: -1.0}, seed=4, max_new_tokens=20),
    SamplingParams(temperature=1.0, min_p=0.2, processors=(forbid_repeats,), seed=5, max_new_tokens=30),
    SamplingParams(repetition_penalty=1.5, processors=(forbid_repeats,), logit_bias={0: 0.5}, max_new_tokens=30),
    SamplingParams(temperature=2.0, seed=6, max_new_tokens=3, logprobs=2),
]


def alone(one: Callable[[], Engine]) -> list[list[int]]:
    return [one().generate([prompt], wish)[0].token_ids for prompt, wish in zip(PROMPTS, WISHES, strict=True)]


@every_drafter
def test_sampled_rows_of_a_batch_say_what_they_say_alone(name: str) -> None:
    """Greedy beside sampled beside penalised; all at once, or coming one by one."""
    expected = alone(lambda: engine(name))
    together = [output.token_ids for output in engine(name, max_rows=8).generate(PROMPTS, WISHES)]
    assert together == expected
    found = run_staggered(engine(name, max_rows=3), PROMPTS, WISHES)
    assert [said for _, said in sorted(found.items())] == expected


def wild(seed: int, kinds: Sequence[Drawn] = tuple(Drawn)) -> Wild:
    return Wild(VOCAB, seed=seed, kinds=kinds)


def verified_wild(networks: dict[str, TableNetwork], nodes: int, seed: int, length: int) -> Drafter:
    """A model whose own drafter makes trees of all kinds."""
    inner = Wild(networks["target"].vocab_size, nodes, seed)
    return Verified(Model(networks["middle"], nodes + 1), inner, length)


@pytest.mark.parametrize("make", [wild, lambda seed: verified_wild(tables(), 5, seed, 3)], ids=["wild", "verified"])
@pytest.mark.parametrize("seed", range(2))
def test_rows_are_independent_when_every_one_has_a_tree_of_another_kind(
    seed: int, make: Callable[[int], Drafter]
) -> None:
    """What a cascade or a fallback does: a database hit for one row, a sampled chain for the next,
    nothing for the third."""
    expected = alone(lambda: engine(make(seed)))
    assert [output.token_ids for output in engine(make(seed)).generate(PROMPTS, WISHES)] == expected
    for prompt, wish, said in zip(PROMPTS, WISHES, expected, strict=True):
        if wish == SamplingParams(max_new_tokens=30):
            assert said == plain(tables()["target"], prompt, 30)


@pytest.mark.parametrize("name", [*DETERMINISTIC, "wild"])
def test_deterministic_drafters_do_not_change_the_text_of_a_seed(name: str) -> None:
    """Whatever the parameters; and the logprobs are those of plain decoding."""
    wishes = [replace(wish, logprobs=2) for wish in WISHES]
    drafter = wild(9, [Drawn.DETERMINISTIC]) if name == "wild" else name
    without, found = (engine(one).generate(PROMPTS, wishes) for one in ("none", drafter))
    for plainly, output in zip(without, found, strict=True):
        assert output.token_ids == plainly.token_ids
        assert output.logprobs == plainly.logprobs
    assert any(output.stats.accepted_tokens for output in found)


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    for name in ("none", "small", "three models"):
        params = SamplingParams(temperature=1.0, seed=7, max_new_tokens=30)
        one, same, other = (
            engine(name).generate([[1]], wish)[0].token_ids for wish in (params, params, replace(params, seed=8))
        )
        assert one == same != other
        first, second = (engine(name).generate([[1]], replace(params, seed=None))[0].token_ids for _ in range(2))
        assert first != second


@pytest.mark.parametrize("name", ["none", "lookup", "small", "verified, chain"])
def test_samples_of_one_prompt_differ_and_do_not_depend_on_their_number(name: str) -> None:
    params = SamplingParams(temperature=1.0, seed=7, max_new_tokens=20)
    one = engine(name).generate([[1], [2, 3]], [replace(params, n=3), params])
    assert [(output.prompt_index, output.sample) for output in one] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert len({tuple(output.token_ids) for output in one[:3]}) == 3
    (first,) = engine(name).generate([[1]], params)
    assert first.token_ids == one[0].token_ids
    two = engine(name, max_rows=1).generate([[1]], replace(params, n=2))
    assert [output.token_ids for output in two] == [output.token_ids for output in one[:2]]


class Checked(Drafter):
    """A drafter beside which, at every step, another is built that has seen nothing but the rows'
    texts: both must propose the same trees, drawn from the same laws. A memory that goes stale
    would still be exact, only worse."""

    name = "checked"

    def __init__(self, make: Callable[[], Drafter]):
        self._make, self._one = make, make()
        self.max_nodes = self._one.max_nodes
        self.admit, self.release, self.observe = self._one.admit, self._one.release, self._one.observe

    def propose(self, context: Context) -> TokenTree:
        fresh = self._make()
        for row in context.rows:
            fresh.admit(row, {})
        tree, again = self._one.propose(context), fresh.propose(context)
        assert tree.tokens == again.tokens and tree.topology == again.topology
        for row, size in enumerate(tree.sizes):
            for node in range(size):
                if tree.drawn_BN is not None and node in tree.topology.children[row]:
                    assert tree.laws_BNV is not None and again.laws_BNV is not None and again.drawn_BN is not None
                    assert tree.drawn_BN[row, node] == again.drawn_BN[row, node]
                    assert (tree.laws_BNV[row, node] == again.laws_BNV[row, node]).all()
        return tree


@pytest.mark.parametrize("name", sorted({*DRAFTERS} - REMEMBERING))
def test_what_a_drafter_proposes_depends_on_the_text_alone(name: str) -> None:
    networks = tables()

    def make() -> Drafter:
        return build(DRAFTERS[name], Workshop(Model(networks["target"], 1), networks.__getitem__))

    wishes = [replace(wish, max_new_tokens=6 + 3 * index) for index, wish in enumerate(WISHES)]
    outputs = engine_of(networks["target"], Checked(make), max_rows=3).generate(PROMPTS, wishes)
    assert [len(output.token_ids) for output in outputs] == [wish.max_new_tokens for wish in wishes]


# ---- sampled: the law


def processed(wishes: SamplingParams, target: TableNetwork, prompt: list[int]) -> Callable[[tuple[int, ...]], Tensor]:
    """The law of the next token after some output, edits included."""

    def law(output: tuple[int, ...]) -> Tensor:
        tokens = [*prompt, *output]
        logits = target.logits(tokens)
        if wishes.edits_scores:
            logits = edited(logits[None], wishes, [Prefix(tokens, len(prompt))])[0]
        return one_law(logits, wishes)

    return law


def engine_law(
    drafter: Callable[[], Any], networks: dict[str, TableNetwork], prompt: list[int], wishes: SamplingParams
):
    """The law of the engine's output, by enumeration: every row of a batch is another way for the dice to fall."""

    def program(_: list[None], lucks: list[Luck]) -> list[tuple[int, ...]]:
        one = engine_of(networks["target"], drafter(), networks, max_rows=len(lucks))
        each = [replace(wishes, seed=seed) for seed in range(len(lucks))]
        with ideal_dice({key_of(seed): luck for seed, luck in enumerate(lucks)}):
            outputs = one.generate([prompt] * len(lucks), each)
        return [tuple(output.token_ids) for output in outputs]

    return law_of(program, at_once=128)


SHORT: dict[str, Any] = {
    "none": "none",
    "lookup": {"drafter": "lookup", "nodes": 3, "depth": 2, "cost": 0.01},
    "small": {**SMALL, "length": 2},
    "small, confidence": {**SMALL, "stopping": {"rule": "confidence", "threshold": 0.4, "most": 2}},
    "small, cumulative": {**SMALL, "stopping": {"rule": "cumulative", "threshold": 0.3, "most": 2}},
    "small, tree": {**SMALL, "tree": {"width": 2, "depth": 2, "nodes": 4}},
    "small, sampled tree": {**SMALL, "widths": [2, 1]},
    "verified, none": {**MIDDLE, "inner": "none", "length": 2},
    "verified, lookup": {**MIDDLE, "inner": "lookup", "length": 2},
    "verified, maxgram": {**MIDDLE, "inner": "maxgram", "length": 6},
    "verified, chain": {**MIDDLE, "inner": {**SMALL, "length": 1}, "length": 2},
    "verified, tree": {**MIDDLE, "inner": {**SMALL, "tree": {"width": 2, "depth": 1, "nodes": 2}}, "length": 2},
    "three models": {
        **MIDDLE,
        "inner": {"drafter": "verified", "checkpoint": "low", "inner": {**SMALL, "length": 1}, "length": 1},
        "length": 1,
    },
    "verified, lenient": {**MIDDLE, "inner": {**SMALL, "length": 1}, "length": 2, "leniency": 2},
    "cascade, vertical": {
        "drafter": "cascade",
        "models": ["middle"],
        "k": [[1, 1], [0, 1]],
        "last": {"drafter": "lookup", "nodes": 1, "cost": 0.01},
    },
    "cascade, horizontal": {
        "drafter": "cascade",
        "parts": [
            {**MIDDLE, "inner": "none", "length": 1, "until": 1},
            {**SMALL, "length": 1, "until": 2},
        ],
    },
    "cascade, mixed": {
        "drafter": "cascade",
        "parts": [{"drafter": "lookup", "nodes": 1, "cost": 0.01, "until": 1}, {**SMALL, "length": 1, "until": 2}],
    },
    "fallback": {
        "drafter": "fallback",
        "sources": [{"drafter": "lookup", "nodes": 2, "cost": 0.3}, {**SMALL, "length": 1}],
    },
    "fallback, enough": {
        "drafter": "fallback",
        "sources": [
            {"drafter": "lookup", "nodes": 1, "cost": 0.01},
            {**SMALL, "stopping": {"rule": "confidence", "threshold": 0.4, "most": 2}},
        ],
        "enough": 2,
    },
}


@pytest.mark.parametrize("name", SHORT)
def test_the_law_of_the_output_is_that_of_plain_sampling(name: str) -> None:
    networks, prompt = tables(3 if "verified" not in name and name != "three models" else 2, 2, 1.0), [1, 0, 1]
    wishes = SamplingParams(temperature=1.3, max_new_tokens=3)
    law = engine_law(lambda: SHORT[name], networks, prompt, wishes)
    assert sum(law.values()) == pytest.approx(1, abs=1e-9)
    assert distance(law, plain_law(processed(wishes, networks["target"], prompt), 3)) < 1e-6


@pytest.mark.parametrize(
    "wishes",
    [
        SamplingParams(temperature=0.7, top_k=2),
        SamplingParams(temperature=1.5, top_p=0.7, logit_bias={0: 0.7}),
        SamplingParams(temperature=1.0, min_p=0.3, frequency_penalty=0.5, presence_penalty=0.2),
        SamplingParams(temperature=1.0, repetition_penalty=1.6, processors=(forbid_repeats,)),
    ],
    ids=["top-k", "top-p, bias", "min-p, penalties", "repetition, processor"],
)
@pytest.mark.parametrize("name", ["lookup", "small", "small, tree", "small, sampled tree", "verified, chain", "wild"])
def test_the_law_is_exact_under_every_sampling_parameter(name: str, wishes: SamplingParams) -> None:
    networks, prompt = tables(3, 2, 1.0), [1, 2, 1]
    wishes = replace(wishes, max_new_tokens=2)
    law = engine_law(lambda: Wild(3, 4, seed=1) if name == "wild" else SHORT[name], networks, prompt, wishes)
    assert distance(law, plain_law(processed(wishes, networks["target"], prompt), 2)) < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_the_law_is_exact_for_trees_of_all_kinds_in_one_batch(seed: int) -> None:
    networks, wishes = tables(3, 2, 1.0), SamplingParams(temperature=1.0, max_new_tokens=3)
    law = engine_law(lambda: Wild(3, 4, seed), networks, [1], wishes)
    assert distance(law, plain_law(processed(wishes, networks["target"], [1]), 3)) < 1e-9


@pytest.mark.parametrize(
    "name", ["small", "small, sampled tree", "verified, chain", "three models", "cascade, mixed", "fallback"]
)
def test_the_law_is_exact_beside_rows_that_ask_for_other_things(name: str) -> None:
    """A greedy row, a filtered one and a longer text share every step, and keep what is theirs."""
    networks, prompt = tables(2 if name in ("verified, chain", "three models") else 3, 2, 1.0), [1, 0, 1]
    wishes = SamplingParams(temperature=1.3, max_new_tokens=3)
    others = [
        ([1, 1], SamplingParams(seed=-1, max_new_tokens=4)),
        ([0], SamplingParams(seed=-2, temperature=0.7, top_k=2, max_new_tokens=2)),
        ([0, 1, 1, 0], SamplingParams(seed=-3, temperature=1.0, max_new_tokens=3)),
    ]

    def program(_: list[None], lucks: list[Luck]) -> list[tuple[int, ...]]:
        one = engine_of(networks["target"], SHORT[name], networks, max_rows=len(lucks) + len(others))
        each = [wish for _, wish in others] + [replace(wishes, seed=seed) for seed in range(len(lucks))]
        keys = {key_of(seed): luck for seed, luck in enumerate(lucks)} | {key_of(-1 - n): Luck() for n in range(3)}
        with ideal_dice(keys):
            outputs = one.generate([text for text, _ in others] + [prompt] * len(lucks), each)
        assert outputs[0].token_ids == plain(networks["target"], [1, 1], 4)
        return [tuple(output.token_ids) for output in outputs[len(others) :]]

    law = law_of(program, at_once=128)
    assert distance(law, plain_law(processed(wishes, networks["target"], prompt), 3)) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_a_verified_model_is_exact_whatever_trees_it_is_given(seed: int) -> None:
    networks, wishes = tables(2, 2, 1.0), SamplingParams(temperature=1.0, max_new_tokens=3)
    law = engine_law(lambda: verified_wild(networks, 3, seed, 1), networks, [1], wishes)
    assert distance(law, plain_law(processed(wishes, networks["target"], [1]), 3)) < 1e-9


@pytest.mark.parametrize("name", ["small", "verified, chain"])
def test_the_real_dice_follow_the_law(name: str) -> None:
    """The seeds are fixed, and so is the outcome: 4,000 samples of three tokens."""
    networks, wishes = tables(3, 2, 1.0), SamplingParams(temperature=1.0, max_new_tokens=3, n=4000, seed=5)
    outputs = engine_of(networks["target"], SHORT[name], networks, max_rows=200).generate([[1]], wishes)
    law = plain_law(processed(wishes, networks["target"], [1]), 3)
    counts = Counter(tuple(output.token_ids) for output in outputs)
    assert set(counts) <= set(law)
    assert stats.chisquare([counts[text] for text in law], [4000 * share for share in law.values()]).pvalue > 1e-3


# ---- drafters at their best and worst


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["small", "small, sampled tree", "verified, chain", "three models"])
def test_a_perfect_drafter_is_accepted_whole(name: str, temperature: float) -> None:
    target = tables()["target"]
    networks = {"target": target} | dict.fromkeys(("middle", "low", "small"), target)
    one = engine(name, networks)
    wishes = SamplingParams(temperature=temperature, seed=1, max_new_tokens=60)
    pieces = list(one.stream([[1, 2]], wishes))
    depth = {"small": 4, "small, sampled tree": 3, "verified, chain": 4, "three models": 5}[name]
    assert all(len(piece.token_ids) >= depth + 1 and all(piece.drafted[:-1]) for piece in pieces[:-1])


class Opposite(TableNetwork):
    """Thinks most of what the target thinks least."""

    def __init__(self, target: TableNetwork):
        super().__init__(target.vocab_size, max_length=target.max_length)
        self._target, self._order = target, target._order

    def logits(self, prefix: Sequence[int]) -> Tensor:
        return -20 * self._target.logits(prefix)


@every_drafter
def test_the_worst_drafter_is_still_exact(name: str) -> None:
    target = tables()["target"]
    networks = {"target": target} | dict.fromkeys(("middle", "low", "small"), Opposite(target))
    (output,) = engine(name, networks).generate([[1, 2]], SamplingParams(max_new_tokens=60))
    assert output.token_ids == plain(target, [1, 2], 60)
    if name in ("small", "verified, chain", "three models"):
        assert output.stats.accepted_tokens == 0 and output.stats.tokens_per_step == 1


@pytest.mark.parametrize("name", ["small", "verified, chain"])
def test_the_worst_drafter_follows_the_law(name: str) -> None:
    target, wishes = tables(2, 2, 1.0)["target"], SamplingParams(temperature=1.0, max_new_tokens=3)
    networks = {"target": target} | dict.fromkeys(("middle", "low", "small"), Opposite(target))
    law = engine_law(lambda: SHORT[name], networks, [1], wishes)
    assert distance(law, plain_law(processed(wishes, target, [1]), 3)) < 1e-6


@every_drafter
def test_draft_models_of_a_shorter_context_draft_while_they_can(name: str) -> None:
    """And the rows beside one that has outgrown them do not notice."""
    target = tables()["target"]
    networks = {"target": target, **{key: Near(target, 0.5, 5, max_length=24) for key in ("middle", "low", "small")}}
    prompts = [[1] * 4, [2] * 23, [3] * 40]
    wishes = [SamplingParams(max_new_tokens=40), SamplingParams(temperature=1.0, seed=3, max_new_tokens=30)]
    greedy = engine(name, networks).generate(prompts, wishes[0])
    assert [output.token_ids for output in greedy] == [plain(target, prompt, 40) for prompt in prompts]
    together = engine(name, networks).generate(prompts, wishes[1])
    for prompt, output in zip(prompts, together, strict=True):
        (single,) = engine(name, networks).generate([prompt], wishes[1])
        assert single.token_ids == output.token_ids
        assert single.stats.drafted_tokens == output.stats.drafted_tokens or name in REMEMBERING


# ---- how a text ends


def ended(tokens: list[int], ends: set[int]) -> list[int]:
    """Up to the first of these tokens, included."""
    return next((tokens[: at + 1] for at, token in enumerate(tokens) if token in ends), tokens)


@every_drafter
@pytest.mark.parametrize("end", range(VOCAB))
def test_a_text_ends_at_its_end_token_wherever_in_a_block_that_is(name: str, end: int) -> None:
    texts = {tuple(prompt): plain(tables()["target"], prompt, 20) for prompt in PROMPTS[:4]}
    for options, wishes in (
        ({"eos": [end]}, SamplingParams(max_new_tokens=20)),
        ({}, SamplingParams(max_new_tokens=20, stop_token_ids=[end])),
        ({"eos": [end]}, SamplingParams(max_new_tokens=20, stop_token_ids=[end], ignore_eos=True)),
    ):
        for output, (prompt, text) in zip(
            engine(name, **options).generate(PROMPTS[:4], wishes), texts.items(), strict=True
        ):
            assert output.token_ids == ended(text, {end}), prompt
            assert output.finish_reason == ("stop" if end in text else "length")


@every_drafter
def test_the_end_token_is_ignored_on_request_and_missing_at_will(name: str) -> None:
    text = plain(tables()["target"], [1], 15)
    for options, wishes in (
        ({"eos": range(VOCAB)}, SamplingParams(max_new_tokens=15, ignore_eos=True)),
        ({}, SamplingParams(max_new_tokens=15)),
    ):
        (output,) = engine(name, **options).generate([[1]], wishes)
        assert output.token_ids == text and output.finish_reason == "length"


@every_drafter
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_text_is_never_longer_than_asked(name: str, count: int) -> None:
    for output, prompt in zip(
        engine(name).generate(PROMPTS, SamplingParams(max_new_tokens=count)), PROMPTS, strict=True
    ):
        assert output.token_ids == plain(tables()["target"], prompt, count)
        assert output.finish_reason == "length" and output.stats.steps <= count
        assert count > 1 or output.stats.drafted_tokens == 0


@every_drafter
@pytest.mark.parametrize("count", [None, 3])
def test_a_text_may_fill_the_context_exactly(name: str, count: int | None) -> None:
    networks = {
        key: TableNetwork(VOCAB, 3, 12, 1.5, 20) if key == "target" else Near(network, 0.4, 1, max_length=20)
        for key, network in tables().items()
    }
    prompts = [[1] * length for length in (1, 13, 16, 17, 18, 19)]
    outputs = engine(name, networks).generate(prompts, SamplingParams(max_new_tokens=count))
    for prompt, output in zip(prompts, outputs, strict=True):
        room = min(20 - len(prompt), count or 99)
        assert output.token_ids == plain(networks["target"], prompt, room) and output.finish_reason == "length"
    with pytest.raises(RequestError, match="20 tokens and the context holds 20"):
        engine(name, networks).generate([[1] * 20])


class Letters:
    """A tokenizer of single letters, as small as the tables."""

    def __init__(self) -> None:
        vocab = {letter: number for number, letter in enumerate("abcd")}
        self.backend_tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        self.backend_tokenizer.decoder = decoders.Fuse()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.backend_tokenizer.encode(text).ids}


def cut(text: str, stops: Sequence[str]) -> tuple[int, str]:
    """How many letters come until a stop string is complete, and the text before it."""
    for length in range(len(text) + 1):
        found = [at for stop in stops if (at := text[:length].find(stop)) >= 0]
        if found:
            return length, text[: min(found)]
    return len(text), text


@every_drafter
def test_a_stop_string_ends_the_text_wherever_in_a_block_it_is(name: str) -> None:
    words = ["".join("abcd"[token] for token in plain(tables()["target"], prompt, 20)) for prompt in PROMPTS[:4]]
    stops = [["ab"], ["cab", "dd"], [words[0][3:7]], [words[1][10:15], "zz"]]
    for wanted in stops:
        one = engine(name, tokenizer=Letters())
        outputs = one.generate(PROMPTS[:4], SamplingParams(max_new_tokens=20, stop=wanted))
        for output, word in zip(outputs, words, strict=True):
            length, text = cut(word, wanted)
            assert output.text == text and len(output.token_ids) == length
            assert output.finish_reason == ("stop" if text != word else "length")


# ---- what is reported


@every_drafter
def test_usage_adds_up(name: str) -> None:
    outputs = engine(name, eos=[3]).generate(
        PROMPTS, [replace(wish, ignore_eos=bool(i % 2)) for i, wish in enumerate(WISHES)]
    )
    for output in outputs:
        stats = output.stats
        assert stats.new_tokens == len(output.token_ids)
        assert stats.tokens_per_step == stats.new_tokens / stats.steps
        assert stats.accepted == stats.accepted_tokens / stats.steps
        assert 0 <= stats.accepted_tokens <= stats.drafted_tokens
        # every step adds one token of the target's own, but for a last step that ends within the accepted ones
        assert stats.accepted_tokens + stats.steps - stats.new_tokens in (
            (0, 1) if output.finish_reason == "stop" else (0,)
        )
        assert stats.drafter == engine(name).drafter.name and stats.rule
        assert stats.seconds >= stats.prefill_seconds >= 0 and stats.as_dict()["new_tokens"] == stats.new_tokens


@every_drafter
def test_the_pieces_of_a_stream_are_the_output(name: str) -> None:
    def one() -> Engine:
        return engine(name, tokenizer=Letters(), eos=[0])

    outputs = one().generate(PROMPTS, WISHES)
    pieces: dict[int, list[Piece]] = {}
    for piece in one().stream(PROMPTS, WISHES):
        assert len(piece.token_ids) == len(piece.origins) == len(piece.texts) > 0
        pieces.setdefault(piece.prompt_index, []).append(piece)
    for index, output in enumerate(outputs):
        mine = pieces[index]
        assert [token for piece in mine for token in piece.token_ids] == output.token_ids
        assert "".join(piece.text for piece in mine) == output.text
        told = mine[-1].output
        assert told is not None  # what may be drafted differently from run to run is compared within this one
        assert sum(sum(piece.drafted) for piece in mine) == told.stats.accepted_tokens
        assert len(mine) == told.stats.steps
        assert [piece.finish_reason for piece in mine] == [None] * (len(mine) - 1) + [output.finish_reason]


@every_drafter
def test_logprobs_are_those_of_the_models_own_law(name: str) -> None:
    """Before penalties, filters and temperature; inside accepted blocks too; never more alternatives than tokens."""
    target = tables()["target"]
    for wish, count in ((WISHES[0], 2), (WISHES[4], 0), (WISHES[6], 100)):
        (output,) = engine(name, eos=[3]).generate([[1, 2]], replace(wish, logprobs=count))
        assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
        for place, (token, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            law = target.logits([1, 2, *output.token_ids[:place]]).log_softmax(-1)
            assert entry.token_id == token and entry.logprob == pytest.approx(float(law[token]), abs=1e-5)
            best = law.topk(min(count, VOCAB))
            assert list(entry.alternatives) == best.indices.tolist()
            assert list(entry.alternatives.values()) == pytest.approx(best.values.tolist(), abs=1e-5)


# ---- interruptions and refusals


class Fragile(TableNetwork):
    """Fails at one forward, counted over all networks that share the fuse."""

    def __init__(self, network: TableNetwork, fuse: Iterator[int], error: type[BaseException]):
        super().__init__(network.vocab_size, max_length=network.max_length)
        self._network, self._order, self._fuse, self._error = network, network._order, fuse, error

    def logits(self, prefix: Sequence[int]) -> Tensor:
        return self._network.logits(prefix)

    def forward(self, *args: Any) -> Any:
        read = super().forward(*args)
        if next(self._fuse) == 0:
            raise self._error
        return read


@every_drafter
@pytest.mark.parametrize("at", range(9))
def test_an_interrupted_engine_returns_what_the_target_said_and_goes_on(name: str, at: int) -> None:
    fuse = iter(range(at, -(10**6), -1))
    networks = {key: Fragile(network, fuse, KeyboardInterrupt) for key, network in tables().items()}
    one = engine(name, networks)
    for output in one.generate(PROMPTS[1:4], SamplingParams(max_new_tokens=40)):
        assert output.finish_reason == "interrupted"
        prompt = PROMPTS[1 + output.prompt_index]
        assert output.token_ids == plain(networks["target"], prompt, 40)[: len(output.token_ids)]
    assert one.is_idle and one.target.cache.rows == 0
    for count in (1, 25):  # one step without a draft first: nothing may be left over from the last
        again = one.generate(PROMPTS[::-1][: 1 + count % 5], SamplingParams(max_new_tokens=count))
        for prompt, output in zip(PROMPTS[::-1], again, strict=False):
            assert output.token_ids == plain(networks["target"], prompt, count)


@pytest.mark.parametrize("name", ["none", "small", "verified, chain"])
def test_an_engine_survives_a_processor_that_raises(name: str) -> None:
    def picky(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > 8:
            raise ZeroDivisionError
        return scores

    one = engine(name)
    for run in (one.generate, lambda *args: list(one.stream(*args))):
        with pytest.raises(ZeroDivisionError):
            run([[1], [2]], SamplingParams(max_new_tokens=40, processors=(picky,)))
        assert one.is_idle and one.target.cache.rows == 0
    outputs = one.generate([[1], [2, 3]], SamplingParams(max_new_tokens=10))
    assert [output.token_ids for output in outputs] == [plain(tables()["target"], p, 10) for p in ([1], [2, 3])]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@every_drafter
def test_a_processor_that_has_nothing_to_say_behind_the_end(name: str, temperature: float) -> None:
    """A grammar knows no word behind the end of a text. Drafts go there, and the answer does not."""
    end, prompts = 3, [[0], [1, 2], [2, 2]]

    def grammar(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -math.inf) if end in ids[0].tolist() else scores

    params = SamplingParams(temperature=temperature, seed=4, max_new_tokens=60, processors=(grammar,))
    outputs = engine(name).generate(prompts, replace(params, stop_token_ids=(end,)))
    assert all(end not in output.token_ids[:-1] for output in outputs)
    assert any(output.token_ids[-1] == end for output in outputs)
    if not temperature:
        plainly = [plain(tables()["target"], prompt, 60) for prompt in prompts]
        assert [output.token_ids for output in outputs] == [text[: text.index(end) + 1] for text in plainly]
    with pytest.raises(RequestError, match="forbid every token"):
        engine(name).generate(prompts, params)


@pytest.mark.parametrize("name", ["none", "lookup", "small", "three models"])
def test_a_stream_that_is_closed_or_an_engine_that_is_cleared_leaves_nothing_behind(name: str) -> None:
    one = engine(name, max_rows=3)
    stream = one.stream(PROMPTS, SamplingParams(max_new_tokens=40))
    for _ in range(5):
        next(stream)
    stream.close()
    assert one.is_idle
    one.add([1, 2], SamplingParams(max_new_tokens=40))
    one.step()
    one.add([2] * 1200, SamplingParams(max_new_tokens=40))  # longer than a chunk: it is being read
    one.step()
    one.clear()
    assert one.is_idle
    outputs = one.generate(PROMPTS, SamplingParams(max_new_tokens=12))
    assert [output.token_ids for output in outputs] == [plain(tables()["target"], prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("prompts", "wishes", "says"),
    [
        ([[]], SamplingParams(), "empty"),
        ([[1, 4]], SamplingParams(), "token id 4 is outside the vocabulary of 4"),
        ([[1, -1]], SamplingParams(), "token id -1"),
        ("text", SamplingParams(), "no tokenizer"),
        ([[1]], SamplingParams(logit_bias={9: 1.0}), "logit_bias names token 9"),
        ([[1]], SamplingParams(stop="x"), "stop_token_ids"),
        ([[1], [2]], [SamplingParams()], "1 sampling parameters for 2 prompts"),
        ([[1], [2]], [SamplingParams(), SamplingParams(stop="x")], "stop_token_ids"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_served_is_refused_and_leaves_nothing_behind(
    prompts: Any, wishes: Any, says: str
) -> None:
    one = engine("none")
    with pytest.raises(RequestError, match=says) as caught:
        one.generate(prompts, wishes)
    assert "\n" not in str(caught.value)
    assert one.is_idle


def test_one_prompt_of_ids_is_as_good_as_a_list_and_nothing_gives_nothing() -> None:
    one = engine("none")
    (output,) = one.generate([1, 2], SamplingParams(max_new_tokens=3))
    assert output.token_ids == plain(tables()["target"], [1, 2], 3)
    assert one.generate([]) == []


def test_text_goes_in_and_comes_out() -> None:
    (output,) = engine("small", tokenizer=Letters()).generate("bc", SamplingParams(max_new_tokens=5))
    expected: Output = output
    assert expected.token_ids == plain(tables()["target"], [1, 2], 5)
    assert expected.text == "".join("abcd"[token] for token in expected.token_ids)


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ({**SMALL, "length": 0}, "length of 0"),
        ({**SMALL, "length": "five"}, "length"),
        ({**SMALL, "length": 3, "widths": [2]}, "only one"),
        ({**SMALL, "widths": []}, "widths"),
        ({**SMALL, "widths": [2, "two"]}, "widths"),
        ({**SMALL, "tree": {"width": 0}}, "width"),
        ({**SMALL, "tree": {"breadth": 3}}, "width, depth and nodes"),
        ({**SMALL, "tree": {"width": "three"}}, "width, depth and nodes"),
        ({**SMALL, "stopping": {"rule": "never"}}, "never"),
        ({**MIDDLE, "inner": "none", "length": 0}, "length is a whole number"),
        ({**MIDDLE, "inner": "none", "length": 2.5}, "length"),
        ({**MIDDLE, "inner": "nobody"}, "nobody"),
        ({"drafter": "small"}, "needs a checkpoint"),
        ({"drafter": "verified", "inner": "none"}, "needs a checkpoint"),
    ],
    ids=str,
)
def test_a_drafter_that_cannot_be_is_refused_with_a_sentence(description: dict[str, Any], says: str) -> None:
    with pytest.raises(DrafterError, match=says) as caught:
        engine_of(tables()["target"], description, tables())
    assert "\n" not in str(caught.value)


def test_a_draft_model_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(DrafterError, match="vocabulary of 3 tokens and the target one of 4"):
        engine_of(tables()["target"], "small:other", {"other": TableNetwork(3)})


def test_greedy_ties_go_to_the_first_token_with_and_without_a_drafter() -> None:
    """Half of all logits are equal here."""

    class Tied(TableNetwork):
        def logits(self, prefix: Sequence[int]) -> Tensor:
            return torch.round(super().logits(prefix))

    target = Tied(VOCAB, 3, 12)
    networks = {"target": target} | {key: Near(target, 0.3, 4) for key in ("small", "middle", "low")}
    text = plain(target, [1], 80)
    for name in DRAFTERS:
        (output,) = engine(name, networks).generate([[1]], SamplingParams(max_new_tokens=80))
        assert output.token_ids == text
