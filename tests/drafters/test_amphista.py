"""Amphista-style heads: the network is what its definition says, what is trained is what drafts, every switch does what
it says, and the text is the target's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drafters.heading import (
    PREFIX,
    PROMPTS,
    TREES,
    VOCAB,
    WIDTH,
    Watching,
    ahead,
    cyclic,
    every_kernel,
    filled,
    greedy,
    lively,
    noise,
    on,
    relative,
)
from drafters.test_hydra import crowded
from enumeration import Luck, distance, ideal_dice, law_of, one_law, plain_law
from forerun.chance import key_of
from forerun.drafters.amphista import METHOD, AmphistaConfig
from forerun.drafters.amphista.drafter import AdaptedState, build, reader
from forerun.drafters.amphista.network import AmphistaHeads
from forerun.drafters.cascade import Cascade, Part
from forerun.drafters.fallback import Fallback
from forerun.drafters.maxgram import MaxGram, Successors
from forerun.drafters.medusa import MedusaConfig
from forerun.drafters.medusa.network import MedusaHeads
from forerun.drafters.none import Nothing
from forerun.drafters.verified import Verified
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.heads import HeadDrafter, HeadParts, Places, TorchHeads
from forerun.drafting.trained import HeadSettings, LayerConfig
from forerun.drafting.workshop import Workshop
from forerun.drafting.workshop import build as build_spec
from forerun.engine.engine import Engine
from forerun.errors import DrafterError
from forerun.layouts import exchange
from forerun.model import Model
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer
from forerun.plan import calibrate as calibration
from forerun.plan.calibrate import Pair, Stopwatch, calibrate
from forerun.ranktree import RankTree
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.train.answers import Answers, Batch
from forerun.train.distill import Sample
from forerun.train.least_squares import LeastSquares
from forerun.train.objectives.heads import HeadsObjective
from forerun.train.ranks import projected, ranks_of, steps_of
from forerun.train.schedule import Schedule
from forerun.train.teacher import Teacher

HEADS = 5
WHOLE = AmphistaConfig(WIDTH, VOCAB, HEADS, layer=PREFIX)
CONFIGS = {
    "whole": WHOLE,
    "one stage": replace(WHOLE, stages=1),
    "no stages": replace(WHOLE, stages=0),
    "first token": replace(WHOLE, sampled_token="first"),
    "no token": replace(WHOLE, sampled_token="no"),
    "deep": replace(WHOLE, layers=2, ae_layers=2),
    "one-way": replace(WHOLE, auto_embedding="one-way"),
    "no auto-embedding": replace(WHOLE, auto_embedding="none"),
    "no positions": replace(WHOLE, ae_positions=False),
    "no mlp": replace(WHOLE, ae_mlp=False),
    "shared": replace(WHOLE, vocabulary="shared"),
    "one head": replace(WHOLE, heads=1),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TAUGHT = METHOD.trained.presets["amphista"].weights  # type: ignore[union-attr]
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


@cache
def some(config: AmphistaConfig = WHOLE) -> AmphistaHeads:
    """Nothing in it is at its neutral value."""
    module: AmphistaHeads = filled(AmphistaHeads(config), 1.5, seed=5).eval().requires_grad_(False)
    return module


def seen(module: AmphistaHeads, network: Transformer, texts: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """What training gives the heads."""
    embedded = F.embedding(texts, network.embedding.weight)
    return module.seen({2: network.features(texts)}, Places(rows, places, embedded))


def seen_of(module: AmphistaHeads, tokens: Sequence[int], network: Transformer | None = None) -> Tensor:
    """At every place of one text that has a token behind it, [N - 1, M]."""
    places = torch.arange(len(tokens) - 1)
    return seen(module, network or lively(), torch.tensor([list(tokens)]), torch.zeros_like(places), places)


def said_by(module: AmphistaHeads, context_PD: Tensor) -> Tensor:
    return module.logits(context_PD, context_PD[:, None], lively().head.weight.to(context_PD.dtype))


def logits_of(module: AmphistaHeads, tokens: Sequence[int]) -> Tensor:
    """[K, N - 1, V]."""
    return said_by(module, seen_of(module, tokens))


# ---- the definition, one row, one head, one token after another, in fp64


class Slow:
    def __init__(self, module: AmphistaHeads):
        self.w = {name: p.double() for name, p in module.named_parameters()}
        self.config, self.shape = module.config, module.config.layer or PREFIX

    def logits(self, tokens: Sequence[int], place: int) -> Tensor:
        """Of all heads, [K, V], at a place whose root is the token behind it."""
        states = [state.double() for state in lively().features(torch.tensor([tokens]))[0, : place + 1]]
        roots = [lively().embedding.weight[token].double() for token in tokens[1 : place + 2]]
        stages, config = [states], self.config
        for stage in range(config.stages):
            x = stages[-1]
            if config.sampled_token == "all" or (config.sampled_token == "first" and stage == 0):
                fuse = self.w[f"adaptation.fuse.{stage}"]
                x = [fuse @ torch.cat((root, state)) for root, state in zip(roots, x, strict=True)]
            for number in range(stage * config.layers, (stage + 1) * config.layers):
                x = self.layer(f"adaptation.blocks.{number}.", x, range(place + 1), causal=True, mlp=True)
            stages.append(x)
        ys = []
        for head in range(config.heads):
            early = config.stages == 2 and head < config.heads // 2
            z = stages[1 if early else -1][-1]
            ys.append(z + F.silu(self.w["mlps"][head] @ z + self.w["mlp_biases"][head]))
        if config.auto_embedding != "none":
            if config.ae_positions:
                ys = [y + position for y, position in zip(ys, self.w["embedding.positions"], strict=True)]
            for number in range(config.ae_layers):
                causal = config.auto_embedding == "one-way"
                ys = self.layer(f"embedding.blocks.{number}.", ys, [0] * len(ys), causal, config.ae_mlp)
        own = config.vocabulary == "own"
        matrices = self.w["vocabulary"] if own else [lively().head.weight.double()] * len(ys)
        return torch.stack([matrix @ y for matrix, y in zip(matrices, ys, strict=True)])

    def layer(self, prefix: str, x: list[Tensor], positions: Sequence[int], causal: bool, mlp: bool) -> list[Tensor]:
        """Pre-norm and residual. Position 0 is no rotation."""
        w = {name.removeprefix(prefix): p for name, p in self.w.items() if name.startswith(prefix)}
        size, group = self.shape.head_dim, self.shape.heads // self.shape.kv_heads
        parts = [self.shape.heads * size, self.shape.kv_heads * size, self.shape.kv_heads * size]
        fused = [(w["qkv.weight"] @ self.norm(one, w["attention_norm"])).split(parts) for one in x]
        turned = [
            ([self.turned(head, at) for head in q.split(size)], [self.turned(head, at) for head in k.split(size)])
            for (q, k, _), at in zip(fused, positions, strict=True)
        ]
        after = []
        for row, one in enumerate(x):
            others = range(row + 1 if causal else len(x))
            mixed = []
            for head, query in enumerate(turned[row][0]):
                law = torch.stack([query @ turned[o][1][head // group] for o in others]).div(size**0.5).softmax(-1)
                mixed.append(law @ torch.stack([fused[o][2].split(size)[head // group] for o in others]))
            one = one + w["out.weight"] @ torch.cat(mixed)
            if mlp:
                gate, up = (w["gate_up.weight"] @ self.norm(one, w["mlp_norm"])).chunk(2)
                one = one + w["down.weight"] @ (F.silu(gate) * up)
            after.append(one)
        return after

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean() + self.shape.norm_eps).rsqrt() * weight

    def turned(self, x: Tensor, position: int) -> Tensor:
        half = self.shape.head_dim // 2
        angle = position * self.shape.rope_theta ** (-torch.arange(half).double() / half)
        a, b = x[:half], x[half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


@every_config
def test_training_computes_what_the_definition_says(config: AmphistaConfig) -> None:
    """Several texts side by side; a text's padding changes nothing."""
    module, texts = some(config), [TEXT, TEXT[5:17]]
    tokens = torch.tensor([[*text, *[7] * (len(TEXT) - len(text))] for text in texts])
    rows, places = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 7, 8, 2, 10])
    logits = said_by(module, seen(module, lively(), tokens, rows, places))
    for number, (row, place) in enumerate(zip(rows.tolist(), places.tolist(), strict=True)):
        expected = Slow(module).logits(texts[row], place)
        torch.testing.assert_close(logits[:, number].double(), expected, atol=2e-4, rtol=1e-4)


