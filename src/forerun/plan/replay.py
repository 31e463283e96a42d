"""What a drafter is worth on answers that are known, without running the target.

The target's answers were recorded once. A drafter proposes behind every beginning of them that it
comes by, its proposal is held against what the target said there, and it is told what the engine
would tell it. Tokens, steps and nodes are those of the engine, token for token, so acceptance is
that of the drafter as a whole: of a hierarchy too, whose levels are not independent of each other.

This is exact where the target's word does not depend on the proposal: for greedy rows, and for
proposals without luck in them, which are matched with what the target says (or has drawn) anyway.
A proposal that was drawn is weighed with the target's laws at tokens that it may not have said, so
such drafters run with the target instead (`Live`).

Seconds: the target's are those of a table. Drafting is timed as it happens. Where the target runs,
it leaves nothing of a draft model in the processor's caches, so before some steps it reads
something, and the others are taken to be dearer than they were in proportion.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.chance import key_of
from forerun.cost import NodePrice, Step, Table
from forerun.drafting.drafter import Context, Drafter
from forerun.engine.engine import Engine
from forerun.model import Inputs, Model, Scores
from forerun.plan.costs import Costs
from forerun.plan.measure import Transcript, reading
from forerun.row import Row
from forerun.sampling import SamplingParams
from forerun.slots import Slots
from forerun.tree import TokenTree

SWEEP, SWEPT = 6, 96
"""One step in so many comes behind a forward of the target, until so many have."""
USUAL = 0.95
"""In the proportion no step counts for more than this share of them take: a few read a whole prompt."""
ENOUGH = 8
"""Steps of either kind that make a proportion."""


@dataclass(frozen=True)
class Spent:
    """One answer's share of a run. steps: that it had a row in; nodes: of its trees, node 0
    included. Seconds are divided among the rows of a step."""

    text: int
    tokens: int
    steps: int
    nodes: int
    draft_seconds: float
    verify_seconds: float

    @property
    def seconds(self) -> float:
        return self.draft_seconds + self.verify_seconds


class Player(Protocol):
    """A drafter that can be asked what an answer costs with it."""

    def play(self, wave: Sequence[int]) -> list[Spent]:
        """The answers of these numbers, side by side."""

    def close(self) -> None:
        """It will not be asked again."""


class IsDrawnError(Exception):
    """A drafter has drawn what it proposes, for a row that samples."""


class Record:
    """The target's answers, and its states wherever somebody wants to see them."""

    def __init__(self, engine: Engine, texts: Sequence[Transcript], params: SamplingParams):
        self.engine, self.texts, self.params = engine, list(texts), params
        self._states: dict[tuple[int, int], Tensor] = {}

    def states(self, text: int, layers: Collection[int]) -> dict[int, Tensor]:
        """By layer, [S - 1, D] at all tokens but the last: read once, all at a time."""
        missing = [layer for layer in layers if (text, layer) not in self._states]
        if missing:
            tokens = [list(self.texts[text].tokens[:-1])]
            model = Model(self.engine.target.network, 0)
            with torch.inference_mode():
                read = model.read(Inputs.of_tokens(tokens, model.device), missing)
            self._states |= {(text, layer): states[0] for layer, states in read.items()}
        return {layer: self._states[text, layer] for layer in layers}


@dataclass(eq=False)
class _Seat:
    """A row that follows a known answer."""

    place: int
    number: int
    text: Transcript
    row: Row
    states: Mapping[int, Tensor]
    steps: int = 0
    nodes: int = 0
    warm: float = 0.0
    cold: float = 0.0
    verify: float = 0.0
    """Its shares of seconds: of drafting with warm caches, of drafting as it is when the target runs, of the target."""

    @property
    def is_over(self) -> bool:
        return len(self.row.tokens) >= len(self.text.tokens)

    def follow(self, tree: TokenTree, slot: int) -> list[int]:
        """The nodes that the target would have kept, node 0 first."""
        tokens, children = tree.tokens[slot], tree.topology.children[slot]
        path = [0]
        for wanted in self.text.tokens[len(self.row.tokens) :]:
            child = next((node for node in children.get(path[-1], ()) if tokens[node] == wanted), None)
            if child is None:
                break
            path.append(child)
        return path

    def next_token(self, path: Sequence[int]) -> int:
        """Behind a path; behind the end of the text any will do, as nobody is told of it."""
        return self.text.tokens[min(len(self.row.tokens) + len(path) - 1, len(self.text.tokens) - 1)]


