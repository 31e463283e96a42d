"""EAGLE: what is trained is what drafts, its memory is that of the text, trees are those of the papers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drafters.heading import (
    PREFIX,
    PROMPTS,
    VOCAB,
    WIDTH,
    cyclic,
    filled,
    greedy,
    lively,
    needs_kernels,
    noise,
    relative,
)
from drafters.test_fallback import Bursts, in_turns
from drafters.test_medusa import demand_law
from enumeration import distance, one_law, plain_law
from fakes import TableNetwork
from forerun.drafters.cascade import Cascade, Part
from forerun.drafters.eagle import METHOD, EagleConfig
from forerun.drafters.eagle.drafter import STATIC, EagleDrafter, Pairs, PairsExpander
from forerun.drafters.eagle.network import EagleModule, EagleStack, sources_of
from forerun.drafters.fallback import Fallback
from forerun.drafters.maxgram import MaxGram, Successors
from forerun.drafters.none import Nothing
from forerun.drafters.switch import is_certain
from forerun.drafters.verified import Verified
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.acceptance import AcceptanceConfig
from forerun.drafting.acceptance.head import AcceptanceHead
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.growth import Chain, Form, Frontier, StaticTree, TopTree
from forerun.drafting.heads import REMEMBERED, WAITING, Places
from forerun.drafting.stopping import Acceptance
from forerun.drafting.trained import LayerConfig, Weights
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.errors import DrafterError
from forerun.model import Inputs, Model, Scores
from forerun.nn.backends.native.transformer import pack
from forerun.nn.transformer import Transformer
from forerun.ranktree import RankTree
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.train.answers import Answers, Batch
from forerun.train.distill import Sample
from forerun.train.objectives.heads import HeadsObjective
from forerun.train.schedule import Schedule
from forerun.train.teacher import Teacher
from forerun.tree import TokenTree
from test_engine import engine_law

STEPS = 5
ONE = EagleConfig(WIDTH, VOCAB, STEPS, taught=STEPS, noise="none", layer=PREFIX)
THREE = replace(ONE, fused=True, sources=(0, 1, 2), vocabulary="own")
KEPT = (0, 1, 2, 5, 7, 8, 9, 14, 20, 21, 30, 31, 33, 36, 39)
CONFIGS = {
    "eagle": ONE,
    "eagle, two layers and biases": replace(ONE, layers=2, fuse_bias=True, qkv_bias=True),
    "eagle, part of the vocabulary": replace(ONE, kept=KEPT),
    "eagle3": THREE,
    "eagle3, the target's projection": replace(THREE, vocabulary="shared", sources=(1, 0)),
    "eagle3, part of the vocabulary": replace(THREE, kept=KEPT, residual_normed=True),
    "eagle3, normed together": replace(THREE, layers=2, qkv_bias=True, joined_normed=True),
    "eagle3.1": replace(THREE, sources_normed=True, output_normed=True, qk_norm=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TOP_P = SamplingParams(temperature=1.0, top_p=0.7)
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


@cache
def eagle(config: EagleConfig) -> EagleModule:
    """Nothing in it is at its neutral value."""
    module: EagleModule = filled(EagleModule(config), 1.0, seed=5).eval().requires_grad_(False)
    return module


def lent(module: EagleModule, target: Transformer | None = None) -> EagleStack:
    target = target or lively()
    return module.stack.lend(target.embedding.weight, module.of_known(target.head.weight))


@cache
def states_of(tokens: tuple[int, ...], target: Transformer) -> dict[int, Tensor]:
    read = Model(target, 0).read(Inputs.whole(torch.tensor([tokens])), (0, 1, 2))
    return {layer: states.clone() for layer, states in read.items()}


def joined(config: EagleConfig, tokens: Sequence[int], target: Transformer | None = None) -> Tensor:
    """[1, N, M D]."""
    known = states_of(tuple(tokens), target or lively())
    return torch.cat([known[layer] for layer in eagle(config).reads(2)], -1)


# ---- the network


class Slow:
    """The definition, one pair after the other, one head after another, in fp64."""

    def __init__(self, module: EagleModule):
        self.w = {name.removeprefix("stack."): p.double() for name, p in module.named_parameters()}
        self.config, shape = module.config, module.config.layer
        assert shape is not None
        self.shape: LayerConfig = shape
        self.memory: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(module.config.layers)]

    def norm(self, x: Tensor, weight: Tensor | float) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.shape.norm_eps).rsqrt() * weight

    def turned(self, x: Tensor, position: int) -> Tensor:
        half = self.shape.head_dim // 2
        angle = position * self.shape.rope_theta ** (-torch.arange(half).double() / half)
        a, b = x[:half], x[half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))

    def fused(self, states: Tensor) -> Tensor:
        """Of one place's states, side by side."""
        if not self.config.fused:
            return states
        if self.config.sources_normed:
            parts = states.split(self.config.width)
            states = torch.cat([self.norm(x, g) for x, g in zip(parts, self.w["fuse_norm"], strict=True)])
        if self.config.joined_normed:
            states = self.norm(states, self.w["fuse_norm"][0])
        return self.w["fuse"] @ states

    def read(self, state: Tensor, token: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """What the next step reads, and what is scored."""
        w, config = self.w, self.config
        if config.fused:
            normed = self.norm(state, w["state_norm"])
            seen = torch.cat((self.norm(token, w["blocks.0.attention_norm"]), normed))
            x = normed if config.residual_normed else state
        else:
            x = w["fuse"] @ torch.cat((token, state)) + w.get("fuse_bias", 0.0)
            seen = x
        for layer in range(config.layers):
            own = {name.split(".", 2)[2]: p for name, p in w.items() if name.startswith(f"blocks.{layer}.")}
            x = self.layer(
                own, self.memory[layer], x, seen if not layer else self.norm(x, own["attention_norm"]), position
            )
        if not config.fused:
            return x, x
        scored = self.norm(x, w["final_norm"])
        return (scored if config.output_normed else x), scored

    def layer(
        self, own: dict[str, Tensor], memory: list[tuple[Tensor, Tensor]], x: Tensor, seen: Tensor, position: int
    ) -> Tensor:
        size, group = self.shape.head_dim, self.shape.heads // self.shape.kv_heads
        made = own["qkv.weight"] @ seen + own.get("qkv.bias", 0.0)
        q, k, v = made.split([n * size for n in (self.shape.heads, self.shape.kv_heads, self.shape.kv_heads)])
        keys = [self.norm(one, own["k_norm"]) if "k_norm" in own else one for one in k.split(size)]
        memory.append((torch.stack([self.turned(one, position) for one in keys]), v.view(-1, size)))
        mixed = []
        for head, query in enumerate(q.split(size)):
            if "q_norm" in own:
                query = self.norm(query, own["q_norm"])
            query = self.turned(query, position)
            law = torch.stack([query @ keys[head // group] for keys, _ in memory]).div(size**0.5).softmax(-1)
            mixed.append(law @ torch.stack([values[head // group] for _, values in memory]))
        x = x + own["out.weight"] @ torch.cat(mixed)
        gate, up = (own["gate_up.weight"] @ self.norm(x, own["mlp_norm"])).chunk(2)
        return x + own["down.weight"] @ (F.silu(gate) * up)

    def logits(self, scored: Tensor) -> Tensor:
        """Over the whole vocabulary."""
        known = known_to(self.config)
        matrix = lively().head.weight.double()[known] if self.config.vocabulary == "shared" else self.w["vocabulary"]
        whole = torch.full((VOCAB,), -math.inf, dtype=torch.float64)
        whole[known] = matrix @ scored
        return whole


def known_to(config: EagleConfig) -> list[int]:
    return list(config.kept or range(VOCAB))


def slow_logits(module: EagleModule, tokens: Sequence[int], said: Sequence[int]) -> list[Tensor]:
    """What may follow each of these tokens, the root first, behind a text that the target has read."""
    slow, embedding = Slow(module), lively().embedding.weight.double()
    states, found = joined(module.config, tokens)[0].double(), []
    state = torch.zeros(0)
    for place, token in enumerate([*tokens[1:], *said]):
        own = place >= len(tokens)
        state, scored = slow.read(state if own else slow.fused(states[place]), embedding[token], place)
        if place >= len(tokens) - 1:
            found.append(slow.logits(scored))
    return found


def taught(module: EagleModule, texts: Sequence[Sequence[int]], places: Sequence[tuple[int, int]]) -> Tensor:
    """What training computes at these (text, place)s, [K, P, V]; texts are padded to the longest."""
    longest = max(map(len, texts))
    tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    read = Model(lively(), 0).read(Inputs.whole(tokens), module.reads(2))
    seen = module.seen({layer: read[layer].clone() for layer in module.reads(2)}, some_places(tokens, places))
    return module.logits(seen, seen[..., :0], module.of_known(lively().head.weight))


def some_places(tokens: Tensor, places: Sequence[tuple[int, int]]) -> Places:
    rows, at = (torch.tensor(part) for part in zip(*places, strict=True))
    return Places(rows, at, F.embedding(tokens, lively().embedding.weight))


@every_config
def test_unrolled_training_computes_what_the_definition_says(config: EagleConfig) -> None:
    """Every step at every place: as if the draft had gone on from there with the true tokens (7.2)."""
    module, texts = eagle(config), [TEXT, TEXT[5:17]]
    places = [(0, 0), (0, 7), (0, 8), (1, 2)]
    logits = taught(module, texts, places)
    assert logits.shape == (STEPS, len(places), len(known_to(config)))
    for number, (text, place) in enumerate(places):
        said = texts[text][place + 1 : place + 1 + STEPS]
        expected = torch.stack(slow_logits(module, texts[text][: place + 1], said))[:, known_to(config)]
        torch.testing.assert_close(logits[:, number].double(), expected, atol=2e-4, rtol=1e-4)


@every_config
def test_a_text_shorter_than_what_training_unrolls(config: EagleConfig) -> None:
    """The steps that it has tokens for are those of a longer text."""
    module, short = eagle(config), TEXT[:3]
    logits = taught(module, [short], [(0, 0)])
    expected = torch.stack(slow_logits(module, short[:1], short[1:3]))[:, known_to(config)]
    torch.testing.assert_close(logits[: len(expected), 0].double(), expected, atol=2e-4, rtol=1e-4)


def row_of(tokens: Sequence[int]) -> Row:
    return Row([*tokens], len(tokens), SamplingParams(max_new_tokens=40), key=0, limit=200)


def following(
    config: EagleConfig, read: Sequence[Sequence[int]], target: Transformer | None = None, piece: int = 3
) -> Pairs:
    """Pairs that have followed these texts up to, but without, the last token, in pieces of so many tokens."""
    pairs = Pairs(lent(eagle(config), target), 64)
    for text in read:
        pairs.admit(row_of(text[:2]), joined(config, text, target)[:, :1])
    for begin in range(1, max(map(len, read)) - 1, piece):
        pairs.observe([joined(config, text, target)[0, :-1][begin : begin + piece] for text in read])
    return pairs


@every_config
def test_drafting_computes_what_training_does(config: EagleConfig) -> None:
    """Rows of several lengths side by side, whose text came piece by piece; every row goes its own way."""
    read = [TEXT[:12], TEXT[:4], TEXT[:15]]
    logits = taught(eagle(config), [TEXT] * 3, [(0, 10), (1, 2), (2, 13)])
    expander = PairsExpander(following(config, read), [row_of(text) for text in read])
    scores = expander.begin()
    for depth in range(1, STEPS + 1):
        torch.testing.assert_close(scores.logits_BNV[:, 0], logits[depth - 1], atol=2e-4, rtol=1e-4)
        tokens = torch.tensor([[TEXT[len(text) - 1 + depth]] for text in read])
        depths = torch.full((3, 1), depth).numpy()
        scores = expander.expand(Frontier(tokens, depths, torch.zeros(3, 1, dtype=torch.int64).numpy()))


class Heard(PairsExpander):
    """Remembers what was said of every node."""

    def __init__(self, pairs: Pairs, rows: Sequence[Row]):
        super().__init__(pairs, rows)
        self.laws: list[Tensor] = []

    def _heard(self, scores: Scores) -> Scores:
        self.laws.append(scores.logits_BNV[0])
        return super()._heard(scores)


@every_config
def test_every_branch_of_a_tree_is_read_by_itself(config: EagleConfig) -> None:
    """All nodes of a level at once, each behind its own parents alone."""
    text, ranks = TEXT[:9], RankTree([(0,), (1,), (0, 0), (0, 2), (1, 0), (1, 1), (0, 2, 0), (1, 1, 3)])
    heard = Heard(following(config, [text]), [row_of(text)])
    grown = StaticTree(ranks).grow(heard, Context([row_of(text)], [8], [3], torch.device("cpu")), [3]).tree
    named, kept = dict(zip(ranks.nodes, grown.tokens[0][1:], strict=True)), known_to(config)
    for path in ((), (0,), (1,), (0, 2), (1, 1)):
        said = [text[-1], *(named[path[: depth + 1]] for depth in range(len(path)))]
        *_, expected = slow_logits(eagle(config), text[:-1], said)
        level = [
            node for node in [(), *ranks.nodes] if len(node) == len(path) and any(n[:-1] == node for n in ranks.nodes)
        ]
        found = heard.laws[len(path)][level.index(path)].double()
        torch.testing.assert_close(found, expected[kept], atol=2e-4, rtol=1e-4)
        best = expected.argsort(descending=True, stable=True)
        for node in ranks.nodes:
            if node[:-1] == path:
                assert named[node] == best[node[-1]]


def test_a_place_sees_its_states_and_the_token_behind_them() -> None:
    """Changing x_{t+1} changes the step at t, changing x_{t+2} or f_{t+1} does not."""
    module, tokens = eagle(ONE), torch.tensor([TEXT])
    states = joined(ONE, TEXT)

    def said(states: Tensor, tokens: Tensor) -> Tensor:
        return module.seen({2: states}, some_places(tokens, [(0, 6)]))[0, 0]

    plain = said(states, tokens)
    for change, token, state in ((True, 7, None), (False, 8, None), (True, None, 6), (False, None, 7)):
        other, moved = tokens.clone(), states.clone()
        if token is not None:
            other[0, token] += 1
        if state is not None:
            moved[0, state] += 1
        assert torch.equal(said(moved, other), plain) is not change


@pytest.mark.parametrize("config", [ONE, THREE], ids=["eagle", "eagle3"])
def test_only_what_the_papers_norm_is_normed(config: EagleConfig) -> None:
    """EAGLE-1's layer sees how long its input is. EAGLE-3's attention does not, its residual does."""
    stack, state, token = eagle(config).stack, noise(1, 1, WIDTH), noise(1, 1, WIDTH, seed=1)
    (x, read), (x10, read10) = stack._begin(state, token), stack._begin(10 * state, 10 * token)
    same = torch.allclose(read, read10, rtol=1e-3, atol=1e-4)
    assert same is config.fused
    assert torch.allclose(x10, 10 * x, rtol=1e-4) and not torch.allclose(x10, x)


LAYERS = {
    "7B": ((4096, 11008, 32, 32), 0.236),
    "13B": ((5120, 13824, 40, 40), 0.370),
    "33B": ((6656, 17920, 52, 13), 0.557),
    "70B": ((8192, 28672, 64, 8), 0.990),
    "8x7B": ((4096, 14336, 32, 32), 0.277),
    "8B": ((4096, 14336, 32, 8), 0.252),
}


@pytest.mark.parametrize(("shape", "billions"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("bias", [False, True])
def test_there_are_as_many_parameters_as_published(
    shape: tuple[int, int, int, int], billions: float, bias: bool
) -> None:
    d, ff, heads, kv = shape
    layer = LayerConfig(heads, kv, d // heads, ff, 2048)
    with torch.device("meta"):
        module = EagleModule(EagleConfig(d, 32000, layer=layer, fuse_bias=bias))
    found, keys = sum(p.numel() for p in module.parameters()), kv * (d // heads)
    assert found == 2 * d * d + bias * d + (2 * d * d + 2 * d * keys + 3 * d * ff + d)
    assert round(found / 1e9, 3) == billions


def test_eagle3_is_as_large_as_its_description() -> None:
    layer = LayerConfig(32, 8, 128, 14336, 2048)
    config = EagleConfig(4096, 128256, layer=layer, fused=True, sources=(2, 16, 29), vocabulary="own")
    with torch.device("meta"):
        module = EagleModule(replace(config, kept=tuple(range(32000))))
    assert 0.42e9 < sum(p.numel() for p in module.parameters()) < 0.44e9


# ---- what is learnt


def objective(config: EagleConfig, weights: Weights, target: Transformer | None = None) -> HeadsObjective:
    module: EagleModule = filled(EagleModule(config), 1.2, seed=7)
    samples = [Sample((1, 2, 3), tuple(TEXT)), Sample((4,), tuple(TEXT[3:])), Sample((7, 7), tuple(TEXT[:9]))]
    answers = Answers(samples, rows=3, length=32, holdout=9)
    return HeadsObjective(module, Teacher(target or lively()), answers, weights, RankTree.chain(1), Schedule(10))


def test_the_loss_of_a_perfect_guess() -> None:
    """No distance is left, and of the cross-entropy the law's own entropy (3.3)."""
    found = objective(replace(ONE, taught=1), Weights(text=0.0, teacher=0.1, state=1.0))
    batch = found.answers.batch(0)
    states = found.teacher.states(batch.tokens_BN, {2})[2]
    rows, places = batch.places()
    guesses = torch.stack(
        [states[rows, (places + 1 + step).clamp(max=states.shape[1] - 1)] for step in range(STEPS)], 1
    )
    found.module.seen = lambda *_: guesses  # type: ignore[method-assign]
    found.module.eval()
    law = (states[rows, places + 1] @ lively().head.weight.T).log_softmax(-1)
    entropy = -(law.exp() * law).sum(-1).mean()
    torch.testing.assert_close(found.loss_on(batch), 0.1 * entropy, rtol=1e-4, atol=1e-5)


def test_the_loss_of_eagle_by_hand() -> None:
    """L1, smooth, mean over the width, and a tenth of the cross-entropy with the target's law, at one step."""
    found = objective(replace(ONE, taught=1), Weights(text=0.0, teacher=0.1, state=1.0))
    found.module.train()
    batch = found.answers.batch(0)
    total = 0.0
    texts = [row[:end] for row, end in zip(batch.tokens_BN.tolist(), batch.ends, strict=True)]
    assert isinstance(found.module, EagleModule)
    learnt = 0
    for row, at in zip(*(part.tolist() for part in batch.places()), strict=True):
        states = states_of(tuple(texts[row]), lively())[2][0].double()
        slow, scored = Slow(found.module), torch.zeros(0)
        for t in range(at + 1):
            token = lively().embedding.weight[texts[row][t + 1]].double()
            _, scored = slow.read(states[t], token, t)
        apart = (scored - states[at + 1]).abs()
        total += float(torch.where(apart < 1, apart**2 / 2, apart - 0.5).mean().detach())
        law = (lively().head.weight.double() @ states[at + 1]).softmax(-1)
        total -= 0.1 * float((law * slow.logits(scored).log_softmax(-1)).sum().detach())
        learnt += 1
    assert found.loss_on(batch).item() == pytest.approx(total / learnt, rel=1e-3)


def test_later_steps_count_less_and_reach_the_fusion() -> None:
    """EAGLE-3: 0.8^s, and the gradient of a later step goes through the earlier ones."""
    preset = METHOD.trained.presets["eagle3"]  # type: ignore[union-attr]
    found = objective(replace(THREE, taught=STEPS), preset.weights)
    found.module.train()
    batch = found.answers.batch(0)
    each = found.losses_on(batch)
    assert len(each) == STEPS
    counted = sum(0.8**step * loss / 1.25 for step, loss in enumerate(each.tolist()))
    assert found._total(each).item() == pytest.approx(1.25 * counted * 0.8, rel=1e-5)
    assert isinstance(found.module, EagleModule)
    each[STEPS - 1].backward()
    assert float(found.module.stack.fuse.grad.abs().sum()) > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("text", [0.0, 1.0])
def test_a_part_of_the_vocabulary_learns_the_law_among_its_tokens(text: float) -> None:
    """Where the target's best token is one of them, and where the true one is, if it is asked for (7.2)."""
    config = replace(THREE, taught=1, heads=1, kept=tuple(range(3, 33)))
    found = objective(config, Weights(text=text, teacher=1.0))
    found.module.train()
    batch, known = found.answers.batch(0), list(config.kept)
    texts = [row[:end] for row, end in zip(batch.tokens_BN.tolist(), batch.ends, strict=True)]
    assert isinstance(found.module, EagleModule)
    total, learnt, outside = 0.0, 0, 0
    for row, at in zip(*(part.tolist() for part in batch.places()), strict=True):
        states = states_of(tuple(texts[row]), lively())
        theirs = lively().head.weight.double() @ states[2][0, at + 1].double()
        label = texts[row][at + 2]
        if int(theirs.argmax()) not in known or (text and label not in known):
            outside += 1
            continue
        slow, scored = Slow(found.module), torch.zeros(0)
        for t in range(at + 1):
            state = torch.cat([states[layer][0, t] for layer in config.sources]).double()
            _, scored = slow.read(slow.fused(state), lively().embedding.weight[texts[row][t + 1]].double(), t)
        mine = slow.logits(scored)[known].log_softmax(-1).detach()
        total -= float((theirs[known].softmax(-1) * mine).sum())
        total -= text * float(mine[known.index(label)]) if text else 0.0
        learnt += 1
    assert learnt > 5 and outside > 1
    assert found.loss_on(batch).item() == pytest.approx(total / learnt, rel=1e-3)
    found.loss_on(batch).backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in found.module.parameters())


def test_what_lies_behind_the_answers_changes_no_loss() -> None:
    """Padding, and the last token, which nothing follows."""
    found = objective(replace(THREE, taught=STEPS), Weights(text=0.0, teacher=1.0))
    batch = found.answers.batch(0)
    padded = batch.tokens_BN.clone()
    for row, end in enumerate(batch.ends):
        padded[row, end:] = 11
    longer = Batch(F.pad(padded, (0, 4), value=5), batch.begins, batch.ends)
    torch.testing.assert_close(found.losses_on(longer), found.losses_on(batch), rtol=1e-4, atol=1e-5)


def test_one_step_learns_and_five_are_looked_at() -> None:
    found = objective(replace(ONE, taught=1), Weights(text=0.0, teacher=0.1, state=1.0))
    figures = found.validate()
    assert "head5_top1" in figures and "head6_top1" not in figures
    assert figures["loss"] == pytest.approx(figures["head1_loss"])
    found.module.train()
    assert len(found.losses_on(found.answers.batch(0))) == 1


@pytest.mark.parametrize(("kind", "most"), [("length", 0.1 * 512 / 40), ("flat", 0.1), ("none", 0.0)])
def test_noise_is_as_strong_as_it_says(kind: str, most: float) -> None:
    """In training alone (3.4)."""
    module = EagleModule(replace(ONE, noise=kind))
    states = torch.zeros(3, 40, WIDTH)
    found = module.train()._noised(states)
    assert float(found.max()) == pytest.approx(most, rel=0.01) and float(found.min()) == pytest.approx(-most, rel=0.01)
    assert torch.equal(module.eval()._noised(states), states)


# ---- trees


def test_the_static_tree_is_that_of_the_paper() -> None:
    assert Counter(map(len, STATIC.nodes)) == {1: 4, 2: 8, 3: 8, 4: 3, 5: 2} and STATIC.size == 25
    with_children = Counter(map(len, {node[:-1] for node in STATIC.nodes if len(node) > 1}))
    assert with_children == {1: 4, 2: 4, 3: 1, 4: 1}
    pairs = following(ONE, [TEXT[:9]])
    before = pairs.model.passes
    context = Context([row_of(TEXT[:9])], [25], [5], torch.device("cpu"))
    StaticTree(STATIC).grow(PairsExpander(pairs, context.rows), context, [5])
    assert pairs.model.passes - before == 5


def dynamic(config: EagleConfig, text: Sequence[int], width: int, levels: int, nodes: int) -> list[tuple[int, ...]]:
    """EAGLE-2 as it is written down (6): paths of tokens."""
    scores: dict[tuple[int, ...], float] = {}
    frontier: list[tuple[int, ...]] = [()]
    for _ in range(levels):
        level = []
        for path in frontier:
            *_, logits = slow_logits(eagle(config), text[:-1], [text[-1], *path])
            values, tokens = logits.log_softmax(-1).topk(width)
            for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
                scores[(*path, token)] = scores.get(path, 0.0) + value
                level.append((*path, token))
        frontier = sorted(level, key=lambda path: -scores[path])[:width]
    return sorted(scores, key=lambda path: -scores[path])[:nodes]


@pytest.mark.parametrize("config", [ONE, THREE, CONFIGS["eagle3, part of the vocabulary"]], ids=["1", "3", "part"])
@pytest.mark.parametrize(("width", "levels", "nodes"), [(3, 4, 12), (1, 4, 4), (4, 2, 99)])
def test_the_dynamic_tree_is_that_of_the_paper(config: EagleConfig, width: int, levels: int, nodes: int) -> None:
    text = TEXT[:9]
    context = Context([row_of(text)], [nodes], [levels], torch.device("cpu"))
    grown = TopTree(width, levels, nodes).grow(
        PairsExpander(following(config, [text]), context.rows), context, [levels]
    )
    expected = dynamic(config, text, width, levels, nodes)
    assert sorted(paths_of(grown.tree)) == sorted(expected)
    assert len(expected) == min(nodes, width + (levels - 1) * width * width)


def paths_of(tree: TokenTree) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens[0][1:], tree.topology.parents[0][1:], strict=True):
        paths.append((*paths[parent], token))
    return paths[1:]


# ---- in the engine


class Watching(EagleDrafter):
    """Compares its memory, at every step, with what reading the whole text at once leaves."""

    target: Transformer
    compared = 0

    def propose(self, context: Context) -> TokenTree:
        tree = super().propose(context)
        pairs = self.pairs
        for slot, row in enumerate(context.rows):
            if tree.sizes[slot] > 1:
                fresh = following(pairs.stack.form, [row.tokens], self.target, len(row.tokens))
                fresh.next_scores([row])
                found, expected = (one.model.cache.entries(place) for one, place in ((pairs, slot), (fresh, 0)))
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
                self.compared += 1
        return tree


def watching(config: EagleConfig, target: Transformer, form: Form | None = None) -> Watching:
    form = form or TopTree(3, 4, 8)
    module = eagle(config)
    drafter = Watching(Pairs(own_stack(module, target), form.scratch), form, module.reads(2))
    drafter.target = target
    return drafter


def own_stack(module: EagleModule, target: Transformer) -> EagleStack:
    """Lent matrices belong to one target."""
    other = EagleModule(module.config)
    other.load_state_dict(module.state_dict())
    return lent(other.eval().requires_grad_(False), target)


@every_config
def test_the_memory_is_that_of_the_text_whatever_runs_beside_it(config: EagleConfig) -> None:
    drafter = watching(config, lively())
    engine, wishes = (
        Engine(lively(), drafter, max_rows=3),
        [SamplingParams(max_new_tokens=n) for n in (9, 25, 4, 17, 12)],
    )
    outputs = engine.generate(PROMPTS, wishes)
    expected = [greedy(lively(), prompt, one.max_new_tokens or 0) for prompt, one in zip(PROMPTS, wishes, strict=True)]
    assert [output.token_ids for output in outputs] == expected
    assert drafter.compared > 40 and not len(drafter.pairs._rows) and not drafter.pairs.model.cache.rows


CROWD = [[1, 2, 3], [4], [7, 7, 7, 7, 7], [9, 30, 2, 2, 11, 25, 0, 6, 19, 5, 5, 5, 8], [12, 3], [20]]


def crowded(inner: Watching, over: Drafter, temperature: float = 0.0) -> None:
    """Rows of different lengths come and go beside one another; the texts are right, and the draft spoke."""
    wishes = [SamplingParams(temperature=temperature, seed=n, max_new_tokens=4 + 7 * n) for n in range(len(CROWD))]
    outputs = Engine(lively(), over, max_rows=3).generate(CROWD, wishes)
    if not temperature:
        for prompt, wish, output in zip(CROWD, wishes, outputs, strict=True):
            assert output.token_ids == greedy(lively(), prompt, wish.max_new_tokens or 0)
    assert inner.compared > 20 and not inner.pairs.model.cache.rows


both = pytest.mark.parametrize("config", [ONE, CONFIGS["eagle3, part of the vocabulary"]], ids=["eagle", "eagle3"])


@both
@pytest.mark.parametrize(("length", "strength"), [(1, 0.1), (4, 0.1), (4, 0.0), (5, 3.0)])
def test_below_a_verified_model(config: EagleConfig, length: int, strength: float) -> None:
    """States come later, or are taken back at every step, and tokens with them."""
    inner = watching(config, relative(0, strength))
    crowded(inner, Verified(Model(relative(0, strength), inner.max_nodes + 1), inner, length))


@pytest.mark.parametrize(
    ("config", "temperature"), [(ONE, 0.8), (CONFIGS["eagle3, part of the vocabulary"], 0.0)], ids=["eagle", "eagle3"]
)
def test_at_the_bottom_of_three_models(config: EagleConfig, temperature: float) -> None:
    inner = watching(config, relative(0, 0.3))
    lower = Verified(Model(relative(0, 0.3), inner.max_nodes + 1), inner, 2)
    crowded(inner, Verified(Model(relative(1, 0.1), lower.max_nodes + 1), lower, 5), temperature)


@both
def test_rows_that_stand_still(config: EagleConfig) -> None:
    """A part of a cascade is asked again without a word from above."""
    inner = watching(config, relative(0, 0.2))
    verified = Verified(Model(relative(0, 0.2), inner.max_nodes + 1), inner, 3)
    crowded(inner, Cascade([Part(verified, 8), Part(MaxGram(4, Successors()), 10)]))


@both
def test_behind_another_source_that_answers_for_long(config: EagleConfig) -> None:
    """More tokens than wait unread, in one row and not in the others."""
    inner = watching(config, lively())
    one = Engine(lively(), Fallback([Bursts(lively(), in_turns), inner]), max_rows=2)
    outputs = one.generate(CROWD[1:4], SamplingParams(max_new_tokens=130))
    assert [output.token_ids for output in outputs] == [greedy(lively(), prompt, 130) for prompt in CROWD[1:4]]
    assert inner.compared > 10


def test_what_waits_unread_is_bounded_and_nothing_is_read_twice() -> None:
    """However long another source answers."""
    pairs, text = following(ONE, [TEXT[:3]]), TEXT * 10
    states = joined(ONE, text)[0]
    for end in range(3, len(text) - 6, 6):
        pairs.observe([states[pairs.known(0) : end]])
        pairs.catch_up([row_of(text[: end + 1])])
        assert pairs.known(0) == end and end - pairs.model.cache.lengths[0] <= WAITING
        assert end - pairs._rows[0].begin <= REMEMBERED + WAITING + 6
    reads = pairs.model.passes
    pairs.next_scores([row_of(text[: pairs.known(0) + 1])])
    assert pairs.model.passes - reads <= 2


def test_a_row_of_which_more_was_taken_back_than_is_remembered_is_left_alone() -> None:
    pairs, text = Pairs(lent(eagle(ONE)), 8), TEXT * 30
    row = Row(text, len(text), SamplingParams(), key=0, limit=700)
    pairs.admit(row, noise(1, len(text) - 1, WIDTH))
    assert pairs.known(0) == len(text) - 1
    pairs.retract(0, 100)
    assert pairs.known(0) == -1
    pairs.retract(0, 90)
    assert pairs.known(0) == -1


@pytest.mark.parametrize(
    ("fused", "layers", "wishes"),
    [
        (False, 1, SamplingParams(temperature=1.0)),
        (True, 2, SamplingParams(temperature=0.6)),
        *((fused, layers, TOP_P) for fused, layers in ((False, 1), (False, 3), (True, 2))),
    ],
)
def test_the_law_of_the_output_is_that_of_plain_sampling(fused: bool, layers: int, wishes: SamplingParams) -> None:
    """Every outcome is enumerated, for a vocabulary of three, of which EAGLE-3 knows two."""
    target = TableNetwork(3, seed=3, order=2, sharpness=1.0)
    more = {"fused": True, "vocabulary": "own", "kept": (0, 2), "sources": (0, 1)} if fused else {}
    config = EagleConfig(3, 3, layers=layers, layer=LayerConfig(1, 1, 2, 4, 64), **more)  # type: ignore[arg-type]
    embedding, head = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def made() -> Drafter:
        module = filled(EagleModule(config), 1.5, seed=4).double().eval().requires_grad_(False)
        form = TopTree(2, 3, 6)
        return EagleDrafter(Pairs(module.stack.lend(embedding, head), form.scratch), form, module.reads(1))

    demand_law(made, target, [1, 0, 1], replace(wishes, max_new_tokens=4))


def ending(width: int, threshold: float = 0.5, most: int = 5) -> Chain:
    """Chains that an acceptance head ends, which reads the states that EAGLE goes on with."""
    torch.manual_seed(1)
    return Chain(Acceptance(AcceptanceHead(AcceptanceConfig(width, 1)), threshold, 1, most))


@both
def test_chains_that_end_themselves(config: EagleConfig) -> None:
    """Their memory is that of the text; of a chain all but the last token are read."""
    drafter = watching(config, lively(), ending(WIDTH))
    outputs = Engine(lively(), drafter, max_rows=3).generate(PROMPTS, SamplingParams(max_new_tokens=30))
    assert [output.token_ids for output in outputs] == [greedy(lively(), prompt, 30) for prompt in PROMPTS]
    assert drafter.compared > 40
    steps, drafted = sum(one.stats.steps for one in outputs), sum(one.stats.drafted_tokens for one in outputs)
    assert 2 * steps < drafted < 5 * steps


def test_the_law_of_chains_that_end_themselves() -> None:
    target = TableNetwork(2, seed=3, order=2, sharpness=1.0)
    config = EagleConfig(2, 2, layer=LayerConfig(1, 1, 2, 4, 64))
    embedding, head = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def made() -> Drafter:
        module = filled(EagleModule(config), 1.5, seed=4).double().eval().requires_grad_(False)
        form = ending(2, most=2)
        return EagleDrafter(Pairs(module.stack.lend(embedding, head), form.scratch), form, module.reads(1))

    wishes = SamplingParams(temperature=1.0, max_new_tokens=3)
    law = engine_law(made, {"target": target}, [1, 0, 1], wishes)
    assert distance(law, plain_law(lambda said: one_law(target.logits([1, 0, 1, *said]), wishes), 3)) < 1e-6


def knowing(right: bool) -> EagleDrafter:
    """On the cyclic target, whose next state is a function of the next token: always right, or never."""
    config = EagleConfig(16, 16, layer=LayerConfig(1, 1, 4, 4, 256))
    module = EagleModule(config).eval().requires_grad_(False)
    for weight in (module.stack.blocks[0].out.weight, module.stack.blocks[0].down.weight):
        weight.zero_()
    module.stack.fuse[:, :16] = torch.eye(16) * (4 if right else -4)
    form = TopTree(2, 5, 10)
    return EagleDrafter(Pairs(lent(module, cyclic()), form.scratch), form, module.reads(1))


@pytest.mark.parametrize(("right", "steps"), [(True, 10), (False, 60)])
def test_a_perfect_draft_and_one_that_is_always_wrong(right: bool, steps: int) -> None:
    """The first gives the depth of the tree and one more at every step, the second one; both say the target's text."""
    output = Engine(cyclic(), knowing(right)).generate([[3, 5]], SamplingParams(max_new_tokens=60))[0]
    assert output.token_ids == greedy(cyclic(), [3, 5], 60)
    assert abs(output.stats.steps - steps) <= 1


@needs_kernels
@both
def test_on_a_target_in_bf16_on_native_kernels(config: EagleConfig) -> None:
    target = pack(deepcopy(lively()).to(torch.bfloat16))
    module = EagleModule(config)
    module.load_state_dict(eagle(config).state_dict())
    module = module.to(torch.bfloat16).eval().requires_grad_(False)
    form = TopTree(3, 4, 8)
    pairs = Pairs(module.stack.lend(target.input_embedding, target.head_matrix()), form.scratch)
    wishes = SamplingParams(max_new_tokens=40)
    drafted = Engine(target, EagleDrafter(pairs, form, module.reads(2)), max_rows=3).generate(PROMPTS, wishes)
    plain = Engine(target, Nothing(), max_rows=3).generate(PROMPTS, wishes)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]


# ---- the configuration


def test_sources_are_those_of_the_code() -> None:
    assert [sources_of(top) for top in (32, 80, 8, 4, 2, 1)] == [
        (2, 16, 29),
        (2, 40, 77),
        (2, 4, 5),
        (1, 2),
        (0, 1),
        (0,),
    ]


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (ONE, {"layer": None}, "sizes"),
        (ONE, {"taught": 6}, "look further"),
        (ONE, {"sources": (0, 1)}, "one layer"),
        (ONE, {"sources": ()}, "sources"),
        (THREE, {"sources": (1, 1)}, "twice"),
        (ONE, {"vocabulary": "own"}, "vocabulary"),
        (ONE, {"output_normed": True}, "output_normed"),
        (ONE, {"noise": "loud"}, "noise"),
        (ONE, {"tied_layers": True}, "tied_layers"),
        (ONE, {"fused": 1}, "true or false"),
        (THREE, {"fuse_bias": True}, "without a bias"),
        (THREE, {"sources_normed": True, "joined_normed": True}, "one by one"),
        (THREE, {"kept": (3, 2)}, "ascending"),
        (THREE, {"kept": (3, VOCAB)}, "ascending"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(base: EagleConfig, change: dict[str, Any], said: str) -> None:
    with pytest.raises(DrafterError, match=said):
        replace(base, **change)


def test_how_far_figures_look_is_no_property_of_the_weights() -> None:
    assert replace(ONE, heads=9, taught=2, noise="flat") == ONE != replace(ONE, layers=2)


def stored(config: EagleConfig, folder: Path) -> str:
    checkpoints.write(eagle(config), config, Checkpoint(folder, "eagle", {}, "lively", {}), torch.float32)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "settings", "levels", "nodes"),
    [
        (ONE, {}, 6, 59),
        (THREE, {}, 8, 59),
        (ONE, {"width": 2, "depth": 3, "nodes": 7}, 3, 7),
        (THREE, {"tree": "static"}, 5, 25),
        (ONE, {"tree": [[0], [0, 0], [1]]}, 2, 3),
    ],
)
def test_the_tree_is_the_papers_unless_one_is_wished_for(
    config: EagleConfig, settings: dict[str, Any], levels: int, nodes: int, tmp_path: Path
) -> None:
    made = build({"drafter": "eagle", "checkpoint": stored(config, tmp_path / "it"), **settings}, workshop())
    assert isinstance(made, EagleDrafter) and made.max_nodes == nodes
    form = made.form
    assert (form.depth if isinstance(form, TopTree) else form.ranks.depth) == levels  # type: ignore[attr-defined]


def test_a_rule_makes_it_a_chain(tmp_path: Path) -> None:
    heads = {"drafter": "eagle", "checkpoint": stored(ONE, tmp_path / "it")}
    made = build({**heads, "stopping": {"rule": "confidence", "most": 7}}, workshop())
    assert isinstance(made, EagleDrafter) and isinstance(made.form, Chain) and made.max_nodes == 7
    assert is_certain(heads) and not is_certain({**heads, "stopping": "confidence"})
    for wrong, says in (({"tree": "static", "stopping": "fixed"}, "not both"), ({"stopping": 3}, "a rule's name")):
        with pytest.raises(DrafterError, match=says):
            build({**heads, **wrong}, workshop())


def workshop(target: Transformer | None = None) -> Workshop:
    return Workshop(Model(target or lively(), 1), {}.__getitem__)


def test_a_target_with_too_few_layers_is_refused(tmp_path: Path) -> None:
    folder = stored(replace(THREE, sources=(0, 1, 3)), tmp_path / "it")
    with pytest.raises(DrafterError, match="reads layer 3, and this target has 2"):
        build(f"eagle:{folder}", workshop())


@pytest.mark.parametrize("setting", ["width", "depth", "nodes"])
def test_sizes_of_trees_are_counts(setting: str) -> None:
    with pytest.raises(DrafterError, match=setting):
        METHOD.checked({setting: 0})
