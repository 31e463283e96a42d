"""Choosing a static tree for heads on this machine: which paths the target follows, and what a step
costs at every size.

For dependent heads the accuracies of single heads say too little, so whole paths are counted: at
every place of the target's own answers, the ranks that its next tokens had. The N most followed
paths are the best tree of N nodes. Paths are counted on one half of the answers, and a tree's
tokens per step are projected on the other, so that no tree is praised for what it was fitted to.
Step seconds are measured with the engine, sizes interleaved; the tree with the most tokens per
second wins (Medusa, section 2.3.3, fits marginals instead; Hydra, section 4, chooses its size by
measured throughput).
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from forerun.cost import Table
from forerun.drafters.none import Nothing
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting import registry
from forerun.drafting.heads import HeadDrafter, HeadsModule
from forerun.engine.engine import Engine
from forerun.errors import DrafterError, TrainingError
from forerun.files import put
from forerun.ranktree import Path as RankPath
from forerun.ranktree import RankTree, most_followed
from forerun.sampling import SamplingParams
from forerun.train.answers import Answers
from forerun.train.distill import Sample
from forerun.train.ranks import Ranks, projected, ranks_of
from forerun.train.teacher import Teacher

WIDEST = 10
"""Ranks that a path may go through."""
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 63)
WARM_UP, STEPS = 4, 24
"""Steps of one timing: those that are not counted, and those that are."""
PATIENCE = 8
"""In a context that is hardly longer than a draft, most steps do not count: so many times as many
are made before giving up."""

Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Candidate:
    """A tree size. tokens_per_step: as projected; step_seconds: the median over all timings;
    fastest and slowest beside it."""

    nodes: int
    tokens_per_step: float
    step_seconds: float
    spread: tuple[float, float]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds


@dataclass(frozen=True)
class Calibration:
    """What was measured. plain_seconds: a step that proposes nothing."""

    tree: RankTree
    best: Candidate
    candidates: tuple[Candidate, ...]
    plain_seconds: float
    rows: int
    answers: int

    @property
    def speedup(self) -> float:
        """Over plain decoding, as projected."""
        return self.best.tokens_per_second * self.plain_seconds

    def as_dict(self, about: dict[str, Any]) -> dict[str, Any]:
        candidates = [asdict(c) | {"tokens_per_second": c.tokens_per_second} for c in self.candidates]
        return {
            "forerun": checkpoints.VERSION,
            "paths": [list(path) for path in self.tree.paths],
            "rows": self.rows,
            "answers": self.answers,
            "plain_seconds": self.plain_seconds,
            "speedup": self.speedup,
            "candidates": candidates,
            **about,
        }


def module_of(path: str) -> HeadsModule:
    """The heads of a checkpoint, whatever their kind."""
    stored = checkpoints.read(path)
    kinds = registry.calibrated()
    if stored.drafter not in kinds:
        raise DrafterError(f"{path} holds a drafter of the kind {stored.drafter}, which grows no static tree")
    kind = kinds[stored.drafter]
    module: HeadsModule = stored.module(kind.network, kind.config)
    return module


def answers_of(engine: Engine, prompts: Sequence[list[int]], params: SamplingParams) -> list[Sample]:
    """What the target says to these prompts. Half of the answers would be of no use: Ctrl-C is a KeyboardInterrupt."""
    outputs = engine.generate(prompts, params)
    if len(outputs) < len(prompts) or any(output.finish_reason == "interrupted" for output in outputs):
        raise KeyboardInterrupt
    temperature = params.temperature
    return [Sample(tuple(p), tuple(o.token_ids), temperature) for p, o in zip(prompts, outputs, strict=True)]


def calibrate(
    engine: Engine,
    module: HeadsModule,
    samples: Sequence[Sample],
    rows: int = 1,
    rounds: int = 3,
    watch: Watch | None = None,
) -> Calibration:
    """Count, project, measure, choose. The engine's drafter must be heads; `rows` requests run side
    by side in the timings, at the temperature of the first answer.

    Raises TrainingError for too few answers or those of another model, DrafterError for a drafter
    that grows no static tree.
    """
    drafter = engine.drafter
    if not isinstance(drafter, HeadDrafter):
        raise DrafterError(
            f"the drafter {drafter.name} grows no static tree: calibrate {' or '.join(registry.calibrated())} heads"
        )
    _demand_answers(samples, engine.target.vocab_size)
    network = engine.target.network
    module = module.to(network.device, network.dtype)
    cut = Answers(samples, rows=4, length=network.max_length, holdout=len(samples) + 1)
    tables = ranks_of(module, Teacher(network), samples, cut)
    trees = trees_from(tables[0::2])
    projections = [projected(tables[1::2], tree) for tree in trees]
    prompts, temperature = [list(sample.prompt) for sample in samples], samples[0].temperature
    timings = _timings(engine, drafter, trees, prompts, temperature, rows, rounds, watch)
    read = [rows, *(rows * (1 + tree.size) for tree in trees)]
    costs = Table([(tokens, median(spans)) for tokens, spans in zip(read, timings, strict=True)], rows)
    candidates = tuple(
        Candidate(tree.size, tokens, costs(rows * (1 + tree.size), rows), (min(spans), max(spans)))
        for tree, tokens, spans in zip(trees, projections, timings[1:], strict=True)
    )
    best = max(candidates, key=lambda candidate: candidate.tokens_per_second)
    return Calibration(trees[candidates.index(best)], best, candidates, costs(rows, rows), rows, len(samples))


def _demand_answers(samples: Sequence[Sample], vocab_size: int) -> None:
    if len(samples) < 2:
        raise TrainingError(f"{len(samples)} answers are too few to calibrate on: give two or more")
    largest = max(max((*sample.prompt, *sample.answer)) for sample in samples)
    if largest >= vocab_size:
        raise TrainingError(
            f"the answers have token {largest} and the target knows {vocab_size}: take answers of this target"
        )


def followed_paths(tables: Sequence[Ranks]) -> Counter[RankPath]:
    """How often each path of ranks was followed, over all places."""
    counts: Counter[RankPath] = Counter()
    for table in tables:
        for row in table.tolist():
            path: RankPath = ()
            for rank in row:
                if not 0 <= rank < WIDEST:
                    break
                path = (*path, rank)
                counts[path] += 1
    return counts


def trees_from(tables: Sequence[Ranks]) -> list[RankTree]:
    """The best tree of every size that the counts can fill."""
    counts = followed_paths(tables)
    if not counts:
        raise TrainingError(
            "the heads never had the target's next token among their best: they belong to another model"
        )
    return [most_followed(counts, size) for size in SIZES if size <= len(counts)]


def _timings(
    engine: Engine,
    drafter: HeadDrafter,
    trees: Sequence[RankTree],
    prompts: Sequence[list[int]],
    temperature: float,
    rows: int,
    rounds: int,
    watch: Watch | None,
) -> list[list[float]]:
    """Seconds of single rounds: plain steps first, then steps with every tree; interleaved."""
    drafters = [Nothing(), *(HeadDrafter(drafter.name, replace(drafter.head, tree=tree)) for tree in trees)]
    depths = [0, *(tree.depth for tree in trees)]
    spans: list[list[float]] = [[] for _ in drafters]
    for number in range(rounds):
        chosen = [prompts[(number * rows + row) % len(prompts)] for row in range(rows)]
        for place, (one, depth, found) in enumerate(zip(drafters, depths, spans, strict=True)):
            most = (WARM_UP + STEPS + 1) * (1 + depth)
            params = SamplingParams(max_new_tokens=most, temperature=temperature, seed=0, ignore_eos=True)
            found.append(_step_seconds(engine.beside(one, rows), chosen, params))
            if watch:
                watch(number * len(drafters) + place + 1, rounds * len(drafters))
    return spans


def _step_seconds(engine: Engine, prompts: Sequence[list[int]], params: SamplingParams) -> float:
    """The median second of a step with all of these requests running and nothing being read.

    Prompts lose their beginning where the context has no room for all the steps; where half of it
    is not enough, a request that has filled it begins again.
    """
    context = engine.target.max_length
    longest = max(2, context - (params.max_new_tokens or 0), context // 2)
    cut = [prompt[-min(longest, context - 1) :] for prompt in prompts]
    spans: list[float] = []
    settled = False
    try:
        for place, prompt in enumerate(cut):
            engine.add(prompt, params, place, text=False)
        for _ in range(PATIENCE * (WARM_UP + STEPS)):
            begun = time.perf_counter()
            pieces = engine.step()
            if settled:
                spans.append(time.perf_counter() - begun)
            if len(spans) == WARM_UP + STEPS:
                break
            ended = [piece.prompt_index for piece in pieces if piece.finish_reason]
            for place in ended:
                engine.add(cut[place], params, place, text=False)
            settled = len(pieces) == len(cut) and not ended
    finally:
        engine.close()
    if not spans:
        raise TrainingError(
            f"a context of {context} tokens has no room for a step to time: choose a model with a longer one"
        )
    return median(spans[WARM_UP:] or spans)


def machine_of(engine: Engine) -> dict[str, Any]:
    """What the timings are true of."""
    network = engine.target.network
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": str(network.device),
            "dtype": str(network.dtype).removeprefix("torch."),
            "kernels": network.backend.name,
        }
    }


def write(calibration: Calibration, about: dict[str, Any], path: Path) -> None:
    """Write the tree for drafters to find; all at once. TrainingError if it cannot be written."""
    try:
        put(path, f"{json.dumps(calibration.as_dict(about))}\n".encode())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TrainingError(f"{path} cannot be written ({reason}): make room, or choose another --out") from None
