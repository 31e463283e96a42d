"""What drafters with heads share: small networks on top of the target's own hidden states, and a static tree of their
best tokens.

    context   c_t, [B, D]: the target's state at the last token that it has read (or what a prefix layer makes of it)
    root      x_{t+1}, node 0: the newest token, which the target has not read
    head i    proposes x_{t+i+2}, a node of depth i + 1

Whatever heads propose is a tree of best tokens, so it is verified by the exact rules for deterministic trees, at any
temperature."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from forerun.accept.exact import Verdict
from forerun.drafting.drafter import Context, Drafter
from forerun.drafting.growth import Expander, Form, Frontier, Known, cut, parts_of, tempered, tokens_of
from forerun.drafting.markov import MarkovExpander, MarkovTerm
from forerun.drafting.stopping import LAST
from forerun.drafting.trained import HeadsConfig, LayerConfig
from forerun.errors import DrafterError
from forerun.model import CHUNK, Inputs, Model, Scores
from forerun.native.matrix import Packed
from forerun.nn.backends.heads import Drafting, HeadWeights
from forerun.nn.network import Network
from forerun.nn.transformer import Layer
from forerun.ranktree import RankTree
from forerun.row import Row
from forerun.slots import Slots
from forerun.tree import TokenTree


@dataclass(frozen=True)
class Places:
    """P places in texts, [P] each: the text's row, and the last token that the target has read. embedded_BND: the
    texts by the target's embedding_VD, which few ask for."""

    rows_P: Tensor
    places_P: Tensor
    embedded_BND: Tensor
    embedding_VD: Tensor | None = None

    @property
    def roots_PD(self) -> Tensor:
        """The embedding of the token behind each place."""
        return self.embedded_BND[self.rows_P, self.places_P + 1]


