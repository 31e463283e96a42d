"""Heads against a discriminator (KOALA, a reconstruction): who moves what and when, which way the signal points, and
that nothing of it is left in the heads' folder."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafters.heading import CONFIGS, HEADS, VOCAB, WIDTH, filled, heads_of, lively, some_heads
from drafters.test_amphista import WHOLE as AMPHISTA
from drafters.test_block import CONFIGS as BLOCKS
from drafters.test_eagle import CONFIGS as EAGLES
from forerun.drafters.hydra import HydraConfig
from forerun.drafters.hydra.network import HydraHeads
from forerun.drafters.medusa.network import MedusaHeads
from forerun.drafting import registry
from forerun.drafting.heads import HeadsModule
from forerun.drafting.trained import Adversary, HeadsConfig, Weights
from forerun.errors import TrainingError
from forerun.nn.transformer import Transformer
from forerun.train.answers import Batch
from forerun.train.lesson import Lesson, logits_of
from forerun.train.objectives import adversarial
from forerun.train.objectives.adversarial import FARTHEST, LEAST, LOOK_EVERY, MOST, PATIENCE, Judging, opposed
from forerun.train.objectives.alternating import Alternating
from forerun.train.objectives.descent import Descent
from forerun.train.run import Run
from forerun.train.schedule import Schedule
from train.test_heads import MIXED, TEACHER, Knowing, adam, objective, some_samples

SETTINGS: dict[str, HeadsConfig] = {
    "medusa": CONFIGS["medusa"],
    "medusa, three layers": CONFIGS["medusa, deep"],
    "medusa, fused": CONFIGS["medusa, fused"],
    "hydra": CONFIGS["hydra"],
    "hydra++": CONFIGS["hydra++"],
    "amphista": AMPHISTA,
    "block": BLOCKS["one layer"],
    "eagle": replace(EAGLES["eagle"], taught=1),
    "eagle, two layers": replace(EAGLES["eagle"], taught=1, layers=2),
    "eagle3": EAGLES["eagle3"],
    "eagle3, part of the vocabulary": EAGLES["eagle3, part of the vocabulary"],
}
every_kind = pytest.mark.parametrize("kind", SETTINGS)
AT_ONCE = Adversary(warmup=0.0)


def module_of(kind: str, seed: int = 0) -> Any:
    config = SETTINGS[kind]
    return filled(registry.trained_of(config)[1].network(config), 1.0, seed=seed)


def both(
    module: HeadsModule, adversary: Adversary = AT_ONCE, schedule: Schedule | None = None, **how: Any
) -> tuple[Alternating, Judging]:
    one = objective(module, how.pop("samples", None) or some_samples(12), how.pop("weights", TEACHER), **how)
    one.schedule = schedule or adam(8)
    judging = opposed(one, adversary)
    return Alternating(discriminator=judging, heads=judging.opposed), judging


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- who moves what, and when


@every_kind
def test_a_weight_of_zero_is_supervised_training_bit_for_bit(kind: str) -> None:
    """While the discriminator learns."""
    alone = objective(module_of(kind), some_samples(12), TEACHER)
    alone.schedule = adam(8)
    pair, judging = both(module_of(kind), replace(AT_ONCE, weight=0.0))
    before = state_of(judging.module)
    for step in range(3):
        assert pair.update(step) == alone.update(step)
    assert same(state_of(judging.opposed.module), state_of(alone.module))
    assert all(not torch.equal(p, before[name]) for name, p in state_of(judging.module).items())


def test_before_it_begins_there_is_no_discriminator() -> None:
    """Half of eight steps: none of its parameters moves, and the heads are those of supervised training."""
    alone = objective(some_heads("medusa"), some_samples(12), TEACHER)
    alone.schedule = adam(8)
    pair, judging = both(some_heads("medusa"), Adversary(warmup=0.5))
    before = state_of(judging.module)
    for step in range(4):
        assert pair.update(step) == alone.update(step)
    assert same(state_of(judging.module), before) and same(state_of(judging.opposed.module), state_of(alone.module))
    assert pair.update(4) != alone.update(4)
    assert not same(state_of(judging.module), before)
    assert not same(state_of(judging.opposed.module), state_of(alone.module))


@every_kind
def test_everybody_moves_what_is_theirs_alone(kind: str) -> None:
    """No gradient reaches the target, nor in one's step the other."""
    target = deepcopy(lively()).requires_grad_(True)
    _, judging = both(module_of(kind), target=target)
    heads, critic, heads_module = judging.opposed, judging.module, judging.opposed.module
    of_critic, of_heads, of_target = state_of(critic), state_of(heads_module), state_of(target)
    judging.update(1)
    assert same(state_of(heads_module), of_heads) and all(p.grad is None for p in heads_module.parameters())
    assert not same(state_of(critic), of_critic)
    of_critic = state_of(critic)
    critic.zero_grad()
    heads.update(1)
    assert same(state_of(critic), of_critic) and all(p.grad is None for p in critic.parameters())
    assert not same(state_of(heads_module), of_heads)
    assert same(state_of(target), of_target) and all(p.grad is None for p in target.parameters())


