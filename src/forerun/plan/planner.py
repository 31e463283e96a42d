"""From prompts to a plan: measure, search, predict, and measure what was predicted.

    answers      the target answers the prompts, once
    costs        its steps are timed, by rows, context and nodes
    race         every candidate is replayed on the answers; those that cannot win fall out
    measurement  the best three and plain decoding generate, taking turns

Predictions are the replays' (tokens over seconds of steps). A drafter that draws for rows that
sample cannot be replayed (`plan.replay`); it runs with the target from the beginning. "none" is
always a candidate, and is chosen where nothing was measured to be faster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import Any

from forerun.drafting.drafter import Drafter
from forerun.drafting.workshop import Workshop
from forerun.engine.engine import Engine
from forerun.engine.load import made_for
from forerun.errors import ForerunError, RequestError
from forerun.plan import measure
from forerun.plan.candidates import PLAIN, AtHand, Candidate, Hierarchy, hierarchy_of, in_turn, named, static_trees
from forerun.plan.costs import Costs
from forerun.plan.measure import LENGTHS, OF_STEPS, Timing, Transcript
from forerun.plan.replay import IsDrawnError, Live, Record, Replay, Spent
from forerun.plan.search import FEW, Worth, promising, race, ranked, survivors
from forerun.sampling import SamplingParams
from forerun.train.teacher import Teacher

log = logging.getLogger(__name__)

NONE = "none"
WIDER = (33, 65)
"""Nodes that are timed too where a candidate proposes as many."""
ROUNDS = 12
"""The most rounds of a measurement."""
TOP = 3
FEWEST = 2
"""Rounds of a measurement in any case."""
FAR = 1.25
"""By so much the longest text must be longer than the shortest prompt to be timed apart."""
SHARES = {"costs": 0.15, "race": 0.6}
"""Of the time; the rest is for measurements."""
NEAR = 0.5
"""Variations of a candidate are looked at if it is this fast, as a share of the fastest."""
ENTRANTS = 12
"""Candidates that are looked at for more rows, by what is known of them for fewer."""

Watch = Callable[[str], None]


@dataclass(frozen=True)
class Wishes:
    """batches: requests side by side, a plan for each; seconds: about what searching and measuring may take."""

    batches: Sequence[int] = (1, 8, 32)
    params: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=96))
    seconds: float = 120.0


@dataclass(frozen=True)
class Elsewhere:
    """Another machine: what its target's steps cost, and what candidates' proposals took there, by name and rows."""

    costs: Costs
    drafts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rank:
    """A candidate for so many rows. worth: as predicted, on all answers that it played. expected: the same on those
    that were measured; measured: tokens per second of every round, of none where it was not measured. is_live: it ran
    with the target, for it draws."""

    candidate: Candidate
    worth: Worth
    spent: tuple[Spent, ...]
    is_live: bool = False
    expected: float = 0.0
    measured: tuple[float, ...] = ()

    @property
    def speed(self) -> float:
        """Tokens per second, measured."""
        return median(self.measured)

    @property
    def off(self) -> float:
        """By which share the predicted tokens per second were too many, on the answers that were measured."""
        return self.expected / self.speed - 1

    def sum_of(self, name: str) -> float:
        return float(sum(getattr(one, name) for one in self.spent))

    def as_dict(self) -> dict[str, Any]:
        steps = max(1.0, self.sum_of("steps"))
        found: dict[str, Any] = {
            "name": self.candidate.name,
            "predicted": self.worth.tokens_per_second,
            "error": self.worth.error,
            "tokens_per_step": self.sum_of("tokens") / steps,
            "nodes_per_step": self.sum_of("nodes") / steps,
            "draft_share": self.sum_of("draft_seconds")
            / max(self.sum_of("draft_seconds") + self.sum_of("verify_seconds"), 1e-12),
            "answers": len(self.spent),
            "is_replayed": not self.is_live,
        }
        if self.measured:
            found |= {
                "expected": self.expected,
                "measured": self.speed,
                "slowest": min(self.measured),
                "fastest": max(self.measured),
                "rounds": len(self.measured),
                "off": self.off,
            }
        return found


@dataclass(frozen=True)
class Ranking:
    """All candidates for so many rows, those that were in the race to its end first, the fastest of them first. unseen:
    for which there was no time."""

    rows: int
    ranks: tuple[Rank, ...]
    unseen: tuple[str, ...] = ()

    @property
    def plain(self) -> Rank:
        return next(one for one in self.ranks if one.candidate.name == NONE)

    @property
    def measured(self) -> list[Rank]:
        return [one for one in self.ranks if one.measured]

    @property
    def winner(self) -> Rank:
        """The fastest measured; plain decoding unless something was faster in most rounds. Without measurements, as
        predicted."""
        if not self.measured:
            return self.ranks[0]
        plain = self.plain.measured
        faster = [one for one in self.measured if median(_ratios(one.measured, plain)) > 1]
        return max(faster, key=lambda one: median(_ratios(one.measured, plain)), default=self.plain)

    def over_plain(self, rank: Rank) -> float:
        if rank.measured and self.plain.measured:
            return median(_ratios(rank.measured, self.plain.measured))
        return rank.worth.tokens_per_second / self.plain.worth.tokens_per_second

    def off(self, rank: Rank) -> float:
        """By which share the predicted times plain were too many: what the whole machine was slower or faster is not in
        it."""
        return (1 + rank.off) / (1 + self.plain.off) - 1


def _ratios(own: Sequence[float], plain: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(own, plain, strict=True)]


@dataclass(frozen=True)
class Result:
    """A ranking for every number of rows, what the target's steps cost, and the formulas' hierarchy of models."""

    rankings: tuple[Ranking, ...]
    costs: Costs
    hierarchy: Hierarchy | None = None

    @property
    def drafts(self) -> dict[str, dict[str, float]]:
        """Seconds of a step's proposals, by candidate and rows."""
        found: dict[str, dict[str, float]] = {}
        for ranking in self.rankings:
            for one in ranking.ranks:
                seconds = one.sum_of("draft_seconds") * ranking.rows / max(1.0, one.sum_of("steps"))
                found.setdefault(one.candidate.name, {})[str(ranking.rows)] = seconds
        return found


