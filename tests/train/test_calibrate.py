"""Calibration: paths are counted as they are, projections are what the engine needs, the choice
follows from the clock."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafters.heading import CONFIGS, every_kernel, future, greedy, heads_of, lively, on, slow_head, some_heads, telling
from drafters.heading import drafter_of as drafter_with
from drafters.heading import engine_with as engine_of_heads
from fakes import TableNetwork, engine_of
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.checkpoint import DEFAULT_TREE, Checkpoint
from forerun.drafting.heads import HeadsModule
from forerun.drafting.trained import Weights
from forerun.drafting.workshop import Workshop, build
from forerun.engine.engine import Engine
from forerun.errors import CheckpointError, DrafterError, ForerunError, TrainingError
from forerun.model import Model
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.plan import calibrate as module
from forerun.plan.calibrate import (
    Calibration,
    Candidate,
    Pair,
    Stopwatch,
    answers_of,
    calibrate,
    followed_paths,
    trees_from,
    write,
)
from forerun.ranktree import RankTree
from forerun.sampling import SamplingParams
from forerun.train.answers import Answers
from forerun.train.distill import Sample
from forerun.train.objectives.heads import HeadsObjective
from forerun.train.ranks import RANKS, projected, ranks_of
from forerun.train.schedule import Schedule
from forerun.train.teacher import Teacher

KINDS = ("medusa", "hydra", "hydra++")
every_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def samples(count: int = 24, seed: int = 0) -> tuple[Sample, ...]:
    """Prompts and what the lively target says to them, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, 40, (2 + n % 5,), generator=generator).tolist() for n in range(count)]
    return tuple(Sample(tuple(p), tuple(greedy(lively(), p, 12 + n % 9))) for n, p in enumerate(prompts))


@cache
def trained(kind: str, steps: int = 40) -> HeadsModule:
    """Heads that are right now and then."""
    torch.manual_seed(0)
    heads, teacher = heads_of(CONFIGS[kind]), Teacher(lively())
    heads.initialise(teacher.head_VD)
    answers, schedule = Answers(samples(), rows=8, length=64), Schedule(steps)
    objective = HeadsObjective(heads, teacher, answers, Weights(), DEFAULT_TREE, schedule)
    optimiser = torch.optim.AdamW(heads.parameters(), 1e-2)
    for number in range(steps):
        optimiser.zero_grad()
        objective.loss(number).backward()
        optimiser.step()
    return heads.eval().requires_grad_(False)


def whole(count: int) -> dict[str, Any]:
    """Nothing is cut, and nothing held out."""
    return {"rows": 4, "length": 256, "holdout": count + 1}


def ranks(heads: HeadsModule, answers: Sequence[Sample]) -> list[Any]:
    return ranks_of(heads, Teacher(lively()), answers, Answers(answers, **whole(len(answers))))


def engine(kind: str = "medusa", kernels: str = "torch", **options: Any) -> Engine:
    return engine_of_heads(trained(kind), on(lively(), kernels), DEFAULT_TREE, **options)


@pytest.fixture
def clock(monkeypatch) -> Callable[..., None]:
    """Set what a step costs: plain, and by the number of nodes."""

    def set_(plain: float, seconds: Callable[[int], float]) -> None:
        monkeypatch.setattr(module._Bench, "pair", lambda bench, tree, number: Pair(plain, seconds(tree.size)))

    return set_


# ---- counting


@every_kind
def test_paths_are_counted_at_every_place(kind):
    """Against every head by itself at every place, and all prefixes of what it finds."""
    heads, network, answers = trained(kind), lively(), samples()[:5]
    expected: Counter[tuple[int, ...]] = Counter()
    for sample in answers:
        text = [*sample.prompt, *sample.answer]
        contexts = heads.contexts(network.features(torch.tensor([text])))[0]
        for place in range(len(sample.prompt) - 2, len(text) - 2):
            path = []
            for index, token in enumerate(text[place + 2 : place + 2 + heads.count]):
                embedded = [network.embedding.weight[one] for one in text[place + 1 : place + 2 + index]]
                logits = slow_head(heads, index, contexts[place], embedded, network.head.weight)
                path.append(int((logits > logits[token]).sum()))
            good = list(itertools.takewhile(lambda rank: rank < module.WIDEST, path))
            expected.update(tuple(good[:depth]) for depth in range(1, len(good) + 1))
    assert followed_paths(ranks(heads, answers)) == expected


