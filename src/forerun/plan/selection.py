"""Choosing a hierarchy: which of the models at hand draft, and how many tokens each gathers.

`best` is optimal for `fixed_block` in time O(M^2 T^2), M models and T the most tokens a level may
gather; `polished` then fits the sizes to `at_least`, which is what runs; `lower_bound` says what no
hierarchy that runs so can beat. A caller who prints [lower_bound, polished, best] says all that is
known before measuring.

As a generalized shortest path, which is how the paper (arXiv 2510.19705) solves it: the nodes are
(model i, T tokens) and the target. An edge from (i, T) down to (j, S) costs r c_i and has the gain
r = r(a_ji, S, T), for one call above makes r calls below; at any node (i, T) a path may end at the
cost T c_i, the model writing for itself. A path costs the sum of its edges, each times the gains
above it, which is the latency unrolled:

    n(a_K, T_(K-1)) * latency = c_K + sum over i of c_i R_i ... R_(K-1) + T_0 c_0 R_1 ... R_(K-1)

with R_i = r(a_i, T_(i-1), T_i). Models are ordered, so the graph has no cycles and one sweep from below solves it.
Reconstruction throughout: of the paper we know that such an algorithm exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import numpy as np

from forerun.cost import Cost, Floats, Price, cost_of
from forerun.errors import DrafterError
from forerun.plan.hierarchy import (
    Autoregressive,
    Chain,
    Draft,
    Round,
    Verifier,
    at_least,
    expected_tokens,
    renewals,
    rounds_up_to,
    verified,
)


@dataclass(frozen=True)
class Start:
    """A way to begin at a model that is not another model's writing: a round of this model over
    what a store proposes, computed (`verified`) or measured."""

    model: int
    round: Round
    name: str = ""


@dataclass(frozen=True)
class Family:
    """The models at hand, by number, the cheapest first and the target last; only earlier ones draft for later ones.

    costs: of a forward of each. rates[j][i]: how often model i accepts a token of model j, for j <
    i; nothing else is read. starts: the ways to begin without a model. To forbid a pair, give it
    the rate 0.
    """

    costs: tuple[Price, ...]
    rates: tuple[tuple[float, ...], ...]
    starts: tuple[Start, ...] = ()

    def __post_init__(self) -> None:
        size = len(self.costs)
        if not size or len(self.rates) < size - 1 or any(len(row) < size for row in self.rates[: size - 1]):
            raise DrafterError(f"the acceptance rates of {size} models are a table of {size} by {size}")
        for low, high in combinations(range(size), 2):
            if not 0 <= self.rates[low][high] <= 1:
                raise DrafterError(
                    f"model {high} accepts {self.rates[low][high]} of model {low}: give a rate from 0 to 1"
                )
        for price in self.costs:
            if not cost_of(price)(1) >= 0:
                raise DrafterError(f"a forward costs {cost_of(price)(1)} seconds: give 0 or more")
        for start in self.starts:
            if not 0 <= start.model < size:
                raise DrafterError(f"the start {start.name} begins at model {start.model}, and there are {size} models")

    @property
    def target(self) -> int:
        return len(self.costs) - 1

    def cost(self, model: int) -> Cost:
        return cost_of(self.costs[model])

    def starts_at(self, model: int) -> tuple[Start, ...]:
        return tuple(start for start in self.starts if start.model == model)


@dataclass(frozen=True)
class Plan:
    """A hierarchy out of a family. drafters: the models below the target, from below; sizes: how
    many tokens each gathers; start: what is below the lowest model, which is the target where there
    are no drafters; latency: seconds per token. With neither drafters nor a start, the advice is
    not to speculate."""

    drafters: tuple[int, ...]
    sizes: tuple[int, ...]
    latency: float
    start: Start | None = None

    @property
    def speculates(self) -> bool:
        return bool(self.drafters) or self.start is not None

    def chain(self, family: Family) -> Chain:
        models = (*self.drafters, family.target)
        verifiers = tuple(Verifier(family.costs[high], family.rates[low][high]) for low, high in pairwise(models))
        return Chain(self.start.round if self.start else Autoregressive(family.costs[models[0]]), verifiers)


@dataclass(frozen=True)
class _Way:
    """How tokens of a model are had for so many seconds: from `below` (a model and how many tokens
    it gathers), from a start, or, with neither, by the model writing alone."""

    seconds: float
    below: tuple[int, int] | None = None
    start: Start | None = None


_Ways = dict[int, list[_Way]]
"""By model: the cheapest way to T = 0, 1, ... tokens of it."""


def best(family: Family, most: int, drafters: Sequence[int] | None = None) -> Plan:
    """The fastest plan under `fixed_block` with at most so many tokens per level. drafters: the
    models that may be used.

        best(i, T) = min of T c_i and, over j < i and S, of r(a_ji, S, T) (c_i + best(j, S))
        latency    = min of c_K   and, over j < K and S, of (c_K + best(j, S)) / n(a_jK, S)

    The latency grows with best(j, S) whatever is above, so the best hierarchy is made of best ones.
    Costs that depend on the length change nothing: a forward's cost is a function of (i, S). Equal
    latencies: the shorter hierarchy.
    """
    if most < 1:
        raise DrafterError(f"at most {most} tokens per level leave nothing to choose: allow 1 or more")
    ways: _Ways = {}
    for model in sorted(range(family.target) if drafters is None else drafters):
        ways[model] = _ways(family, model, ways, most)
    return _traced(_target_way(family, ways, most), ways)


def _ways(family: Family, model: int, below: _Ways, most: int) -> list[_Way]:
    cost = family.cost(model)
    ways = [_Way(tokens * cost(1)) for tokens in range(most + 1)]
    for start in family.starts_at(model):
        rounds = np.append(0.0, renewals(start.round.yields, most).cumsum())
        _improve(ways, rounds * start.round.seconds, _Way(0.0, start=start))
    for lower, cheapest in below.items():
        for drafts in range(1, most + 1):
            rounds = rounds_up_to(family.rates[lower][model], drafts, most)
            _improve(ways, rounds * (cost(drafts + 1) + cheapest[drafts].seconds), _Way(0.0, below=(lower, drafts)))
    return ways


def _improve(ways: list[_Way], seconds: Floats, way: _Way) -> None:
    for tokens, each in enumerate(seconds.tolist()):
        if each < ways[tokens].seconds:
            ways[tokens] = replace(way, seconds=each)


def _target_way(family: Family, ways: _Ways, most: int) -> _Way:
    """Per token, unlike the ways below the target: an outer round is one forward of the target."""
    target, cost = family.target, family.cost(family.target)
    choices = [_Way(cost(1))]
    choices += [_Way(start.round.latency, start=start) for start in family.starts_at(target)]
    for lower, cheapest in ways.items():
        for drafts in range(1, most + 1):
            tokens = expected_tokens(family.rates[lower][target], drafts)
            choices.append(_Way((cost(drafts + 1) + cheapest[drafts].seconds) / tokens, below=(lower, drafts)))
    return min(choices, key=lambda way: way.seconds)


def _traced(way: _Way, ways: _Ways) -> Plan:
    latency, downwards = way.seconds, []
    while way.below:
        downwards.append(way.below)
        model, tokens = way.below
        way = ways[model][tokens]
    upwards = downwards[::-1]
    return Plan(tuple(m for m, _ in upwards), tuple(size for _, size in upwards), latency, way.start)


def polished(family: Family, plan: Plan, most: int) -> Plan:
    """The same models, with sizes that are best one at a time under `at_least`; its latency is the one of `at_least`.

    Coordinate descent: no polynomial algorithm for the best sizes under `at_least` is known to us,
    as the cost of a level depends on the whole distribution of the lengths below. It may end beside
    the best sizes, by some tenths of a percent where we compared."""
    chain = plan.chain(family)

    def latency(sizes: tuple[int, ...]) -> float:
        return at_least(chain, sizes).latency

    sizes, now = plan.sizes, latency(plan.sizes)
    while True:
        before = now
        for place in range(len(sizes)):
            tried = (sizes, *((*sizes[:place], size, *sizes[place + 1 :]) for size in range(1, most + 1)))
            now, sizes = min(((latency(one), one) for one in tried), key=lambda pair: pair[0])
        if now >= before:
            return replace(plan, sizes=sizes, latency=now)


def cheapest_token(cost: Cost, rate: float, below: float, longest: int) -> float:
    """min over S in 1 .. longest of (c(S + 1) + S f) / n(a, S): seconds per token where drafted
    tokens are sold singly, for f seconds each, `below`.

    No distribution of lengths does better: by Wald's identity `at_least` has (E c(X + 1) + E X f) /
    E n(a, X), a ratio of two means, and that is never below the smallest ratio. So it holds for
    costs of any shape. The paper's reconstruction allows fractional lengths (the fluid bound),
    which is a little lower and needs convex costs.
    """
    return min((cost(drafts + 1) + drafts * below) / expected_tokens(rate, drafts) for drafts in range(1, longest + 1))


def chain_bound(chain: Chain, longest: int) -> float:
    """A latency that no sizes of this chain can beat, under `at_least` or `fixed_block`, while no
    draft is longer than this."""
    level, verifiers = chain.bottom, chain.verifiers
    if isinstance(level, Draft):
        level, verifiers = verified(level, verifiers[0]), verifiers[1:]
    below = cost_of(level.cost)(1) if isinstance(level, Autoregressive) else level.latency
    for verifier in verifiers:
        below = cheapest_token(cost_of(verifier.cost), verifier.rate, below, longest)
    return below


def lower_bounds(family: Family, most: int, drafters: Sequence[int] | None = None) -> dict[int, float]:
    """By model: seconds per token of it that no hierarchy with at most so many tokens per level can beat."""
    longest = longest_draft(family, most)
    bounds: dict[int, float] = {}
    for model in [*sorted(range(family.target) if drafters is None else drafters), family.target]:
        cost = family.cost(model)
        starts = [start.round.latency for start in family.starts_at(model)]
        edges = [cheapest_token(cost, family.rates[lower][model], each, longest) for lower, each in bounds.items()]
        bounds[model] = min([cost(1), *starts, *edges])
    return bounds


def lower_bound(family: Family, most: int, drafters: Sequence[int] | None = None) -> float:
    """The target's: what `at_least` cannot beat with any models and sizes of the family."""
    return lower_bounds(family, most, drafters)[family.target]