def row_of(tokens: Sequence[int]) -> Row:
    return Row([*tokens], len(tokens), SamplingParams(max_new_tokens=40), key=0, limit=200)


@every_config
def test_drafting_computes_what_training_does(config: AmphistaConfig) -> None:
    """Rows of several lengths side by side, whose text came piece by piece."""
    module, read = some(config), [TEXT[:12], TEXT[:8], TEXT[:15]]
    found = reader(module, lively())
    states = [lively().features(torch.tensor([text[:-1]])) for text in read]
    for text, state in zip(read, states, strict=True):
        found.admit(row_of(text), state[:, :-6])
    found.observe([state[0, -6:-5] for state in states])
    found.contexts()
    found.observe([state[0, -5:] for state in states])
    tree = TREES["gaps"].within(module.count, TREES["gaps"].size)
    assert tree is not None
    contexts = torch.stack([one for one in found.contexts() if one is not None])
    heads = TorchHeads(module, lively().embedding.weight, lively().head.weight)
    drafted = heads.draft(contexts, [text[-1] for text in read], tree)
    for text, context, tokens in zip(read, contexts, drafted, strict=True):
        logits = Slow(module).logits(text, len(text) - 2)
        torch.testing.assert_close(said_by(module, context[None])[:, 0].double(), logits, atol=2e-4, rtol=1e-4)
        ranked = logits.argsort(descending=True)
        assert tokens == [text[-1], *(int(ranked[len(path) - 1, path[-1]]) for path in tree.nodes)]


# ---- heads hear one another, places do not


def hearing(module: AmphistaHeads) -> Tensor:
    """How much what head i says to another [i, j] moves with what head j made of its stage."""
    y = noise(module.count, 1, WIDTH, seed=2)
    slopes = torch.autograd.functional.jacobian(module.embed, y)
    return slopes[:, 0, :, :, 0].abs().amax((1, 3))