class Replay:
    """A drafter held against the record. costs: of the target's steps, which say also what a node must promise
    (`cost.NodePrice`)."""

    def __init__(self, drafter: Drafter, record: Record, costs: Costs):
        self.drafter, self.record, self.costs = drafter, record, costs
        self._table = Table()
        self._price = NodePrice(self._table)
        self._sweep = reading(record.engine.target.network, record.texts[0])
        self._clocked: dict[bool, list[float]] = {False: [], True: []}  # seconds by whether the caches were swept

    @torch.inference_mode()
    def play(self, wave: Sequence[int]) -> list[Spent]:
        """Raises IsDrawnError where a replay says nothing; no row is left in the drafter then."""
        seats: Slots[_Seat] = Slots()
        done: list[_Seat] = []
        try:
            for place, number in enumerate(wave):
                seats.append(self._admit(place, number))
            while seats:
                self._step(seats)
                for slot in reversed(range(len(seats))):
                    if seats[slot].is_over:
                        done.append(seats[slot])
                        self.drafter.release(slot)
                        seats.release(slot)
        except BaseException:
            for slot in reversed(range(len(seats))):
                self.drafter.release(slot)
            raise
        dearer = _proportion(*self._clocked.values())
        return [
            Spent(
                seat.number,
                seat.text.answer_length,
                seat.steps,
                seat.nodes,
                seat.cold + dearer * seat.warm,
                seat.verify,
            )
            for seat in sorted(done, key=lambda seat: seat.place)
        ]

    def close(self) -> None:
        """Nothing is held but what the drafter holds."""

    def _admit(self, place: int, number: int) -> _Seat:
        text, record = self.record.texts[number], self.record
        params = record.params
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else record.engine.eos)
        row = Row(text.prompt, text.prompt_length, params, key_of(params.seed or 0), text.limit, ends=ends)
        states = record.states(number, self.drafter.reads)
        self.drafter.admit(row, {layer: one[None, : text.prompt_length - 1] for layer, one in states.items()})
        return _Seat(place, number, text, row, states)

    def _step(self, seats: Slots[_Seat]) -> None:
        """As the engine makes it, the target's part apart."""
        rows, step = [seat.row for seat in seats], seats[0].steps
        is_swept = step % SWEEP == 1 and len(self._clocked[True]) < SWEPT
        if is_swept:
            self._sweep()
        price = self._price.value
        context = Context(
            rows=rows,
            budgets=[self.drafter.max_nodes] * len(rows),
            depths=[row.remaining - 1 for row in rows],
            device=self.record.engine.target.device,
            prices=None if price is None else [price] * len(rows),
            costs=self._table,
        )
        begun = time.perf_counter()
        tree = self.drafter.propose(context)
        drafted = time.perf_counter()
        if not (tree.is_deterministic or self.record.params.is_greedy):
            raise IsDrawnError
        kept = [seat.follow(tree, slot) for slot, seat in enumerate(seats)]
        verdict = _verdict(seats, tree, kept)
        scores = self._scores(seats, tree, kept)
        judged = time.perf_counter()
        self.drafter.observe(context, tree, verdict, scores)
        seconds = drafted - begun + time.perf_counter() - judged
        for seat in seats:
            if is_swept or step == 0:
                seat.cold += seconds / len(seats)
            else:
                seat.warm += seconds / len(seats)
        if step:
            self._clocked[is_swept].append(seconds)
        self._settle(seats, tree, verdict, seconds)

    def _settle(self, seats: Slots[_Seat], tree: TokenTree, verdict: Verdict, drafting: float) -> None:
        rows, nodes = len(seats), sum(tree.sizes)
        context = sum(len(seat.row.tokens) for seat in seats)
        verify = self.costs(rows, nodes / rows, context / rows)
        for slot, seat in enumerate(seats):
            seat.steps += 1
            seat.nodes += tree.sizes[slot]
            seat.verify += verify / rows
            said = len(verdict.kept[slot])
            seat.row.tokens += seat.text.tokens[len(seat.row.tokens) :][:said]
            seat.row.step += 1
        step = Step(rows, nodes, context, sum(map(len, verdict.kept)), drafting, verify, 0.0)
        self._table.learn(step)
        self._price.learn(step)

    def _scores(self, seats: Slots[_Seat], tree: TokenTree, kept: Sequence[Sequence[int]]) -> Scores:
        """The states of what is kept, wherever they are wanted; nothing is known of other nodes, and no logits."""
        device = self.record.engine.target.device
        hidden = {}
        for layer in self.drafter.reads:
            some = seats[0].states[layer]
            table = some.new_zeros(len(seats), tree.nodes, some.shape[-1])
            for slot, (seat, path) in enumerate(zip(seats, kept, strict=True)):
                newest = len(seat.row.tokens) - 1
                known = seat.states[layer][newest : newest + len(path)]
                table[slot, list(path[: len(known)])] = known
            hidden[layer] = table
        return Scores(torch.empty(len(seats), tree.nodes, 0, device=device), hidden)