def test_only_the_best_ranks_and_the_answer_itself_count():
    tables = [np.array([[0, 9, 3], [1, 10, 0], [RANKS, 0, 0], [0, 0, -1], [2, -1, -1]])]
    assert followed_paths(tables) == {(0,): 2, (0, 9): 1, (0, 9, 3): 1, (1,): 1, (0, 0): 1, (2,): 1}


def test_trees_of_every_size_each_within_the_next():
    trees = trees_from(ranks(trained("hydra"), samples()))
    assert [tree.size for tree in trees] == [size for size in module.SIZES if size <= trees[-1].size] and len(trees) > 9
    for small, large in itertools.pairwise(trees):
        assert large.paths[: small.size] == small.paths


def test_a_tree_has_the_most_followed_paths():
    counts = followed_paths(tables := ranks(trained("medusa"), samples()))
    for tree in trees_from(tables):
        left_out = max((counts[path] for path in counts if path not in tree.paths), default=0)
        assert min(counts[path] for path in tree.paths) >= left_out


def test_few_paths_give_few_trees():
    assert [tree.size for tree in trees_from([np.array([[0, 0], [1, 0], [0, -1]])])] == [1, 2, 3, 4]


def test_heads_that_are_never_right():
    with pytest.raises(TrainingError, match="belong to another model"):
        trees_from([np.full((5, 3), RANKS)])


# ---- projecting


@every_kind
def test_the_halves_are_apart(kind, clock):
    """Trees come from the first, third, ... answer; their tokens per step from the others."""
    clock(1.0, lambda nodes: 1.0)
    ours, theirs = samples(24), samples(24, seed=1)
    mixed = [sample for pair in zip(ours, theirs, strict=True) for sample in pair]
    found = calibrate(engine(kind), trained(kind), mixed)
    trees, other = trees_from(ranks(trained(kind), ours)), ranks(trained(kind), theirs)
    assert [candidate.nodes for candidate in found.candidates] == [tree.size for tree in trees]
    assert [candidate.tokens_per_step for candidate in found.candidates] == [projected(other, tree) for tree in trees]
    assert found.answers == 48


@pytest.mark.parametrize(
    "kind",
    [
        "medusa",
        "hydra",
        "hydra++",
    ],
)
def test_what_is_projected_is_what_the_engine_needs(kind, clock):
    clock(1.0, lambda nodes: 1.0 + 0.01 * nodes)
    found = calibrate(engine(kind), trained(kind), samples())
    tree, asked = found.best.tree, samples()[1::2]
    drafting = engine_of_heads(trained(kind), lively(), tree, max_rows=4)
    prompts = [list(sample.prompt) for sample in asked]
    outputs = drafting.generate(prompts, [SamplingParams(max_new_tokens=len(sample.answer)) for sample in asked])
    assert [tuple(output.token_ids) for output in outputs] == [sample.answer for sample in asked]
    measured = sum(o.stats.new_tokens for o in outputs) / sum(o.stats.steps for o in outputs)
    assert measured == pytest.approx(found.best.tokens_per_step)


# ---- choosing


def test_the_greatest_speed_up_wins(clock):
    clock(0.9, lambda nodes: 1.0 if nodes <= 4 else 0.25 * nodes)
    found = calibrate(engine(), trained("medusa"), samples(), Stopwatch(rows=2))
    speeds = [candidate.tokens_per_step / candidate.step_seconds for candidate in found.candidates]
    assert found.best is found.candidates[speeds.index(max(speeds))] and 1 < found.best.nodes < 63
    assert found.best.tokens_per_second == max(speeds)
    assert found.best.speedup == pytest.approx(max(speeds) * 0.9) and (found.plain_seconds, found.rows) == (0.9, 2)


