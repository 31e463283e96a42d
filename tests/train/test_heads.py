"""Teaching heads: which token each of them learns where, what the loss is made of, and that what is
projected is what happens."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import forerun
from drafters.heading import (
    CONFIGS,
    HEADS,
    TREES,
    VOCAB,
    WIDTH,
    ahead,
    cyclic,
    drafter_of,
    engine_with,
    every_kernel,
    filled,
    greedy,
    heads_of,
    lively,
    noise,
    on,
    slow_head,
    some_heads,
)
from forerun.drafters.hydra import HydraConfig
from forerun.drafters.hydra.network import HydraHeads
from forerun.drafters.medusa import MedusaConfig
from forerun.drafters.medusa.network import MedusaHeads
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting import registry
from forerun.drafting.heads import HeadsModule, LastState
from forerun.drafting.trained import Adversary, Weights
from forerun.engine.engine import Engine
from forerun.errors import ForerunError, TrainingError
from forerun.nn.save import save_pretrained
from forerun.nn.transformer import Transformer
from forerun.plan.calibrate import module_of
from forerun.ranktree import RankTree
from forerun.sampling import SamplingParams
from forerun.train import least_squares as squares
from forerun.train import lesson as teaching
from forerun.train.answers import Answers, Batch
from forerun.train.distill import Sample
from forerun.train.drafters import NO_TEXT, HeadsRecipe, HeadsTraining, example, prepare, schedule_for
from forerun.train.least_squares import LeastSquares
from forerun.train.lesson import Lesson, logits_of
from forerun.train.objectives import heads as objectives
from forerun.train.objectives.heads import HeadsObjective
from forerun.train.ranks import RANKS, projected, ranks_of, steps_of
from forerun.train.run import Record, Run
from forerun.train.schedule import Schedule
from forerun.train.teacher import Teacher

TRAINED = registry.trained()
PRESETS = {name: preset for one in TRAINED.values() for name, preset in one.presets.items()}
KINDS = {name: kind for kind, one in TRAINED.items() for name in one.presets}
RANKED = [preset for preset, kind in KINDS.items() if kind in registry.calibrated()]
"""Of heads that grow static trees; the others' are in their own files."""

TEXT, TEACHER, MIXED = Weights(decay=0.8), Weights(text=0.0, teacher=1.0), Weights(0.3, 0.7, 0.5)
every_kind = pytest.mark.parametrize("kind", CONFIGS)


def some_samples(count: int = 7, seed: int = 0, vocab: int = VOCAB) -> list[Sample]:
    """Prompts and answers of all lengths, one token included."""
    luck = np.random.default_rng(seed)
    lengths = [(1, 1), (1, 6), (2, 1), *((int(p), int(a)) for p, a in luck.integers(1, 12, (count, 2)))][:count]
    return [Sample(tuple(luck.integers(0, vocab, p)), tuple(luck.integers(0, vocab, a))) for p, a in lengths]


def objective(
    module: HeadsModule,
    samples: Sequence[Sample] | None = None,
    weights: Weights = TEXT,
    target: Transformer | None = None,
    **options: Any,
) -> HeadsObjective:
    answers = Answers(samples or some_samples(), **{"rows": 4, "length": 64, "holdout": 1000, **options})
    return HeadsObjective(module, Teacher(target or lively()), answers, weights, TREES["chain"], adam(1))


def adam(steps: int, rate: float = 1e-2, **rest: Any) -> Schedule:
    kind: dict[str, Any] = {"muon_rate": 0.0, "adam_rate": rate, "weight_decay": 0.0, "shape": "cosine", **rest}
    return Schedule(steps, **{"warmup": 2, "validate_every": 10_000, **kind})


def fit(one: HeadsObjective, schedule: Schedule, folder: Path, title: str) -> dict[str, float]:
    """Train by this schedule."""
    one.schedule = schedule
    return Run(one, schedule, folder).finish(title)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


# ---- the loss


@torch.no_grad()
def slow_loss(module: HeadsModule, samples: Sequence[Sample], weights: Weights) -> float:
    """Token by token, one sample after another, in fp64: every head's mean over the answer tokens
    that it learns, weighted."""
    network, total = lively(), 0.0
    for head in range(module.count):
        found = []
        for sample in samples:
            text = [*sample.prompt, *sample.answer]
            states = network.features(torch.tensor([text]))
            contexts = module.contexts(states)[0]
            for place in range(max(0, len(sample.prompt) - 2), len(text) - head - 2):
                embedded = [
                    module.table(network.embedding.weight)[token] for token in text[place + 1 : place + head + 2]
                ]
                logits = slow_head(module, head, contexts[place], embedded, network.head.weight).log_softmax(-1)
                law = (network.head.weight @ states[0, place + head + 1]).double().softmax(-1)
                said = -float(logits[text[place + head + 2]])
                found.append(weights.text * said - weights.teacher * float((law * logits).sum()))
        total += weights.decay ** (head + 1) * float(np.mean(found)) if found else 0.0
    return total


@every_kind
@pytest.mark.parametrize("weights", [TEXT, TEACHER, MIXED], ids=["text", "teacher", "mixed"])
def test_the_loss_is_that_of_going_through_the_answers_by_hand(kind: str, weights: Weights) -> None:
    """Ragged rows; every head is divided by its own number of places."""
    module, samples = some_heads(kind), some_samples(9)
    loss = objective(module, samples, weights).loss_on(Batch.of(samples, 64))
    assert loss.item() == pytest.approx(slow_loss(module, samples, weights), rel=1e-4)


@pytest.mark.parametrize(("heads", "factor"), [(1, 0.8), (4, 2.3616), (5, 2.68928)])
def test_equal_cross_entropies_add_up_with_the_papers_weights(heads: int, factor: float) -> None:
    """Heads without any weights are uniform: log V each."""
    module = MedusaHeads(MedusaConfig(WIDTH, VOCAB, heads))
    samples = [Sample((1, 2), tuple(range(number))) for number in (6, 9, 20)]
    assert objective(module, samples).loss(0).item() == pytest.approx(factor * math.log(VOCAB), rel=1e-5)
    assert PRESETS["medusa"].weights == Weights(text=1.0, teacher=0.0, decay=0.8)


