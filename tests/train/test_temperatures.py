"""One temperature per depth: what they are fitted to, and what uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drafters.heading import PROMPTS, VOCAB, WIDTH, cyclic, every_kernel, filled, greedy, lively, on, successors
from drafters.test_block import BLOCK, TEXT, best_first, block, following, paths_of, row_of, slow_states
from drafters.test_block import CONFIGS as BLOCKS
from forerun.drafters.block.drafter import BlockDrafter
from forerun.drafters.medusa import MedusaConfig
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.drafter import Context
from forerun.drafting.growth import Chain, Expander, Frontier, Known, TopTree, tempered
from forerun.drafting.heads import HeadsModule
from forerun.drafting.stopping import Fixed
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.errors import DrafterError
from forerun.model import Inputs, Model, Scores
from forerun.sampling import SamplingParams
from forerun.train.answers import Answers
from forerun.train.distill import Sample
from forerun.train.teacher import Teacher
from forerun.train.temperatures import temperatures_of

RIGHT = 0.7
"""How often the next token is the one that the heads believe in."""


def answers() -> Answers:
    """Texts that mostly go on as the cycle does."""
    random, following = np.random.default_rng(0), successors(16).tolist()
    samples = []
    for _ in range(40):
        tokens = [int(random.integers(16))]
        for _ in range(60):
            tokens.append(following[tokens[-1]] if random.random() < RIGHT else int(random.integers(16)))
        samples.append(Sample(tuple(tokens[:2]), tuple(tokens[2:])))
    return Answers(samples, rows=8, length=64, holdout=100)


class Believers(HeadsModule):
    """Each believes, as firmly as it is told, that the token behind the one that it sees is the next of the cycle."""

    sees_tokens = True

    def __init__(self, firmly: Sequence[float], kept: tuple[int, ...] = ()):
        super().__init__(MedusaConfig(16, 16, len(firmly), kept=kept))
        self.count, self.firmly = len(firmly), torch.nn.Parameter(torch.tensor(firmly))

    def logits(self, context_PD: Tensor, embedded_PKD: Tensor, head_VD: Tensor) -> Tensor:
        return (embedded_PKD @ head_VD.T).transpose(0, 1) * self.firmly[:, None, None]


def fitted_to(firmly: Sequence[float], kept: tuple[int, ...] = ()) -> tuple[float, ...]:
    one = answers()
    return temperatures_of(Believers(firmly, kept), Teacher(cyclic()), one.training, one)


def test_they_are_where_the_answers_are_likeliest() -> None:
    """Of sixteen tokens one has the logit s: a head is as sure as it is right where s / T = log(15 p / (1 - p))."""
    right = RIGHT + (1 - RIGHT) / 16
    expected = [firmly / math.log(15 * right / (1 - right)) for firmly in (2.0, 4.0, 6.0)]
    assert fitted_to((2.0, 4.0, 6.0)) == pytest.approx(expected, rel=0.05)


def test_where_a_part_is_known_they_are_those_of_the_law_among_it() -> None:
    """Places whose token is not known say nothing; of the others, more are right."""
    (whole,), (part,) = fitted_to((4.0,)), fitted_to((4.0,), tuple(range(4)))
    tokens = [pair for s in answers().training for pair in pairwise((*s.prompt, *s.answer))]
    following, there = successors(16).tolist(), [pair for pair in tokens if pair[1] < 4]
    costs = []
    for temperature in (part / 1.15, part, part * 1.15):
        laws = [
            (torch.tensor([4.0 * (following[a] == v) for v in range(4)]) / temperature).log_softmax(0) for a, _ in there
        ]
        costs.append(-sum(float(law[b]) for law, (_, b) in zip(laws, there, strict=True)))
    assert costs[1] < costs[0] and costs[1] < costs[2] and part != pytest.approx(whole, rel=0.02)


def test_a_head_that_has_nothing_to_say_keeps_its_own() -> None:
    """Answers end before its token."""
    short = Answers([Sample((1, 2, 3), (4, 5))] * 3, rows=2, length=64, holdout=100)
    found = temperatures_of(Believers([4.0] * 4), Teacher(cyclic()), short.training, short)
    assert found[2:] == (1.0, 1.0) and found[0] != 1.0


# ---- what uses them


TEMPERATURES = (0.7, 1.6, 0.5, 2.0, 1.0)


@pytest.mark.parametrize("price", [None, 0.05])
@pytest.mark.parametrize("config", BLOCKS.values(), ids=BLOCKS)
def test_trees_grow_by_tempered_paths(config: Any, price: float | None) -> None:
    """Best first among all paths, and what is worth its price is what these probabilities say."""
    module, text, nodes = block(config), TEXT[:9], 10
    blocks = following(config, [text])
    blocks.module.temperatures = TEMPERATURES  # type: ignore[attr-defined]
    try:
        prices = None if price is None else [price]
        context = Context([row_of(text)], [nodes], [BLOCK], torch.device("cpu"), prices=prices)
        grown = BlockDrafter(blocks, TopTree(nodes, BLOCK, nodes), ()).propose(context)
    finally:
        blocks.module.temperatures = ()  # type: ignore[attr-defined]
    laws = laws_of(module, text, TEMPERATURES)
    least = -math.inf if price is None else math.log(price)
    expected = best_first(laws, text[-1], nodes, least)
    assert sorted(paths_of(grown.tokens[0], grown.topology.parents[0])) == sorted(expected)
    assert sorted(expected) != sorted(best_first(laws_of(module, text, [1.0]), text[-1], nodes, least))


def laws_of(module: Any, text: Sequence[int], temperatures: Sequence[float]) -> list[Tensor]:
    """By depth, log-probabilities of every token behind every token."""
    states = slow_states(module, [*text, 0], len(text) - 2) @ lively().head.weight.double().T
    term = 0.0 if module.markov is None else (module.markov.before @ module.markov.behind.T).double()
    each = [*temperatures, *[temperatures[-1]] * BLOCK][:BLOCK]
    return [((states[depth] + term) / t).log_softmax(-1).expand(VOCAB, -1) for depth, t in enumerate(each)]


@every_kernel
@pytest.mark.parametrize("kept", [(), tuple(range(1, VOCAB, 2))], ids=["all tokens", "a part"])
def test_both_backends_grow_by_one_temperature_for_all_depths(
    kept: tuple[int, ...], kernels: str, tmp_path: Path
) -> None:
    """The kernels have the mean of them all; with equal ones their trees are those of torch, with whatever price."""
    config = replace(BLOCKS["two layers"], kept=kept, temperatures=[2.5] * BLOCK)
    module = filled(type(block(BLOCKS["two layers"]))(config), 1.5, seed=5)
    checkpoints.write(module, config, Checkpoint(tmp_path / "it", "block", {}, "lively", {}), torch.float32)
    trees = {}
    for name, where in (("torch", "torch"), (kernels, kernels)):
        network = on(lively(), where)
        made = build(
            {"drafter": "block", "checkpoint": str(tmp_path / "it")}, Workshop(Model(network, 1), {}.__getitem__)
        )
        assert isinstance(made, BlockDrafter)
        row = row_of(TEXT[:9])
        read = Model(lively(), 0)
        made.blocks.admit(row, states_of_text(read, row.tokens))
        context = Context([row], [16], [BLOCK], torch.device("cpu"), prices=[0.02])
        tree = replace_nodes(made, 16).propose(context)
        trees[name] = sorted(paths_of(tree.tokens[0], tree.topology.parents[0]))
        scored = made.blocks.expander([row.tokens[-1]])
        trees[f"{name} logits"] = scored.begin().logits_BNV  # type: ignore[assignment]
    assert trees[kernels] == trees["torch"] and len(trees["torch"]) > 1
    torch.testing.assert_close(trees[f"{kernels} logits"], trees["torch logits"], atol=2e-4, rtol=1e-4)


def states_of_text(model: Model, tokens: Sequence[int]) -> Tensor:
    read = model.read(Inputs.whole(torch.tensor([list(tokens)])), (0, 2))
    return torch.cat([read[0], read[2]], -1)[:, :-1].clone()


def replace_nodes(drafter: BlockDrafter, nodes: int) -> BlockDrafter:
    drafter.form = TopTree(nodes, BLOCK, nodes)
    return drafter


class Steady(Expander):
    """The same may follow everything."""

    def __init__(self, logits: Sequence[float]):
        self._logits = torch.tensor([[list(logits)]])

    def begin(self) -> Scores:
        return Scores(self._logits)

    def expand(self, frontier: Frontier) -> Scores:
        return Scores(self._logits)


def test_laws_that_are_drawn_from_are_tempered() -> None:
    """At their depth, beyond the last by the last, and over the vocabulary where a part of it is known."""
    logits, row = [0.5, -1.0, 2.0], row_of([1, 2])
    row = replace(row, params=SamplingParams(temperature=0.8))
    steady = Steady(logits)
    steady.known = Known(torch.tensor([3, 4, 8]), 10)
    context = Context([row], [3], [3], torch.device("cpu"))
    tree = Chain(Fixed(3)).grow(tempered(steady, (2.0, 0.5)), context, [3]).tree
    assert tree.laws_BNV is not None
    for law, temperature in zip(tree.laws_BNV[0].tolist(), (2.0, 0.5, 0.5), strict=False):
        expected = np.zeros(10)
        expected[[3, 4, 8]] = (torch.tensor(logits).double() / (temperature * 0.8)).softmax(-1).numpy()
        assert law == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("wrong", [[0.0], [-1.0], [math.inf], ["hot"]])
def test_temperatures_that_make_no_sense_are_refused(wrong: list[Any]) -> None:
    with pytest.raises(DrafterError, match="temperatures"):
        MedusaConfig(WIDTH, VOCAB, 4, temperatures=wrong)  # type: ignore[arg-type]


@every_kernel
def test_text_is_that_of_plain_decoding_whatever_they_are(kernels: str, tmp_path: Path) -> None:
    config = replace(BLOCKS["one layer"], temperatures=TEMPERATURES)
    checkpoints.write(
        block(BLOCKS["one layer"]), config, Checkpoint(tmp_path / "it", "block", {}, "lively", {}), torch.float32
    )
    network = on(lively(), kernels)
    drafter = build(
        {"drafter": "block", "checkpoint": str(tmp_path / "it")}, Workshop(Model(network, 1), {}.__getitem__)
    )
    outputs = Engine(network, drafter, max_rows=3).generate(PROMPTS, SamplingParams(max_new_tokens=60))
    assert [o.token_ids for o in outputs] == [greedy(lively(), prompt, 60) for prompt in PROMPTS]
    assert sum(o.stats.drafted_tokens for o in outputs) > 0