def test_steps_that_cost_nothing_more_deserve_all_nodes_and_dear_ones_few(clock):
    clock(1.0, lambda nodes: 1.0)
    free = calibrate(engine(), trained("medusa"), samples())
    assert free.best.tokens_per_step == max(candidate.tokens_per_step for candidate in free.candidates)
    clock(1.0, lambda nodes: 1.0 + 0.02 * nodes)
    assert calibrate(engine(), trained("medusa"), samples()).best.nodes < free.best.nodes


def test_every_tree_is_timed_beside_plain_steps(monkeypatch):
    asked: list[tuple[int, list[list[int]], SamplingParams]] = []

    def seconds(engine, prompts, params, clock):
        asked.append((engine.drafter.max_nodes, prompts, params))
        return 1.0 if engine.drafter.max_nodes == 0 else 1.0 + len(asked) / 1000

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "_step_seconds", seconds)
    watch = lambda done, total: seen.append((done, total))  # noqa: E731
    found = calibrate(engine(), trained("medusa"), samples(), Stopwatch(2, 3), watch)
    sizes = [candidate.nodes for candidate in found.candidates]
    width = len(sizes)
    assert [nodes for nodes, *_ in asked] == [nodes for size in sizes for nodes in (0, size)] * 3
    prompts = [list(sample.prompt) for sample in samples()]
    assert [chosen for _, chosen, _ in asked[:: 2 * width]] == [prompts[0:2], prompts[2:4], prompts[4:6]]
    assert all(params.is_greedy and params.ignore_eos for *_, params in asked)
    first = found.candidates[0]
    expected = [1 + (2 + 2 * width * round_) / 1000 for round_ in range(3)]
    assert [pair.drafted for pair in first.pairs] == expected and first.step_seconds == expected[1]
    assert first.spread == pytest.approx((first.tokens_per_step / expected[2], first.tokens_per_step / expected[0]))
    assert seen == [(done, 3 * width) for done in range(1, 3 * width + 1)]


def test_drawn_answers_are_timed_as_such(monkeypatch):
    asked: list[SamplingParams] = []
    monkeypatch.setattr(module, "_step_seconds", lambda engine, prompts, params, clock: float(not asked.append(params)))
    drawn = [Sample(sample.prompt, sample.answer, 0.7) for sample in samples()]
    calibrate(engine(), trained("medusa"), drawn, Stopwatch(rounds=1))
    assert {params.temperature for params in asked} == {0.7} and all(params.seed is not None for params in asked)


# ---- believing


CHAIN = RankTree([(0,)])


def candidate(*pairs: tuple[float, float], tokens: float = 1.5) -> Candidate:
    return Candidate(CHAIN, tokens, tuple(Pair(*pair) for pair in pairs))


def verdict(*candidates: Candidate) -> Calibration:
    return Calibration(candidates, rows=1, answers=8)


def test_a_speed_up_above_the_tokens_per_step_is_not_believed():
    """Once 13.00x at 1.23 tokens per step was saved, for two plain timings had been held up."""
    found = verdict(candidate((10.6, 1.0), (10.6, 1.0), tokens=1.23), candidate((1.0, 1.1), (1.0, 1.2)))
    assert [one.is_believed for one in found.candidates] == [False, True]
    assert found.best is found.candidates[1]
    assert [one["speedup"] for one in found.as_dict({})["candidates"]] == [found.best.speedup]


@pytest.mark.parametrize(("drafted", "is_believed"), [(0.99, False), (1.0, True)])
def test_a_step_with_a_tree_takes_as_long_as_a_plain_one_or_longer(drafted, is_believed):
    assert candidate((1.0, drafted), (1.0, drafted), (1.0, 5.0)).is_believed == is_believed


def test_drafting_must_beat_plain_decoding_in_every_pair():
    assert verdict(candidate((1.0, 1.4), (1.0, 1.4), (1.0, 1.4))).best is not None
    wavering = verdict(candidate((1.0, 1.2), (1.0, 1.2), (1.0, 1.6)))
    assert wavering.best is None
    assert "at most 1.25x, and that between 0.94x and 1.25x" in wavering.refusal
    slower = verdict(candidate((1.0, 2.0), (1.0, 3.0)))
    assert slower.best is None and "does not beat plain decoding" in slower.refusal


