"""What there is to choose from: drafters at hand, their variations, and what can be made of several.

A method states what is worth varying in it (`Method.variations`). Static trees are counted on the
answers (`plan.calibrate`). Of stores, heads and models come: a store in front of each, models over a
store, CS Drafting's cascade, and of several models the hierarchy whose sizes a polynomial program
finds (`plan.selection`). All of them are only looked at here; what they are worth is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from forerun.cost import Table
from forerun.drafters.auto import STORES, beside
from forerun.drafting.registry import method
from forerun.drafting.spec import describe
from forerun.engine.engine import Engine
from forerun.errors import DrafterError
from forerun.nn.network import Network
from forerun.plan import calibrate, measure
from forerun.plan.measure import Transcript
from forerun.plan.selection import Family, Plan, best, lower_bound, polished
from forerun.sampling import SamplingParams
from forerun.train.answers import Answers
from forerun.train.distill import Sample
from forerun.train.ranks import ranks_of
from forerun.train.teacher import Teacher

Description = dict[str, Any]
PLAIN: Description = {"drafter": "none"}
SIZES = (4, 8, 16, 32)
"""Nodes of the static trees that are looked at."""
BEFORE = 64
"""Tokens of a prompt that its answer's paths are counted behind: more would take longer to read, and say the same."""
MOST = 12
"""Tokens that a level of a hierarchy may gather."""
IN_FRONT = {"small": ({"length": 3}, {"tree": {"width": 3, "depth": 4, "nodes": 8}})}
"""The variations that are tried behind a store, where all would be too many."""


@dataclass(frozen=True)
class Candidate:
    """A drafter that may be chosen. family: candidates of one are variations of each other."""

    name: str
    description: Description
    family: str

    @staticmethod
    def of(description: Mapping[str, Any], family: str = "") -> Candidate:
        name = named(description)
        return Candidate(name, dict(description), family or name)


def named(description: Mapping[str, Any]) -> str:
    """A description in a line for the eye; `spec.describe` reads most of them."""
    rest = dict(description)
    kind = str(rest.pop("drafter"))
    if kind == "fallback":
        sources = " | ".join(named(describe(one)) for one in rest.pop("sources"))
        return sources + _settings(rest)
    checkpoint, inner = rest.pop("checkpoint", None), rest.pop("inner", None)
    name = kind + (f":{Path(checkpoint).name or checkpoint}" if checkpoint else "")
    if inner is not None:
        name += f"({named(describe(inner))})"
    return name + _settings(rest)


def _settings(rest: Mapping[str, Any]) -> str:
    """What differs from the method's own, in few words."""
    words = []
    for key, value in rest.items():
        if key == "tree" and isinstance(value, Sequence) and not isinstance(value, str):
            words.append(f"tree {len(value)}")
        elif key == "models":
            words.append(f"models {'+'.join(Path(one).name for one in value)}")
        elif isinstance(value, Mapping):
            words.append(f"{key} {' '.join(str(one) for one in value.values())}")
        else:
            words.append(f"{key} {value}")
    return "".join(f" {word}" for word in words)


@dataclass(frozen=True)
class AtHand:
    """Descriptions without variations: stores, trained heads, draft models from the smallest, and whatever else was
    named."""

    stores: tuple[Description, ...] = ()
    heads: tuple[Description, ...] = ()
    models: tuple[Description, ...] = ()
    others: tuple[Description, ...] = ()

    @staticmethod
    def of(specs: Iterable[str | Mapping[str, Any]]) -> AtHand:
        """What the user has named. DrafterError for what is no drafter, or is nothing to choose from."""
        found: dict[str, list[Description]] = {"stores": [], "heads": [], "models": [], "others": []}
        for spec in specs:
            description = describe(spec)
            one = method(description["drafter"])
            if one.name in ("auto", "switch"):
                raise DrafterError(f"{one.name} chooses while it runs: name the drafters that it may choose from")
            if one.grows != "nothing":
                found[_kind(one.name, one.trained is not None, one.grows)].append(description)
        return AtHand(**{name: tuple(each) for name, each in found.items()})

    @staticmethod
    def beside(home: Path | None) -> AtHand:
        """Everything that lies beside a target, and the stores."""
        heads, models = beside(home) if home is not None else ([], [])
        return AtHand((STORES,), tuple(heads), tuple(models))

    @property
    def everything(self) -> tuple[Description, ...]:
        return (*self.stores, *self.heads, *self.models, *self.others)

    def __add__(self, other: AtHand) -> AtHand:
        def both(name: str) -> tuple[Description, ...]:
            mine, theirs = getattr(self, name), getattr(other, name)
            return (*mine, *(one for one in theirs if one not in mine))

        return AtHand(both("stores"), both("heads"), both("models"), both("others"))

    def where(self, holds: Callable[[Description], bool]) -> AtHand:
        kinds = (self.stores, self.heads, self.models, self.others)
        return AtHand(*(tuple(one for one in each if holds(one)) for each in kinds))

    def compositions(self) -> list[Candidate]:
        """A store in front of heads and models; models over a store; a model's cascade."""
        found = []
        for store in self.stores:
            for one in (*self.heads, *self.models):
                both = ({"drafter": "fallback", "sources": [store, each]} for each in _in_front(one))
                found += [Candidate.of(each, f"| {named(one)}") for each in both]
        for model in self.models:
            for store in self.stores:
                over = {"drafter": "verified", "checkpoint": model["checkpoint"], "inner": store}
                found += _varied(over)
            found.append(Candidate.of({"drafter": "cascade", "models": [model["checkpoint"]]}))
        return found

    def variations(self) -> list[Candidate]:
        return [one for each in self.everything for one in _varied(each)]


def _kind(name: str, is_trained: bool, grows: str) -> str:
    if is_trained:
        return "heads"
    return "models" if name == "small" else "stores" if grows == "certain" else "others"


def _varied(description: Mapping[str, Any]) -> list[Candidate]:
    return [Candidate.of(one, named(description)) for one in method(description["drafter"]).varied(description)]


def _in_front(description: Mapping[str, Any]) -> list[Description]:
    some = IN_FRONT.get(description["drafter"], ())
    is_settled = any(name in description for each in some for name in each)
    return [{**description, **each} for each in some] if some and not is_settled else [dict(description)]


def in_turn(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Each once; the first of every family, then the second of each, and so on: whoever has to stop looking has seen
    all kinds."""
    families: dict[str, dict[str, Candidate]] = {}
    for one in candidates:
        families.setdefault(one.family, {}).setdefault(one.name, one)
    layers = zip_longest(*(list(each.values()) for each in families.values()))
    seen = {one.name: one for one in chain.from_iterable(layers) if one is not None}
    return list(seen.values())


# ---- trees of heads


def static_trees(
    teacher: Teacher, description: Mapping[str, Any], texts: Sequence[Transcript], temperature: float
) -> list[Candidate]:
    """Heads with the trees that every second answer follows most often. None for heads that grow no static tree, or
    whose tree is settled."""
    if method(description["drafter"]).grows != "ranks" or "tree" in description:
        return []
    network = teacher.network
    module = calibrate.module_of(description["checkpoint"]).to(network.device, network.dtype)
    samples = [
        Sample(tuple(text.prompt), text.tokens[text.prompt_length :], temperature)
        for text in texts[::2]
        if text.answer_length > 1
    ]
    if not samples:
        return []
    longest = max(len(sample.answer) for sample in samples) + BEFORE
    cut = Answers(samples, rows=4, length=min(longest, network.max_length), holdout=len(samples) + 1)
    trees = calibrate.trees_from(ranks_of(module, teacher, samples, cut), SIZES)
    return [
        Candidate.of({**description, "tree": [list(path) for path in tree.paths]}, named(description)) for tree in trees
    ]


# ---- hierarchies of models


@dataclass(frozen=True)
class Hierarchy:
    """The best hierarchy of models under the planner's formulas. bound: seconds per token that no sizes and no choice
    of these models can beat, as far as acceptance is independent of level and place."""

    plan: Plan
    bound: float
    candidate: Candidate | None


def hierarchy_of(
    engine: Engine, models: Mapping[str, Network], texts: Sequence[Transcript], params: SamplingParams
) -> Hierarchy:
    """models: networks by checkpoint, the cheapest first, two or more. Costs are measured for one row."""
    names, target = list(models), engine.target.network
    networks = [*models.values(), target]
    agreed = measure.agreement(networks, texts, params)
    text = min(texts, key=lambda one: len(one.tokens))
    costs = [_cost(network, text, params, target) for network in models.values()]
    points = measure.step_costs(engine, [[text]], params)
    plain = Table([(point.nodes, point.seconds) for point in points])
    rates = tuple(tuple(float(rate) for rate in row) for row in agreed.rates)
    family = Family((*costs, plain), rates)
    found = polished(family, best(family, MOST), MOST)
    candidate = None
    if len(found.drafters) > 1:
        low, *above = [(names[model], size) for model, size in zip(found.drafters, found.sizes, strict=True)]
        made: Description = {"drafter": "small", "checkpoint": low[0], "length": low[1]}
        for checkpoint, size in above:
            made = {"drafter": "verified", "checkpoint": checkpoint, "inner": made, "length": size}
        candidate = Candidate.of(made)
    return Hierarchy(found, lower_bound(family, MOST), candidate)


def _cost(network: Network, text: Transcript, params: SamplingParams, target: Network) -> Table:
    """A forward's; at one token the cheaper of verifying nothing and writing one of several."""
    points = dict(measure.verifier_cost(network, text, params, target).points)
    points[1] = min(points[1], measure.writer_cost(network, text, params, target)(5) / 5)
    return Table(sorted((int(tokens), seconds) for tokens, seconds in points.items()))