def test_every_head_hears_every_other_and_one_way_only_those_before() -> None:
    assert (hearing(some()) > 1e-4).all()
    one_way = hearing(some(CONFIGS["one-way"]))
    assert (one_way.tril() > 1e-4).equal(torch.ones(HEADS, HEADS).tril().bool()) and not one_way.triu(1).any()
    alone = hearing(some(CONFIGS["no auto-embedding"]))
    assert alone.equal(torch.eye(HEADS))


def test_heads_are_told_apart_by_their_positions_alone() -> None:
    y, order = noise(HEADS, 3, WIDTH, seed=2), [3, 0, 4, 1, 2]
    without = some(CONFIGS["no positions"])
    torch.testing.assert_close(without.embed(y[order]), without.embed(y)[order])
    assert not torch.allclose(some().embed(y[order]), some().embed(y)[order], atol=1e-2)


@every_config
def test_a_place_hears_those_before_it_through_the_stages_alone(config: AmphistaConfig) -> None:
    """A state that is moved changes what is said there, never before, and behind it only through the stages."""
    module, at = some(config), 6
    tokens = torch.tensor([TEXT])
    states, places = lively().features(tokens), torch.arange(len(TEXT) - 1)
    there = Places(torch.zeros_like(places), places, F.embedding(tokens, lively().embedding.weight))
    moved = states.clone()
    moved[0, at] += noise(WIDTH)
    change = said_by(module, module.seen({2: moved}, there)) - said_by(module, module.seen({2: states}, there))
    size_P = change.abs().amax((0, 2))
    assert not size_P[:at].any() and size_P[at] > 0.1
    assert (size_P[at + 1 :] > 1e-4).all() if config.stages else not size_P[at + 1 :].any()


@every_config
def test_the_newest_token_moves_every_head(config: AmphistaConfig) -> None:
    """At its own place and behind it, unless no stage is given it."""
    module, at = some(config), 6
    other = [*TEXT[: at + 1], 33, *TEXT[at + 2 :]]
    states, places = lively().features(torch.tensor([TEXT])), torch.arange(len(TEXT) - 1)

    def said(tokens: Sequence[int]) -> Tensor:
        embedded = F.embedding(torch.tensor([tokens]), lively().embedding.weight)
        return said_by(module, module.seen({2: states}, Places(torch.zeros_like(places), places, embedded)))

    size_KP = (said(other) - said(TEXT)).abs().amax(2)
    given = config.stages and config.sampled_token != "no"
    assert not size_KP[:, :at].any()
    assert (size_KP[:, at:] > 1e-4).all() if given else not size_KP.any()


def test_a_stage_that_is_given_no_token_does_not_see_it_itself() -> None:
    """With the token for the first stage alone, the second is told by the first."""
    module = some(CONFIGS["first token"])
    assert module.adaptation is not None and len(module.adaptation.fuse) == 1
    assert len(some(CONFIGS["no token"]).adaptation.fuse) == 0  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "hears"), [("whole", True), ("no auto-embedding", False), ("one-way", False)])
def test_the_first_heads_read_the_first_stage(name: str, hears: bool) -> None:
    """The second stage reaches them through the other heads alone, if they hear these."""
    module = deepcopy(some(CONFIGS[name])).requires_grad_(True)
    second = module.adaptation.blocks[1].qkv.weight  # type: ignore[union-attr,index]
    for head, reads in enumerate([hears, hears, True, True, True]):
        module.zero_grad()
        logits_of(module, TEXT)[head].square().sum().backward()
        assert bool(second.grad is not None and second.grad.abs().max() > 1e-6) == reads  # type: ignore[union-attr]


# ---- where it begins