class HeadsModule(nn.Module):
    """K draft heads, as they are trained. Subclasses say how a head thinks.

    sees_tokens: heads see the tokens drafted before theirs, not only the context. markov: heads
    that see of these the one before theirs alone, through this term. solvable: a linear map may be
    their start (`start_from`). tables: how the names of parameters begin that are looked up like
    embeddings. borrows: how many of the target's last layers their own begin as (`borrow`).
    foresees: they guess the target's states, which may be taught (`foreseen`). temperatures: as in
    their config; training knows nothing of them.
    """

    sees_tokens = False
    solvable = True
    tables: tuple[str, ...] = ()
    borrows = 0
    foresees = False
    count: int

    def __init__(self, config: HeadsConfig | None = None) -> None:
        super().__init__()
        self.markov: MarkovTerm | None = None
        self.temperatures = config.temperatures if config else ()
        self._known = torch.tensor(config.kept, device="cpu") if config and config.kept else None

    @property
    def known(self) -> Tensor | None:
        """The tokens that they can propose, ascending, where they are not all: logits are of these alone. They learn
        the target's law among these, where the target's best token is one of them."""
        if self._known is not None:
            device = next(self.parameters()).device
            if device.type not in ("meta", self._known.device.type):
                self._known = self._known.to(device)
        return self._known

    def of_known(self, matrix_VD: Tensor) -> Tensor:
        """Of a matrix with a row for every token, the rows of those that can be proposed."""
        return matrix_VD if self.known is None else matrix_VD[self.known]

    @property
    def taught(self) -> int:
        """The first so many heads learn; figures tell about all that `count` names after training."""
        return self.count

    def reads(self, top: int) -> tuple[int, ...]:
        """The target's layers whose states they see; `top` is what its output projection sees."""
        return (top,)

    def contexts(self, states_BND: Tensor) -> Tensor:
        """What the heads see of whole sequences of the target's states."""
        return states_BND

    def seen(self, states: Mapping[int, Tensor], places: Places) -> Tensor:
        """What the heads see at P places of whole sequences, [P, ...]. states: by layer, [B, N, D]."""
        (states_BND,) = states.values()
        return self.contexts(states_BND)[places.rows_P, places.places_P]

    def table(self, embedding_VD: Tensor) -> Tensor:
        """What a token is to the heads that follow it, [V, M]; embedding: the target's."""
        return embedding_VD

    def logits(self, context_PD: Tensor, embedded_PKD: Tensor, head_VD: Tensor) -> Tensor:
        """Of all heads at P places, [K, P, V]. context: as `seen`; embedded: of the K tokens that follow each place,
        the root first, their rows of `table`; head: the target's output projection, for heads that share it. Where only
        some tokens are known, V is of these (`of_known`)."""
        raise NotImplementedError

    def unconditional(self, context_PD: Tensor, head_VD: Tensor) -> Tensor:
        """The same without what drafted tokens say: all of it, or all but for the Markov term."""
        return self.logits(context_PD, context_PD[:, None], head_VD)

    def linear_context(self, context_PD: Tensor) -> Tensor:
        """Of what the heads see, the [P, D] that linear maps may begin from."""
        return context_PD

    def foreseen(self, context_PD: Tensor) -> Tensor:
        """Of every head, its guess at the state behind which the target says the token that it proposes, [K, P, D]."""
        raise NotImplementedError

    def start_from(self, maps: Sequence[Tensor], head_VD: Tensor) -> None:
        """Begin from linear guesses: maps[i], [D, M], takes what head i sees to the state that the target will have one
        token before the one that it proposes. Heads that cannot express this stay as they are."""

    def borrow(self, layers: Sequence[nn.Module]) -> None:
        """Begin as these layers of the target."""

    def grow_from(self, smaller: Any) -> None:
        """Of heads that were initialised: begin as these trained ones, of the same shape with fewer layers. What the
        further layers add is nothing yet, so both say the same. Raises DrafterError where that cannot be."""
        raise DrafterError("such heads cannot be given layers after their training: train them with all of theirs")

    def head_logits(self, index: int, z: Tensor, head_VD: Tensor) -> Tensor:
        """Of one head: z [..., M] is the context and, where heads see tokens, the embeddings that follow it."""
        return self.projected(index, self.head_state(index, z), head_VD)

    def head_state(self, index: int, z: Tensor) -> Tensor:
        """What the head's projection sees, [..., D]."""
        raise NotImplementedError

    def projected(self, index: int, state: Tensor, head_VD: Tensor) -> Tensor:
        """What the head says in this state, [..., V]."""
        raise NotImplementedError

    def weights(self, head_VD: Tensor | Packed) -> list[HeadWeights]:
        """The heads as plain matrices, for the kernels."""
        raise NotImplementedError


@torch.no_grad()
def grow(module: nn.Module, smaller: nn.Module, stacked: Collection[str] = (), layers: int = 0) -> None:
    """Give a module the parameters of a smaller one. stacked: those that hold a block for each layer, or one that is
    repeated; layers: how many blocks that makes in the smaller one."""
    own = dict(module.named_parameters())
    for name, theirs in smaller.named_parameters():
        if name not in stacked:
            own[name].copy_(theirs)
            continue
        if len(own[name]) < layers + 1:
            raise DrafterError(
                "tied layers repeat one block, and trained heads would change by more of it: give --own-layers"
            )
        for layer in range(layers):
            own[name][layer].copy_(theirs[layer % len(theirs)])


@torch.no_grad()
def quieten(layers: Iterable[nn.Module]) -> None:
    """Have layers of a transformer add nothing to what they read."""
    for layer in layers:
        assert isinstance(layer, Layer)
        layer.out.weight.zero_()
        layer.down.weight.zero_()


