"""A model reads states as it reads tokens, and hands back hidden states from every way of reading."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import forerun.model
from fakes import TableNetwork
from forerun.drafting.heads import PrefixState
from forerun.model import Inputs, Model
from forerun.nn.backends.native.transformer import pack
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed, Read
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.row import Row
from forerun.sampling import SamplingParams
from nn.kernel_oracles import REASON, some

STACK = TransformerConfig(0, width=40, layers=2, heads=4, kv_heads=2, head_dim=10, mlp_width=70, max_length=256)
every_kernel = pytest.mark.parametrize(
    "kernels", ["torch", pytest.param("native", marks=pytest.mark.skipif(REASON is not None, reason=str(REASON)))]
)


def stack() -> Transformer:
    return Transformer(STACK).initialise(seed=1).requires_grad_(False)


def on(network: Transformer, kernels: str) -> Network:
    return pack(network) if kernels == "native" else network


def row_of(tokens: list[int], limit: int = 200) -> Row:
    return Row(list(tokens), len(tokens), SamplingParams(), key=0, limit=limit)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_kernel
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_states_appended_in_ragged_pieces_are_encoded(kernels: str, data: st.DataObject) -> None:
    """Rows come, go and read different amounts, some nothing; every state is what the whole text makes of it."""
    network = stack()
    model = Model(on(network, kernels), 4)
    live: list[tuple[int, int]] = []
    for step in range(6):
        if not live or (len(live) < 3 and data.draw(st.booleans())):
            assert model.admit(60) == len(live)
            live.append((step, 0))
        counts = [data.draw(st.integers(0, 5)) for _ in live]
        counts[-1] += 1
        texts = [some(40, 40, seed=seed) for seed, _ in live]
        parts = [text[at : at + n] for text, (_, at), n in zip(texts, live, counts, strict=True)]
        with torch.inference_mode():
            read = model.append(Inputs.of_states(parts), layers=(2,)).hidden[2]
        for row, (text, (seed, at), count) in enumerate(zip(texts, live, counts, strict=True)):
            close(read[row, :count], network.encode(text[None])[0, at : at + count])
            live[row] = seed, at + count
        assert model.cache.lengths == [at for _, at in live]
        if data.draw(st.integers(0, 3)) == 0:
            slot = data.draw(st.integers(0, len(live) - 1))
            model.release(slot)
            live[slot] = live[-1]
            live.pop()


@every_kernel
def test_what_is_appended_takes_the_place_of_a_draft_that_nobody_kept(kernels: str) -> None:
    network, text = stack(), some(9, 40, seed=1)
    model = Model(on(network, kernels), 8)
    model.admit(60)
    with torch.inference_mode():
        model.append(Inputs.of_states([text[:4]]))
        tokens, depths = torch.zeros(1, 3, dtype=torch.int64), np.arange(1, 4)[None]
        model.grow(tokens, depths, states_BND=some(3, 40, seed=2)[None])
        read = model.append(Inputs.of_states([text[4:]]), layers=(2,)).hidden[2]
        again = model.grow(tokens[:, :1], depths[:, :1], layers=(2,), states_BND=text[None, :1]).hidden[2]
    close(read[0], network.encode(text[None])[0, 4:])
    close(again[0, 0], network.encode(torch.cat((text, text[:1]))[None])[0, -1])


@every_kernel
def test_a_tree_of_states_may_grow_and_be_kept(kernels: str) -> None:
    """As a drafter does whose layer reads its own states: committed ones, then a tree, of which a path is kept."""
    network, text, other = stack(), some(9, 40, seed=1), some(9, 40, seed=2)
    model = Model(on(network, kernels), 8)
    model.admit(60)
    with torch.inference_mode():
        model.append(Inputs.of_states([text[:5]]))
        nodes = torch.stack((text[5], other[5]))[None]
        first = model.grow(torch.zeros(1, 2).long(), np.array([[1, 1]]), np.array([[[0], [1]]]), (2,), nodes)
        deeper = model.grow(torch.zeros(1, 1).long(), np.array([[2]]), np.array([[[1, 2]]]), (0, 2), other[None, 6:7])
        close(first.hidden[2][0, 0], network.encode(text[None, :6])[0, -1])
        branch = torch.cat((text[:5], other[5:9]))
        close(deeper.hidden[2][0, 0], network.encode(branch[None])[0, 6])
        close(deeper.hidden[0][0, 0], other[6])
        model.keep([[1, 2]])
        rest = model.append(Inputs.of_states([other[7:9]]), layers=(2,)).hidden[2]
        close(rest[0], network.encode(branch[None])[0, 7:])


@every_kernel
def test_whole_texts_are_read_without_a_trace(kernels: str) -> None:
    network = Transformer(replace(STACK, vocab_size=61)).initialise(seed=1).requires_grad_(False)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 60, 0]])
    model, layer = Model(on(network, kernels), 0), network.config.layers
    with torch.inference_mode():
        for _ in range(2):
            found = model.read(Inputs.whole(tokens), (0, layer))
            close(found[layer], network.features(tokens))
            close(found[0], network.embedding(tokens))
            assert not model.cache.rows
    model.admit(20)
    with pytest.raises(ValueError, match="running"):
        model.read(Inputs.whole(tokens), (layer,))


def test_a_text_beyond_the_context_is_not_read() -> None:
    with pytest.raises(ValueError, match="4 tokens is longer than the context of 3"):
        Model(TableNetwork(4, max_length=3), 0).read(Inputs.whole(torch.zeros(1, 4).long()), (1,))


def test_what_is_read_is_forgotten_when_reading_fails() -> None:
    class Failing(TableNetwork):
        def forward(self, feed: Feed, cache: Cache, hidden_layers: Collection[int] = ()) -> Read:
            raise KeyboardInterrupt

    model = Model(Failing(4), 0)
    with pytest.raises(KeyboardInterrupt):
        model.read(Inputs.whole(torch.zeros(2, 4).long()), (1,))
    assert not model.cache.rows


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=3))
def test_states_come_with_what_comes_next(sizes: list[tuple[int, int]]) -> None:
    """A table's state is its logits: those of the newest token, and in front of it those of all
    that was read on the way."""
    network = TableNetwork(5, 1, order=1000)
    model, rows = Model(network, 4), []
    for index, (size, missing) in enumerate(sizes):
        tokens = np.random.default_rng(index).integers(0, 5, size + missing).tolist()
        rows.append(row_of(tokens[:size]))
        model.admit(200)
    model.next_scores(rows)
    before = list(model.cache.lengths)
    for row, index, (_, missing) in zip(rows, range(9), sizes, strict=False):
        row.tokens += np.random.default_rng(50 + index).integers(0, 5, missing).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forerun.model, "CHUNK", 6)
        scores = model.next_scores(rows, (1,))
    for index, (row, begin) in enumerate(zip(rows, before, strict=True)):
        own = [network.logits(row.tokens[: end + 1]) for end in range(len(row.tokens))]
        assert (scores.hidden[1][index, 0] == own[-1]).all() and (scores.logits_BNV[index, 0] == own[-1]).all()
        lead = own[min(begin, len(own) - 1) : -1]
        states = scores.before[1][index] if scores.before else []
        assert len(states) == len(lead) and all((a == b).all() for a, b in zip(states, lead, strict=True))


def test_a_network_may_read_tokens_and_states() -> None:
    """What EAGLE's layer does: the feed carries both, ragged alike, committed or not."""
    fed: list[Feed] = []

    class Eagle(TableNetwork):
        def forward(self, feed: Feed, cache: Cache, hidden_layers: Collection[int] = ()) -> Read:
            fed.append(feed)
            return super().forward(feed, cache, hidden_layers)

    model = Model(Eagle(5, order=1000), 4)
    model.admit(50)
    states = some(1, 3, 8, seed=1)
    model.append(Inputs(torch.tensor([[1, 2, 3]]), np.array([3]), states))
    scores = model.grow(torch.tensor([[4]]), np.array([[1]]), layers=(1,), states_BND=states[:, :1])
    assert torch.equal(fed[0].states_BND, states) and torch.equal(fed[1].states_BND, states[:, :1])
    assert (scores.hidden[1][0, 0] == model.network.logits([1, 2, 3, 4])).all()


