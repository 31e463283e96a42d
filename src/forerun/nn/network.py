"""What a model needs of a network, ours or anybody's."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from forerun.native.matrix import Packed
from forerun.nn.cache import Cache, CacheShape
from forerun.nn.feed import Feed, Read


class Network(Protocol):
    """Anything that reads a `Feed` and scores it: our `Transformer`, or a `Foreign` model.

    kernels: "native" or "torch", what a forward runs on. weights: their number format (dtype, or int8). max_length: the
    most tokens a row may have. windows: the sliding-window sizes for which `forward` needs a mask of its own.

    input_embedding and output_head, [V, D] each: the matrices themselves, for drafters that use the target's. Nobody else's to
    write to.
    """

    @property
    def kernels(self) -> str: ...

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

    def forward(self, feed: Feed, cache: Cache, hidden_layers: Collection[int] = ()) -> Read:
        """Write the keys and values of `feed` into `cache` and score its tokens.

        hidden_layers: which hidden states to return, numbered as transformers does: i is the residual stream entering
        layer i, and the number of layers stands for the output of the final norm. Every token must see at least one
        entry.
        """
        ...