class TorchHeads:
    """Drafting in plain torch: the readable version, and the one for CUDA."""

    def __init__(self, module: HeadsModule, embedding_VD: Tensor, head_VD: Tensor):
        self.module, self.embedding, self.head = module, embedding_VD, module.of_known(head_VD)
        self._known = None if module.known is None else Known(module.known, len(embedding_VD))

    @torch.inference_mode()
    def draft(self, context_BD: Tensor, roots: Sequence[int], tree: RankTree) -> list[list[int]]:
        return tokens_of(tree, self.expander(context_BD, roots), roots, context_BD.device).tolist()

    def expander(self, context_BD: Tensor, roots: Sequence[int]) -> Expander:
        """For trees of any form."""
        return tempered(self._expander(context_BD, roots), self.module.temperatures)

    def _expander(self, context_BD: Tensor, roots: Sequence[int]) -> Expander:
        if self.module.markov is not None:
            logits = self.module.unconditional(context_BD, self.head).transpose(0, 1)
            root_B = torch.tensor(roots, device=context_BD.device)
            return MarkovExpander(logits, root_B, self.module.markov, self._known)
        if not self.module.sees_tokens:
            return _Independent(self.module.unconditional(context_BD, self.head), self._known)
        return _Chained(self, context_BD, torch.tensor(roots, device=context_BD.device), self._known)


class _Independent(Expander):
    """Heads that see the context alone know all depths at once: the same may follow every node of a level."""

    def __init__(self, logits_KBV: Tensor, known: Known | None):
        self._logits, self.known = logits_KBV, known

    def begin(self) -> Scores:
        return Scores(self._logits[0][:, None])

    def expand(self, frontier: Frontier) -> Scores:
        return Scores(self._logits[frontier.depth][:, None])


class _Chained(Expander):
    """Heads that see the tokens drafted before theirs, each node its own branch."""

    def __init__(self, heads: TorchHeads, context_BD: Tensor, root_B: Tensor, known: Known | None):
        self._heads, self.known = heads, known
        self._z_BWM = torch.cat((context_BD, heads.embedding[root_B]), -1)[:, None]

    def begin(self) -> Scores:
        return self._scores(0)

    def expand(self, frontier: Frontier) -> Scores:
        rows = np.arange(len(frontier.tokens_BW))[:, None]
        branches = self._z_BWM[rows, frontier.parents_BW]
        self._z_BWM = torch.cat((branches, self._heads.embedding[frontier.tokens_BW]), -1)
        return self._scores(frontier.depth)

    def _scores(self, head: int) -> Scores:
        module = self._heads.module
        state = module.head_state(head, self._z_BWM)
        return Scores(module.projected(head, state, self._heads.head), {LAST: state})


def format_of(network: Network, weights: str) -> torch.dtype:
    """The number format of heads on this target. weights: "int8", "target" (as the target's), or
    "auto": int8 on the native kernels beside a target in half precision, for a guess need not be
    exact, and it is read at every step.

    Raises DrafterError for another word, and where int8 cannot be had.
    """
    if weights not in ("auto", "int8", "target"):
        raise DrafterError(f"heads have no weights {weights!r}: choose auto, int8 or target")
    knows_int8 = torch.int8 in network.backend.formats
    if weights == "int8" and not knows_int8:
        raise DrafterError("heads with int8 weights need the native kernels, and this target runs on torch: use auto")
    rounded = weights == "int8" or (weights == "auto" and knows_int8 and network.dtype == torch.bfloat16)
    return torch.int8 if rounded else network.weights


def drafting(module: HeadsModule, network: Network, weights: str) -> Drafting:
    """The heads on the target's own backend and device, in the number format of `format_of`."""
    kind = format_of(network, weights)
    module = module.to(device=network.device, dtype=network.dtype).eval().requires_grad_(False)
    in_one_go = network.backend.heads(module, network, kind)
    return in_one_go or TorchHeads(module, network.input_embedding, network.head_matrix())


def layer_like(network: Network) -> LayerConfig:
    """Layers of the heads' own, of the shape of one of the target's."""
    cached, layer = network.cache_shape, network.layer_shape
    kv_heads = cached.kv_heads if layer.heads % cached.kv_heads == 0 else layer.heads
    return LayerConfig(
        layer.heads, kv_heads, cached.head_dim, layer.mlp_width, network.max_length, layer.norm_eps, layer.rope_theta
    )