@pytest.mark.parametrize("heads", [1, 2, 5, 8])
@every_config
def test_untrained_heads_say_what_the_target_says(config: AmphistaConfig, heads: int) -> None:
    module = AmphistaHeads(replace(config, heads=heads)).initialise(lively().head.weight).eval()
    states = lively().features(torch.tensor([TEXT]))[0, :-1]
    torch.testing.assert_close(
        logits_of(module, TEXT), F.linear(states, lively().head.weight).expand(heads, -1, -1), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(seen_of(module, TEXT)[:, -WIDTH:], states)


@pytest.mark.parametrize("vocabulary", ["own", "shared"])
def test_with_everything_off_they_are_medusas_heads(vocabulary: str) -> None:
    """Logits and loss, with the same weights."""
    bare = replace(CONFIGS["no stages"], auto_embedding="none", vocabulary=vocabulary)
    module = some(bare)
    medusa = MedusaHeads(MedusaConfig(WIDTH, VOCAB, HEADS, vocabulary=vocabulary)).requires_grad_(False)
    medusa.blocks.copy_(module.mlps[None])
    medusa.biases.copy_(module.mlp_biases[None])
    if medusa.vocabulary is not None:
        medusa.vocabulary.copy_(module.vocabulary)
    states = noise(9, WIDTH)
    assert torch.equal(said_by(module, states), medusa.logits(states, states[:, None], lively().head.weight))
    batch = Batch.of([Sample(tuple(TEXT[:4]), tuple(TEXT[4:])), Sample((7,), (2, 9, 9, 1))], 64)
    losses = [objective(one, some_answers()).losses_on(batch) for one in (module, medusa)]
    assert torch.equal(*losses)


D, FF, V = 4096, 11008, 32000
VICUNA = AmphistaConfig(D, V, 5, layer=LayerConfig(32, 32, 128, FF, 2048))
ATTENTION, MLP, NORM, FUSE = 4 * D * D, 3 * D * FF, D, 2 * D * D
LAYER = ATTENTION + MLP + 2 * NORM
BLOCKS, PROJECTIONS = 5 * (D * D + D), 5 * V * D
ENCODER = LAYER + 5 * D


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 2 * (FUSE + LAYER) + BLOCKS + ENCODER + PROJECTIONS),
        ({"stages": 1}, FUSE + LAYER + BLOCKS + ENCODER + PROJECTIONS),
        ({"stages": 0}, BLOCKS + ENCODER + PROJECTIONS),
        ({"sampled_token": "first"}, FUSE + 2 * LAYER + BLOCKS + ENCODER + PROJECTIONS),
        ({"sampled_token": "no"}, 2 * LAYER + BLOCKS + ENCODER + PROJECTIONS),
        ({"auto_embedding": "none"}, 2 * (FUSE + LAYER) + BLOCKS + PROJECTIONS),
        ({"auto_embedding": "one-way"}, 2 * (FUSE + LAYER) + BLOCKS + ENCODER + PROJECTIONS),
        ({"ae_positions": False}, 2 * (FUSE + LAYER) + BLOCKS + LAYER + PROJECTIONS),
        ({"ae_mlp": False}, 2 * (FUSE + LAYER) + BLOCKS + ENCODER - MLP - NORM + PROJECTIONS),
        ({"ae_layers": 2}, 2 * (FUSE + LAYER) + BLOCKS + ENCODER + LAYER + PROJECTIONS),
        ({"layers": 2}, 2 * (FUSE + 2 * LAYER) + BLOCKS + ENCODER + PROJECTIONS),
        ({"vocabulary": "shared"}, 2 * (FUSE + LAYER) + BLOCKS + ENCODER),
    ],
    ids=str,
)
def test_sizes_are_those_of_the_specification(changes: dict[str, Any], count: int) -> None:
    """For Vicuna 7B; 1.41 billion in all."""
    with torch.device("meta"):
        module = AmphistaHeads(replace(VICUNA, **changes))
    assert sum(p.numel() for p in module.parameters()) == count
    if not changes:
        assert count / 1e9 == pytest.approx(0.472 + 0.084 + 0.067 + 0.135 + 0.655, abs=2e-3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stages": 3}, "3 stages"),
        ({"sampled_token": "every"}, "'every'"),
        ({"auto_embedding": "both ways"}, "'both ways'"),
        ({"ae_mlp": 1}, "ae_mlp 1"),
        ({"ae_positions": "no"}, "ae_positions 'no'"),
        ({"ae_layers": 0}, "ae_layers 0"),
        ({"tied_layers": True}, "tied_layers"),
        ({"layer": None}, "sizes"),
        ({"heads": 0}, "heads 0"),
    ],
    ids=str,
)
def test_a_shape_that_no_heads_can_have_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(DrafterError, match=says):
        replace(WHOLE, **changes)


# ---- the stages' memory


def doubled(module: torch.nn.Module) -> Any:
    return deepcopy(module).double()


@pytest.mark.parametrize("config", [CONFIGS["whole"], CONFIGS["deep"], CONFIGS["no token"], CONFIGS["one stage"]])
@pytest.mark.parametrize("seed", range(3))
def test_the_stages_piece_by_piece_say_what_they_say_of_the_whole_text(config: AmphistaConfig, seed: int) -> None:
    """In fp64, with 1 to K + 1 tokens a step; now and then a level above takes tokens back and places other ones."""
    module, target, luck = doubled(some(config)), doubled(lively()), np.random.default_rng(seed)
    found, rows = reader(module, target), [row_of(luck.integers(0, VOCAB, 2 + 5 * n).tolist()) for n in range(3)]
    assert isinstance(found, AdaptedState)
    for row in rows:
        found.admit(row, target.features(torch.tensor([row.tokens[:-1]])))
    for step in range(12):
        if step % 4 != 1:
            for slot, (row, context) in enumerate(zip(rows, found.contexts(), strict=True)):
                expected = seen_of(module, row.tokens, target)[-1]
                assert context is not None
                torch.testing.assert_close(context, expected, atol=1e-10, rtol=1e-10)
                assert found.model.cache.lengths[slot] == len(row.tokens) - 1
        for slot, row in enumerate(rows):
            if step % 3 == 2 and len(row.tokens) > 6:
                length = len(row.tokens) - int(luck.integers(1, 5))
                found.retract(slot, length)
                row.tokens[length:] = [int(luck.integers(VOCAB))]
        kept = [len(row.tokens) - 1 for row in rows]
        for row in rows:
            row.tokens += luck.integers(0, VOCAB, int(luck.integers(1, HEADS + 2))).tolist()
        states = [target.features(torch.tensor([row.tokens[:-1]]))[0] for row in rows]
        found.observe([state[begin:] for state, begin in zip(states, kept, strict=True)])