def _verdict(seats: Slots[_Seat], tree: TokenTree, kept: list[list[int]]) -> Verdict:
    ends = [not tree.topology.children[slot].get(path[-1]) for slot, path in enumerate(kept)]
    return Verdict(kept, [seat.next_token(path) for seat, path in zip(seats, kept, strict=True)], ends)


def _proportion(warm: Sequence[float], swept: Sequence[float]) -> float:
    """How much dearer steps are with swept caches."""
    if min(len(warm), len(swept)) < ENOUGH:
        return 1.0
    most = float(np.quantile([*warm, *swept], USUAL))
    means = [sum(min(one, most) for one in kind) / len(kind) for kind in (warm, swept)]
    return means[1] / means[0] if means[0] > 0 else 1.0


@dataclass(eq=False)
class Live:
    """A drafter and the target itself, in an engine, as they are served. costs: price the target's steps instead of the
    clock, if given."""

    drafter: Drafter
    record: Record
    costs: Costs | None = None
    _engine: Engine | None = field(default=None, init=False)

    def play(self, wave: Sequence[int]) -> list[Spent]:
        """Prompts are read before the clock starts, as in a replay."""
        engine = self._engine = self._engine or self.record.engine.beside(self.drafter, len(wave))
        engine.max_rows = len(wave)
        shares: list[list[_Share]] = [[] for _ in wave]
        try:
            for place, number in enumerate(wave):
                engine.add(self.record.texts[number].prompt, self.record.params, place, text=False)
            while engine.is_busy:
                for place, share in _step(engine, not shares[0], self.costs):
                    shares[place].append(share)
        finally:
            engine.clear()
        return [
            Spent(
                number,
                sum(one.tokens for one in own),
                len(own),
                round(sum(one.nodes for one in own)),
                sum(one.draft for one in own),
                sum(one.verify for one in own),
            )
            for number, own in zip(wave, shares, strict=True)
        ]

    def close(self) -> None:
        self._engine = None


class _Share(NamedTuple):
    """Of a step: a row's tokens, and its part of the nodes and the seconds."""

    tokens: int
    nodes: float
    draft: float
    verify: float


def _step(engine: Engine, is_first: bool, costs: Costs | None) -> Iterator[tuple[int, _Share]]:
    """A step of the engine: what every row had of it. The first one comes with the reading of prompts, so its
    seconds are those that the engine states."""
    begun = time.perf_counter()
    pieces = engine.step()
    seconds, step = time.perf_counter() - begun, engine.costs.last
    assert step is not None
    if is_first:
        seconds = step.draft_seconds + step.verify_seconds + step.other_seconds
    verify = seconds - step.draft_seconds
    if costs is not None:
        verify = costs(step.rows, step.nodes / step.rows, step.context / step.rows)
    for piece in pieces:
        yield (
            piece.prompt_index,
            _Share(
                len(piece.token_ids),
                step.nodes / step.rows,
                step.draft_seconds / step.rows,
                verify / step.rows,
            ),
        )