class ContextReader(Protocol):
    """Follows the target's states, row by row in slot order."""

    def admit(self, row: Row, states_1SD: Tensor | None) -> None:
        """A new row takes the next slot; its prompt gave these states (None: it has but one token).
        If this fails, nothing has changed."""

    def release(self, slot: int) -> None: ...

    def observe(self, states: Sequence[Tensor]) -> None:
        """The states [n, D] of the tokens that were just verified in each row, oldest first."""

    def retract(self, slot: int, length: int) -> None:
        """Forget the states of all tokens from this length on."""

    def known(self, slot: int) -> int:
        """Of how many of a row's tokens the states were read."""


class ContextMaker(ContextReader, Protocol):
    """Has one state per row that says it all."""

    def contexts(self) -> list[Tensor | None]:
        """[D] per row; None where nothing is known."""


REMEMBERED = 256
"""States of a row that can be gone back to: more than a level of a hierarchy ever takes back."""


WAITING = 32
"""Steps whose states may wait to be read together."""


class _States:
    """The newest states of one row. count: how many of its tokens have had one."""

    def __init__(self) -> None:
        self.count = 0
        self._parts: list[Tensor] = []
        self._held = 0

    def append(self, part_ND: Tensor) -> None:
        self._parts.append(part_ND)
        self.count += len(part_ND)
        self._held += len(part_ND)
        while self._held - len(self._parts[0]) >= REMEMBERED:
            self._held -= len(self._parts.pop(0))

    def truncate(self, length: int) -> None:
        """Forget the newest, down to this count."""
        excess, self.count = max(0, self.count - length), min(self.count, length)
        while excess and self._parts:
            part = self._parts.pop()
            kept = part[: max(0, len(part) - excess)]
            self._held -= len(part) - len(kept)
            excess -= len(part) - len(kept)
            if len(kept):
                self._parts.append(kept)

    @property
    def last(self) -> Tensor | None:
        return self._parts[-1][-1] if self._parts else None

    def since(self, number: int) -> Tensor | None:
        """Those of the tokens from this number on, [n, D]; None where one of them is not remembered, or there are
        none."""
        wanted, parts = self.count - number, list[Tensor]()
        for part in reversed(self._parts):
            if wanted <= 0:
                break
            parts.insert(0, part[-wanted:])
            wanted -= len(part)
        return torch.cat(parts) if parts and wanted <= 0 else None


class LastState:
    """The context is the target's state itself."""

    def __init__(self) -> None:
        self._rows: Slots[_States] = Slots()

    def admit(self, row: Row, states_1SD: Tensor | None) -> None:
        states = _States()
        if states_1SD is not None:
            states.append(states_1SD[0, -1:].clone())  # not the whole prompt's
            states.count = states_1SD.shape[1]
        self._rows.admit(states)

    def release(self, slot: int) -> None:
        self._rows.release(slot)

    def observe(self, states: Sequence[Tensor]) -> None:
        for row, part in zip(self._rows, states, strict=True):
            row.append(part)

    def retract(self, slot: int, length: int) -> None:
        self._rows[slot].truncate(length)

    def known(self, slot: int) -> int:
        return self._rows[slot].count

    def contexts(self) -> list[Tensor | None]:
        return [row.last for row in self._rows]


class _Unread:
    """States of one row that wait to be read, as they came. count: how many they are, for asking tensors takes time."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.count = 0

    def append(self, part_ND: Tensor) -> None:
        self.parts.append(part_ND)
        self.count += len(part_ND)

    def keep(self, begin: int, end: int | None = None) -> None:
        """These alone go on waiting."""
        kept = torch.cat(self.parts)[begin:end] if self.parts else None
        self.count = 0 if kept is None else len(kept)
        self.parts = [kept] if kept is not None and self.count else []


class PrefixState(LastState):
    """The context is what a layer of the heads' own makes of the states of all verified tokens (Hydra++).

    The layer is a model that reads states, of verified tokens only. What was verified waits until a
    context is asked for, or for so many steps: a drafter in front of the heads may answer instead
    of them.
    """

    def __init__(self, network: Network, longest: int):
        """longest: the most tokens of a row that one step keeps. Shorter rows of a batch are padded to that."""
        super().__init__()
        self._longest = max(longest, WAITING)
        self.model = Model(network, self._longest)
        self._waiting: Slots[_Unread] = Slots()

    def admit(self, row: Row, states_1SD: Tensor | None) -> None:
        slot, read = self.model.admit(row.limit), None
        try:
            for part in () if states_1SD is None else torch.split(states_1SD[0], CHUNK):
                read = self._read([part], slot)
        except BaseException:
            self.model.release(slot)
            raise
        super().admit(row, read)
        self._rows[-1].count = 0 if states_1SD is None else states_1SD.shape[1]
        self._waiting.admit(_Unread())

    def release(self, slot: int) -> None:
        self._waiting.release(slot)
        self.model.release(slot)
        super().release(slot)

    def observe(self, states: Sequence[Tensor]) -> None:
        for waiting, part in zip(self._waiting, states, strict=True):
            waiting.append(part)
        if any(len(waiting.parts) >= WAITING for waiting in self._waiting):
            self._catch_up()

    def retract(self, slot: int, length: int) -> None:
        self._waiting[slot].keep(0, max(0, length - self._rows[slot].count))
        super().retract(slot, length)
        self.model.truncate(slot, length)

    def known(self, slot: int) -> int:
        return super().known(slot) + self._waiting[slot].count

    def contexts(self) -> list[Tensor | None]:
        self._catch_up()
        return super().contexts()

    def _catch_up(self) -> None:
        while any(waiting.count for waiting in self._waiting):
            self._read_some()

    def _read_some(self) -> None:
        """Read what waits, at most `longest` tokens of every row."""
        some = next(waiting.parts[0] for waiting in self._waiting if waiting.count)
        parts = [torch.cat(waiting.parts or [some[:0]])[: self._longest] for waiting in self._waiting]
        for waiting in self._waiting:
            waiting.keep(self._longest)
        read = self._read(parts, 0)
        for row, states, part in zip(self._rows, read, parts, strict=True):
            if len(part):
                row.append(states[: len(part)])

    def _read(self, parts: Sequence[Tensor], start: int) -> Tensor:
        """Append states [n, D] to the slots from `start` on; what the layer says of them, [B, N, D]."""
        layer = self.model.network.cache_shape.layers
        return self.model.append(Inputs.of_states(parts), start, (layer,)).hidden[layer]


class StatesDrafter(Drafter):
    """A drafter whose `reader` follows the target's states of some layers, side by side where there are several."""

    def __init__(self, name: str, layers: Sequence[int]):
        self.name, self.layers = name, tuple(layers)
        self.reads = frozenset(layers)

    @property
    def reader(self) -> ContextReader:
        raise NotImplementedError

    def admit(self, row: Row, hidden: Mapping[int, Tensor]) -> None:
        self.reader.admit(row, self._joined([hidden[layer] for layer in self.layers]) if hidden else None)

    def release(self, slot: int) -> None:
        self.reader.release(slot)

    def observe(self, context: Context, tree: TokenTree, verdict: Verdict, scores: Scores) -> None:
        joined = self._joined([scores.hidden[layer] for layer in self.layers])
        kept = [states[path] for states, path in zip(joined, verdict.kept, strict=True)]
        leads = [0] * len(kept)
        if scores.before:
            before = [self._joined(row) for row in zip(*(scores.before[layer] for layer in self.layers), strict=True)]
            leads = list(map(len, before))
            kept = [torch.cat(pair) for pair in zip(before, kept, strict=True)]
        self._align([len(row.tokens) - 1 - lead for row, lead in zip(context.rows, leads, strict=True)])
        self.reader.observe(kept)

    def retract(self, lengths: Sequence[int]) -> None:
        for slot, length in enumerate(lengths):
            self.reader.retract(slot, length)

    def depths(self, context: Context) -> list[int]:
        """How deep each row may draft: not at all where a level above has placed tokens not read yet."""
        self._align([len(row.tokens) - 1 for row in context.rows])
        return [
            depth if self.reader.known(slot) == len(row.tokens) - 1 > 0 else 0
            for slot, (row, depth) in enumerate(zip(context.rows, context.depths, strict=True))
        ]

    @staticmethod
    def _joined(states: Sequence[Tensor]) -> Tensor:
        return states[0] if len(states) == 1 else torch.cat(list(states), -1)

    def _align(self, lengths: Sequence[int]) -> None:
        """A row that stood still while others went on has its newest token read again and again: as
        the model does, forget that one before it is read the next time."""
        for slot, length in enumerate(lengths):
            if self.reader.known(slot) > length:
                self.reader.retract(slot, length)