def test_the_discriminator_sees_the_heads_as_they_are_now() -> None:
    """Its step comes first, and the heads' term is that of what it has become."""
    pair, judging = both(some_heads("medusa"))
    heads, seen = judging.opposed, list[Tensor]()
    loss = heads.loss

    def watched(number: int) -> Tensor:
        seen.append(next(judging.module.parameters()).detach().clone())
        return loss(number)

    heads.loss = watched  # type: ignore[method-assign]
    pair.update(1)
    assert torch.equal(seen[-1], next(judging.module.parameters()))


# ---- the losses


def slow_verdict(critic: nn.Module, head: int, here: Tensor, token: Tensor, seen: Tensor) -> Tensor:
    w = {name: p.detach().double() for name, p in critic.named_parameters()}

    def normed(x: Tensor) -> Tensor:
        return x.double() * (x.double().square().mean() + 1e-6).rsqrt()

    x = w["state.weight"] @ normed(here) + w["law.weight"] @ normed(seen) + w["which"][head]
    if "token.weight" in w:
        x = x + w["token.weight"] @ normed(token)
    x = F.silu(w["middle.weight"] @ F.silu(x) + w["middle.bias"])
    return (w["verdict.weight"] @ x + w["verdict.bias"])[0]


@pytest.mark.parametrize("sees", ["embedding", "law", "state"])
@every_kind
def test_the_losses_are_those_of_going_through_the_answers_by_hand(kind: str, sees: str) -> None:
    """Place by place and head by head, with the true state, the newest token that the head sees, and both laws among
    the tokens that it knows; only what is taught is judged."""
    module = module_of(kind)
    adversary = replace(AT_ONCE, sees=sees, smoothing=0.2)
    if sees == "state" and not module.foresees:
        with pytest.raises(TrainingError, match="foresee no states"):
            both(module, adversary)
        return
    _, judging = both(module, adversary)
    filled(judging.module, 1.0, seed=4)
    heads, embedding, head_VD = judging.opposed, lively().embedding.weight.double(), lively().head.weight.double()
    batch, _ = heads.drawn(0)
    lesson = Lesson.of(module, heads.teacher, batch)
    logits, rows_places = logits_of(module, heads.teacher, lesson).detach().double(), batch.places()
    known = slice(None) if module.known is None else module.known
    texts = [row[:end] for row, end in zip(batch.tokens_BN.tolist(), batch.ends.tolist(), strict=True)]
    read = [lively().features(torch.tensor([text]))[0].double() for text in texts]
    each: list[list[tuple[float, float]]] = [[] for _ in range(module.taught)]
    right = 0
    for place, (row, at) in enumerate(zip(*(part.tolist() for part in rows_places), strict=True)):
        states = read[row]
        for head in range(module.taught):
            if at + head + 2 >= len(texts[row]):
                continue
            theirs = head_VD @ states[at + head + 1]
            if module.known is not None and int(theirs.argmax()) not in module.known.tolist():
                continue
            laws = theirs[known].softmax(-1), logits[head, place].softmax(-1)
            if sees == "state":
                shown = states[at + head + 1], module.foreseen(lesson.context_PD)[head, place].detach()
            else:
                shown = laws if sees == "law" else tuple(law @ embedding[known] for law in laws)  # type: ignore[assignment]
            token = embedding[texts[row][at + head + 1]]
            real, fake = (float(slow_verdict(judging.module, head, states[at], token, y)) for y in shown)
            sigmoid = [1 / (1 + math.exp(-x)) for x in (real, fake)]
            loss = -0.8 * math.log(sigmoid[0]) - 0.2 * math.log(1 - sigmoid[0]) - math.log(1 - sigmoid[1])
            each[head].append((loss, -math.log(sigmoid[1])))
            right += (real > 0) + (fake <= 0)
    count = sum(map(len, each))
    loss, accuracy = judging.judged(batch)
    assert loss.item() == pytest.approx(sum(one for head in each for one, _ in head) / count, rel=1e-3)
    assert accuracy == pytest.approx(right / (2 * count))
    supervised = heads.loss_on(batch)
    heads.pressure = 0.3
    adversarial = sum(
        heads.weights.decay ** (head + 1) * sum(one for _, one in found) / len(found)
        for head, found in enumerate(each)
        if found
    )
    assert (heads.loss_on(batch) - supervised).item() == pytest.approx(0.3 * adversarial, rel=1e-2, abs=1e-4)