@every_kernel
def test_the_prefix_layer_says_what_encoding_says(kernels: str) -> None:
    """Steps wait and are read together, some are taken back, and rows move: contexts are those of
    the states that are left."""
    network, texts = stack(), [some(60, 40, seed=seed) for seed in range(3)]
    prefix, at = PrefixState(on(network, kernels), 5), [0, 0, 0]
    with torch.inference_mode():
        for index, size in enumerate((7, 1, 12)):
            prefix.admit(row_of([0] * (size + 1)), texts[index][None, :size])
            at[index] = size
        order = [0, 1, 2]
        for step in range(40):
            counts = [(step * 7 + index * 3) % 3 for index in order]
            prefix.observe([texts[i][at[i] : at[i] + n] for i, n in zip(order, counts, strict=True)])
            for i, n in zip(order, counts, strict=True):
                at[i] = min(60, at[i] + n)
            if step % 5 == 2:
                slot = step % len(order)
                at[order[slot]] = max(1, at[order[slot]] - 1)
                prefix.retract(slot, at[order[slot]])
            if step == 20:
                prefix.release(0)
                order = [2, 1]
            if step % 4 == 3:
                for slot, (i, context) in enumerate(zip(order, prefix.contexts(), strict=True)):
                    assert context is not None and prefix.known(slot) == at[i] == prefix.model.cache.lengths[slot]
                    close(context, network.encode(texts[i][None, : at[i]])[0, -1])
