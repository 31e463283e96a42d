"""Choosing a static tree for heads on this machine: which paths the target follows, and what a step
costs at every size.

For dependent heads the accuracies of single heads say too little, so whole paths are counted: at
every place of the target's own answers, the ranks that its next tokens had. The N most followed
paths are the best tree of N nodes. Paths are counted on one half of the answers, and a tree's
tokens per step are projected on the other, so that no tree is praised for what it was fitted to.
Step seconds are measured with the engine, every one in a pair with plain steps made just before it,
sizes interleaved; so a machine that slows down for a while slows both. The tree with the greatest
speed-up wins (Medusa, section 2.3.3, fits marginals instead; Hydra, section 4, chooses its size by
measured throughput). A step with a tree does all that a plain one does and more, so a speed-up above
the tokens per step is an error of measurement: it is measured again, and in the end not believed.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from forerun.drafters.none import Nothing
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting import registry
from forerun.drafting.drafter import Drafter
from forerun.drafting.heads import HeadDrafter, HeadsModule
from forerun.engine.engine import Engine
from forerun.errors import DrafterError, TrainingError
from forerun.files import put
from forerun.nn.machine import record
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

AGAIN = 2
"""So many times what cannot be believed is measured again."""

Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Stopwatch:
    """How steps are timed. rows: requests that run side by side. rounds: pairs of timings of every
    tree. clock: seconds."""

    rows: int = 1
    rounds: int = 5
    clock: Callable[[], float] = time.perf_counter


class Pair(NamedTuple):
    """Seconds of a plain step, and of a step with a tree right after it."""

    plain: float
    drafted: float


@dataclass(frozen=True)
class Candidate:
    """A tree, its projected tokens per step, and the seconds of its steps beside plain ones."""

    tree: RankTree
    tokens_per_step: float
    pairs: tuple[Pair, ...]

    @property
    def nodes(self) -> int:
        return self.tree.size

    @property
    def step_seconds(self) -> float:
        """The median over all pairs."""
        return median(pair.drafted for pair in self.pairs)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def speedup(self) -> float:
        """Over plain decoding: the median over all pairs."""
        return median(self._speedups)

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the greatest speed-up of a pair."""
        return min(self._speedups), max(self._speedups)

    @property
    def _speedups(self) -> list[float]:
        return [self.tokens_per_step * pair.plain / pair.drafted for pair in self.pairs]

    @property
    def is_believed(self) -> bool:
        """A step with a tree cannot take less time than a plain one."""
        return median(pair.plain / pair.drafted for pair in self.pairs) <= 1

    @property
    def pays(self) -> bool:
        """It beats plain decoding beyond the spread: in every single pair."""
        return self.is_believed and self.spread[0] > 1

    def as_dict(self) -> dict[str, Any]:
        names = ("nodes", "tokens_per_step", "step_seconds", "tokens_per_second", "speedup")
        return {name: getattr(self, name) for name in names} | {"spread": list(self.spread)}


@dataclass(frozen=True)
class Calibration:
    """What was measured, on so many answers with so many rows."""

    candidates: tuple[Candidate, ...]
    rows: int
    answers: int

    @property
    def best(self) -> Candidate | None:
        """The greatest speed-up of all that pay. None: plain decoding is as fast."""
        return max((one for one in self.candidates if one.pays), key=lambda one: one.speedup, default=None)

    @property
    def plain_seconds(self) -> float:
        """A step that proposes nothing: the median over all pairs."""
        return median(pair.plain for one in self.candidates for pair in one.pairs)

    @property
    def refusal(self) -> str:
        """A sentence: why there is no best one."""
        believed = [one for one in self.candidates if one.is_believed]
        if not believed:
            return (
                "steps with a tree were timed as faster than plain steps, which they cannot be: calibrate again while"
                " nothing else runs on this machine"
            )
        most = max(believed, key=lambda one: one.speedup)
        slowest, fastest = most.spread
        return (
            f"drafting with these heads does not beat plain decoding here beyond the spread of the timings (at most"
            f" {most.speedup:.2f}x, and that between {slowest:.2f}x and {fastest:.2f}x): decode plainly, or calibrate"
            " again while nothing else runs on this machine"
        )

    def as_dict(self, about: dict[str, Any]) -> dict[str, Any]:
        """What a file of it holds. TrainingError with the refusal where there is no best one."""
        best = self.best
        if best is None:
            raise TrainingError(self.refusal)
        return {
            "forerun": checkpoints.VERSION,
            "paths": [list(path) for path in best.tree.paths],
            "rows": self.rows,
            "answers": self.answers,
            "plain_seconds": self.plain_seconds,
            "speedup": best.speedup,
            "spread": list(best.spread),
            "candidates": [one.as_dict() for one in self.candidates if one.is_believed],
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
    stopwatch: Stopwatch | None = None,
    watch: Watch | None = None,
) -> Calibration:
    """Count, project, measure, choose. The engine's drafter must be heads; timings are made at the
    temperature of the first answer.

    Raises TrainingError for too few answers or those of another model, DrafterError for a drafter
    that grows no static tree.
    """
    drafter, stopwatch = engine.drafter, stopwatch or Stopwatch()
    if not isinstance(drafter, HeadDrafter):
        raise DrafterError(
            f"the drafter {drafter.name} grows no static tree: calibrate {' or '.join(registry.calibrated())} heads"
        )
    _demand_answers(samples, engine.target.vocab_size)
    network = engine.target.network
    module = module.to(network.device, network.dtype)
    cut = Answers(samples, rows=4, length=network.max_length, holdout=len(samples) + 1)
    tables = ranks_of(module, Teacher(network), samples, cut)
    candidates = [Candidate(tree, projected(tables[1::2], tree), ()) for tree in trees_from(tables[0::2])]
    timed = _measured(candidates, _Bench(engine, drafter, samples, stopwatch), watch or (lambda done, total: None))
    return Calibration(tuple(timed), stopwatch.rows, len(samples))


