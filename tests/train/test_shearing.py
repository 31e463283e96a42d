"""Masks that learn which parts stay: their laws by hand, their constraint, and the model that is left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.train.answers import Answers
from forerun.train.distill import Sample
from forerun.train.objectives.imitation import Imitation
from forerun.train.pruning.masks import Masked
from forerun.train.pruning.shape import Shape
from forerun.train.pruning.shearing import EDGE, Gates, Shear, absent, constraint, drawn, settled, shear, sheared
from forerun.train.schedule import Schedule
from forerun.train.small import LOSS
from forerun.train.teacher import Teacher

CONFIG = TransformerConfig(
    vocab_size=30, width=16, layers=3, heads=4, kv_heads=2, head_dim=4, mlp_width=12, max_length=32, tied=True
)
SHAPE = Shape(2, 8, 6, 2, 2).within(CONFIG)


def test_the_chance_that_a_mask_is_nothing() -> None:
    odds = torch.tensor([4.605, 0.0, -4.605], dtype=torch.float64)
    assert absent(odds).tolist() == pytest.approx([0.00202, 0.16818, 0.95286], abs=5e-6)
    group = torch.tensor([4.605, 4.605, -4.605, 0.0], dtype=torch.float64)
    assert absent(group).mean().item() == pytest.approx(0.281269, abs=5e-6)
    uniform = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for one in odds.tolist():
        masks = drawn(torch.tensor(one), uniform)
        assert (masks == 0).double().mean().item() == pytest.approx(absent(torch.tensor(one)).item(), abs=1e-4)
    assert settled(torch.tensor(EDGE)).item() == pytest.approx(0.996, abs=5e-4)


def test_the_constraint_by_hand() -> None:
    """m1 = 2, m2 = 3; two layers of which 0.1 and 0.5 are gone, and 0.3 shall be: the linear parts cancel out."""
    one = constraint(torch.tensor([0.1, 0.5]), 0.3, torch.tensor(2.0), torch.tensor(3.0))
    assert one.item() == pytest.approx(3 * 0.04)


def test_masks_go_down_and_multipliers_up() -> None:
    gates = Gates(CONFIG, SHAPE, seed=0)
    with torch.no_grad():
        for one in gates.multipliers.values():
            one.copy_(torch.tensor([-2.0, 0.0]))
    gates.penalty(1.0).backward()
    apart = absent(gates.log_odds["hidden"]).mean() - 0.5
    assert gates.multipliers["hidden"].grad is not None and apart < 0
    assert gates.multipliers["hidden"].grad[0].item() == pytest.approx(-apart.item())
    odds = gates.log_odds["hidden"].grad
    assert odds is not None and (odds > 0).all(), "too few are gone: a step down makes masks smaller"


def test_only_sizes_that_change_have_masks() -> None:
    """Heads can go without touching the stream."""
    gates = Gates(CONFIG, replace(CONFIG, heads=2), seed=0)
    assert set(gates.log_odds) == {"heads"}
    masks = gates.masks(torch.Generator().manual_seed(0))
    assert masks.hidden_D.eq(1).all() and masks.layers_L.eq(1).all()


def learning(steps: int) -> tuple[Transformer, Imitation, Shear]:
    torch.manual_seed(0)
    source = Transformer(CONFIG).initialise(0)
    samples = [Sample((1, n % 29), tuple((n + 3 * k) % 30 for k in range(12))) for n in range(30)]
    answers = Answers(samples, rows=4, length=16)
    teacher = Teacher(Transformer(CONFIG).initialise(1))
    objective = Imitation(Transformer(SHAPE), teacher, answers, LOSS, Schedule(0))
    return source, objective, shear(source, objective, steps)


def test_the_shape_is_reached_and_what_is_left_says_what_the_masked_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the constraint alone."""
    monkeypatch.setattr(Imitation, "loss", lambda self, number: torch.zeros(()))
    source, objective, learner = learning(60)
    for step in range(60):
        learner.update(step)
    gates = learner.gates
    for kind, wanted in gates.wanted.items():
        assert absent(gates.log_odds[kind]).mean().item() == pytest.approx(wanted, abs=0.12), kind
    found = sheared(source, gates, objective.module.config)
    assert (len(found.parts.layers), len(found.parts.hidden), len(found.parts.units[0])) == (2, 8, 6)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        masked = Masked(source, found.masks)
        logits = masked.features(tokens) @ masked.head.weight.T
        left = found.module.features(tokens) @ found.module.head.weight.T
    torch.testing.assert_close(left, logits, atol=1e-5, rtol=1e-5)


def test_steps_that_are_taken_up_again_end_alike() -> None:
    whole = learning(6)[2]
    for step in range(6):
        whole.update(step)
    first = learning(6)[2]
    for step in range(3):
        first.update(step)
    second = learning(6)[2]
    second.load_state({name: value.clone() for name, value in first.state().items()})
    for step in range(3, 6):
        second.update(step)
    assert all(torch.equal(one, two) for one, two in zip(whole.state().values(), second.state().values(), strict=True))