def test_nothing_is_written_of_what_does_not_pay(tmp_path):
    for one in (candidate((1.0, 2.0)), candidate((1.0, 0.5))):
        with pytest.raises(TrainingError, match="calibrate again while"):
            write(verdict(one), {}, tmp_path / "tree.json")
    assert not list(tmp_path.iterdir())
    assert "faster than plain steps, which they cannot be" in verdict(candidate((1.0, 0.5))).refusal


@pytest.mark.parametrize("held_up", [2, 4, 100])
def test_what_is_not_believed_is_measured_again(held_up, monkeypatch):
    """The plain steps beside the smallest tree are held up in the first rounds."""
    made: Counter[int] = Counter()

    def pair(bench, tree, number):
        made[tree.size] += 1
        return Pair(20.0 if tree.size == 1 and made[1] <= held_up else 1.0, 1.1)

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "SIZES", (1, 2, 3))
    monkeypatch.setattr(module._Bench, "pair", pair)
    watch = lambda done, total: seen.append((done, total))  # noqa: E731
    found = calibrate(engine(), trained("medusa"), samples(), Stopwatch(rounds=3), watch)
    assert made == {1: {2: 6, 4: 9, 100: 9}[held_up], 2: 3, 3: 3}
    assert found.candidates[0].is_believed == (held_up < 100)
    assert found.best is not None and found.best.speedup < found.best.tokens_per_step
    assert seen[-1][0] == seen[-1][1] == sum(made.values())


# ---- a step


class Recorded:
    """How many rows made every step of an engine, and whether one of them was read in it; the clock
    ticks once a step."""

    def __init__(self, monkeypatch, cost: Callable[[int], float] = float):
        self.rows: list[int] = []
        self.now, step = 0.0, Engine.step

        def ticking(engine: Engine) -> Any:
            waiting = bool(engine._waiting or engine._reading)
            pieces = step(engine)
            self.rows.append(len(pieces))
            self.now += 1000.0 if waiting else cost(len(pieces))
            return pieces

        monkeypatch.setattr(Engine, "step", ticking)

    def clock(self) -> float:
        return self.now


def told(context: int, depth: int = 3) -> Engine:
    """An oracle that is always right, on tables."""
    target = TableNetwork(8, seed=1, max_length=context)
    drafter = telling(lambda row, tree: future(target, row, tree.depth), RankTree.chain(depth))
    return engine_of(target, drafter, max_rows=3)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("context", [4096, 160, 64, 24, 12])
def test_only_steps_with_all_rows_and_no_reading_count(monkeypatch, rows, context):
    """Also where the context is so short that requests end and begin again."""
    recorded = Recorded(monkeypatch)
    prompts = [[1, 2, 3, 4, 5, 6, 7] * 40, [3, 1], [2] * 9][:rows]
    params = SamplingParams(max_new_tokens=4 * (module.WARM_UP + module.STEPS + 1), ignore_eos=True)
    running = told(context)
    assert module._step_seconds(running, prompts, params, recorded.clock) == float(rows)
    assert running.is_idle
    if context == 4096:
        assert len(recorded.rows) == 1 + module.WARM_UP + module.STEPS


def test_a_context_without_room_is_refused(monkeypatch):
    clock = Recorded(monkeypatch).clock
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    running = told(5)
    with pytest.raises(TrainingError, match="context of 5 tokens"):
        module._step_seconds(running, [[1, 2, 3]], params, clock)
    assert running.is_idle
    with pytest.raises(ForerunError):
        module._step_seconds(told(1), [[1, 2, 3]], params, clock)


def test_warm_up_does_not_count(monkeypatch):
    costs = itertools.chain([50.0] * module.WARM_UP, itertools.repeat(2.0))
    clock = Recorded(monkeypatch, lambda rows: next(costs)).clock
    params = SamplingParams(max_new_tokens=200, ignore_eos=True)
    assert module._step_seconds(told(4096), [[1, 2, 3]], params, clock) == 2.0


