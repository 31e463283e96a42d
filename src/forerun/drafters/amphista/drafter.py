"""Drafting with Amphista-style heads: the stages read every verified token once, beside the one that came next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from forerun.drafters.amphista import AmphistaConfig
from forerun.drafters.amphista.network import Adaptation, AmphistaHeads
from forerun.drafting import heads
from forerun.drafting.checkpoint import demand_fit, load, tree_for
from forerun.drafting.drafter import Drafter
from forerun.drafting.heads import WAITING, ContextMaker, HeadDrafter, HeadParts, LastState, TorchHeads, format_of
from forerun.drafting.trained import HeadSettings
from forerun.drafting.workshop import Workshop
from forerun.errors import DrafterError
from forerun.model import CHUNK, Inputs, Model
from forerun.nn.network import Network
from forerun.row import Row
from forerun.slots import Slots


class AdaptedState(LastState):
    """The context is what the stages make of the states of all verified tokens, each beside the token behind it.

    Behind the newest of them stands the root, which is verified, but in a hierarchy a level above may place another
    one: so the newest is read again whenever its root may have changed. What was verified waits until a context is
    asked for, as far as states are remembered. A row of which a state was taken back and is not remembered any more
    has no context from then on.
    """

    def __init__(self, network: Adaptation, embedding_VD: Tensor):
        super().__init__()
        self.model = Model(network, WAITING)
        self._embedding = embedding_VD
        self._texts: Slots[Row] = Slots()

    def admit(self, row: Row, states_1SD: Tensor | None) -> None:
        slot = self.model.admit(row.limit)
        try:
            if states_1SD is not None:
                self._read_prompt(slot, row, states_1SD[0, :-1])  # the newest waits for its root
        except BaseException:
            self.model.release(slot)
            raise
        super().admit(row, states_1SD)
        self._texts.admit(row)

    def _read_prompt(self, slot: int, row: Row, states_ND: Tensor) -> None:
        for part in filter(len, torch.split(states_ND, CHUNK)):
            begin = self.model.cache.lengths[slot] + 1
            self._read([self._beside(part, row.tokens[begin : begin + len(part)])], slot)

    def release(self, slot: int) -> None:
        self._texts.release(slot)
        self.model.release(slot)
        super().release(slot)

    def observe(self, states: Sequence[Tensor]) -> None:
        unread = [row.count - length for row, length in zip(self._rows, self.model.cache.lengths, strict=True)]
        if any(waiting + len(part) > heads.REMEMBERED for waiting, part in zip(unread, states, strict=True)):
            self._catch_up()
        super().observe(states)

    def retract(self, slot: int, length: int) -> None:
        super().retract(slot, length)
        self.model.truncate(slot, max(0, length - 1))

    def contexts(self) -> list[Tensor | None]:
        return self._catch_up()

    def _catch_up(self) -> list[Tensor | None]:
        """Read what waits; what the stages say of every row's newest state."""
        said: list[Tensor | None] = [None for _ in self._rows]
        waiting = [self._waiting(slot) for slot in range(len(said))]
        while any(map(len, waiting)):
            parts, waiting = [part[:WAITING] for part in waiting], [part[WAITING:] for part in waiting]
            for slot, (part, read) in enumerate(zip(parts, self._read(parts, 0), strict=True)):
                if len(part):
                    said[slot] = read[len(part) - 1]
        return said

    def _waiting(self, slot: int) -> Tensor:
        """What a row's stages have still to read, [n, 2 D]; the newest state always."""
        states, tokens = self._rows[slot], self._texts[slot].tokens
        end = min(states.count, len(tokens) - 1)
        self.model.truncate(slot, max(0, end - 1))
        begin = self.model.cache.lengths[slot]
        unread = states.since(begin)
        if unread is None or end <= begin:
            return self._embedding.new_zeros(0, 2 * self._embedding.shape[1])
        return self._beside(unread[: end - begin], tokens[begin + 1 : end + 1])

    def _beside(self, states_ND: Tensor, tokens: Sequence[int]) -> Tensor:
        """States, and the embeddings of the tokens behind them."""
        return torch.cat((states_ND, self._embedding[list(tokens)].to(states_ND.dtype)), -1)

    def _read(self, parts: Sequence[Tensor], start: int) -> Tensor:
        """Append [n, 2 D] to the slots from `start` on; what the stages say of them, [B, N, stages D]."""
        layer = self.model.network.cache_shape.layers
        return self.model.append(Inputs.of_states(parts), start, (layer,)).hidden[layer]


def reader(module: AmphistaHeads, network: Network) -> ContextMaker:
    """Where the heads' contexts come from."""
    return LastState() if module.adaptation is None else AdaptedState(module.adaptation, network.input_embedding)


def build(workshop: Workshop, settings: HeadSettings) -> Drafter:
    """{"drafter": "amphista", "checkpoint": PATH, "tree": TREE, "weights": "auto" | "target"}"""
    stored = load(settings.checkpoint, "amphista")
    module = stored.module(AmphistaHeads, AmphistaConfig)
    network = workshop.target.network
    demand_fit(stored, module.config.width, module.config.vocab_size, network)
    if settings.weights == "int8":
        raise DrafterError("amphista heads run in the target's number format alone: leave weights out")
    format_of(network, settings.weights)
    grows = tree_for(stored, settings.tree, module.count, module.config.candidates)
    module = module.to(device=network.device, dtype=network.dtype).eval().requires_grad_(False)
    drafting = TorchHeads(module, network.input_embedding, network.head_matrix())
    return HeadDrafter("amphista", HeadParts(drafting, reader(module, network), grows, network.cache_shape.layers))
