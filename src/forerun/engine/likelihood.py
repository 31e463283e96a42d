"""How probable a model finds texts that are given: rows beside one another, and nothing is generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from forerun.errors import RequestError
from forerun.model import CHUNK, Inputs, Model
from forerun.nn.network import Network

WIDTH = 128
"""Tokens of a row that are scored in one forward: each has logits over the whole vocabulary."""


@dataclass(frozen=True)
class Text:
    """context: at least one token. continuation: what is asked about."""

    context: Sequence[int]
    continuation: Sequence[int]

    @property
    def read(self) -> list[int]:
        """All that the model reads of it: nothing follows the last token."""
        return [*self.context, *self.continuation[:-1]]


@dataclass(frozen=True)
class Likelihood:
    """logprobs: natural logarithms, one per token of the continuation, each given everything before
    it. is_greedy: plain greedy decoding would have said the same."""

    logprobs: list[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@torch.inference_mode()
def likelihoods(
    network: Network,
    texts: Sequence[Text],
    rows: int = 16,
    watch: Callable[[int, Likelihood], None] = lambda index, found: None,
) -> list[Likelihood]:
    """One per text, in their order; up to `rows` of them run side by side, the longest first.

    watch: is shown every one with its place, as soon as it is known. The cache is its own: engines
    on the same network are not disturbed. RequestError for a text without context, with a token
    outside the vocabulary, or beyond the model's context.
    """
    for text in texts:
        _demand_sense(text, network)
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index].read))
    found: dict[int, Likelihood] = {}
    for begin in range(0, len(order), rows):
        batch = order[begin : begin + rows]
        for index, one in zip(batch, _side_by_side(network, [texts[index] for index in batch]), strict=True):
            found[index] = one
            watch(index, one)
    return [found[index] for index in range(len(texts))]


def _demand_sense(text: Text, network: Network) -> None:
    if not text.context:
        raise RequestError("a text to be scored has no context: give at least one token, such as the beginning of text")
    outside = [token for token in (*text.context, *text.continuation) if not 0 <= token < network.vocab_size]
    if outside:
        raise RequestError(f"token id {outside[0]} is outside the vocabulary of {network.vocab_size}")
    if len(text.read) > network.max_length:
        raise RequestError(
            f"a text of {len(text.read)} tokens is to be scored and the context holds {network.max_length}: shorten it"
        )


def _side_by_side(network: Network, texts: Sequence[Text]) -> list[Likelihood]:
    model = Model(network, WIDTH)
    model.reserve(len(texts), max(len(text.read) for text in texts))
    for _ in texts:
        model.cache.admit()
    _read(model, [text.context[:-1] for text in texts])
    logprobs: list[list[float]] = [[] for _ in texts]
    is_greedy = [True] * len(texts)
    asked = [[text.context[-1], *text.continuation[:-1]] if text.continuation else [] for text in texts]
    for begin in range(0, max(map(len, asked)), WIDTH):
        inputs = Inputs.of_tokens([row[begin : begin + WIDTH] for row in asked], network.device)
        shape = tuple(inputs.tokens_BN.shape)
        scores = model.grow(inputs.tokens_BN, np.broadcast_to(np.arange(1, shape[1] + 1), shape))
        model.keep([range(count) for count in inputs.counts_B.tolist()])
        for row, count in enumerate(inputs.counts_B.tolist()):
            said = torch.tensor(
                texts[row].continuation[begin : begin + count], dtype=torch.int64, device=network.device
            )
            laws = scores.logits_BNV[row, :count].float().log_softmax(-1)
            logprobs[row] += laws.gather(-1, said[:, None]).flatten().tolist()
            is_greedy[row] &= bool((scores.best[row, :count] == said).all())
    return [Likelihood(*both) for both in zip(logprobs, is_greedy, strict=True)]


def _read(model: Model, contexts: Sequence[Sequence[int]]) -> None:
    for begin in range(0, max(map(len, contexts)), CHUNK):
        model.append(Inputs.of_tokens([context[begin : begin + CHUNK] for context in contexts], model.device))
