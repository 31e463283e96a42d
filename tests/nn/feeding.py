"""A network fed by hand: the slow, obvious version of `forerun.model`, and small models to feed."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from forerun.chance import Ints
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed, Read
from forerun.nn.network import Network

torch.set_num_threads(1)  # operations this small only lose time to threads, most of all beside other work

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def small_model(kind: str, **choices: Any) -> Any:
    """A random model of a transformers family, with nothing left at its neutral value (norms, biases)."""
    torch.manual_seed(len(kind))
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **(SMALL | choices)), dtype=torch.float32
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def some_tokens(count: int, seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, SMALL["vocab_size"]) for _ in range(count)]


@torch.no_grad()
def plain(model: Any, tokens: Sequence[int]) -> Any:
    """What transformers says about a text read at once, without a cache: logits [1, S, V] and all hidden states."""
    return model(torch.tensor([list(tokens)]), use_cache=False, output_hidden_states=True)


@dataclass(frozen=True)
class Tree:
    """Tokens and parents (-1 for the root) of one row."""

    tokens: list[int]
    parents: list[int]

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`."""
        return [] if node < 0 else [*self.path(self.parents[node]), node]

    def text(self, node: int) -> list[int]:
        return [self.tokens[n] for n in self.path(node)]


def some_tree(size: int, seed: int) -> Tree:
    chance = random.Random(seed)
    return Tree(some_tokens(size, seed), [-1] + [chance.randrange(max(0, node - 3), node) for node in range(1, size)])


class Reader:
    """A network and its cache. Rows are slots 0, 1, ..."""

    def __init__(self, network: Network, rows: int = 1, capacity: int = 64):
        self.network = network
        self.cache = Cache(network.cache_shape, network.dtype, network.device)
        self.cache.reserve(rows, capacity)
        for _ in range(rows):
            self.cache.admit()

    @torch.inference_mode()
    def read(self, parts: Sequence[Sequence[int]], last: bool = False, layers: Collection[int] = ()) -> Read:
        """Commit one piece of text per row; shorter ones are padded behind. `last`: score only the end of each."""
        trees = [Tree(list(part), list(range(-1, len(part) - 1))) for part in parts]
        ends = np.asarray([len(part) - 1 for part in parts]) if last else None
        read = self.network.forward(self._feed(trees, ends), self.cache, layers)
        for slot, part in enumerate(parts):
            self.cache.keep(slot, list(range(len(part))))
        return read

    @torch.inference_mode()
    def score(self, trees: Sequence[Tree]) -> Tensor:
        """Logits [B, N, V] of one uncommitted tree per row."""
        return self.network.forward(self._feed(trees, None), self.cache).logits_BNV

    def _feed(self, trees: Sequence[Tree], last_B: Ints | None) -> Feed:
        lengths = self.cache.lengths
        count = max(len(tree.tokens) for tree in trees)
        padded = [self._padded(tree, count) for tree in trees]
        depths = np.asarray([[len(tree.path(n)) - 1 for n in range(count)] for tree in padded])
        return Feed(
            tokens_BN=torch.tensor([tree.tokens for tree in padded]),
            lengths_B=np.asarray(lengths),
            where_BN=np.asarray(lengths)[:, None] + depths,
            paths_BNJ=np.asarray([[_padded_path(tree, n, count) for n in range(count)] for tree in padded], np.int32),
            counts_B=np.asarray([len(tree.tokens) for tree in trees]),
            dtype=self.network.dtype,
            last_B=last_B,
        )

    @staticmethod
    def _padded(tree: Tree, count: int) -> Tree:
        missing = count - len(tree.tokens)
        return Tree(tree.tokens + [0] * missing, tree.parents + [-1] * missing)


def _padded_path(tree: Tree, node: int, count: int) -> list[int]:
    path = tree.path(node)
    return path + [-1] * (count - len(path))


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder
