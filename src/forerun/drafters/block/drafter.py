"""Drafting with a block: the target's states become the layers' own memory, and one forward says all depths at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from forerun.drafters.block import BlockConfig, BlockSettings
from forerun.drafters.block.network import BlockModule
from forerun.drafting.checkpoint import demand_fit, demand_layers, load, tree_for
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.growth import Expander, Form, Known, StaticTree, TopTree, least_of, tempered
from forerun.drafting.heads import StatesDrafter, format_of
from forerun.drafting.markov import MarkovExpander
from forerun.drafting.workshop import Workshop
from forerun.model import CHUNK
from forerun.nn import ops
from forerun.nn.backends.blocks import BestTree, BlockNetwork, TreeLimits
from forerun.nn.cache import Cache
from forerun.nn.network import Network
from forerun.row import Row
from forerun.tree import TokenTree


class Blocks:
    """A block's network with the memory of what the target has read, row by row in slot order (a `ContextReader`). The
    memory holds verified tokens alone; `room`: entries that a draft needs behind them."""

    def __init__(self, cache: Cache, room: int = 0):
        self.cache, self._room = cache, room

    def expander(self, roots: Sequence[int]) -> Expander:
        """What may follow in every row, whose newest token, not read by the target, is the root."""
        raise NotImplementedError

    def best_first(self, roots: Sequence[int], limits: Sequence[TreeLimits]) -> list[BestTree] | None:
        """The best-first trees in one go; None where they are grown over `expander`."""
        return None

    def _read(self, start: int, states: Sequence[Tensor]) -> None:
        """Remember these states [n, M D] of the rows in slots from `start` on."""
        raise NotImplementedError

    def admit(self, row: Row, states_1SD: Tensor | None) -> None:
        rows = self.cache.rows
        slots = rows + 1 if rows < self.cache.slots else max(1, 2 * rows)
        self.cache.reserve(slots, row.limit + self._room)
        slot = self.cache.admit()
        try:
            for part in () if states_1SD is None else torch.split(states_1SD[0], CHUNK):
                self._read(slot, [part])
        except BaseException:
            self.cache.release(slot)
            raise

    def release(self, slot: int) -> None:
        self.cache.release(slot)

    def observe(self, states: Sequence[Tensor]) -> None:
        self._read(0, states)

    def retract(self, slot: int, length: int) -> None:
        self.cache.truncate(slot, length)

    def known(self, slot: int) -> int:
        return self.cache.lengths[slot]


class PackedBlocks(Blocks):
    """In one call of the target's backend."""

    def __init__(self, network: BlockNetwork, module: BlockModule, cache: Cache):
        super().__init__(cache, network.count)
        self.network, self._module = network, module
        self._known = Known.of(module.config.kept, module.config.vocab_size, module.fuse.device)

    def expander(self, roots: Sequence[int]) -> Expander:
        logits = self._module.proposing(self.network.logits(self.cache, roots))
        expander = MarkovExpander(logits, torch.tensor(roots), self._module.markov, self._known)
        return tempered(expander, self._module.temperatures)

    def best_first(self, roots: Sequence[int], limits: Sequence[TreeLimits]) -> list[BestTree] | None:
        if not self._module.config.from_anchor:  # the kernels take the first row for the first depth
            return None
        return self.network.grow(self.cache, roots, limits)

    def _read(self, start: int, states: Sequence[Tensor]) -> None:
        self.network.read(self.cache, start, states)