@every_kind
def test_what_lies_behind_the_answers_is_not_judged(kind: str) -> None:
    _, judging = both(module_of(kind))
    batch, _ = judging.opposed.drawn(0)
    other = batch.tokens_BN.clone()
    for row, end in enumerate(batch.ends.tolist()):
        other[row, end:] = 5 + row
    loss, accuracy = judging.judged(batch)
    again, same_accuracy = judging.judged(Batch(F.pad(other, (0, 7), value=3), batch.begins, batch.ends))
    assert again.item() == pytest.approx(loss.item(), rel=1e-4) and same_accuracy == pytest.approx(accuracy, abs=0.01)


@pytest.mark.parametrize("sees", ["embedding", "law", "token", "state"])
def test_every_input_has_the_heads_learn(sees: str) -> None:
    _, judging = both(module_of("eagle"), replace(AT_ONCE, sees=sees), weights=Weights(text=0.0))
    heads = judging.opposed
    supervised, adversarial = heads.sizes(0)
    assert supervised == 0 and adversarial > 1e-4
    assert heads.sizes(0) == (supervised, adversarial), "its luck belongs to the batch"


def test_a_drawn_token_is_one_of_its_law_with_the_laws_gradient() -> None:
    torch.manual_seed(1)
    logits = torch.tensor([[[0.0, 1.0, -1.0]]]).repeat(1, 4000, 1).requires_grad_()
    seen = adversarial._seen(logits, "token", torch.eye(3))
    assert set(seen.detach().round(decimals=4).unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(seen.detach().mean(1)[0], logits[0, 0].softmax(-1), rtol=0.1, atol=0.02)
    seen[..., 1].sum().backward()
    assert logits.grad is not None and bool((logits.grad[..., 1] > 0).any())


def test_parts_of_a_batch_are_judged_like_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from forerun.train import lesson as teaching

    _, judging = both(some_heads("medusa"))
    whole = judging.loss(0).item(), judging.opposed.sizes(0)
    monkeypatch.setattr(teaching, "CHUNK_NUMBERS", 3 * HEADS * VOCAB)
    assert judging.loss(0).item() == pytest.approx(whole[0], rel=1e-5)
    assert judging.opposed.sizes(0) == pytest.approx(whole[1], rel=1e-3)


# ---- which way the signal points


def slope(judging: Judging) -> float:
    """How large the adversarial gradient is."""
    return judging.opposed.sizes(0)[1]


@pytest.mark.parametrize("sees", ["embedding", "law"])
def test_nobody_can_tell_a_perfect_drafter_from_the_target(sees: str) -> None:
    """It is right half of the time, and comes to say nothing that would move the drafter."""
    torch.manual_seed(0)
    _, judging = both(Knowing(), replace(AT_ONCE, sees=sees), adam(200, 2e-2, warmup=0), rows=12)
    filled(judging.module, 1.0, seed=2)
    first = slope(judging)
    for step in range(200):
        Descent.update(judging, step)
    _, accuracy = judging.judged(judging.opposed.drawn(0)[0])
    assert accuracy == pytest.approx(0.5, abs=0.01)
    assert slope(judging) < 0.2 * first


@pytest.mark.parametrize("sees", ["embedding", "law"])
def test_a_drafter_that_knows_nothing_is_told_from_the_target(sees: str) -> None:
    """Heads without weights are uniform; within some hundred steps it is right about nearly all."""
    _, judging = both(MedusaHeads(CONFIGS["medusa"]), replace(AT_ONCE, sees=sees), adam(200, warmup=0), rows=12)
    for step in range(200):
        Descent.update(judging, step)
    assert judging.judged(judging.opposed.drawn(0)[0])[1] > 0.95


def without_attention() -> Transformer:
    """Of eight tokens, each of which decides by itself what may follow it."""
    target = deepcopy(lively(vocab=8))
    for block in target.blocks:
        block.out.weight.zero_()
        block.down.weight.zero_()
    target.head.weight.mul_(0.4)
    return target


@pytest.mark.parametrize(("sees", "rate", "learns"), [("embedding", 5e-3, 1.0), ("token", 2e-3, 5.0)])
def test_the_discriminator_alone_brings_a_head_closer_to_the_target(sees: str, rate: float, learns: float) -> None:
    """There is no other term, and the divergence from the target's law falls to a third; in the end nobody can tell."""
    target, samples = without_attention(), some_samples(30, vocab=8)
    module = filled(HydraHeads(HydraConfig(WIDTH, 8, 1)), 0.3)
    adversary = replace(AT_ONCE, weight=1.0, balanced=False, sees=sees, width=32, rate=learns)
    how: dict[str, Any] = {"target": target, "samples": samples, "rows": 30}
    pair, judging = both(module, adversary, adam(240, rate, warmup=0), weights=Weights(text=0.0), **how)
    batch, _ = judging.opposed.drawn(0)
    said = judging.opposed.said(Lesson.of(module, judging.opposed.teacher, batch), law=True)
    assert said.target_logits_KPV is not None
    entropy = torch.special.entr(said.target_logits_KPV.softmax(-1)).sum(-1).mean().item()
    measure = objective(module, samples, TEACHER, target, rows=30)
    first = measure.loss(0).item() - entropy
    for step in range(240):
        pair.update(step)
    assert 0 < measure.loss(0).item() - entropy < first / 3
    assert judging.judged(batch)[1] < 0.6


# ---- what watches over it


def test_a_discriminator_that_is_too_good_rests_until_it_no_longer_is() -> None:
    _, judging = both(some_heads("medusa"), Adversary(warmup=0.1), adam(1000))
    rests = []
    accuracies = [0.99] * 6 + [0.95] + [0.97] * 11 + [0.93, 0.9, 0.899] + [0.96] * 9
    for look, accuracy in enumerate(accuracies):
        judging.guard(100 + look * LOOK_EVERY, accuracy)
        rests.append(judging._rests)
    patient = PATIENCE // LOOK_EVERY
    assert rests.index(True) == 6 + patient, "a look at which it was not too good begins anew"
    assert rests[6 + patient :] == [True] * (20 - 6 - patient) + [False] * 10


def test_it_rests_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at are held-out answers, one batch after the other; heads go on."""
    pair, judging = both(some_heads("medusa"), AT_ONCE, adam(600), rows=2, holdout=3)
    shown, rightly = list[int](), judging._accuracy_on
    monkeypatch.setattr(judging, "_accuracy_on", lambda number: (shown.append(number), rightly(number))[1] * 0 + 1.0)
    judging.update(PATIENCE)
    before, heads = state_of(judging.module), state_of(judging.opposed.module)
    pair.update(PATIENCE + 1)
    assert same(before, state_of(judging.module)) and not same(heads, state_of(judging.opposed.module))
    assert shown == [PATIENCE // LOOK_EVERY]
    monkeypatch.setattr(judging, "_accuracy_on", lambda number: 0.6)
    judging.update(PATIENCE + LOOK_EVERY)
    assert not same(before, state_of(judging.module))


def test_the_weight_keeps_the_gradient_within_bounds() -> None:
    _, judging = both(some_heads("medusa"))
    heads = judging.opposed
    heads._balance(1.0, 1.0)
    assert (heads.ratio, heads.weight) == (0.1, 0.1), "within bounds it stays"
    heads._balance(1.0, 4.0)
    assert heads.ratio == pytest.approx(0.4) and heads.weight * 4 == pytest.approx(MOST)
    for _ in range(9):
        heads._balance(1.0, 1e9)
    assert heads.weight == pytest.approx(0.1 / FARTHEST), "but not for any price"
    heads.weight = 0.1
    heads._balance(1.0, 0.3)
    assert heads.weight * 0.3 == pytest.approx(LEAST)
    heads._balance(1.0, 1e-3)
    assert heads.weight == pytest.approx(2 * LEAST / 0.3), "by a factor of two at a time"
    for supervised, adversarial_ in ((0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)):
        heads._balance(supervised, adversarial_)
    assert heads.weight == pytest.approx(2 * LEAST / 0.3)
    _, other = both(some_heads("medusa"), replace(AT_ONCE, balanced=False))
    other.opposed._balance(1.0, 50.0)
    assert (other.opposed.ratio, other.opposed.weight) == (5.0, 0.1)


def test_the_gradients_that_are_compared_are_those_of_both_terms() -> None:
    """Every twentieth step, and the step itself goes down both."""
    _, judging = both(some_heads("medusa"), replace(AT_ONCE, balanced=False), adam(40, warmup=0), weights=MIXED)
    heads = judging.opposed
    learning = list(heads.module.parameters())

    def at(pressure: float) -> tuple[float, Tensor]:
        heads.pressure = pressure
        loss = heads.loss(LOOK_EVERY)
        heads.pressure = 0.0
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, learning)])

    (_, plain), (_, pressed), (loss, _) = at(0.0), at(1.0), at(0.1)
    supervised, adversarial_ = heads.sizes(LOOK_EVERY)
    assert supervised == pytest.approx(plain.norm().item(), rel=1e-4)
    assert adversarial_ == pytest.approx((pressed - plain).norm().item(), rel=1e-3)
    assert heads.update(LOOK_EVERY) == pytest.approx(loss)
    assert heads.ratio == pytest.approx(0.1 * adversarial_ / supervised, rel=1e-3)
    assert heads.pressure == 0.0, "what is asked for outside steps is the supervised loss"
    heads.ratio = 9.0
    heads.update(LOOK_EVERY + 1)
    assert heads.ratio == 9.0


def test_more_steps_of_the_discriminator_are_steps_of_their_own() -> None:
    """Each on a batch of its own, and at the rate of its share of all of them."""
    _, judging = both(some_heads("medusa"), replace(AT_ONCE, rounds=3, rate=0.5), adam(10, 1e-2, parts=2))
    numbers, rightly = list[int](), judging.loss
    judging.loss = lambda number: (numbers.append(number), rightly(number))[1]  # type: ignore[method-assign]
    judging.update(4)
    assert numbers == [*range(24, 30)]
    assert judging.schedule.steps == 30 and judging.schedule.adam_rate == 5e-3
    (group,) = judging.optimisers[0].param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.9), 0.0) and judging.schedule.clip == 1.0
    assert group["lr"] == pytest.approx(5e-3 * judging.schedule.rate(14))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weight": -1.0}, "weight = -1"),
        ({"rounds": 0}, "rounds = 0"),
        ({"sees": "all"}, "cannot see 'all'"),
        ({"smoothing": 1.5}, "leaves no label"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        both(some_heads("medusa"), Adversary(**settings))


# ---- going on


@pytest.mark.parametrize(("kind", "sees"), [("medusa", "embedding"), ("hydra++", "token"), ("eagle", "embedding")])
def test_a_resumed_training_is_that_which_was_not_interrupted(kind: str, sees: str, tmp_path: Path) -> None:
    """Discriminator, its optimiser, the weight of its term, and whether it rests."""
    schedule = adam(50, save_every=7, parts=1)
    adversary = Adversary(warmup=0.2, sees=sees)

    def fresh() -> tuple[Alternating, Judging]:
        torch.manual_seed(0)
        return both(module_of(kind), adversary, schedule, weights=MIXED)

    whole, _ = fresh()
    figures = Run(whole, schedule, tmp_path / "whole").finish("whole")
    broken, judging = fresh()
    rightly = judging.opposed.loss

    def loss(number: int) -> Tensor:
        if number == 45:
            raise KeyboardInterrupt
        return rightly(number)

    judging.opposed.loss = loss  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        Run(broken, schedule, tmp_path / "parts").finish("parts")
    again, other = fresh()
    run = Run(again, schedule, tmp_path / "parts")
    assert run.step == 42 and other.opposed.ratio > 0
    assert run.finish("parts") == figures
    assert same(whole.state(), again.state())
    assert {"discriminator_loss", "discriminator_accuracy", "adversarial_weight", "adversarial_ratio"} <= set(figures)


def test_a_supervised_run_is_not_gone_on_with(tmp_path: Path) -> None:
    schedule = adam(4)
    alone = objective(some_heads("medusa"), some_samples(12), TEACHER)
    alone.schedule = schedule
    Run(alone, schedule, tmp_path).finish("alone")
    with pytest.raises(TrainingError, match="another shape"):
        Run(both(some_heads("medusa"), schedule=schedule)[0], schedule, tmp_path)


# ---- layers


def test_two_layers_learn_more_than_one_in_equal_steps() -> None:
    """KOALA's other half: from the same start, on the same batches."""
    losses = []
    for layers in (1, 2):
        config = replace(CONFIGS["medusa, shared"], layers=layers)
        module = heads_of(config).initialise(lively().head.weight)  # type: ignore[operator]
        one = objective(module, some_samples(60), TEACHER, rows=20, holdout=4)
        one.schedule = adam(150, 5e-3, warmup=0)
        for step in range(150):
            one.update(step)
        losses.append(one.validate()["loss"])
    assert losses[1] < losses[0] - 0.02
