"""Drafting with EAGLE: it reads the pairs of the verified text, and goes on with its own states along every branch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from forerun.accept.exact import Verdict
from forerun.drafters.eagle import EagleConfig, EagleSettings
from forerun.drafters.eagle.network import EagleModule, EagleStack
from forerun.drafting.checkpoint import demand_fit, demand_layers, load, tree_for
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.growth import Chain, Expander, Form, Frontier, Known, StaticTree, TopTree, tempered
from forerun.drafting.heads import REMEMBERED, WAITING, StatesDrafter
from forerun.drafting.settings import MOST
from forerun.drafting.stopping import LAST, prepared, rule_of
from forerun.drafting.workshop import Workshop
from forerun.model import CHUNK, SHORT, Inputs, Model, Scores
from forerun.nn.feed import Read
from forerun.ranktree import RankTree
from forerun.row import Row
from forerun.slots import Slots
from forerun.tree import TokenTree

STATIC = RankTree(
    [
        *[(0,), (1,), (2,), (3,)],
        *[(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)],
        *[(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0)],
        *[(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 0, 0), (0, 0, 0, 0, 1)],
    ]
)
"""EAGLE-1's, for every model (its code's mc_sim_7b_63, of 25 nodes)."""


@dataclass
class _Tail:
    """The newest states of one row, those of the tokens `begin` up to `end`. Nothing goes unless it is told to."""

    begin: int = 0
    end: int = 0
    parts: list[Tensor] = field(default_factory=list)

    def append(self, part_ND: Tensor) -> None:
        self.parts.append(part_ND)
        self.end += len(part_ND)

    def between(self, begin: int, end: int) -> Tensor:
        return self._joined()[begin - self.begin : end - self.begin]

    def forget(self, before: int) -> None:
        if before > self.begin and self.parts:
            self.parts, self.begin = [self._joined()[before - self.begin :].clone()], before

    def truncate(self, end: int) -> None:
        if end < self.end:
            self.parts = [self._joined()[: max(0, end - self.begin)]]
            self.begin, self.end = min(self.begin, end), end

    def _joined(self) -> Tensor:
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts)]
        return self.parts[0]


class Pairs:
    """The network with the memory of what it has read, row by row in slot order: a `ContextReader`.

    A pair is known with the token behind the state, so the newest state waits for the next token. Only pairs of the
    target's own states are kept; the states that it drafted with are forgotten. What was verified waits until
    something is to be drafted, or for so many tokens.
    """

    def __init__(self, stack: EagleStack, scratch: int):
        """scratch: the most nodes that are read for a tree."""
        self.stack, self.model = stack, Model(stack, max(scratch, WAITING))
        self.known_tokens = Known.of(stack.form.kept, stack.form.vocab_size, stack.device)
        self._layers = (stack.config.layers,)
        self._rows: Slots[_Tail] = Slots()

    def admit(self, row: Row, states_1SD: Tensor | None) -> None:
        slot = self.model.admit(row.limit)
        tail = _Tail()
        self._rows.admit(tail)
        try:
            for part in () if states_1SD is None else torch.split(states_1SD[0], CHUNK):
                self._append(tail, part)
                self._read_alone(slot, row.tokens, len(row.tokens) - 2)
        except BaseException:
            self.release(slot)
            raise

    def release(self, slot: int) -> None:
        self.model.release(slot)
        self._rows.release(slot)

    def observe(self, states: Sequence[Tensor]) -> None:
        for tail, part in zip(self._rows, states, strict=True):
            self._append(tail, part)

    @torch.inference_mode()
    def _append(self, tail: _Tail, part_NM: Tensor) -> None:
        if len(part_NM):
            tail.append(self.stack.fused(part_NM).clone())

    def retract(self, slot: int, length: int) -> None:
        self._rows[slot].truncate(length)
        self.model.truncate(slot, max(0, length - 1))

    def known(self, slot: int) -> int:
        tail = self._rows[slot]
        return tail.end if tail.begin <= self.model.cache.lengths[slot] else -1  # more was taken back than remembered

    def catch_up(self, rows: Sequence[Row]) -> None:
        """Read what has waited for too long."""
        for slot, row in enumerate(rows):
            if self._rows[slot].end - self.model.cache.lengths[slot] > WAITING:
                self._read_alone(slot, row.tokens, len(row.tokens) - 1)

    def next_scores(self, rows: Sequence[Row]) -> Scores:
        """Read everything that is known and say what may follow the newest token of every row, and with which state
        (N is 1). Of a row whose states are not all here it says anything."""
        for slot, row in enumerate(rows):
            self.model.truncate(slot, max(0, len(row.tokens) - 2))  # the newest pair is always read again
            self._read_alone(slot, row.tokens, len(row.tokens) - 1 - SHORT)
        begins = [self.model.cache.lengths[slot] for slot in range(len(rows))]
        ends = [self._end(slot, row.tokens, len(row.tokens) - 1) for slot, row in enumerate(rows)]
        tokens = [row.tokens[begin + 1 : end + 1] for row, begin, end in zip(rows, begins, ends, strict=True)]
        states = [self._states(slot, *span) for slot, span in enumerate(zip(begins, ends, strict=True))]
        inputs = Inputs.of_tokens(tokens, self.model.device)
        read = self._read(Inputs(inputs.tokens_BN, inputs.counts_B, Inputs.of_states(states).states_BND), 0)
        last = [max(0, count - 1) for count in map(len, tokens)]
        said = read.hidden[self._layers[0]]
        return Scores(read.logits_BNV, {LAST: said[torch.arange(len(rows)), last].unsqueeze(1)})

    def grow(self, frontier: Frontier, states_BWD: Tensor) -> Scores:
        """What may follow these nodes, and with which states (LAST). states_BWD: what was said at their parents."""
        where = frontier.depths_BW, frontier.paths_BWJ
        scores = self.model.grow(frontier.tokens_BW, *where, self._layers, states_BWD, frontier.counts_B)
        return Scores(scores.logits_BNV, {LAST: scores.hidden[self._layers[0]]})

    def _end(self, slot: int, tokens: Sequence[int], end: int) -> int:
        """How many pairs of a row can be read, at most so many: their states are here, and none before is missing."""
        have = self.model.cache.lengths[slot]
        return max(have, min(end, self.known(slot), len(tokens) - 1))

    def _states(self, slot: int, begin: int, end: int) -> Tensor:
        if begin == end:
            return torch.zeros(0, self.stack.form.width, dtype=self.stack.dtype, device=self.stack.device)
        return self._rows[slot].between(begin, end)

    def _read_alone(self, slot: int, tokens: Sequence[int], end: int) -> None:
        """Read pairs of one row, up to but without number `end`, as far as they are here."""
        while (begin := self.model.cache.lengths[slot]) < (last := self._end(slot, tokens, end)):
            last = min(last, begin + CHUNK)
            some = torch.tensor([tokens[begin + 1 : last + 1]], device=self.model.device)
            self._read(Inputs(some, np.array([last - begin]), self._states(slot, begin, last)[None]), slot)
        self._rows[slot].forget(self.model.cache.lengths[slot] - REMEMBERED)

    def _read(self, inputs: Inputs, start: int) -> Read:
        return self.model.append(inputs, start, self._layers)


class PairsExpander(Expander):
    """Every node is read with what was said at its parent."""

    def __init__(self, pairs: Pairs, rows: Sequence[Row]):
        self._pairs, self._rows, self.known = pairs, rows, pairs.known_tokens

    def begin(self) -> Scores:
        return self._heard(self._pairs.next_scores(self._rows))

    def expand(self, frontier: Frontier) -> Scores:
        rows = np.arange(len(frontier.tokens_BW))[:, None]
        return self._heard(self._pairs.grow(frontier, self._said_BWD[rows, frontier.parents_BW]))

    def _heard(self, scores: Scores) -> Scores:
        self._said_BWD = scores.hidden[LAST]
        return scores


class EagleDrafter(StatesDrafter):
    """Grows a deterministic tree, the dynamic one of EAGLE-2 or a static one, or draws a chain."""

    def __init__(self, pairs: Pairs, form: Form, layers: Sequence[int]):
        super().__init__("eagle3" if pairs.stack.form.fused else "eagle", layers)
        self.pairs, self.form = pairs, form
        self.max_nodes = form.max_nodes

    @property
    def reader(self) -> Pairs:
        return self.pairs

    @property
    def bytes_per_token(self) -> float:
        """Weights that are read for one drafted token."""
        return float(self.pairs.stack.footprint.weight_bytes)

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        super().observe(context, tree, verdict, scores)
        self.pairs.catch_up(context.rows)

    def propose(self, context: Context) -> TokenTree:
        depths = [min(depth, most) for depth, most in zip(self.depths(context), context.budgets, strict=True)]
        if not any(depths):
            return TokenTree.root([row.tokens[-1] for row in context.rows], context.device)
        expander = tempered(PairsExpander(self.pairs, context.rows), self.pairs.stack.form.temperatures)
        return self.form.grow(expander, context, depths).tree


def build(workshop: Workshop, settings: EagleSettings) -> Drafter:
    """See `EagleSettings`."""
    stored = load(settings.checkpoint, "eagle")
    module = stored.module(EagleModule, EagleConfig)
    config, network = module.config, workshop.target.network
    demand_fit(stored, config.width, config.vocab_size, network)
    layers = module.reads(network.cache_shape.layers)
    demand_layers(str(stored.folder), layers, network)
    module = module.to(device=network.device, dtype=network.dtype).eval().requires_grad_(False)
    form: Form = TopTree(settings.width, settings.depth or (8 if config.fused else 6), settings.nodes)
    if settings.tree is not None:
        wish = [list(path) for path in STATIC.paths] if settings.tree == "static" else settings.tree
        form = StaticTree(tree_for(stored, wish, MOST, config.candidates))
    if settings.stopping is not None:
        form = Chain(prepared(rule_of(settings.stopping), config.width, network.device))
    stack = module.stack.lend(network.input_embedding, module.of_known(network.head_matrix()))
    return EagleDrafter(Pairs(stack, form.scratch), form, layers)