def test_a_fault_leaves_the_engine_idle(monkeypatch):
    monkeypatch.setattr(Engine, "_emit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    running = told(4096)
    with pytest.raises(KeyboardInterrupt):
        module._step_seconds(running, [[1, 2, 3]], SamplingParams(max_new_tokens=200), float)
    assert running.is_idle


# ---- the whole of it


@every_kernel
@every_kind
def test_on_this_machine(kind, kernels, monkeypatch):
    monkeypatch.setattr(module, "SIZES", (1, 4, 12))
    monkeypatch.setattr(module, "STEPS", 3)
    found = calibrate(engine(kind, kernels, max_rows=2), trained(kind), samples(), Stopwatch(rows=2, rounds=1))
    assert len(found.candidates) == 3 and found.plain_seconds > 0
    assert all(one.step_seconds > 0 for one in found.candidates)


@every_kernel
def test_heads_in_the_number_format_of_their_target(kernels, monkeypatch):
    monkeypatch.setattr(module, "STEPS", 3)
    network = on(_half(), kernels)
    heads = some_heads("hydra++")
    prompts = [list(sample.prompt) for sample in samples()[:6]]
    running = engine_of_heads(heads, network, DEFAULT_TREE)
    answers = answers_of(running, prompts, SamplingParams(max_new_tokens=16))
    found = calibrate(running, heads, answers, Stopwatch(rounds=1))
    assert all(one.tokens_per_step >= 1 for one in found.candidates)


def _half() -> Transformer:
    network = Transformer(lively().config).bfloat16().requires_grad_(False)
    network.load_state_dict(lively().state_dict())
    return network


def test_a_target_of_a_short_context():
    config = TransformerConfig(40, 24, layers=1, heads=4, kv_heads=2, head_dim=6, mlp_width=40, max_length=16)
    network = Transformer(config).initialise(1).requires_grad_(False)
    running = engine_of_heads(some_heads("medusa"), network, DEFAULT_TREE)
    answers = answers_of(running, [[n, 1, 2 + n] for n in range(8)], SamplingParams(max_new_tokens=30))
    assert all(len(answer.answer) == 13 for answer in answers)
    found = calibrate(running, some_heads("medusa"), answers, Stopwatch(rounds=1))
    assert all(one.step_seconds > 0 for one in found.candidates)


# ---- what cannot be calibrated


def test_a_drafter_without_a_tree():
    with pytest.raises(DrafterError, match="lookup grows no static tree"):
        calibrate(engine_of(TableNetwork(8), "lookup"), trained("medusa"), samples())


def test_too_few_answers_or_those_of_another_model():
    with pytest.raises(TrainingError, match="1 answers are too few"):
        calibrate(engine(), trained("medusa"), samples()[:1])
    with pytest.raises(TrainingError, match="token 40 and the target knows 40"):
        calibrate(engine(), trained("medusa"), [*samples(), Sample((1, 2), (40,))])


def test_answers_are_the_targets_own():
    prompts = [list(sample.prompt) for sample in samples()[:5]]
    found = answers_of(engine(max_rows=2), prompts, SamplingParams(max_new_tokens=12))
    assert [sample.prompt for sample in found] == [tuple(prompt) for prompt in prompts]
    assert [list(sample.answer) for sample in found] == [greedy(lively(), prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("steps", [0, 2, 9])
def test_half_the_answers_are_none(steps, monkeypatch):
    decode, made = Engine._decode, 0

    def interrupted(self):
        nonlocal made
        made += 1
        if made > steps:
            raise KeyboardInterrupt
        return decode(self)

    monkeypatch.setattr(Engine, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers_of(engine(max_rows=2), [[1, 2], [3, 4], [5, 6]], SamplingParams(max_new_tokens=12))


# ---- the file


@pytest.fixture
def found(clock) -> Calibration:
    clock(1.0, lambda nodes: 1.0 + 0.02 * nodes)
    return calibrate(engine(), trained("medusa"), samples())


def stored(folder: Path, kind: str = "medusa", scale: float = 1.0) -> Path:
    heads = deepcopy(trained(kind))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.mul_(scale)
    checkpoints.write(heads, heads.config, Checkpoint(folder, kind.rstrip("+"), {}, "lively", {}))
    return folder


def built(**settings: Any) -> Any:
    return build({"drafter": "medusa", **settings}, Workshop(Model(lively(), 1), lambda path: lively()))


def test_the_tree_is_found_by_the_drafter(found, tmp_path):
    heads = stored(tmp_path / "heads")
    assert built(checkpoint=str(heads)).head.tree == DEFAULT_TREE
    write(found, {"machine": {}}, heads / "tree.json")
    assert built(checkpoint=str(heads)).head.tree == found.best.tree != DEFAULT_TREE
    stored(heads)  # the same weights again, as a finished training writes them
    assert built(checkpoint=str(heads)).head.tree == found.best.tree
    stored(heads, "medusa", scale=2.0)  # trained anew: what was calibrated is no longer true
    assert built(checkpoint=str(heads)).head.tree == DEFAULT_TREE


def test_a_tree_elsewhere_is_named(found, tmp_path):
    heads = stored(tmp_path / "heads")
    write(found, {}, tmp_path / "mine.json")
    assert built(checkpoint=str(heads), tree=str(tmp_path / "mine.json")).head.tree == found.best.tree
    assert built(checkpoint=str(heads), tree=[[0], [1]]).head.tree == RankTree([(0,), (1,)])
    assert built(checkpoint=str(heads), tree="mc_sim_7b_63").max_nodes == 63
    with pytest.raises(DrafterError, match=r"5 deep and .* has 4 heads"):
        built(checkpoint=str(heads), tree=[[0] * depth for depth in range(1, 6)])


def test_the_file_says_what_was_measured(found, tmp_path):
    write(found, module.machine_of(engine()) | {"temperature": 0.0}, tmp_path / "tree.json")
    held = json.loads((tmp_path / "tree.json").read_text())
    assert held["forerun"] == 1 and [tuple(path) for path in held["paths"]] == found.best.tree.paths
    assert held["machine"].keys() == {"processor", "threads", "device", "dtype", "weights", "kernels"}
    assert (held["plain_seconds"], held["rows"], held["answers"], held["temperature"]) == (1.0, 1, 24, 0.0)
    assert (held["speedup"], held["spread"]) == (found.best.speedup, list(found.best.spread))
    assert len(held["candidates"]) == len(found.candidates)
    fields = {"nodes", "tokens_per_step", "step_seconds", "spread", "tokens_per_second", "speedup"}
    assert all(candidate.keys() == fields for candidate in held["candidates"])
    assert (tmp_path / "tree.json").read_text().endswith("\n")


def test_a_file_that_finds_no_room_leaves_the_older_one(found, tmp_path, monkeypatch):
    (tmp_path / "tree.json").write_text("[[0]]")

    def full(descriptor):
        os.ftruncate(descriptor, 9)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"tree\.json cannot be written \(No space left on device\)"):
        write(found, {}, tmp_path / "tree.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tree.json"]
    assert (tmp_path / "tree.json").read_text() == "[[0]]"


@every_kind
def test_heads_of_any_kind_are_read(kind, tmp_path):
    again = module.module_of(str(stored(tmp_path / "heads", kind)))
    assert type(again) is type(trained(kind)) and again.count == 4


def test_heads_of_no_kind(tmp_path):
    heads = stored(tmp_path / "heads")
    config = json.loads((heads / "config.json").read_text())
    (heads / "config.json").write_text(json.dumps(config | {"drafter": "eagle"}))
    with pytest.raises(DrafterError, match="kind eagle, which grows no static tree"):
        module.module_of(str(heads))
    with pytest.raises(CheckpointError, match=r"there is no .*config\.json"):
        module.module_of(str(tmp_path / "nowhere"))


def test_drafters_of_the_timings_share_their_heads(monkeypatch):
    """Trees change, weights do not: nothing is packed or copied again."""
    draftings = []
    monkeypatch.setattr(
        module, "_step_seconds", lambda engine, *_: draftings.append(getattr(engine.drafter, "head", None)) or 1.0
    )
    running = Engine(lively(), drafter_with(trained("hydra"), lively(), DEFAULT_TREE))
    calibrate(running, trained("hydra"), samples(), Stopwatch(rounds=1))
    assert {id(head.drafting) for head in draftings if head} == {id(running.drafter.head.drafting)}