def test_a_root_that_changes_is_read_again() -> None:
    """Without a word from above: the row's text alone says so."""
    found, row = reader(some(), lively()), row_of(TEXT[:8])
    found.admit(row, lively().features(torch.tensor([row.tokens[:-1]])))
    for root in (row.tokens[-1], 11, 30):
        row.tokens[-1] = root
        (context,) = found.contexts()
        torch.testing.assert_close(context, seen_of(some(), row.tokens)[-1], atol=1e-4, rtol=1e-4)


def test_a_long_prompt_is_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forerun.drafters.amphista.drafter.CHUNK", 4)
    found, row = reader(some(), lively()), row_of(TEXT)
    found.admit(row, lively().features(torch.tensor([TEXT[:-1]])))
    assert isinstance(found, AdaptedState) and found.model.passes == 5
    (context,) = found.contexts()
    torch.testing.assert_close(context, seen_of(some(), TEXT)[-1], atol=1e-4, rtol=1e-4)


def test_states_that_wait_are_read_before_they_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter in front answers for a long time; the memory is that of the text all the same."""
    monkeypatch.setattr("forerun.drafting.heads.REMEMBERED", 20)
    text = [*greedy(lively(), TEXT, 120)]
    found, row = reader(some(), lively()), row_of(text[:2])
    states = lively().features(torch.tensor([text]))[0]
    found.admit(row, states[None, :1])
    for begin in range(1, len(text) - 7, 7):
        found.observe([states[begin : begin + 7]])
        row.tokens[:] = text[: begin + 8]
    (context,) = found.contexts()
    torch.testing.assert_close(context, seen_of(some(), row.tokens)[-1], atol=1e-4, rtol=1e-4)


# ---- training


def some_answers(vocab: int = VOCAB) -> list[Sample]:
    luck = np.random.default_rng(0)
    texts = [luck.integers(0, vocab, 24).tolist() for _ in range(8)]
    return [Sample(tuple(text[: 1 + n]), tuple(text[1 + n :])) for n, text in enumerate(texts)]


def objective(module: Any, samples: Sequence[Sample], target: Transformer | None = None) -> HeadsObjective:
    schedule = Schedule(60, warmup=5, muon_rate=0.0, adam_rate=1e-2, weight_decay=0.0, shape="cosine")
    answers = Answers(samples, rows=4, length=64, holdout=1000)
    return HeadsObjective(module, Teacher(target or lively()), answers, TAUGHT, RankTree.chain(1), schedule)


@torch.no_grad()
def slow_loss(module: AmphistaHeads, samples: Sequence[Sample]) -> float:
    """The specification's, token by token: sum over k of 0.8^(k-1) (CE(law, head k) + 0.1 CE(token, head k)), each
    head's mean over the tokens that it proposes."""
    found: dict[int, list[float]] = {head: [] for head in range(module.count)}
    for sample in samples:
        text = [*sample.prompt, *sample.answer]
        target_logits = lively().features(torch.tensor([text]))[0].double() @ lively().head.weight.double().T
        for place in range(max(0, len(sample.prompt) - 2), len(text) - 2):
            logits = Slow(module).logits(text, place).log_softmax(-1)
            for head, here in enumerate(range(place + 2, min(place + 2 + module.count, len(text)))):
                law = target_logits[here - 1].softmax(-1)
                found[head].append(-float((law * logits[head]).sum()) - 0.1 * float(logits[head, text[here]]))
    return sum(0.8**head * float(np.mean(each)) for head, each in found.items())


@pytest.mark.parametrize("name", ["whole", "no stages", "no token", "one-way", "shared"])
def test_the_loss_is_that_of_going_through_the_answers_by_hand(name: str) -> None:
    """With the preset's weights."""
    module, samples = some(CONFIGS[name]), [replace(one, answer=one.answer[:9]) for one in some_answers()[:3]]
    loss = objective(module, samples).loss_on(Batch.of(samples, 64))
    assert loss.item() == pytest.approx(slow_loss(module, samples), rel=1e-4)


@every_config
def test_every_parameter_learns_and_the_target_stays_as_it_is(config: AmphistaConfig) -> None:
    """From the start on which they begin, after a step: layers that add nothing yet let nothing through."""
    target = deepcopy(lively()).requires_grad_(True)
    before = deepcopy(target.state_dict())
    module = AmphistaHeads(config).initialise(target.head.weight.detach())
    started = deepcopy(module.state_dict())
    one = objective(module, some_answers(), target)
    for step in range(5):
        one.update(step)
    for name, value in module.state_dict().items():
        assert not torch.equal(value, started[name]), name
    assert all(p.grad is None for p in target.parameters())
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def cyclic_samples() -> list[Sample]:
    texts = [[int(ahead(torch.tensor(first), k, 16)) for k in range(24)] for first in range(16)]
    return [Sample(tuple(text[:3]), tuple(text[3:])) for text in texts]


CYCLIC = AmphistaConfig(16, 16, HEADS, layer=replace(PREFIX, heads=2, kv_heads=2, head_dim=8))


