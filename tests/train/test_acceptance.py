"""Teaching acceptance heads (SpecDec++): what is learnt where, and that thresholds are tried as rules would act."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drafters.heading import PREFIX, VOCAB, WIDTH, cyclic, filled, greedy, lively, relative
from forerun.drafters.eagle import EagleConfig
from forerun.drafters.eagle.drafter import EagleDrafter, Pairs
from forerun.drafters.eagle.network import EagleModule
from forerun.drafters.small import DraftModel
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.acceptance import AcceptanceConfig
from forerun.drafting.acceptance.head import AcceptanceHead, opened
from forerun.drafting.checkpoint import Checkpoint
from forerun.drafting.drafter import Context
from forerun.drafting.growth import Chain, Form
from forerun.drafting.stopping import LAST, Acceptance, Drafted, Fixed, rule_of
from forerun.drafting.trained import LayerConfig
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.errors import RequestError, TrainingError
from forerun.model import Model
from forerun.nn.save import save_pretrained
from forerun.nn.transformer import Transformer
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.train.acceptance import AcceptanceRecipe, prepare, schedule_for
from forerun.train.answers import Answers, Batch
from forerun.train.distill import Sample
from forerun.train.objectives.acceptance import (
    AcceptanceObjective,
    Drafts,
    Pair,
    divergence,
    drawn_of,
    label_of,
    loss_of,
    reliability,
)
from forerun.train.run import Run
from forerun.train.teacher import Teacher
from forerun.train.thresholds import MOST, Chains, Replay, chains_of, cut
from train.test_heads import shaky, some_samples, written

P, Q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])


def pair_of(**changes: Any) -> Pair:
    return Pair(Teacher(lively()), Teacher(relative()), **changes)


def objective_of(seed: int = 0, depth: int = 1, **changes: Any) -> AcceptanceObjective:
    torch.manual_seed(seed)
    answers = Answers(some_samples(15), rows=4, length=64, holdout=5)
    head = AcceptanceHead(AcceptanceConfig(WIDTH, depth))
    return AcceptanceObjective(head, pair_of(**changes), answers, schedule_for(5, save_every=2))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forerun.train.objectives.acceptance.CHAINS", 8)


# ---- labels and loss


def test_a_label_is_the_probability_of_acceptance() -> None:
    labels = label_of(P.expand(3, 3), Q.expand(3, 3), torch.arange(3))
    assert labels.tolist() == pytest.approx([1, 0.6, 2 / 3])
    assert float(Q @ labels) == pytest.approx(0.7) == pytest.approx(float(torch.minimum(P, Q).sum()))


def test_tokens_are_drawn_from_the_drafts_law() -> None:
    luck = (torch.arange(1000) + 0.5) / 1000
    drawn = drawn_of(Q.expand(1000, 3), luck.double())
    assert (drawn.bincount(minlength=3) / 1000).tolist() == pytest.approx(Q.tolist(), abs=2e-3)
    assert drawn_of(torch.tensor([[0.0, 1.0, 0.0]] * 2), torch.tensor([0.0, 1.0]).double()).tolist() == [1, 2]


def logits_for(*said: float) -> Tensor:
    return torch.tensor([[0.0, math.log(one / (1 - one))] for one in said])


def test_the_loss_is_the_papers() -> None:
    loss = loss_of(logits_for(0.8, 0.4), torch.tensor([1, 0.25]), 6.0)
    assert loss.item() == pytest.approx(2.7509315 / 5.75, abs=1e-6) == pytest.approx(0.4784229, abs=1e-6)


@pytest.mark.parametrize(
    ("weight", "label", "said"), [(1, 0.8, 0.8), (3, 0.9, 0.75), (6, 0.95, 0.76), (12, 0.5, 0.0769)]
)
def test_the_loss_is_least_where_the_odds_are_divided_by_the_weight(weight: float, label: float, said: float) -> None:
    logits = logits_for(said).requires_grad_()
    loss_of(logits, torch.tensor([label]), weight).backward()
    assert logits.grad.abs().max() < 1e-4
    lower, higher = (loss_of(logits_for(one), torch.tensor([label]), weight) for one in (said - 0.02, said + 0.02))
    assert loss_of(logits, torch.tensor([label]), weight) < min(lower, higher)


def test_figures_of_what_is_said() -> None:
    labels, said = torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.tensor([0.75, 0.75, 0.5, 0.25])
    kl = [math.log(1 / 0.75), math.log(1 / 0.25), 0, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)]
    assert divergence(labels, said) == pytest.approx(sum(kl) / 4)
    assert divergence(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 0
    table = reliability(labels, said)
    assert (table["bin8_share"], table["bin8_said"], table["bin8_true"]) == (0.5, 0.75, 0.5)
    assert table["ece"] == pytest.approx((0.25 * 2 + 0 + 0.25) / 4) and table["bin1_share"] == 0


# ---- what is learnt where


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_lesson_is_that_of_reading_every_answer_by_itself(temperature: float) -> None:
    """Its tokens are found again by the states: those of the draft model at the end of a text of its own."""
    pair, samples = pair_of(temperature=temperature, mix=0.3), some_samples(6)
    lesson, batch = pair.lesson(Batch.of(samples, 64)), Batch.of(samples, 64)
    states, labels = [], []
    for row, sample in enumerate(samples):
        text, begin = [*sample.prompt, *sample.answer], len(sample.prompt)
        drafted = pair._drafted(batch.tokens_BN[row, : len(text)], begin)
        own = drafted.is_own_N.nonzero()[:, 0].tolist()
        assert all(begin <= place < len(text) for place in own)
        read = [int(drafted.tokens_N[n]) if n in own else text[n] for n in range(len(text))]
        for place in own:
            before = torch.tensor([text[:place]])
            laws = [
                (model.features(before)[0, -1] @ model.head.weight.T / (temperature or 1e-6)).softmax(-1)
                for model in (lively(), relative())
            ]
            labels.append(min(1.0, float(laws[0][read[place]] / laws[1][read[place]])))
            states.append(relative().features(torch.tensor([read[: place + 1]]))[0, -1])
    torch.testing.assert_close(lesson.states_PD, torch.stack(states), rtol=1e-4, atol=1e-4)
    assert lesson.label_P.tolist() == pytest.approx(labels, abs=1e-4)
    assert len(labels) > 10 and (temperature == 0) == (set(labels) <= {0.0, 1.0})


def test_what_is_drawn_is_drawn_once() -> None:
    """For a text, whatever stands beside it, and for the next training with this seed."""
    samples = some_samples(6)
    one, other = pair_of().lesson(Batch.of(samples, 64)), pair_of()
    apart = [other.lesson(Batch.of([sample], 64)) for sample in samples]
    assert torch.equal(one.label_P, torch.cat([part.label_P for part in apart]))
    assert not torch.equal(one.label_P, pair_of(seed=1).lesson(Batch.of(samples, 64)).label_P[: len(one.label_P)])


def test_the_mix_is_how_much_of_the_answers_is_read() -> None:
    texts = np.random.default_rng(0).integers(0, 40, (30, 42)).tolist()
    batch, count = Batch.of([Sample(tuple(text[:2]), tuple(text[2:])) for text in texts], 64), 1200
    for mix in (0.0, 0.15, 0.8):
        assert len(pair_of(mix=mix).lesson(batch).label_P) / count == pytest.approx(1 - mix, abs=0.03)


def test_where_nothing_is_taught_nothing_is_moved() -> None:
    one = objective_of(mix=1.0)
    loss = one.loss(0)
    loss.backward()
    assert loss.item() == 0 and all(not parameter.grad.any() for parameter in one.module.parameters())


# ---- training


def test_a_resumed_training_gives_the_weights_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """Over several passes, with labels that are computed anew."""
    whole, parts = objective_of(), objective_of()
    Run(whole, whole.schedule, tmp_path / "whole").finish("head")
    with pytest.raises(KeyboardInterrupt):
        Run(shaky(objective_of(), [3], KeyboardInterrupt), whole.schedule, tmp_path / "parts").finish("head")
    Run(parts, parts.schedule, tmp_path / "parts").finish("head")
    for one, other in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        assert torch.equal(one, other)


@cache
def picky() -> Transformer:
    """A target that is not sure of tokens with odd numbers, beside a draft model whose states name the newest token."""
    network = deepcopy(cyclic())
    network.head.weight[1::2] = 0
    return network


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_pretrained(picky(), folder / "target", dtype=torch.float32)
    save_pretrained(cyclic(), folder / "small", dtype=torch.float32)
    texts = np.random.default_rng(0).integers(0, 16, (60, 42)).tolist()
    written(folder / "answers.jsonl", [Sample(tuple(text[:2]), tuple(text[2:])) for text in texts])
    return folder


def recipe(folders: Path, steps: int = 4, **changes: Any) -> AcceptanceRecipe:
    fields = {"architecture": {"depth": 1, "weight": 3.0}, "rows": 16, "length": 64, "dtype": "fp32"}
    schedule = schedule_for(steps, 1e-2, validate_every=1000)
    named = {"target": str(folders / "target"), "drafter": f"small:{folders / 'small'}"}
    return AcceptanceRecipe(**{**named, "data": folders / "answers.jsonl", "schedule": schedule, **fields, **changes})


def test_a_training_leaves_a_head_that_knows_more_than_the_mean_and_ends_drafts_by_it(
    folders: Path, tmp_path: Path
) -> None:
    training = prepare(recipe(folders, 60), torch.device("cpu"))
    figures = training.fit(tmp_path / "run", tmp_path / "head")
    assert figures["kl_corrected"] < 0.5 * figures["kl_constant"] and figures["kl_corrected"] < figures["kl"]
    assert figures["ece"] < 0.1
    assert figures["h10_drafted"] <= figures["h50_drafted"] <= figures["h90_drafted"]
    stored = checkpoints.read(tmp_path / "head")
    assert (stored.target, stored.training["draft_model"]) == ("target", "small")
    assert opened(str(tmp_path / "head")).config == AcceptanceConfig(16, 1, weight=3.0)
    rule = rule_of({"rule": "acceptance", "checkpoint": str(tmp_path / "head"), "threshold": 0.5})
    one = Engine(picky(), DraftModel.on(cyclic(), Chain(rule.prepared(16, cyclic().device))))
    (output,) = one.generate([[4]], SamplingParams(max_new_tokens=80))
    assert output.token_ids == greedy(picky(), [4], 80)
    with pytest.raises(TrainingError, match="another temperature"):
        prepare(recipe(folders, 60, temperature=0.5), torch.device("cpu")).fit(tmp_path / "run", tmp_path / "head")


def test_a_head_for_a_drafter_that_reads_the_target(folders: Path, tmp_path: Path) -> None:
    config = EagleConfig(16, 16, layer=LayerConfig(1, 1, 4, 4, 256))
    module = filled(EagleModule(config))
    checkpoints.write(module, config, Checkpoint(tmp_path / "eagle", "eagle", {}, "target", {}), torch.float32)
    training = prepare(recipe(folders, 2, drafter=f"eagle:{tmp_path / 'eagle'}"), torch.device("cpu"))
    figures = training.fit(tmp_path / "run", tmp_path / "head")
    assert 0 < figures["acceptance"] < 1 and 0 < training.objective.lessons.draft_share < 2
    stored = checkpoints.read(tmp_path / "head").training
    assert (stored["drafter"], stored["draft_model"]) == ("eagle", "eagle")
    made = build({**training.recipe.drafted_with, "stopping": f"acceptance:{tmp_path / 'head'}"}, workshop())
    (output,) = Engine(picky(), made).generate([[4]], SamplingParams(max_new_tokens=40))
    assert output.token_ids == greedy(picky(), [4], 40)


def workshop() -> Workshop:
    return Workshop(Model(picky(), 1), {}.__getitem__)


def test_what_cannot_be_taught_is_refused(folders: Path, tmp_path: Path) -> None:
    for changes, says in (
        ({"drafter": "lookup"}, "draws no chains that a rule could end"),
        ({"mix": 1.0}, "with --mix 1 nothing would be learnt"),
        ({"length": 4096}, "do not fit a context"),
        ({"temperature": 1e-9}, "temperature=1e-09"),
    ):
        with pytest.raises((TrainingError, RequestError), match=says):
            prepare(replace(recipe(folders), **changes), torch.device("cpu"))


# ---- thresholds


def slow_size(said: list[float], threshold: float) -> int:
    """By asking the rule."""

    class Told:
        config = AcceptanceConfig(1, 0, weight=1.0)

        def probability(self, states: Tensor) -> Tensor:
            return states[:, 0]

    rule, notes = Acceptance(Told(), threshold), dict[str, Tensor]()  # type: ignore[arg-type]
    row = Row([0], 1, SamplingParams(), key=0, limit=99)
    for depth in range(1, MOST + 1):
        state = torch.tensor([[said[depth - 2] if 1 < depth < MOST else 0.0]])
        if not rule.goes_on(Drafted(depth, [row], None, {LAST: state}, notes)).item():
            return depth
    raise AssertionError("no end")


def test_a_threshold_is_tried_as_the_rule_would_act() -> None:
    luck = np.random.default_rng(0)
    accepted, said = luck.random((6, MOST)), luck.uniform(0.6, 1, (6, MOST - 2))
    tried = Replay(torch.from_numpy(accepted).float(), torch.from_numpy(said).float())
    for threshold in (0.0, 0.3, 0.8, 1.0):
        sizes = [slow_size(row, threshold) for row in said.tolist()]
        kept = [float(np.cumprod(row)[:size].sum()) for row, size in zip(accepted, sizes, strict=True)]
        rates = tried.at(threshold)
        assert (rates.drafted, rates.accepted) == pytest.approx((np.mean(sizes), np.mean(kept)))
    assert tried.fixed(4).accepted == pytest.approx(np.cumprod(accepted, 1)[:, :4].sum(1).mean())


def test_rates_say_what_a_token_takes() -> None:
    """Specs, section 3: each token is accepted with probability 0.8, and verifying takes 4 drafts more than one."""
    tried = Replay(torch.full((1, 20), 0.8), torch.ones(1, 18))
    assert tried.best_fixed(1.0, 5.0) == 4
    assert tried.fixed(4).seconds(1.0, 5.0) - 1 == pytest.approx(1.6773, abs=5e-5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_chains_are_those_of_the_draft_model(temperature: float) -> None:
    found = pair_of(temperature=temperature).chains(some_samples(4), 18)
    assert isinstance(found, Chains) and found.accepted_RJ.shape == (18, MOST)
    assert found.states_RJD.shape == (18, MOST - 2, WIDTH)
    same = Pair(Teacher(lively()), Teacher(lively()), temperature).chains(some_samples(4), 3)
    assert same.accepted_RJ.min() > 1 - 1e-4 and found.accepted_RJ.min() < 0.5
    assert (temperature == 0) == (set(found.accepted_RJ.flatten().tolist()) <= {0.0, 1.0})


def eagle(form: Form) -> EagleDrafter:
    config = EagleConfig(WIDTH, VOCAB, layer=PREFIX)
    module = filled(EagleModule(config), 1.5, seed=4).eval().requires_grad_(False)
    stack = module.stack.lend(lively().input_embedding, module.of_known(lively().head_matrix()))
    return EagleDrafter(Pairs(stack, form.scratch), form, module.reads(2))


def test_a_drafter_that_reads_the_target_is_taught_on_its_own_drafts() -> None:
    """States and labels are those of the chains that it would draw in an engine, and every batch has others."""
    drafts = Drafts(lively(), eagle(Chain(Fixed(MOST))), 1.0, length=4)
    batch = Batch.of(some_samples(6), 64)
    lesson = drafts.lesson(batch, 0)
    assert lesson.states_PD.shape == (6 * 2, WIDTH) and 0 < lesson.label_P.min() < lesson.label_P.max() <= 1
    assert torch.equal(lesson.label_P, drafts.lesson(batch, 0).label_P)
    assert not torch.equal(lesson.label_P, drafts.lesson(batch, 1).label_P)
    (text,) = cut([some_samples(6)[3]], 256, 1.0, np.random.default_rng(2))
    chains = chains_of(lively(), eagle(Chain(Fixed(MOST))), [text], 4)
    drafter, target = eagle(Chain(Fixed(4))), Model(lively(), 5)
    drafter.admit(text, target.prefill_all(text, target.admit(99), drafter.reads))
    tree = drafter.propose(Context([text], [4], [4], lively().device))
    assert tree.laws_BNV is not None
    for depth, token in enumerate(tree.tokens[0][1:]):
        said = torch.tensor([[*text.tokens, *tree.tokens[0][1 : depth + 1]]])
        law = (lively().features(said)[0, -1] @ lively().head.weight.T).softmax(-1)
        right = min(1.0, float(law[token] / tree.laws_BNV[0, depth, token]))
        assert chains.accepted_RJ[0, depth].item() == pytest.approx(right, abs=1e-4)