class Planner:
    """An engine's target, its recorded answers and what its steps cost, for plans of several numbers of rows.

    workshop: what drafters are built with, for this target. elsewhere: plan for another machine; then
    nothing is measured but acceptance. watch: is told what comes next. costs: what steps cost, if that was
    measured before.
    """

    def __init__(
        self,
        engine: Engine,
        workshop: Workshop,
        wishes: Wishes,
        elsewhere: Elsewhere | None = None,
        watch: Watch = lambda said: None,
        costs: Costs | None = None,
    ):
        self.engine, self.workshop, self.wishes, self.elsewhere, self.watch = engine, workshop, wishes, elsewhere, watch
        self.record: Record
        self.costs: Costs
        self._known = elsewhere.costs if elsewhere else costs

    def build(self, description: Mapping[str, Any]) -> Drafter:
        return made_for(self.workshop, description)

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[Transcript]:
        """The target answers. RequestError where no answer has more than a token."""
        self.watch(f"answers to {len(prompts)} prompts")
        texts = measure.texts_of(self.engine, prompts, self.wishes.params)
        some = [text for text in texts if text.answer_length > 1]
        if not some:
            raise RequestError("the target has nothing to say to these prompts: give others, or more new tokens")
        self.record = Record(self.engine, some, self.wishes.params)
        return some

    def price(self, most: int) -> None:
        """Time the target's steps, of trees of up to so many nodes, unless it is known what they cost."""
        self.costs = self._known or self._timed(most)

    def _timed(self, most: int) -> Costs:
        self.watch("what steps cost")
        lengths = (*LENGTHS, *(wide for wide in WIDER if wide <= 2 * most))
        rows = sorted({1, *self.wishes.batches})
        contexts = self._contexts(lengths)
        groups = [[self._stretched(n, context) for n in range(count)] for count in rows for context in contexts]
        timing = replace(OF_STEPS, seconds=SHARES["costs"] * self.wishes.seconds, lengths=lengths)
        return Costs(tuple(measure.step_costs(self.engine, groups, self.wishes.params, timing)))

    def _contexts(self, lengths: tuple[int, ...]) -> list[int]:
        """The shortest and the longest that the answers' steps have, as far as there is room to time them."""
        room = self.engine.target.max_length - measure.moves(replace(OF_STEPS, lengths=lengths))
        texts = self.record.texts
        near = max(1, min(min(text.prompt_length for text in texts), room))
        far = max(1, min(max(len(text.tokens) for text in texts), room))
        return [near, far] if far > FAR * near else [far]

    def _stretched(self, number: int, context: int) -> Transcript:
        """An answer, again and again, to so many tokens: what they are makes no difference to what they cost."""
        tokens = self.record.texts[number % len(self.record.texts)].tokens
        tokens = (tokens * -(-context // len(tokens)))[:context]
        return Transcript(tokens, len(tokens), self.engine.target.max_length)

    def plan(self, drafters: AtHand, prompts: Sequence[Sequence[int]], beside: AtHand | None = None) -> Result:
        """All of it, of drafters that were named and of what lies beside the target. What is broken of the latter is
        left out with a warning, of the former it is an error. RequestError where there is nothing to answer."""
        at_hand = drafters + beside.where(self._is_sound) if beside else drafters
        most = max((self.build(one).max_nodes for one in at_hand.everything), default=0)
        self.answer(prompts)
        begun = time.perf_counter()
        candidates, hierarchy = self.candidates(at_hand)
        self.price(most)
        batches: list[int] = sorted(self.wishes.batches)
        rankings: list[Ranking] = []
        left, parts = self.wishes.seconds - (time.perf_counter() - begun), len(batches) + 1
        for rows in batches:
            started, share = time.perf_counter(), left * (1 if rankings else 2) / parts
            some = self.entrants(rankings[-1], candidates, rows) if rankings else candidates
            ranking = self.rank(some, rows, SHARES["race"] * share)
            if self.elsewhere is None:
                ranking = self.measured(ranking, share - (time.perf_counter() - started))
            rankings.append(ranking)
            left, parts = left - (time.perf_counter() - started), parts - (1 if rankings[1:] else 2)
        return Result(tuple(rankings), self.costs, hierarchy)

    def candidates(self, at_hand: AtHand) -> tuple[list[Candidate], Hierarchy | None]:
        """Everything that is looked at, and of several models the hierarchy that the formulas prefer."""
        self.watch("trees and hierarchies")
        found = [*at_hand.variations(), *(one for one in at_hand.compositions() if self._is_sound(one.description))]
        for heads in at_hand.heads:
            teacher = Teacher(self.engine.target.network)
            found += static_trees(teacher, heads, self.record.texts, self.wishes.params.temperature)
        hierarchy = None
        if len(at_hand.models) > 1:
            checkpoints = [one["checkpoint"] for one in at_hand.models]
            try:
                networks = {path: self.workshop.network(path, "small") for path in checkpoints}
                hierarchy = hierarchy_of(self.engine, networks, self.record.texts, self.wishes.params)
            except ForerunError as error:
                log.warning("no hierarchy of models is looked for: %s", error)
            if hierarchy is not None and hierarchy.candidate is not None:
                found.append(hierarchy.candidate)
        return in_turn(found), hierarchy

    # ---- the search

    def rank(self, candidates: Sequence[Candidate], rows: int, seconds: float) -> Ranking:
        """The race, for so many rows: first one of every family, then all of the families that are not far behind."""
        trials = {one.name: Trial(one, self) for one in (Candidate.of(PLAIN), *candidates)}
        waves, started = self._waves(rows), time.perf_counter()
        first: dict[str, str] = {}
        for name, one in trials.items():
            first.setdefault(one.candidate.family, name)
        self.watch(f"{len(trials)} candidates of {len(first)} kinds, {rows} side by side")

        def is_late() -> bool:
            return time.perf_counter() - started > seconds

        begun = race({name: trials[name] for name in first.values()}, waves[: -(-FEW // rows)], is_late, NONE)
        near = {trials[name].candidate.family for name in promising(begun, NEAR)} | {NONE}
        out = set(first.values()) - {NONE, *survivors(begun)}
        entering = {n: one for n, one in trials.items() if one.candidate.family in near and n not in out}
        spent = {**begun, **race(entering, waves, is_late, NONE, begun)}
        spent = {name: self._moved(name, rows, own) for name, own in spent.items()}
        error = self.costs.error
        ranks = [
            Rank(trials[name].candidate, Worth.of(spent[name], error), tuple(spent[name]), trials[name].is_live)
            for name in ranked(spent)
        ]
        return Ranking(rows, tuple(ranks), tuple(name for name in [*first.values(), *entering] if name not in spent))

    def entrants(self, before: Ranking, candidates: Sequence[Candidate], rows: int) -> list[Candidate]:
        """Those that may be the fastest for more rows, by what they were found to be for fewer: as much is accepted,
        and drafting for more rows takes no less."""
        context = sum(len(text.tokens) for text in self.record.texts) / len(self.record.texts)

        def most(rank: Rank) -> float:
            steps = rank.sum_of("steps")
            drafting = rank.sum_of("draft_seconds") / steps * before.rows
            seconds = drafting + self.costs(rows, rank.sum_of("nodes") / steps, context)
            return rank.sum_of("tokens") / steps / seconds

        names = [one.candidate.name for one in sorted(before.ranks, key=most, reverse=True)[:ENTRANTS]]
        return [one for one in candidates if one.name in names]

    def _is_sound(self, description: Mapping[str, Any]) -> bool:
        try:
            self.build(description)
        except ForerunError as error:
            log.warning("%s is left out: %s", named(description), error)
            return False
        return True

    def _waves(self, rows: int) -> list[list[int]]:
        """Answers that are played side by side. Where there are fewer than rows, some are there several times."""
        count = len(self.record.texts)
        return [[(begin + row) % count for row in range(rows)] for begin in range(0, max(1, count - rows + 1), rows)]

    def _moved(self, name: str, rows: int, spent: list[Spent]) -> list[Spent]:
        """Drafting takes on another machine what it took there, or as many plain steps as here."""
        if self.elsewhere is None:
            return spent
        known = self.elsewhere.drafts.get(name, {}).get(str(rows))
        steps, drafting = sum(one.steps for one in spent), sum(one.draft_seconds for one in spent)
        if known is not None and drafting > 0:
            factor = known * steps / rows / drafting
        else:
            factor = self.elsewhere.costs(1, 1, 1) / self._plain_here
        return [replace(one, draft_seconds=one.draft_seconds * factor) for one in spent]

    @cached_property
    def _plain_here(self) -> float:
        """Seconds of a plain step of one row on this machine."""
        text = self._stretched(0, min(64, self._contexts(LENGTHS)[0]))
        return measure.step_costs(self.engine, [[text]], self.wishes.params, Timing(4, 1.0, (1,)))[0].seconds

    # ---- the measurement

    def measured(self, ranking: Ranking, seconds: float, top: int = TOP) -> Ranking:
        """The best and plain decoding generate, in turn, as many of the answers as there is time for."""
        arms = [*[one for one in ranking.ranks if one.candidate.name != NONE][:top], ranking.plain]
        waves = self._waves(ranking.rows)[: min(len(one.spent) for one in arms) // ranking.rows]
        round_seconds = sum(one.sum_of("draft_seconds") + one.sum_of("verify_seconds") for one in arms) / len(waves)
        waves = waves[: max(1, int(seconds / (FEWEST + 1) / max(round_seconds, 1e-9)))]
        self.watch(f"measuring {', '.join(one.candidate.name for one in arms)}, {ranking.rows} side by side")
        speeds = self._generate(arms, waves, seconds)
        played = len(waves) * ranking.rows

        def told(rank: Rank) -> Rank:
            if rank.candidate.name not in speeds:
                return rank
            expected = Worth.of(rank.spent[:played]).tokens_per_second
            return replace(rank, expected=expected, measured=tuple(speeds[rank.candidate.name]))

        return replace(ranking, ranks=tuple(map(told, ranking.ranks)))

    def _generate(self, arms: Sequence[Rank], waves: Sequence[Sequence[int]], seconds: float) -> dict[str, list[float]]:
        players = {one.candidate.name: Live(self.build(one.candidate.description), self.record) for one in arms}
        speeds: dict[str, list[float]] = {name: [] for name in players}
        started, names = time.perf_counter(), list(players)
        for number in range(ROUNDS):
            spent: dict[str, list[Spent]] = {name: [] for name in names}
            for player in players.values():
                player.drafter.reset()  # what an earlier round said is the very answer that is asked for again
            for turn, wave in enumerate(waves):
                for name in names[(number + turn) % len(names) :] + names[: (number + turn) % len(names)]:
                    spent[name] += players[name].play(wave)
            for name, own in spent.items():
                speeds[name].append(Worth.of(own).tokens_per_second)
            passed = time.perf_counter() - started
            if number + 1 >= FEWEST and passed * (number + 2) / (number + 1) > seconds:
                break
        return speeds


class Trial:
    """A candidate in the race: replayed, or live once it has drawn."""

    def __init__(self, candidate: Candidate, planner: Planner):
        self.candidate, self.is_live, self._planner = candidate, False, planner
        self._player: Replay | Live | None = None

    def play(self, wave: Sequence[int]) -> list[Spent]:
        if self._player is None:
            drafter = self._planner.build(self.candidate.description)
            self._player = Replay(drafter, self._planner.record, self._planner.costs)
        try:
            return self._player.play(wave)
        except IsDrawnError:
            self.is_live, drafter = True, self._player.drafter
            drafter.reset()
            costs = self._planner.costs if self._planner.elsewhere else None
            self._player = Live(drafter, self._planner.record, costs)
            return self._player.play(wave)

    def close(self) -> None:
        """Its drafter and all that this remembers of texts may go."""
        self._player = None