@pytest.mark.parametrize("vocabulary", ["own", "shared"])
def test_trained_heads_know_a_cyclic_text_and_nothing_beside_it(vocabulary: str) -> None:
    """Every head the token at its own distance, and none of them the one behind it."""
    module = AmphistaHeads(replace(CYCLIC, vocabulary=vocabulary)).initialise(cyclic().head.weight)
    one = objective(module, cyclic_samples(), cyclic())
    before = np.concatenate(ranks_of(module, one.teacher, cyclic_samples(), one.answers))
    for step in range(60):
        one.update(step)
    after = np.concatenate(ranks_of(module, one.teacher, cyclic_samples(), one.answers))
    assert not (before == 0).any() and (after >= 0).any(0).all() and (after[after >= 0] == 0).all()
    text = list(cyclic_samples()[5].prompt + cyclic_samples()[5].answer)
    logits = module.logits(seen_of(module, text, cyclic()), torch.zeros(0), cyclic().head.weight)
    for head, said in enumerate(logits.argmax(-1)):
        assert said.tolist() == ahead(torch.tensor(text[:-1]), head + 2, 16).tolist()


def test_heads_that_start_from_the_fit_know_a_cyclic_text_at_once() -> None:
    module = AmphistaHeads(CYCLIC).initialise(cyclic().head.weight)
    answers = Answers(cyclic_samples(), rows=4, length=64, holdout=1000)
    start = LeastSquares(module, Teacher(cyclic()), answers, 4)
    for step in range(start.steps):
        start.update(step)
    start.finish()
    ranks = np.concatenate(ranks_of(module, Teacher(cyclic()), cyclic_samples(), answers))
    assert (ranks >= 0).any(0).all() and (ranks[ranks >= 0] == 0).all()


def own_answers(count: int = 96) -> list[Sample]:
    """What the lively target says at temperature 0.5."""
    luck = np.random.default_rng(5)
    prompts = [luck.integers(0, VOCAB, 3).tolist() for _ in range(count)]
    wishes = [SamplingParams(max_new_tokens=40, temperature=0.5, seed=seed) for seed in range(count)]
    outputs = Engine(lively(), Nothing()).generate(prompts, wishes)
    return [Sample(tuple(p), tuple(o.token_ids), 0.5) for p, o in zip(prompts, outputs, strict=True)]


def test_every_part_helps_at_equal_steps() -> None:
    """Medusa's heads, then stages, then their token, then the block between heads: loss and tokens per step."""
    bare, answers = replace(CONFIGS["no stages"], auto_embedding="none"), Answers(own_answers(), 12, 64, holdout=4)
    growing = [bare, CONFIGS["no token"], CONFIGS["whole"]]
    without = replace(WHOLE, auto_embedding="none")
    figures = []
    for config in [*growing, without]:
        module = AmphistaHeads(config).initialise(lively().head.weight)
        schedule = Schedule(60, warmup=5, muon_rate=0.0, adam_rate=3e-3, weight_decay=0.0, shape="cosine")
        one = HeadsObjective(module, Teacher(lively()), answers, TAUGHT, TREES["dense"], schedule)
        for step in range(60):
            one.update(step)
        figures.append(one.validate())
    losses, tokens = ([each[name] for each in figures] for name in ("loss", "tokens_per_step"))
    assert losses[0] > losses[1] + 0.1 and losses[1] > losses[2] + 0.1 and losses[3] > losses[2] + 0.05
    assert tokens[0] < tokens[1] < tokens[2] and tokens[3] < tokens[2]


# ---- in the engine


def drafter(module: AmphistaHeads, network: Network, tree: RankTree) -> HeadDrafter:
    """What `build` makes of a checkpoint."""
    heads = TorchHeads(module, network.input_embedding, network.head_matrix())
    return HeadDrafter("amphista", HeadParts(heads, reader(module, network), tree, network.cache_shape.layers))