def longest_draft(family: Family, most: int) -> int:
    """What `at_least` can hand up at most: every level adds its size to what is below."""
    return most * len(family.costs) + max((len(start.round.yields) for start in family.starts), default=0)


def best_within(family: Family, most: int, memory: Sequence[int], budget: int) -> Plan:
    """The fastest plan whose models fit together. memory: bytes of each model, its weights and
    cache; budget: of the device.

    Tries every largest set of drafters that fits, which is exponential in the number of models; families are small.
    """
    room = budget - memory[family.target]
    if room < 0:
        raise DrafterError(f"the target needs {memory[family.target]} bytes and the device has {budget}")
    return min((best(family, most, drafters) for drafters in fitting(memory[:-1], room)), key=lambda plan: plan.latency)


def fitting(memory: Sequence[int], room: int) -> Iterator[tuple[int, ...]]:
    """The largest sets that fit: those to which nothing can be added."""
    kept: list[set[int]] = []
    for size in range(len(memory), -1, -1):
        for chosen in combinations(range(len(memory)), size):
            if sum(memory[one] for one in chosen) <= room and not any(set(chosen) <= more for more in kept):
                kept.append(set(chosen))
                yield chosen


@dataclass(frozen=True)
class Detour:
    """Rates that no models can have: these two are further apart than it is `via` a third, by so much."""

    low: int
    high: int
    via: int
    excess: float