@every_kind
@pytest.mark.parametrize("weights", [TEXT, TEACHER], ids=["text", "teacher"])
def test_every_parameter_of_every_head_learns(kind: str, weights: Weights) -> None:
    """A published port never trained its first head."""
    module = some_heads(kind)
    found = gradients(module, objective(module, some_samples(12, 1), weights, rows=12).loss(0))
    assert set(found) == {name for name, _ in module.named_parameters()}
    for name, gradient in found.items():
        if name.startswith(("blocks", "biases")):
            assert (gradient.flatten(2).abs().amax(-1) > 1e-6).all(), name
        elif name.startswith(("vocabulary", "first_biases", "through_biases")):
            assert (gradient.flatten(1).abs().amax(-1) > 1e-6).all(), name
        else:
            assert gradient.abs().max() > 1e-6, name


@every_kind
def test_neither_padding_nor_what_comes_after_an_answer_matters(kind: str) -> None:
    """Not the tokens there, and not how many of them there are."""
    module, samples = some_heads(kind), some_samples(9)
    one = objective(module, samples, MIXED)
    batch = Batch.of(samples, 64)
    other = batch.tokens_BN.clone()
    for row, end in enumerate(batch.ends.tolist()):
        other[row, end:] = 5 + row
    loss = one.loss_on(batch)
    assert one.loss_on(replace(batch, tokens_BN=other)) == loss
    longer = F.pad(other, (0, 9), value=3)
    assert one.loss_on(replace(batch, tokens_BN=longer)).item() == pytest.approx(loss.item(), rel=1e-6)


@every_kind
@pytest.mark.parametrize("places", [1, 3, 7])
def test_cutting_the_loss_into_chunks_changes_neither_it_nor_its_gradient(
    kind: str, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = some_heads(kind)
    one = objective(module, weights=MIXED)
    whole = one.loss(0)
    expected = gradients(module, whole)
    monkeypatch.setattr(teaching, "CHUNK_NUMBERS", places * HEADS * VOCAB)
    parts = one.loss(0)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)
    for name, gradient in gradients(module, parts).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@every_kind
def test_accumulated_parts_are_one_large_batch_where_every_part_has_as_many_places(kind: str) -> None:
    module = some_heads(kind)
    samples = [replace(s, prompt=s.prompt[:1] * 5, answer=s.answer[:1] * 9) for s in some_samples(8)]
    small, large = (objective(module, samples, rows=rows) for rows in (4, 8))
    expected = gradients(module, large.loss(0))
    parts = [gradients(module, small.loss(number) / 2) for number in (0, 1)]
    for name, gradient in expected.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], gradient, rtol=1e-3, atol=1e-5)


class Knowing(HeadsModule):
    """Says what the target itself will say: head i has the target's state of the token before the one it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.count = HEADS
        self.delta = nn.Parameter(torch.zeros(HEADS, VOCAB))

    def contexts(self, states_BND: Tensor) -> Tensor:
        return torch.cat([states_BND.roll(-i - 1, 1) for i in range(HEADS)], -1)

    def logits(self, context_PD: Tensor, embedded_PKD: Tensor, head_VD: Tensor) -> Tensor:
        later = F.linear(context_PD.unflatten(-1, (HEADS, WIDTH)), head_VD).transpose(0, 1)
        return later + self.delta[:, None]


def test_the_teachers_loss_is_least_where_the_heads_say_what_the_target_will_say() -> None:
    """The mean entropy of its laws, with a gradient of zero; and from anywhere else it is more."""
    samples = some_samples(9)
    one = objective(Knowing(), samples, TEACHER, rows=9)
    loss = one.loss_on(Batch.of(samples, 64))
    bound = 0.0
    for head in range(HEADS):
        entropies = []
        for sample in samples:
            states = lively().features(torch.tensor([[*sample.prompt, *sample.answer]]))[0]
            first = max(0, len(sample.prompt) - 2)
            laws = lively().head(states[first + head + 1 : -1]).double().softmax(-1)
            entropies += torch.special.entr(laws).sum(-1).tolist()
        bound += float(np.mean(entropies))
    assert loss.item() == pytest.approx(bound, rel=1e-5)
    (gradient,) = gradients(one.module, loss).values()
    assert gradient.abs().max() < 1e-6
    for seed in range(3):
        with torch.no_grad():
            one.module.delta.copy_(noise(HEADS, VOCAB, seed=seed) * 0.1)
        assert one.loss_on(Batch.of(samples, 64)) > loss + 1e-4


def test_the_teachers_loss_is_that_of_the_text_where_the_target_is_certain() -> None:
    """Labels and laws stand at the same places: the text is the target's own, and its law is all but one-hot."""
    target = deepcopy(cyclic())
    with torch.no_grad():
        target.head.weight.mul_(10)
    samples = [Sample(tuple(cycle(first, 3)), tuple(cycle(first, 12)[3:])) for first in range(6)]
    module = filled(MedusaHeads(MedusaConfig(16, 16, HEADS)))
    text, teacher = (objective(module, samples, weights, target).loss(0) for weights in (Weights(), TEACHER))
    assert text.item() == pytest.approx(teacher.item(), rel=1e-4)


@every_kind
def test_the_target_stays_as_it_is_and_gets_no_gradient(kind: str, tmp_path: Path) -> None:
    target = deepcopy(lively()).requires_grad_(True)
    module = heads_of(CONFIGS[kind]).initialise(target.head.weight)
    before, started = deepcopy(target.state_dict()), deepcopy(module.state_dict())
    fit(objective(module, weights=MIXED, target=target), adam(5), tmp_path, "heads")
    assert all(p.grad is None for p in target.parameters())
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert any(not torch.equal(value, started[name]) for name, value in module.state_dict().items())