def _measured(candidates: Sequence[Candidate], bench: _Bench, watch: Watch) -> list[Candidate]:
    """Every tree is timed, and what cannot be believed is timed again."""
    timed = {one.nodes: one for one in candidates}
    rounds, done, total = bench.stopwatch.rounds, 0, 0
    for attempt in range(1 + AGAIN):
        doubted = [one for one in timed.values() if not (one.pairs and one.is_believed)]
        total += rounds * len(doubted)
        for number in range(attempt * rounds, (attempt + 1) * rounds):
            for one in doubted:
                pair = bench.pair(one.tree, number)
                timed[one.nodes] = replace(one, pairs=(*timed[one.nodes].pairs, pair))
                done += 1
                watch(done, total)
    return list(timed.values())


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


def trees_from(tables: Sequence[Ranks], sizes: Sequence[int] | None = None) -> list[RankTree]:
    """The best tree of every size that the counts can fill. sizes: numbers of nodes, or all that are calibrated."""
    counts = followed_paths(tables)
    if not counts:
        raise TrainingError(
            "the heads never had the target's next token among their best: they belong to another model"
        )
    return [most_followed(counts, size) for size in sizes or SIZES if size <= len(counts)]


@dataclass(frozen=True)
class _Bench:
    """What is timed: the engine's target, plainly and with trees of its drafter, after these prompts."""

    engine: Engine
    drafter: HeadDrafter
    samples: Sequence[Sample]
    stopwatch: Stopwatch

    def pair(self, tree: RankTree, number: int) -> Pair:
        """The prompts depend on the round's number."""
        rows = self.stopwatch.rows
        chosen = [self.samples[(number * rows + row) % len(self.samples)] for row in range(rows)]
        prompts = [list(sample.prompt) for sample in chosen]
        heads = HeadDrafter(self.drafter.name, replace(self.drafter.head, tree=tree))
        return Pair(self._seconds(Nothing(), 0, prompts), self._seconds(heads, tree.depth, prompts))

    def _seconds(self, drafter: Drafter, depth: int, prompts: Sequence[list[int]]) -> float:
        most = (WARM_UP + STEPS + 1) * (1 + depth)
        temperature = self.samples[0].temperature
        params = SamplingParams(max_new_tokens=most, temperature=temperature, seed=0, ignore_eos=True)
        return _step_seconds(self.engine.beside(drafter, len(prompts)), prompts, params, self.stopwatch.clock)


def _step_seconds(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams, clock: Callable[[], float]
) -> float:
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
            begun = clock()
            pieces = engine.step()
            if settled:
                spans.append(clock() - begun)
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
    return {"machine": record(engine.target.network)}


def write(calibration: Calibration, about: dict[str, Any], path: Path) -> None:
    """Write the tree for drafters to find; all at once. TrainingError if none pays, or it cannot be written."""
    content = f"{json.dumps(calibration.as_dict(about))}\n".encode()
    try:
        put(path, content)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TrainingError(f"{path} cannot be written ({reason}): make room, or choose another --out") from None