class TorchBlocks(Blocks):
    """In plain torch: the readable version, and the one for CUDA."""

    def __init__(self, module: BlockModule, embedding_VD: Tensor, head_VD: Tensor):
        super().__init__(Cache(module.stack.config.cache_shape, embedding_VD.dtype, embedding_VD.device))
        self.module, self.embedding, self.head = module, embedding_VD, module.of_known(head_VD)
        self._known = Known.of(module.config.kept, module.config.vocab_size, module.fuse.device)

    @torch.inference_mode()
    def _read(self, start: int, states: Sequence[Tensor]) -> None:
        for slot, part_NM in enumerate(states, start):
            if len(part_NM):
                self._read_row(slot, part_NM)

    def _read_row(self, slot: int, states_NM: Tensor) -> None:
        begin = self.cache.lengths[slot]
        end = begin + len(states_NM)
        fused = self.module.fused(states_NM[None].to(self.cache.dtype))
        positions = torch.arange(begin, end, device=fused.device)[None]
        for layer in range(self.module.config.layers):
            for kind, part in enumerate(self.module.memory(layer, fused, positions)):
                self.cache.store[layer, kind, slot, begin:end] = part[0]
        self.cache.lengths[slot] = end

    @torch.inference_mode()
    def expander(self, roots: Sequence[int]) -> Expander:
        root_B = torch.tensor(roots, device=self.embedding.device)
        expander = MarkovExpander(self.states(root_B) @ self.head.T, root_B, self.module.markov, self._known)
        return tempered(expander, self.module.temperatures)

    def states(self, root_B: Tensor) -> Tensor:
        """The last states of the rows of every block that propose, [B, K, D]."""
        module, width = self.module, self.module.config.rows
        lengths_B = torch.tensor(list(self.cache.lengths), device=root_B.device)
        longest = int(lengths_B.max())
        positions_BW = lengths_B[:, None] + torch.arange(width, device=root_B.device)
        outside = torch.arange(longest, device=root_B.device) >= lengths_B[:, None]
        outside = torch.cat((outside, outside.new_zeros(len(root_B), width)), 1)[:, None].expand(-1, width, -1)
        x = module.rows(self.embedding[root_B], self.embedding)
        bias = torch.zeros(outside.shape, dtype=x.dtype, device=x.device).masked_fill_(outside, float("-inf"))
        for layer in range(module.config.layers):
            q, k, v = module.project(layer, x, positions_BW)
            text = self.cache.store[layer, :, : len(root_B), :longest]
            keys, values = torch.cat((text[0], k.to(text.dtype)), 1), torch.cat((text[1], v), 1)
            x = module.go_on(layer, x, ops.attention(q, keys, values, bias, module.stack.config.head_dim**-0.5))
        return module.last_norm(module.proposing(x))


class BlockDrafter(StatesDrafter):
    """Grows a tree of any form from one draft forward."""

    def __init__(self, blocks: Blocks, form: Form, layers: Sequence[int]):
        super().__init__("block", layers)
        self.blocks, self.form = blocks, form
        self.max_nodes = form.max_nodes

    @property
    def reader(self) -> Blocks:
        return self.blocks

    def propose(self, context: Context) -> TokenTree:
        roots = [row.tokens[-1] for row in context.rows]
        depths = [min(depth, most) for depth, most in zip(self.depths(context), context.budgets, strict=True)]
        if not any(depths):
            return TokenTree.root(roots, context.device)
        if isinstance(self.form, TopTree) and self.form.is_best_first:
            trees = self.blocks.best_first(roots, self._limits(self.form, context, depths))
            if trees is not None:
                return TokenTree.of([one.tokens for one in trees], [one.parents for one in trees], context.device)
        return self.form.grow(self.blocks.expander(roots), context, depths).tree

    @staticmethod
    def _limits(form: TopTree, context: Context, depths: Sequence[int]) -> list[TreeLimits]:
        return [
            TreeLimits(min(form.nodes, most), min(form.depth, depth), least)
            for most, depth, least in zip(context.budgets, depths, least_of(context), strict=True)
        ]


def build(workshop: Workshop, settings: BlockSettings) -> Drafter:
    """See `BlockSettings`."""
    stored = load(settings.checkpoint, "block")
    module = stored.module(BlockModule, BlockConfig)
    config, network = module.config, workshop.target.network
    demand_fit(stored, config.width, config.vocab_size, network)
    layers = module.reads(network.cache_shape.layers)
    demand_layers(str(stored.folder), layers, network)
    module.stretch(network.max_length)
    kind = format_of(network, settings.weights)
    module = module.to(device=network.device, dtype=network.dtype).eval().requires_grad_(False)
    blocks = blocks_on(module, network, kind)
    form: Form = TopTree(settings.nodes, module.count, settings.nodes)
    if settings.tree is not None:
        form = StaticTree(tree_for(stored, settings.tree, module.count, config.candidates))
    return BlockDrafter(blocks, form, layers)


def blocks_on(module: BlockModule, network: Network, weights: torch.dtype) -> Blocks:
    """On the target's own backend. weights: the number format of what the backend packs."""
    in_one_go = network.backend.blocks(module.parts(network.input_embedding), network, weights)
    if in_one_go is None:
        return TorchBlocks(module, network.input_embedding, network.head_matrix())
    return PackedBlocks(in_one_go, module, Cache(module.stack.config.cache_shape, network.dtype, network.device))
