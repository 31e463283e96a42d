"""What a model needs of a network, ours or anybody's, and of what it runs on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from forerun.native.matrix import Packed
from forerun.nn.backends.blocks import BlockNetwork, BlockWeights
from forerun.nn.backends.heads import DraftHeads, Drafting
from forerun.nn.cache import Cache, CacheShape
from forerun.nn.feed import Feed, Read
from forerun.nn.formats import Formats


@dataclass(frozen=True)
class LayerShape:
    """What one of a network's layers is like beside its keys and values (`CacheShape`): query
    heads, width between the two halves of its multilayer perceptron, epsilon of its norms, base of
    its rotary frequencies."""

    heads: int
    mlp_width: int
    norm_eps: float
    rope_theta: float


@dataclass(frozen=True)
class Footprint:
    """What runs a network, in words, how many numbers it has learnt, and the memory that they take."""

    runs_on: str
    parameters: int
    weight_bytes: int


class Backend(Protocol):
    """What networks run on. A third one need only be this, and networks that name it.

    name: as reports say it. keeps_bits: a token's logits have the same bits whatever is read beside
    it, in every number format. formats: what weights may be.
    """

    @property
    def name(self) -> str: ...

    @property
    def keeps_bits(self) -> bool: ...

    @property
    def formats(self) -> frozenset[torch.dtype]: ...

    def pack(self, module: nn.Module, weights: torch.dtype | Formats) -> Network:
        """A `Transformer` as a network on this backend. The module belongs to it from then on."""
        ...

    def heads(self, module: DraftHeads, network: Network, weights: torch.dtype) -> Drafting | None:
        """Draft heads beside a network of this backend, on its device and in its dtype already, that grow a static
        tree in one go; None where the readable growth does as well (`drafting.growth`)."""
        ...

    def blocks(self, block: BlockWeights, network: Network, weights: torch.dtype) -> BlockNetwork | None:
        """A block drafter's network beside a network of this backend, with its embedding and its head; None where the
        readable one does as well (`drafters.block`)."""
        ...

    def top_log_probs(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k most probable tokens of every row [..., V] that a network of this backend gave:
        natural logarithms of their probabilities, and their ids, [..., k]."""
        ...


class Network(Protocol):
    """Anything that reads a `Feed` and scores it: our `Transformer`, or a `Foreign` model.

    backend: what a forward runs on. weights: their number format (dtype, or int8), where a matrix
    is no exception. max_length: the most tokens a row may have. windows: the sliding-window sizes
    for which `forward` needs a mask of its own. no_tokens: ids [n] that have rows in the matrices
    and are no tokens, such as the padding beyond a tokenizer, or None; `Model` makes them
    impossible, whoever loads a network says which. home: the folder that it was loaded from, if it was.

    input_embedding and output_head, [V, D] each: the matrices themselves, for drafters that use the
    target's. Nobody else's to write to. output_head may be packed: `head_matrix` is it as a tensor
    in `dtype`, and output_shape its shape.
    """

    no_tokens: Tensor | None
    home: Path | None

    @property
    def backend(self) -> Backend: ...

    @property
    def weights(self) -> torch.dtype: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    @property
    def cache_shape(self) -> CacheShape: ...

    @property
    def windows(self) -> frozenset[int]: ...

    @property
    def input_embedding(self) -> Tensor: ...

    @property
    def output_head(self) -> Tensor | Packed: ...

    @property
    def output_shape(self) -> tuple[int, int]: ...

    @property
    def layer_shape(self) -> LayerShape: ...

    @property
    def footprint(self) -> Footprint: ...

    def head_matrix(self) -> Tensor: ...

    def forward(self, feed: Feed, cache: Cache, hidden_layers: Collection[int] = ()) -> Read:
        """Write the keys and values of `feed` into `cache` and score its tokens.

        hidden_layers: which hidden states to return, numbered as transformers does: i is the residual stream entering
        layer i, and the number of layers stands for the output of the final norm. Every token must see at least one
        entry.
        """
        ...