@every_kernel
def test_states_to_learn_from_are_those_of_the_target(kernels: str) -> None:
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    teacher = Teacher(on(lively(), kernels))

    def last(tokens: Tensor) -> Tensor:
        return teacher.states(tokens, [teacher.top])[teacher.top]

    torch.testing.assert_close(last(tokens), lively().features(tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher.head_VD, lively().head.weight)
    torch.testing.assert_close(teacher.embedding_VD, lively().embedding.weight)
    assert not last(tokens).is_inference() and not last(tokens).requires_grad


@every_kernel
def test_a_teacher_hands_out_any_layers(kernels: str) -> None:
    """Numbered from what enters the first layer to what the output projection sees, of every place."""
    network, tokens = lively(), torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    teacher = Teacher(on(network, kernels))
    assert teacher.top == network.config.layers >= 2
    states = teacher.states(tokens, range(teacher.top + 1))
    assert list(states) == [*range(teacher.top + 1)] and {s.shape for s in states.values()} == {(2, 5, WIDTH)}
    torch.testing.assert_close(states[0], network.embedding(tokens))
    torch.testing.assert_close(states[teacher.top], network.features(tokens), rtol=1e-4, atol=1e-4)
    shallow = Transformer(replace(network.config, layers=1))
    own = shallow.state_dict()
    shallow.load_state_dict({name: value for name, value in network.state_dict().items() if name in own})
    shallow.final_norm.data.fill_(1)
    middle = states[1] * torch.rsqrt(states[1].square().mean(-1, keepdim=True) + network.config.norm_eps)
    torch.testing.assert_close(middle, shallow.features(tokens), rtol=1e-4, atol=1e-4)
    assert not any(state.is_inference() or state.requires_grad for state in states.values())


# ---- batches


def test_a_batch_teaches_at_the_places_from_which_answer_tokens_are_drafted() -> None:
    """Place t drafts token t + 2: the first is two before the answer begins, if the prompt has so many tokens."""
    batch = Batch.of([Sample((1, 2, 3), (4, 5)), Sample((6,), (7, 8, 9)), Sample((1, 2), (3,))], 64)
    assert batch.tokens_BN.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0], [1, 2, 3, 0, 0]]
    rows, places = batch.places()
    assert list(zip(rows.tolist(), places.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    lesson = Lesson.of(some_heads("medusa"), Teacher(lively()), batch)
    assert lesson.labels_KP[0].tolist() == [4, 5, 8, 9, 3] and lesson.tokens_PK[:, 0].tolist() == [3, 4, 7, 8, 2]
    assert lesson.valid_KP.tolist() == [
        [True, True, True, True, True],
        [True, False, True, False, False],
        *[[False] * 5] * 2,
    ]


def test_what_is_too_long_loses_the_beginning_of_its_prompt_then_the_end_of_its_answer() -> None:
    sample = Sample(tuple(range(10)), tuple(range(20, 26)))
    batch = Batch.of([sample], 12)
    assert batch.tokens_BN.tolist() == [[4, 5, 6, 7, 8, 9, *range(20, 26)]] and (batch.begins, batch.ends) == (6, 12)
    batch = Batch.of([replace(sample, answer=tuple(range(20, 40)))], 12)
    assert batch.tokens_BN.tolist() == [[8, 9, *range(20, 30)]] and (batch.begins, batch.ends) == (2, 12)


@every_kind
def test_a_batch_in_which_nothing_can_be_learnt_gives_no_loss(kind: str) -> None:
    module = some_heads(kind)
    loss = objective(module).loss_on(Batch.of([Sample((1,), (2,))], 64))
    assert loss.item() == 0 and not any(g.any() for g in gradients(module, loss).values())


def test_samples_are_drawn_once_per_pass_in_an_order_of_the_seed() -> None:
    samples = [Sample((1, number), (number,)) for number in range(30)]

    def numbers(answers: Answers, batches: range) -> list[int]:
        return [int(token) for number in batches for token in answers.batch(number).tokens_BN[:, 1]]

    one, other = (Answers(samples, rows=3, seed=seed, holdout=10) for seed in (0, 1))
    assert [s.answer[0] for s in one.heldout] == [9, 19, 29]
    first, second = numbers(one, range(9)), numbers(one, range(9, 18))
    assert sorted(first) == sorted(second) == [n for n in range(30) if n % 10 != 9]
    assert first != second and first != numbers(other, range(9))
    assert numbers(Answers(samples, rows=3, holdout=10), range(9, 18)) == second
    assert one.trained_share == pytest.approx(1 / 3)


@pytest.mark.parametrize(("count", "rows", "batches"), [(28, 5, 5), (30, 5, 6), (28, 40, 1), (7, 1, 7)])
def test_a_pass_has_full_batches_of_like_lengths(count: int, rows: int, batches: int) -> None:
    """What is left over is read in another pass; rows beyond the samples stay empty."""
    samples = [Sample((1, number), (number,) * (1 + number * 7 % 20)) for number in range(count)]
    answers = Answers(samples, rows=rows, length=64, holdout=1000)
    seen: set[int] = set()
    for number in range(12 * batches):
        if number % batches == 0:
            once: list[int] = []
        batch = answers.batch(number)
        assert len(batch.ends) == min(rows, count)
        assert rows > 5 or batch.ends.max() - batch.ends.min() <= 5, "as few lengths as there are batches"
        once += batch.tokens_BN[:, 1].tolist()
        assert len(set(once)) == len(once)
        seen |= set(once)
    assert seen == set(range(count))


def test_no_answers_are_refused() -> None:
    with pytest.raises(TrainingError, match="too few"):
        Answers([Sample((1,), (2,))], holdout=1)


# ---- which token a head learns


def cycle(first: int, length: int) -> list[int]:
    return [int(ahead(torch.tensor(first), steps, 16)) for steps in range(length)]


CYCLES = [Sample(tuple(cycle(first, 3)), tuple(cycle(first, 15)[3:])) for first in range(16)]
Learn = Callable[[HeadsModule], HeadsObjective]


def learnt(module: HeadsModule, folder: Path, learn: Callable[[HeadsModule], None] | None = None) -> dict[str, float]:
    """Figures after a short training on cyclic texts."""
    one = objective(module, CYCLES, Weights(), cyclic(), rows=16)
    fit(one, adam(60, 0.05), folder, "heads")
    return one.validate()


def accuracies(figures: dict[str, float]) -> list[float]:
    return [figures[f"head{head}_top1"] for head in range(1, HEADS + 1)]


@pytest.mark.parametrize("head", range(HEADS))
def test_a_medusa_head_alone_learns_the_token_of_its_distance(head: int, tmp_path: Path) -> None:
    """All others are kept as they are; head i is right about token t + i + 2, and so about none of another distance."""
    module = MedusaHeads(MedusaConfig(16, 16, HEADS))
    mask = torch.zeros(HEADS, 1, 1)
    mask[head] = 1
    module.vocabulary.register_hook(lambda gradient: gradient * mask)
    module.blocks.register_hook(lambda gradient: gradient * mask)
    module.biases.register_hook(lambda gradient: gradient * mask[..., 0])
    found = accuracies(learnt(module, tmp_path))
    assert found[head] == 1 and all(share < 0.2 for other, share in enumerate(found) if other != head)
    states = cyclic().features(torch.arange(16)[:, None])[:, 0]
    best = module.logits(states, states[:, None], cyclic().head.weight)[head].argmax(-1)
    assert (best == ahead(torch.arange(16), head + 2, 16)).all()


@pytest.mark.parametrize("off", [-1, 1])
def test_a_head_that_learns_a_token_of_another_distance_is_never_right(
    off: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above would notice: the same training with labels that are one place off, and the true figures."""
    module, rightly = MedusaHeads(MedusaConfig(16, 16, HEADS)), Lesson.of

    def shifted(*args: Any) -> Lesson:
        lesson = rightly(*args)
        return replace(lesson, tokens_PK=ahead(lesson.tokens_PK, off % 16, 16))

    monkeypatch.setattr(Lesson, "of", shifted)
    assert accuracies(learnt(module, tmp_path / "a")) == [1.0] * HEADS, "it has learnt what it was taught"
    monkeypatch.setattr(Lesson, "of", rightly)
    assert accuracies(objective(module, CYCLES, Weights(), cyclic()).validate()) == [0.0] * HEADS
    outputs = engine_with(module, cyclic(), TREES["chain"]).generate([cycle(1, 2)], SamplingParams(max_new_tokens=20))
    assert outputs[0].stats.accepted_tokens == 0


class Blind(HydraHeads):
    """Sees tokens alone."""

    def contexts(self, states_BND: Tensor) -> Tensor:
        return torch.zeros_like(states_BND)


class Nothing(LastState):
    def contexts(self) -> list[Tensor | None]:
        return [None if state is None else torch.zeros_like(state) for state in super().contexts()]


def blind_engine(module: HydraHeads) -> Engine:
    drafter = drafter_of(deepcopy(module), cyclic(), TREES["chain"])
    drafter.head = replace(drafter.head, reader=Nothing())
    return Engine(cyclic(), drafter)


def test_hydra_heads_learn_from_the_newest_token_alone_what_the_engine_shows_them(tmp_path: Path) -> None:
    """With contexts of zero, and the engine drafts as well as the training promised: five tokens at every step."""
    module = Blind(HydraConfig(16, 16, HEADS)).initialise(cyclic().head.weight)
    assert accuracies(learnt(module, tmp_path)) == [1.0] * HEADS
    (output,) = blind_engine(module).generate([[1, 2]], SamplingParams(max_new_tokens=40))
    assert output.stats.steps == 8


def test_hydra_heads_that_are_taught_with_other_embeddings_are_never_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above would notice embeddings that are one place off."""
    module, rightly = Blind(HydraConfig(16, 16, HEADS)).initialise(cyclic().head.weight), logits_of

    def shifted(module: HeadsModule, teacher: Teacher, lesson: Lesson) -> Tensor:
        return rightly(module, teacher, replace(lesson, tokens_PK=ahead(lesson.tokens_PK, 15, 16)))

    monkeypatch.setattr(objectives, "logits_of", shifted)
    fit(objective(module, CYCLES, Weights(), cyclic(), rows=16), adam(60, 0.05), tmp_path, "heads")
    monkeypatch.setattr(objectives, "logits_of", rightly)
    assert accuracies(objective(module, CYCLES, Weights(), cyclic()).validate()) == [0.0] * HEADS
    (output,) = blind_engine(module).generate([[1, 2]], SamplingParams(max_new_tokens=40))
    assert output.stats.accepted_tokens == 0


# ---- ranks, and what they promise


@every_kind
def test_a_rank_is_the_place_of_the_true_token_among_all(kind: str) -> None:
    module, samples = some_heads(kind).eval(), some_samples(9, 3)
    tables = ranks_of(module, Teacher(lively()), samples, Answers(samples, rows=4, length=64, holdout=1000))
    assert len(tables) == len(samples)
    for sample, table in zip(samples, tables, strict=True):
        text = [*sample.prompt, *sample.answer]
        states = module.contexts(lively().features(torch.tensor([text])))[0]
        drafting = range(max(0, len(sample.prompt) - 2), len(text) - 2)
        for row, place in enumerate(drafting, len(table) - len(drafting)):
            for head in range(HEADS):
                if place + head + 2 >= len(text):
                    assert table[row, head] == -1
                    continue
                embedded = list(module.table(lively().embedding.weight)[text[place + 1 : place + head + 2]])
                order = slow_head(module, head, states[place], embedded, lively().head.weight)
                rank = order.argsort(descending=True).tolist().index(text[place + head + 2])
                assert table[row, head] == min(rank, RANKS)


def test_equal_logits_are_ranked_by_token() -> None:
    samples = [Sample((1, 2), (0, 3, 15, 16, 39))]
    module = MedusaHeads(MedusaConfig(WIDTH, VOCAB, 1))
    (table,) = ranks_of(module, Teacher(lively()), samples, Answers(samples, length=64, holdout=9))
    assert table[:, 0].tolist() == [0, 3, 15, RANKS, RANKS]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=20), st.integers(0, 10_000))
def test_steps_are_those_of_walking_the_tree(rows: list[list[int]], seed: int) -> None:
    """A step is never deeper than what is left of the answer, less the token that the target adds itself."""
    luck = np.random.default_rng(seed)
    paths: list[tuple[int, ...]] = [(int(luck.integers(3)),)]
    for _ in range(6):
        above = [(), *(p for p in paths if len(p) < 3)]
        path = (*above[luck.integers(len(above))], int(luck.integers(3)))
        paths += [path] if path not in paths else []
    table = np.array(rows)
    for row in range(len(table)):
        table[row, len(table) - row :] = -1
    place, steps = 0, 0
    while place < len(table):
        room = len(table) - place - 1
        fits = [len(p) for p in paths if len(p) <= room and p == tuple(table[place, : len(p)])]
        place, steps = place + 1 + max(fits, default=0), steps + 1
    assert steps_of(table, RankTree(paths)) == steps
    assert projected([table, table], RankTree(paths)) == pytest.approx(len(table) / steps)


ANSWERED = [
    [1, 2, 3],
    [9, 30],
    [7, 7, 7, 7, 7],
    [9, 30, 2, 2, 11, 25, 0, 6, 19],
    [12, 3],
    [5, 5],
    [31, 8, 4],
    [0, 0, 1],
]


@dataclass(frozen=True)
class Taught:
    module: HeadsModule
    samples: list[Sample]


@cache
def by_heart(kind: str) -> Taught:
    """Heads that know these greedy answers by heart, more or less; one answer in two ends with
    token 19 or at 40 tokens."""
    samples = []
    for number, prompt in enumerate(ANSWERED):
        text = greedy(lively(), prompt, 40)
        end = text.index(19) + 1 if number % 2 and 19 in text else 40
        samples.append(Sample(tuple(prompt), tuple(text[:end])))
    module = heads_of(CONFIGS[kind]).initialise(lively().head.weight)
    one = objective(module, samples, Weights(), rows=8)
    optimiser = torch.optim.AdamW(module.parameters(), lr=6e-3, weight_decay=0)
    for number in range(45):
        optimiser.zero_grad()
        one.loss(number).backward()
        optimiser.step()
    return Taught(module.eval().requires_grad_(False), samples)


@pytest.mark.parametrize("kind", ["medusa", "medusa, shared", "hydra", "hydra, deep", "hydra++"])
@pytest.mark.parametrize("name", TREES)
@every_kernel
def test_the_engine_needs_exactly_the_steps_that_were_projected(kind: str, name: str, kernels: str) -> None:
    taught, tree = by_heart(kind), TREES[name]
    answers = Answers(taught.samples, rows=3, length=64, holdout=1000)
    tables = ranks_of(taught.module, Teacher(on(lively(), kernels)), taught.samples, answers)
    one = engine_with(deepcopy(taught.module), on(lively(), kernels), tree, max_rows=3)
    wishes = [SamplingParams(max_new_tokens=40, stop_token_ids=[19] if n % 2 else ()) for n in range(len(ANSWERED))]
    outputs = one.generate(ANSWERED, wishes)
    assert [output.token_ids for output in outputs] == [list(sample.answer) for sample in taught.samples]
    assert [output.stats.steps for output in outputs] == [steps_of(table, tree) for table in tables]
    said = sum(output.stats.new_tokens for output in outputs)
    assert projected(tables, tree) == said / sum(output.stats.steps for output in outputs)
    if name in ("dense", "mc_sim"):
        assert projected(tables, tree) > 1.5, "there was something to get wrong"


def test_the_first_step_after_a_prompt_of_one_token_is_projected_too() -> None:
    module, text = by_heart("medusa").module, greedy(lively(), [4], 30)
    samples = [Sample((4,), tuple(text))]
    tables = ranks_of(module, Teacher(lively()), samples, Answers(samples, length=64, holdout=9))
    one = engine_with(deepcopy(module), lively(), TREES["mc_sim"])
    (output,) = one.generate([[4]], SamplingParams(max_new_tokens=30))
    assert output.stats.steps == steps_of(tables[0], TREES["mc_sim"]) and len(tables[0]) == 30


def test_the_figures_are_those_of_the_heldout_answers() -> None:
    taught = by_heart("hydra")
    one = objective(deepcopy(taught.module), taught.samples, Weights(decay=0.5), rows=3, holdout=2)
    told: list[tuple[int, int]] = []
    figures, held = one.validate(lambda done, total: told.append((done, total))), one.answers.heldout
    assert list(held) == taught.samples[1::2] and told == [(n, len(told)) for n in range(-(-len(held) // 3))]
    tops = {f"head{h}_top{k}" for h in range(1, 5) for k in range(1, 6)}
    assert set(figures) == {
        "loss",
        "tokens_per_step",
        *(f"head{h}_{part}" for h in range(1, 5) for part in ("loss", "given")),
        *tops,
    }
    assert figures["loss"] == pytest.approx(sum(figures[f"head{h}_loss"] * 0.5**h for h in range(1, 5)))
    tables = ranks_of(one.module, one.teacher, held, one.answers)
    assert figures["tokens_per_step"] == projected(tables, one.tree)
    for head in range(HEADS):
        known = np.concatenate([table[:, head] for table in tables])
        known = known[known >= 0]
        for top in range(1, 6):
            assert figures[f"head{head + 1}_top{top}"] == pytest.approx((known < top).mean())
    assert one.validate() == figures


# ---- the start


def fitted(module: HeadsModule, network: Transformer, answers: Answers, batches: int) -> LeastSquares:
    start = LeastSquares(module, Teacher(network), answers, batches)
    for step in range(start.steps):
        start.update(step)
    return start


@every_kind
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_fit_that_is_taken_up_again_is_the_same(kind: str, step: int) -> None:
    """While batches are read, between reading and solving, and while heads are solved."""
    module, answers = some_heads(kind).eval(), Answers(some_samples(12), rows=4, length=64, holdout=1000)
    first, second = (LeastSquares(module, Teacher(lively()), answers, 3) for _ in range(2))
    for number in range(step):
        first.update(number)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    for number in range(step, second.steps):
        second.update(number)
    whole = fitted(module, lively(), answers, 3).maps
    assert len(second.maps) == module.count and all(map(torch.equal, second.maps, whole))
    with pytest.raises(ValueError, match="does not fit"):
        second.load_state({})


@pytest.mark.parametrize("kind", ["medusa", "hydra", "hydra++"])
def test_the_fit_is_the_ridge_regression_that_it_says_it_is(kind: str) -> None:
    """Place by place, in fp64: what a head sees, against the target's state one token before the one it proposes."""
    module, network, samples = some_heads(kind).eval(), lively(), some_samples(12)
    answers = Answers(samples, rows=4, length=64, holdout=1000)
    maps = fitted(module, network, answers, 3).maps
    for head in range(module.count):
        seen, there = [], []
        for sample in samples:
            text = [*sample.prompt, *sample.answer]
            with torch.no_grad():
                states = network.features(torch.tensor([text]))
                context = module.contexts(states)[0]
            for place in range(max(0, len(sample.prompt) - 2), len(text) - head - 2):
                behind = [network.embedding.weight[token] for token in text[place + 1 : place + head + 2]]
                seen.append(torch.cat([context[place], *(behind if module.sees_tokens else [])]))
                there.append(states[0, place + head + 1])
        inputs, targets = torch.stack(seen).double(), torch.stack(there).double()
        square = inputs.T @ inputs
        damping = squares.RIDGE * (square.diagonal() + square.diagonal().mean())
        slow = torch.linalg.solve(square + torch.diag(damping), inputs.T @ targets).T
        torch.testing.assert_close(inputs @ maps[head].double().T, inputs @ slow.T, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_heads_that_start_from_the_fit_know_a_cyclic_text_at_once(kind: str) -> None:
    """And those that start as copies of the projection are wrong about every token of it."""
    network = cyclic()
    config = replace(CONFIGS[kind], width=16, vocab_size=16, layers=1)
    texts = [[(start := n % 16), *(int(ahead(torch.tensor(start), k, 16)) for k in range(1, 30))] for n in range(16)]
    samples = [Sample(tuple(text[:3]), tuple(text[3:])) for text in texts]
    answers = Answers(samples, rows=4, length=64, holdout=1000)
    module = heads_of(config)
    module.initialise(network.head.weight)  # type: ignore[operator]
    before = np.concatenate(ranks_of(module, Teacher(network), samples, answers))
    fitted(module, network, answers, 4).finish()
    after = np.concatenate(ranks_of(module, Teacher(network), samples, answers))
    assert not (before == 0).any() and (after[after >= 0] == 0).all() and (after >= 0).any(0).all()


# ---- going on


def shaky(one: HeadsObjective, at: Sequence[int], what: float | type[BaseException]) -> HeadsObjective:
    """Fails at these batches."""
    rightly = one.loss

    def loss(number: int) -> Tensor:
        if number not in at:
            return rightly(number)
        if isinstance(what, type):
            raise what
        return rightly(number) * what

    one.loss = loss  # type: ignore[method-assign]
    return one


@pytest.mark.parametrize(
    "kind",
    [
        "medusa",
        "hydra",
        "hydra++",
        "hydra++, dropout",
    ],
)
def test_a_resumed_training_gives_the_weights_of_one_that_was_not_interrupted(kind: str, tmp_path: Path) -> None:
    def fresh() -> HeadsObjective:
        name, _, dropout = kind.partition(", ")
        config = CONFIGS[name] if not dropout else replace(CONFIGS[name], dropout=0.2)
        torch.manual_seed(0)
        return objective(heads_of(config).initialise(lively().head.weight), some_samples(15), MIXED)

    schedule = adam(8, save_every=3, parts=2, weight_decay=0.1)
    whole, parts = fresh(), fresh()
    fit(whole, schedule, tmp_path / "whole", "heads")
    with pytest.raises(KeyboardInterrupt):
        fit(shaky(fresh(), [10], KeyboardInterrupt), schedule, tmp_path / "parts", "heads")
    fit(parts, schedule, tmp_path / "parts", "heads")
    for (name, one), (_, other) in zip(whole.module.named_parameters(), parts.module.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_one_bad_batch_is_skipped_and_two_in_a_row_end_the_run(tmp_path: Path) -> None:
    def fresh() -> HeadsObjective:
        return objective(heads_of(CONFIGS["medusa"]).initialise(lively().head.weight))

    bad = shaky(fresh(), [2, 4], math.nan)
    fit(bad, adam(6), tmp_path / "one", "heads")
    assert all(p.isfinite().all() for p in bad.module.parameters())
    with pytest.raises(TrainingError, match="steps 2 and 3"):
        fit(shaky(fresh(), [2, 3], math.inf), adam(6), tmp_path / "two", "heads")


def test_a_run_of_heads_of_another_shape_is_not_resumed(tmp_path: Path) -> None:
    fit(objective(some_heads("medusa")), adam(2), tmp_path, "heads")
    for kind in ("medusa, deep", "hydra"):
        with pytest.raises(TrainingError, match="another shape"):
            fit(objective(some_heads(kind)), adam(2), tmp_path, "heads")
    with pytest.raises(TrainingError, match="another schedule"):
        fit(objective(some_heads("medusa")), adam(3), tmp_path, "heads")


# ---- from files to files


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_pretrained(lively(), folder, dtype=torch.float32)
    return folder


def written(path: Path, samples: Sequence[Sample]) -> Path:
    rows = [{"prompt": [int(t) for t in s.prompt], "answer": [int(t) for t in s.answer]} for s in samples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@cache
def own_answers() -> list[Sample]:
    """Of the target to 64 prompts, 2,560 tokens."""
    luck = np.random.default_rng(5)
    prompts = [luck.integers(0, VOCAB, int(luck.integers(2, 9))).tolist() for _ in range(64)]
    one = Engine(lively(), drafter_of(some_heads("medusa"), lively(), TREES["one"]))
    outputs = one.generate(prompts, SamplingParams(max_new_tokens=40))
    return [Sample(tuple(p), tuple(o.token_ids)) for p, o in zip(prompts, outputs, strict=True)]


def recipe(target: Path, data: Path, preset: str = "medusa", steps: int = 4, **changes: Any) -> HeadsRecipe:
    schedule = schedule_for(PRESETS[preset], steps, 3e-3)
    fields = {"architecture": {}, "weights": None, "rows": 8, "length": 64, "dtype": "fp32"}
    return HeadsRecipe(preset, str(target), data, schedule=schedule, **{**fields, **changes})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return written(tmp_path / "answers.jsonl", own_answers())


def prepared(*args: Any, **changes: Any) -> HeadsTraining:
    return prepare(recipe(*args, **changes), torch.device("cpu"))


def test_text_beside_the_answers(data: Path, target_folder: Path, tmp_path: Path) -> None:
    """It takes its share of the batches, and a run does not go on without it."""
    text = tmp_path / "train.bin"
    (np.arange(4000) * 7 % VOCAB).astype(np.uint16).tofile(text)
    mixed = {"text": text, "text_share": 0.25, "rows": 2}
    training = prepared(target_folder, data, "block", **mixed)
    plain = prepared(target_folder, data, "block", rows=2)
    of_text = [n for n in range(12) if (training.answers.batch(n).begins == 1).all()]
    assert of_text == [3, 7, 11]
    answers = [n for n in range(12) if n not in of_text]
    for place, number in enumerate(answers):
        assert torch.equal(training.answers.batch(number).tokens_BN, plain.answers.batch(place).tokens_BN)
    Record(training.record(), older=NO_TEXT).demand_same(tmp_path / "run")
    with pytest.raises(TrainingError, match="text"):
        Record(plain.record(), older=NO_TEXT).demand_same(tmp_path / "run")


@pytest.mark.parametrize(
    ("preset", "token", "changes", "says"),
    [
        ("block", 40_000, {}, "has token 40000"),
        ("medusa", 3, {}, "no term of the loss asks the target"),
        ("block", 3, {"length": 0}, "--length"),
    ],
)
def test_text_that_teaches_nothing_is_refused(
    preset: str, token: int, changes: dict[str, Any], says: str, data: Path, target_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "train.bin"
    np.full(2000, token, np.uint16).tofile(text)
    with pytest.raises(TrainingError, match=says):
        prepared(target_folder, data, preset, text=text, **changes)


@pytest.mark.parametrize("preset", RANKED)
def test_a_training_leaves_heads_that_draft_as_was_projected(
    preset: str, data: Path, target_folder: Path, tmp_path: Path
) -> None:
    training, out = prepared(target_folder, data, preset, steps=30), tmp_path / "heads"
    figures = training.fit(tmp_path / "run", out)
    held = training.answers.heldout
    tree = training.objective.tree
    settings = {"checkpoint": str(out), "tree": [list(path) for path in tree.nodes]}
    engine = forerun.load(target_folder, {"drafter": KINDS[preset], **settings}, dtype="fp32", kernels="torch")
    outputs = engine.generate([list(s.prompt) for s in held], SamplingParams(max_new_tokens=40))
    assert [output.token_ids for output in outputs] == [list(s.answer) for s in held]
    tables = ranks_of(module_of(str(out)), training.objective.teacher, held, training.answers)
    assert [o.stats.steps for o in outputs] == [steps_of(table, tree) for table in tables]
    assert set(figures) > {"loss", "tokens_per_step"} and figures["tokens_per_step"] >= 1
    config = json.loads((out / "config.json").read_text())
    assert config["drafter"] == KINDS[preset] and config["training"]["preset"] == preset
    assert config["training"]["figures"]["loss"] == pytest.approx(figures["loss"], abs=1e-4)
    again = prepared(target_folder, data, preset, steps=30)
    assert again.fit(tmp_path / "run", tmp_path / "again").keys() == figures.keys(), "a finished run is only written"
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("preset", ["eagle3", "block", "medusa", "hydra"])
def test_the_tokens_that_answers_have_most_often_are_those_that_are_known(
    preset: str, data: Path, target_folder: Path, tmp_path: Path
) -> None:
    """And no others are proposed, though the text is the target's; steps are as many as was projected."""
    training, out = prepared(target_folder, data, preset, architecture={"known": 9}), tmp_path / "it"
    counts = Counter(token for sample in training.answers.training for token in sample.answer)
    kept = training.config.kept
    assert len(kept) == 9 and min(counts[t] for t in kept) >= max(counts[t] for t in set(counts) - set(kept))
    training.fit(tmp_path / "run", out)
    again = prepared(target_folder, data, preset, init_from=str(out))
    assert again.config.kept == kept
    tree, sample, seen = training.objective.tree, training.answers.heldout[0], []
    description = {"drafter": KINDS[preset], "checkpoint": str(out), "tree": [list(path) for path in tree.paths]}
    engine = forerun.load(target_folder, description, dtype="fp32", kernels="torch")
    propose = engine.drafter.propose
    engine.drafter.propose = lambda context: seen.append(propose(context)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    output = engine.generate([list(sample.prompt)], SamplingParams(max_new_tokens=40))[0]
    assert output.token_ids == list(sample.answer)
    proposed = {token for tree in seen for token in tree.tokens[0][1:]}
    assert proposed and proposed <= set(kept)
    tables = ranks_of(training.objective.module, training.objective.teacher, [sample], training.answers)
    assert output.stats.steps == steps_of(tables[0], tree)


def test_a_run_from_before_a_field_goes_on(data: Path, target_folder: Path, tmp_path: Path) -> None:
    """What an architecture did not say when its run began had the field's default."""
    prepared(target_folder, data, "medusa").fit(tmp_path / "run", tmp_path / "it")
    recipe = tmp_path / "run" / "recipe.json"
    fields = json.loads(recipe.read_text())
    del fields["architecture"]["kept"], fields["architecture"]["known"]
    recipe.write_text(json.dumps(fields))
    prepared(target_folder, data, "medusa").fit(tmp_path / "run", tmp_path / "again")
    with pytest.raises(TrainingError, match="another architecture"):
        prepared(target_folder, data, "medusa", architecture={"known": 9}).fit(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - set(RANKED)))
def test_a_training_of_other_drafters_leaves_some_that_draft_as_was_projected(
    preset: str, data: Path, target_folder: Path, tmp_path: Path
) -> None:
    """On the tree that figures are projected for; and they have learnt something."""
    training, out, kind = prepared(target_folder, data, preset, steps=30), tmp_path / "it", TRAINED[KINDS[preset]]
    before = training.objective.validate()
    figures = training.fit(tmp_path / "run", out)
    assert figures["loss"] < before["loss"] and figures["tokens_per_step"] >= 1
    held, tree = training.answers.heldout, training.objective.tree
    description = {"drafter": KINDS[preset], "checkpoint": str(out), "tree": [list(path) for path in tree.paths]}
    engine = forerun.load(target_folder, description, dtype="fp32", kernels="torch")
    outputs = engine.generate([list(s.prompt) for s in held], SamplingParams(max_new_tokens=40))
    assert [output.token_ids for output in outputs] == [list(s.answer) for s in held]
    module = checkpoints.read(out).module(kind.network, kind.config)
    tables = ranks_of(module, training.objective.teacher, held, training.answers)
    assert [o.stats.steps for o in outputs] == [steps_of(table, tree) for table in tables]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_training_may_be_against_a_discriminator(
    preset: str, data: Path, target_folder: Path, tmp_path: Path
) -> None:
    """It learns, its run goes on, and the heads that are left are read as any others."""
    adversary = Adversary(warmup=0.25)
    training = prepared(target_folder, data, preset, adversary=adversary)
    assert training.judging is not None
    before = {name: p.clone() for name, p in training.judging.module.named_parameters()}
    figures = training.fit(tmp_path / "run", tmp_path / "heads")
    assert 0 <= figures["discriminator_accuracy"] <= 1 and figures["adversarial_ratio"] >= 0
    assert all(not torch.equal(p, before[name]) for name, p in training.judging.module.named_parameters())
    held = load_file(tmp_path / "heads" / "model.safetensors")
    assert set(held) == {name for name, _ in training.objective.module.named_parameters()}
    again = prepared(target_folder, data, preset, adversary=adversary)
    assert again.fit(tmp_path / "run", tmp_path / "again") == figures, "a finished run is only written"
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "heads" / "model.safetensors"
    ).read_bytes()
    sample = training.answers.heldout[0]
    engine = forerun.load(target_folder, f"{KINDS[preset]}:{tmp_path / 'heads'}", dtype="fp32", kernels="torch")
    assert engine.generate([list(sample.prompt)], SamplingParams(max_new_tokens=40))[0].token_ids == list(sample.answer)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"adversary": Adversary()}, "adversary"),
        ({"architecture": {"layers": 2}}, "architecture"),
        ({"weights": TEACHER}, "weights"),
        ({"rows": 4}, "rows"),
        ({"length": 32}, "length"),
        ({"seed": 1}, "seed"),
        ({"preset": "hydra"}, "preset"),
        ({"data": "other"}, "data"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_run_of_another_recipe_is_not_resumed(
    changes: dict[str, Any], says: str, data: Path, target_folder: Path, tmp_path: Path
) -> None:
    prepared(target_folder, data).fit(tmp_path / "run", tmp_path / "heads")
    if "data" in changes:
        data, changes = written(tmp_path / "other.jsonl", own_answers()[:-1]), {}
    with pytest.raises(TrainingError, match=f"another {says}"):
        prepared(target_folder, data, **changes).fit(tmp_path / "run", tmp_path / "others")
    assert not (tmp_path / "others").exists()


@pytest.mark.parametrize("preset", RANKED)
def test_a_preset_is_that_of_its_paper(preset: str, data: Path, target_folder: Path) -> None:
    training = prepared(target_folder, data, preset)
    config = training.config
    shape = (type(config).__name__, config.heads, config.layers, config.vocabulary)
    assert (
        shape
        == {
            "medusa": ("MedusaConfig", 5, 1, "own"),
            "hydra": ("HydraConfig", 4, 1, "own"),
            "hydra++": ("HydraConfig", 4, 4, "own"),
            "medusa-fused": ("MedusaConfig", 7, 1, "shared"),
            "block": ("BlockConfig", 7, 1, "shared"),
            "amphista": ("AmphistaConfig", 5, 1, "own"),
        }[preset]
    )
    schedules = {
        "medusa": (1e-3, 100, 0.0, 0.0),
        "hydra": (1e-3, 100, 0.0, 0.0),
        "hydra++": (5e-4, 100, 0.33, 0.1),
        "medusa-fused": (1e-3, 100, 0.0, 0.0),
        "block": (1e-3, 40, 0.0, 0.0),
        "amphista": (3e-4, 100, 0.0, 0.0),
    }
    schedule = schedule_for(PRESETS[preset], 1000)
    assert (schedule.adam_rate, schedule.warmup, schedule.floor, schedule.weight_decay) == schedules[preset]
    assert (schedule.shape, schedule.muon_rate) == ("cosine", 2e-3 if preset == "block" else 0.0)
    assert schedule_for(PRESETS["hydra++"], 50).warmup == 25, "a short run does not only warm up"
    if isinstance(config, HydraConfig) and preset == "hydra++":
        assert config.tied_layers and config.dropout == 0.2 and PRESETS[preset].weights == TEACHER
        prefix, outside = config.prefix, lively().config
        assert prefix is not None
        for name in ("heads", "kv_heads", "head_dim", "mlp_width", "max_length", "norm_eps", "rope_theta"):
            assert getattr(prefix, name) == getattr(outside, name), name
    assert example(training.answers) == training.answers.training[0]


def test_a_training_may_begin_with_trained_heads_of_the_same_shape(
    data: Path, target_folder: Path, tmp_path: Path
) -> None:
    first = prepared(target_folder, data)
    first.fit(tmp_path / "run", tmp_path / "heads")
    second = prepared(target_folder, data, init_from=str(tmp_path / "heads"))
    for (name, one), (_, other) in zip(
        first.objective.module.named_parameters(), second.objective.module.named_parameters(), strict=True
    ):
        assert torch.equal(one.bfloat16(), other.bfloat16()), name
    for preset, architecture in (("medusa", {"heads": 3}), ("hydra", {})):
        with pytest.raises(ForerunError, match="heads"):
            prepared(target_folder, data, preset, architecture=architecture, init_from=str(tmp_path / "heads"))


@pytest.mark.parametrize("preset", ["medusa", "hydra", "hydra++", "eagle", "eagle3", "block"])
def test_a_training_may_begin_with_trained_heads_of_fewer_layers(
    preset: str, data: Path, target_folder: Path, tmp_path: Path
) -> None:
    """It begins where they stood (KOALA), and what it leaves has all its layers; there is no way back to fewer."""
    one = {"layers": 1} if preset == "hydra++" else {}
    first = prepared(target_folder, data, preset, architecture=one, steps=6)
    first.fit(tmp_path / "run", tmp_path / "one")
    again = prepared(target_folder, data, preset, init_from=str(tmp_path / "one"))
    deeper = {"architecture": {"layers": 3}, "init_from": str(tmp_path / "one")}
    grown = prepared(target_folder, data, preset, **deeper)
    assert grown.config.layers == 3
    assert grown.objective.validate() == again.objective.validate()
    assert grown.record() != again.record()
    grown.fit(tmp_path / "grown.run", tmp_path / "three")
    stored = checkpoints.load(str(tmp_path / "three"), KINDS[preset])
    assert stored.architecture["layers"] == 3
    with pytest.raises(ForerunError, match=r"unexpected|instead of"):
        prepared(target_folder, data, preset, architecture={"layers": 1}, init_from=str(tmp_path / "three"))


@pytest.mark.parametrize(
    ("samples", "changes", "says"),
    [
        (lambda: [*own_answers(), Sample((1, VOCAB), (2, 3))], {}, f"token {VOCAB} and .* knows {VOCAB}"),
        (lambda: own_answers()[:40], {}, "1,520 answer tokens"),
        (lambda: [Sample((1,) * 200, (2,))] * 2300, {"length": 250}, "0.5% of what would be read"),
        (own_answers, {"length": 257}, "8 x 257 tokens do not fit a context of 256"),
        (own_answers, {"length": 7}, "8 x 7 tokens"),
        (own_answers, {"rows": 0}, "0 x 64 tokens"),
        (lambda: [Sample((1,), (2,))], {"data": "nowhere"}, "nowhere"),
    ],
    ids=["vocabulary", "few", "share", "long", "short", "rows", "missing"],
)
def test_data_that_cannot_teach_is_refused_before_anything_is_written(
    samples: Callable[[], list[Sample]], changes: dict[str, Any], says: str, target_folder: Path, tmp_path: Path
) -> None:
    path = written(tmp_path / "answers.jsonl", samples())
    changes = {"data": path, **changes}
    with pytest.raises(ForerunError, match=says) as caught:
        prepared(target_folder, Path(changes.pop("data")), **changes)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