@dataclass(frozen=True)
class HeadParts:
    """A drafter's working parts: how it drafts, what it makes of the target's states, the tree it grows, and the
    layer it reads."""

    drafting: Drafting
    reader: ContextMaker
    tree: RankTree
    layer: int


class HeadDrafter(StatesDrafter):
    """Heads grow the same tree at every step, cut to what a row has room for."""

    def __init__(self, name: str, head: HeadParts):
        super().__init__(name, (head.layer,))
        self.head = head
        self.max_nodes = head.tree.size

    @property
    def reader(self) -> ContextMaker:
        return self.head.reader

    def propose(self, context: Context) -> TokenTree:
        roots, (context_BD, depths) = (
            [row.tokens[-1] for row in context.rows],
            contexts(self.reader, self.depths(context)),
        )
        tree = self.head.tree.within(max(depths), max(context.budgets))
        if tree is None or context_BD is None:
            return TokenTree.root(roots, context.device)
        tokens = self.head.drafting.draft(context_BD, roots, tree)
        return cut(tokens, tree, parts_of(tree, depths, context.budgets), context.device)


def contexts(reader: ContextMaker, depths: Sequence[int]) -> tuple[Tensor | None, list[int]]:
    """Of all rows, zeros where nothing is known, [B, D], and the depths, 0 there. None: nothing is known of any."""
    states = reader.contexts() if any(depths) else [None] * len(depths)
    some = next((state for state in states if state is not None), None)
    if some is None:
        return None, [0] * len(depths)
    stacked = torch.stack([torch.zeros_like(some) if state is None else state for state in states])
    return stacked, [0 if state is None else depth for state, depth in zip(states, depths, strict=True)]


class HeadChain(StatesDrafter):
    """Heads that see the tokens drafted before theirs draw a chain, which a rule ends."""

    def __init__(self, name: str, heads: TorchHeads, reader: ContextMaker, form: Form, layer: int):
        super().__init__(name, (layer,))
        self.heads, self._reader, self.form = heads, reader, form
        self.max_nodes = min(form.max_nodes, heads.module.count)

    @property
    def reader(self) -> ContextMaker:
        return self._reader

    @property
    def bytes_per_token(self) -> float:
        """Weights that are read for one drafted token."""
        return sum(one.nbytes for one in self.heads.module.parameters()) / self.heads.module.count

    def propose(self, context: Context) -> TokenTree:
        roots = [row.tokens[-1] for row in context.rows]
        context_BD, depths = contexts(self.reader, self.depths(context))
        depths = [min(depth, most, self.max_nodes) for depth, most in zip(depths, context.budgets, strict=True)]
        if context_BD is None or not any(depths):
            return TokenTree.root(roots, context.device)
        return self.form.grow(self.heads.expander(context_BD, roots), context, depths).tree
