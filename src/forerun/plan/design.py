"""Which draft model to train for a target: the shape, and how far it should run ahead ("Decoding Speculative Decoding",
arXiv 2402.01528, as we reconstruct it).

    tokens(K)      1 + the tokens of K drafted ones that survive
    seconds(K)     K * draft step + verifying K + 1 tokens + what a proposal costs beside its steps
    throughput     tokens / seconds; with K = 0 plain decoding

A draft step costs  fixed + layers * (one layer of this width) + the vocabulary's matrix. All three are measured, for
what decides is how they compare on the machine at hand: where every layer has a price of its own, shallow and wide
models draft faster than deep and narrow ones of their size, and where bytes alone count they hardly do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Any, Protocol

from forerun.cost import Table
from forerun.errors import DrafterError
from forerun.nn.save import is_readable
from forerun.nn.transformer import TransformerConfig
from forerun.plan.acceptance import CERTAIN, Acceptance, Given
from forerun.train.pruning.shape import Shape

LONGEST = 16
"""Tokens of a draft at most."""
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24)
EIGHTHS = (2, 3, 4, 5, 6, 8)
"""Widths that are tried, in eighths of the target's."""
MULTIPLE = 64
"""Of which widths are multiples where the target is wide enough."""
DOUBT_RATE, DOUBT_STEP = 0.05, 0.2
"""How far rates and draft steps may be off: so much, and this share."""


class Latency(Protocol):
    """What drafting and verifying take here, in seconds."""

    @property
    def overhead(self) -> float:
        """Of a proposal, beside its steps."""

    def step(self, config: TransformerConfig) -> float:
        """One draft step of such a model. DrafterError for a shape of which nothing is known."""

    def head(self, config: TransformerConfig) -> float:
        """The part of it that the vocabulary takes."""

    def verify(self, tokens: int) -> float:
        """A step of the target that reads so many tokens."""


LayerKind = tuple[int, int, int, int]
"""Width, units, heads, key heads."""


def kind_of(config: TransformerConfig) -> LayerKind:
    return config.width, config.mlp_width, config.heads, config.kv_heads