def detours(family: Family, tolerance: float) -> tuple[Detour, ...]:
    """Where 1 - rate breaks the triangle inequality by more than the tolerance.

    1 - rate is the mean total variation, and with greedy models the share of places where they
    differ; both are distances, so rates measured on the same contexts break it by sampling error
    only. More says that they were measured on different ones. Bound the error of the three rates
    together, three standard errors each, to find the tolerance."""
    found = []
    for models in combinations(range(len(family.costs)), 3):
        apart = {pair: 1 - family.rates[pair[0]][pair[1]] for pair in combinations(models, 2)}
        for (low, high), distance in apart.items():
            excess = distance - (sum(apart.values()) - distance)
            if excess > tolerance:
                (via,) = set(models) - {low, high}
                found.append(Detour(low, high, via, excess))
    return tuple(found)


def useless_edges(family: Family, most: int) -> tuple[tuple[int, int], ...]:
    """Pairs (drafter, verifier) where a drafted token cannot be had cheaper than the verifier
    writes one, so that drafting cannot help even if all is accepted. Assumes that a longer forward
    is never cheaper."""
    bounds = lower_bounds(family, most)
    pairs = combinations(range(len(family.costs)), 2)
    return tuple((low, high) for low, high in pairs if bounds[low] >= family.cost(high)(1))