@pytest.mark.parametrize("heads", [2, 5, 8])
def test_a_step_takes_one_draft_forward_however_many_heads_there_are(heads: int) -> None:
    module = deepcopy(some(replace(WHOLE, heads=heads)))
    one = Engine(lively(), drafter(module, lively(), RankTree.chain(heads)))
    calls, logits = 0, module.logits

    def counted(*given: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return logits(*given)

    module.logits = counted  # type: ignore[method-assign]
    (output,) = one.generate([[1, 2, 3]], SamplingParams(max_new_tokens=30))
    found = one.drafter.head.reader  # type: ignore[attr-defined]
    assert output.token_ids == greedy(lively(), [1, 2, 3], 30)
    drafted = output.stats.steps - (output.stats.steps > calls)  # nothing is drafted where one token is left
    assert calls == drafted and found.model.passes == calls + 1, "and one for the prompt"


@every_kernel
@every_config
def test_rows_that_come_and_go_say_what_the_target_says(config: AmphistaConfig, kernels: str) -> None:
    counts = [24, 30, 1, 7, 18]
    one = Engine(on(lively(), kernels), drafter(some(config), on(lively(), kernels), tree_of(config)), max_rows=3)
    outputs = one.generate(PROMPTS, [SamplingParams(max_new_tokens=count) for count in counts])
    for prompt, count, output in zip(PROMPTS, counts, outputs, strict=True):
        assert output.token_ids == greedy(lively(), prompt, count) and output.stats.exact
    if isinstance(found := one.drafter.head.reader, AdaptedState):  # type: ignore[attr-defined]
        assert found.model.cache.rows == 0 == len(found._texts)


def tree_of(config: AmphistaConfig) -> RankTree:
    tree = TREES["gaps"].within(config.heads, TREES["gaps"].size)
    assert tree is not None
    return tree


def test_rows_at_the_end_of_the_context_are_served() -> None:
    prompts = [[1] * 250, [2] * 254, [3] * 255, [1, 2, 3] * 60]
    outputs = Engine(lively(), drafter(some(), lively(), TREES["mc_sim"])).generate(prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == greedy(lively(), prompt, 256 - len(prompt)) and output.finish_reason == "length"


@pytest.mark.parametrize("at", range(8))
def test_an_engine_that_is_interrupted_within_the_stages_goes_on(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Engine(lively(), drafter(deepcopy(some()), lively(), TREES["gaps"]), max_rows=3)
    found = one.drafter.head.reader  # type: ignore[attr-defined]
    forward, left = found.model.network.forward, at

    def interrupted(*given: object) -> object:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt
        return forward(*given)

    monkeypatch.setattr(found.model.network, "forward", interrupted)
    for output in one.generate(PROMPTS, SamplingParams(max_new_tokens=20)):
        assert output.token_ids == greedy(lively(), PROMPTS[output.prompt_index], 20)[: len(output.token_ids)]
    assert left < 0 and one.is_idle and one.target.cache.rows == 0 == found.model.cache.rows
    again = one.generate(PROMPTS[:3], SamplingParams(max_new_tokens=12))
    assert [output.token_ids for output in again] == [greedy(lively(), prompt, 12) for prompt in PROMPTS[:3]]


@pytest.mark.parametrize("wishes", [{"temperature": 1.0, "top_p": 0.7}, {"temperature": 0.6}])
def test_the_law_of_the_output_is_that_of_plain_sampling(wishes: dict[str, float]) -> None:
    """On a transformer of three words in fp64, where every outcome is enumerated; the heads' own law is another."""
    params, prompt = SamplingParams(max_new_tokens=4, **wishes), [1, 0, 1]  # type: ignore[arg-type]
    target, module = doubled(lively(vocab=3)), doubled(some(replace(WHOLE, vocab_size=3)))
    tree = RankTree([[0], [1], [0, 0], [1, 2], [1, 2, 0]])

    def program(_: list[None], lucks: list[Luck]) -> list[tuple[int, ...]]:
        one = Engine(target, drafter(module, target, tree), max_rows=len(lucks))
        each = [replace(params, seed=seed) for seed in range(len(lucks))]
        with ideal_dice({key_of(seed): luck for seed, luck in enumerate(lucks)}):
            return [tuple(output.token_ids) for output in one.generate([prompt] * len(lucks), each)]

    def plain(said: tuple[int, ...]) -> Tensor:
        states = target.features(torch.tensor([[*prompt, *said]]))[0, -1]
        return one_law(states @ target.head.weight.T, params)

    law = law_of(program, at_once=128)
    assert sum(law.values()) == pytest.approx(1, abs=1e-9) and distance(law, plain_law(plain, 4)) < 1e-9


# ---- below a verified model


class WatchingStages(Watching):
    """Compares what the heads see with what training would have shown them there."""

    def __init__(self, module: AmphistaHeads, network: Transformer, kernels: str):
        super().__init__(module, network, kernels)
        self.head = replace(self.head, reader=reader(module, on(network, kernels)))

    def _context(self, tokens: Sequence[int]) -> Tensor:
        assert isinstance(self._module, AmphistaHeads)
        return seen_of(self._module, tokens, self._network)[-1]


@every_kernel
@pytest.mark.parametrize(("length", "strength"), [(1, 0.1), (4, 0.1), (4, 0.0), (9, 3.0)])
def test_heads_below_a_verified_model_see_what_they_would_have_seen_at_once(
    kernels: str, length: int, strength: float
) -> None:
    """Where everything, something or next to nothing is accepted: roots change at every step."""
    inner = WatchingStages(some(), relative(0, strength), kernels)
    crowded(inner, Verified(inner.model, inner, length))
    assert inner.silent > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_heads_at_the_bottom_of_three_models(temperature: float) -> None:
    inner = WatchingStages(some(), relative(0, 0.3), "torch")
    lower = Verified(inner.model, inner, 2)
    crowded(inner, Verified(Model(relative(1, 0.1), lower.max_nodes + 1), lower, 5), temperature)


def test_heads_that_are_asked_again_and_again_without_a_word_from_above() -> None:
    inner = WatchingStages(some(), relative(0, 0.2), "torch")
    crowded(inner, Cascade([Part(Verified(inner.model, inner, 3), 8), Part(MaxGram(4, Successors()), 10)]))


@pytest.mark.parametrize("front", ["lookup", "hierarchy"])
def test_heads_behind_a_store_see_what_they_would_have_seen_at_once(front: str) -> None:
    """It answers for some rows of a step, for all of them, or for none."""
    inner = WatchingStages(some(), relative(0, 0.1), "torch")
    store = build_spec(front, Workshop(inner.model, {}.__getitem__))
    over = Verified(Model(relative(0, 0.1), 65), Fallback([store, inner]), 4)
    inner.model = over.model
    crowded(inner, over)
    asked, answered = over.inner.tallies()[0].asked, over.inner.tallies()[0].hits
    assert 0 < answered < asked


def test_rows_that_stand_still_for_long_do_not_fill_the_stages_memory() -> None:
    inner = WatchingStages(some(), relative(0, 0.0), "torch")
    over = Verified(inner.model, inner, 150)
    prompts, wishes = [[5, 6, 7] * 60, [1, 2]], [SamplingParams(max_new_tokens=count) for count in (3, 180)]
    for prompt, wish, output in zip(prompts, wishes, Engine(lively(), over).generate(prompts, wishes), strict=True):
        assert output.token_ids == greedy(lively(), prompt, wish.max_new_tokens or 0)
    assert over.tallies()[0].asked > 40


def test_heads_whose_memory_was_taken_back_whole_fall_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A level above takes back more than is remembered."""
    monkeypatch.setattr("forerun.drafting.heads.REMEMBERED", 2)
    heads = drafter(some(), relative(0, 3.0), TREES["chain"])
    one = Engine(lively(), Verified(Model(relative(0, 3.0), heads.max_nodes + 1), heads, 12))
    (output,) = one.generate([[1, 2, 3]], SamplingParams(max_new_tokens=40))
    assert output.token_ids == greedy(lively(), [1, 2, 3], 40)
    assert one.drafter.tallies()[0].drafted > 0


# ---- from files


def written(folder: Path, config: AmphistaConfig) -> str:
    about = Checkpoint(folder / "heads", "amphista", {}, "lively", {})
    checkpoints.write(some(config), config, about, torch.float32)
    return str(folder / "heads")


@every_config
def test_a_checkpoint_is_read_as_it_was_written(config: AmphistaConfig, tmp_path: Path) -> None:
    """Also where any layout is read: layers of stages are never taken for one that is repeated."""
    place = written(tmp_path, config)
    module, heads = calibration.module_of(place), exchange.read(place)
    assert isinstance(module, AmphistaHeads) and module.config == config == heads.config
    for name, weight in some(config).named_parameters():
        assert torch.equal(module.get_parameter(name), weight) and torch.equal(heads.tensors[name], weight), name


@every_kernel
def test_heads_have_the_number_format_of_their_target(tmp_path: Path, kernels: str) -> None:
    stored = written(tmp_path, WHOLE)
    workshop = Workshop(Model(on(lively(), kernels), 1), {}.__getitem__)
    for weights, says in (("int8", "number format"), ("fp4", "fp4")):
        with pytest.raises(DrafterError, match=says):
            build(workshop, HeadSettings(stored, weights=weights))
    assert build(workshop, HeadSettings(stored, weights="target")).name == "amphista"


def test_calibration_finds_the_tree_that_the_engine_walks_as_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration._Bench, "pair", lambda bench, tree, number: Pair(1.0, 1.0 + 0.01 * tree.size))
    prompts = [[n, n + 1, 2 * n % 9] for n in range(24)]
    samples = [Sample(tuple(p), tuple(greedy(lively(), p, 15 + n % 5))) for n, p in enumerate(prompts)]
    module = AmphistaHeads(WHOLE).initialise(lively().head.weight)
    one = objective(module, samples)
    for step in range(60):
        one.update(step)
    module.eval().requires_grad_(False)
    engine = Engine(lively(), drafter(module, lively(), TREES["chain"]))
    best = calibrate(engine, module, samples, Stopwatch(rounds=1)).best
    assert best is not None and best.tokens_per_step > 1.2
    asked = samples[1::2]
    walking = Engine(lively(), drafter(module, lively(), best.tree), max_rows=4)
    wishes = [SamplingParams(max_new_tokens=len(sample.answer)) for sample in asked]
    outputs = walking.generate([list(sample.prompt) for sample in asked], wishes)
    tables = ranks_of(module, Teacher(lively()), asked, Answers(asked, rows=4, length=64, holdout=1000))
    assert [o.stats.steps for o in outputs] == [steps_of(table, best.tree) for table in tables]
    assert best.tokens_per_step == pytest.approx(projected(tables, best.tree)) and math.isfinite(best.speedup)


@every_kernel
@pytest.mark.parametrize("name", ["whole", "no stages", "no auto-embedding", "shared"])
def test_a_target_in_bf16_teaches_and_is_drafted_for(name: str, kernels: str) -> None:
    """Heads learn in fp32 and draft in bf16, which moves what they say a little."""
    network = on(deepcopy(lively()).bfloat16(), kernels)
    module = AmphistaHeads(CONFIGS[name]).initialise(network.head_matrix().float())
    one = HeadsObjective(
        module, Teacher(network), Answers(some_answers(), 4, 64, holdout=1000), TAUGHT, RankTree.chain(1), Schedule(9)
    )
    losses = [one.update(step) for step in range(9)]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    heads = drafter(deepcopy(module).bfloat16().eval().requires_grad_(False), network, TREES["gaps"])
    outputs = Engine(network, heads).generate(PROMPTS, SamplingParams(max_new_tokens=20))
    expected = Engine(network, Nothing()).generate(PROMPTS, SamplingParams(max_new_tokens=20))
    if kernels == "native":  # there bits do not depend on the tree
        assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert all(output.stats.steps <= 20 for output in outputs)