@dataclass(frozen=True)
class Measured:
    """Costs of this machine or another. layers: by kind, the fixed part of a draft step without a vocabulary and that
    of every layer. heads: by width. verifying: (tokens, seconds). about: the machine, and how it was measured."""

    layers: Mapping[LayerKind, tuple[float, float]]
    heads: Mapping[int, float]
    verifying: Sequence[tuple[int, float]]
    overhead: float = 0.0
    about: Mapping[str, Any] = field(default_factory=dict)

    def step(self, config: TransformerConfig) -> float:
        kind = kind_of(config)
        if kind not in self.layers or config.width not in self.heads:
            raise DrafterError(
                f"these costs know no layers of the shape {'x'.join(map(str, kind))}: measure this target and these"
                " drafts anew"
            )
        fixed, each = self.layers[kind]
        return fixed + config.layers * each + self.head(config)

    def head(self, config: TransformerConfig) -> float:
        return self.heads[config.width]

    @cached_property
    def _table(self) -> Table:
        return Table(self.verifying)

    def verify(self, tokens: int) -> float:
        return self._table(tokens)

    def times(self, factor: float) -> Measured:
        """Where everything takes so many times as long."""
        return Measured(
            {kind: (fixed * factor, each * factor) for kind, (fixed, each) in self.layers.items()},
            {width: seconds * factor for width, seconds in self.heads.items()},
            [(tokens, seconds * factor) for tokens, seconds in self.verifying],
            self.overhead * factor,
            self.about,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON, whose keys are strings."""
        return {
            "forerun": "draft costs",
            "layers": {"x".join(map(str, kind)): list(costs) for kind, costs in self.layers.items()},
            "heads": {str(width): seconds for width, seconds in self.heads.items()},
            "verifying": [list(point) for point in self.verifying],
            "overhead": self.overhead,
            "about": dict(self.about),
        }

    @staticmethod
    def of(fields: Mapping[str, Any]) -> Measured:
        """DrafterError for what `as_dict` has not made."""
        try:
            kinds = {_kind(name): (float(fixed), float(each)) for name, (fixed, each) in fields["layers"].items()}
            heads = {int(width): float(seconds) for width, seconds in fields["heads"].items()}
            verifying = [(int(tokens), float(seconds)) for tokens, seconds in fields["verifying"]]
            found = Measured(kinds, heads, verifying, float(fields["overhead"]), fields["about"])
            found._demand_sense()
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DrafterError(f"these are no costs of draft models ({error!r}): measure them anew") from None

    def _demand_sense(self) -> None:
        """ValueError unless everything takes some time."""
        takes_time = [*(fixed + each for fixed, each in self.layers.values()), *(one for _, one in self.verifying)]
        parts = [*(part for costs in self.layers.values() for part in costs), *self.heads.values(), self.overhead]
        if not self.verifying or not all(0 < one < inf for one in takes_time) or not all(one >= 0 for one in parts):
            raise ValueError("seconds are numbers above 0")


def _kind(written: str) -> LayerKind:
    width, units, heads, kv_heads = map(int, written.split("x"))
    return width, units, heads, kv_heads


def line(points: Mapping[int, float]) -> tuple[float, float]:
    """Fixed seconds and seconds per layer, from the seconds of stacks of several depths (least squares)."""
    depths, seconds = list(points), list(points.values())
    middle, mean = sum(depths) / len(depths), sum(seconds) / len(seconds)
    spread = sum((depth - middle) ** 2 for depth in depths)
    if not spread:
        raise DrafterError(f"stacks of {depths} layers do not tell what a layer costs: time two different depths")
    each = sum((depth - middle) * (second - mean) for depth, second in points.items()) / spread
    return mean - middle * each, each


@dataclass(frozen=True)
class Bandwidth:
    """Costs of a machine that nobody has measured: weights are read once a step, at so many bytes per second, and every
    layer costs some seconds to start."""

    bytes_per_second: float
    layer_seconds: float
    fixed_seconds: float
    verifying: Sequence[tuple[int, float]]
    bytes_per_weight: float = 2.0
    overhead: float = 0.0

    def step(self, config: TransformerConfig) -> float:
        layer = self.layer_seconds + config.layer_parameters * self.bytes_per_weight / self.bytes_per_second
        return self.fixed_seconds + config.layers * layer + self.head(config)

    def head(self, config: TransformerConfig) -> float:
        return config.vocab_size * config.width * self.bytes_per_weight / self.bytes_per_second

    @cached_property
    def _table(self) -> Table:
        return Table(self.verifying)

    def verify(self, tokens: int) -> float:
        return self._table(tokens)


# ---- one draft model


@dataclass(frozen=True)
class Pace:
    """How far a draft model runs ahead, and what comes of it: tokens per step, and per second."""

    length: int
    tokens: float
    throughput: float


def pace(accepted: Acceptance, step: float, latency: Latency, length: int) -> Pace:
    """With drafts of so many tokens; 0 is plain decoding."""
    if not length:
        return Pace(0, 1.0, 1 / latency.verify(1))
    tokens = accepted.tokens(length)
    seconds = length * step + latency.verify(length + 1) + latency.overhead
    return Pace(length, tokens, tokens / seconds)


def best_pace(accepted: Acceptance, step: float, latency: Latency, longest: int = LONGEST) -> Pace:
    """The fastest, of equally fast ones the shortest. All are tried: measured curves have more than one hill."""
    return max((pace(accepted, step, latency, length) for length in range(longest + 1)), key=lambda p: p.throughput)


def break_even_ratio(length: int, step_a: float, step_b: float, verify: float) -> float:
    """Of the tokens per step of A, the share that B needs to be as fast, both with drafts of so many tokens."""
    return (length * step_b + verify) / (length * step_a + verify)


def break_even_rate(throughput: float, step: float, latency: Latency, longest: int = LONGEST) -> float | None:
    """The rate from which on drafts of a model with such a step reach so many tokens per second; None: from none on."""

    def reaches(rate: float) -> bool:
        accepted, lengths = Given((rate,)), range(1, longest + 1)
        return any(pace(accepted, step, latency, length).throughput >= throughput for length in lengths)

    if not reaches(CERTAIN):
        return None
    low, high = 0.0, CERTAIN
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


# ---- many


@dataclass(frozen=True)
class Constraints:
    """parameters: at most so many in all; memory: bytes, cache for `rows` rows of `context` tokens included;
    step_seconds: of a draft step. tied: the embedding is the head, even if the target's is not."""

    parameters: float = inf
    memory: float = inf
    step_seconds: float = inf
    context: int = 2048
    rows: int = 1
    bytes_per_weight: int = 2
    tied: bool = False

    def memory_of(self, config: TransformerConfig) -> int:
        entries = 2 * config.layers * config.kv_heads * config.head_dim * self.context * self.rows
        return (config.parameters + entries) * self.bytes_per_weight


@dataclass(frozen=True)
class DraftPlan:
    """A draft model that might be trained. shape: as `forerun train small --shape` takes it. rate_needed: from which
    on it is as fast as what it is to beat; None if it never is. worst_speedup: over plain decoding, if its rate and its
    step are as bad as may be. is_stable: its rank stays when all rates or all steps are off alike."""

    shape: str
    parameters: int
    parameters_outside_vocabulary: int
    memory: int
    step_seconds: float
    head_share: float
    length: int
    tokens_per_step: float
    throughput: float
    speedup: float
    draft_share: float
    rate: float
    rate_needed: float | None
    worst_speedup: float
    is_stable: bool
    is_pareto: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Design:
    """Plans, the fastest first. None of them may be worth it: then `best` is None."""

    plans: tuple[DraftPlan, ...]
    plain_throughput: float

    @property
    def best(self) -> DraftPlan | None:
        return next((plan for plan in self.plans if plan.speedup > 1), None)

    def as_dict(self) -> dict[str, Any]:
        best = self.best
        return {
            "forerun": "design",
            "plain_tokens_per_second": self.plain_throughput,
            "best": best.shape if best else None,
            "plans": [asdict(plan) for plan in self.plans],
        }


Believed = Callable[[TransformerConfig], Acceptance]
"""What a draft model of such a shape would bring."""


def configs(target: TransformerConfig, tied: bool = False) -> list[TransformerConfig]:
    """Shapes worth a look: depths, widths, heads as the target's or in proportion to the width, and three sizes of the
    perceptron. With the target's heads and perceptron they are the paper's family."""
    found = dict[str, TransformerConfig]()
    for depth in (one for one in DEPTHS if one <= target.layers):
        for width in widths(target):
            for heads, kv_heads in _heads(target, width):
                for units in _units(target, width):
                    shape = Shape(depth, width, units, heads, kv_heads)
                    found[str(shape)] = replace(shape.within(target), windows=(), tied=tied or target.tied)
    return list(found.values())


def distinct(shapes: Iterable[TransformerConfig]) -> list[TransformerConfig]:
    """Each shape once, as the first that has it."""
    found = dict[str, TransformerConfig]()
    for one in shapes:
        found.setdefault(str(Shape.of(one)), one)
    return list(found.values())


def widths(target: TransformerConfig) -> list[int]:
    return sorted({_rounded(target.width * eighths / 8, target.width) for eighths in EIGHTHS})


def _heads(target: TransformerConfig, width: int) -> set[tuple[int, int]]:
    group = target.heads // target.kv_heads
    few = max(1, round(target.kv_heads * width / target.width))
    wanted = {(target.heads, target.kv_heads), (few * group, few)}
    bare = replace(target, width=width, windows=())
    return {(heads, keys) for heads, keys in wanted if is_readable(replace(bare, heads=heads, kv_heads=keys))}


def _units(target: TransformerConfig, width: int) -> set[int]:
    wanted = target.mlp_width, target.mlp_width * width / target.width, 8 * width / 3
    return {_rounded(min(units, target.mlp_width), target.mlp_width) for units in wanted}


def _rounded(size: float, most: int) -> int:
    return min(most, max(MULTIPLE, round(size / MULTIPLE) * MULTIPLE))


def design(
    target: TransformerConfig,
    latency: Latency,
    believed: Believed,
    constraints: Constraints = Constraints(),
    shapes: Iterable[TransformerConfig] | None = None,
    incumbent: float | None = None,
) -> Design:
    """Every shape that keeps to the constraints and is not beaten by another in both its step and its rate, ranked by
    tokens per second. incumbent: tokens per second of what is to be beaten (None: of plain decoding)."""
    plain = 1 / latency.verify(1)
    tried = configs(target, constraints.tied) if shapes is None else shapes
    candidates = [_Candidate(one, latency.step(one), believed(one)) for one in tried if _fits(one, constraints)]
    candidates = _undominated([one for one in candidates if one.step <= constraints.step_seconds])
    order = _ranked(candidates, latency)
    doubts = [
        _ranked([one.doubted(rate, share) for one in candidates], latency)
        for rate in (-DOUBT_RATE, DOUBT_RATE)
        for share in (1 - DOUBT_STEP, 1 + DOUBT_STEP)
    ]
    ranks = [{place: rank for rank, place in enumerate(each)} for each in (order, *doubts)]
    made = []
    for place in order:
        is_stable = len({rank[place] for rank in ranks}) == 1
        made.append(_planned(candidates[place], latency, constraints, incumbent or plain, is_stable))
    return Design(tuple(_marked(made)), plain)


@dataclass(frozen=True)
class _Candidate:
    config: TransformerConfig
    step: float
    accepted: Acceptance

    def doubted(self, rate: float, share: float) -> _Candidate:
        return _Candidate(self.config, self.step * share, self.accepted.shifted(rate))


def _fits(config: TransformerConfig, constraints: Constraints) -> bool:
    return config.parameters <= constraints.parameters and constraints.memory_of(config) <= constraints.memory


def _undominated(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Of models with the same step and rate the smallest."""
    order = sorted(candidates, key=lambda one: (one.step, -one.accepted.rate, one.config.parameters))
    found, best = list[_Candidate](), -1.0
    for one in order:
        if one.accepted.rate > best:
            found.append(one)
            best = one.accepted.rate
    return found


def _ranked(candidates: Sequence[_Candidate], latency: Latency) -> list[int]:
    speeds = [best_pace(one.accepted, one.step, latency).throughput for one in candidates]
    return sorted(range(len(candidates)), key=lambda place: -speeds[place])


def _planned(
    one: _Candidate, latency: Latency, constraints: Constraints, incumbent: float, is_stable: bool
) -> DraftPlan:
    config, plain = one.config, 1 / latency.verify(1)
    found = best_pace(one.accepted, one.step, latency)
    worst = one.doubted(-DOUBT_RATE, 1 + DOUBT_STEP)
    head = latency.head(config)
    return DraftPlan(
        shape=str(Shape.of(config)),
        parameters=config.parameters,
        parameters_outside_vocabulary=config.parameters_outside_vocabulary,
        memory=constraints.memory_of(config),
        step_seconds=one.step,
        head_share=head / one.step,
        length=found.length,
        tokens_per_step=found.tokens,
        throughput=found.throughput,
        speedup=found.throughput / plain,
        draft_share=found.length * one.step * found.throughput / found.tokens,
        rate=one.accepted.rate,
        rate_needed=break_even_rate(incumbent, one.step, latency),
        worst_speedup=pace(worst.accepted, worst.step, latency, found.length).throughput / plain,
        is_stable=is_stable,
        is_pareto=False,
        notes=tuple(_notes(config, head / one.step)),
    )


def _notes(config: TransformerConfig, head_share: float) -> Iterable[str]:
    vocabulary = config.vocab_size * config.width
    if head_share > 0.5:
        yield f"the vocabulary takes {head_share:.0%} of a draft step: frequent tokens alone would draft faster"
    if not config.tied and vocabulary > config.parameters / 4:
        yield f"with the head for its embedding, too, it would have {vocabulary / 1e6:.1f} M parameters less (--tied)"


def _marked(plans: Sequence[DraftPlan]) -> list[DraftPlan]:
    """Those that no other one beats in both throughput and parameters."""
    found, fewest = list[DraftPlan](), inf
    for plan in plans:  # the fastest first
        found.append(replace(plan, is_pareto=plan.parameters < fewest))
        fewest = min(fewest, plan.parameters)
    return found
