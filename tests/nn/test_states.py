"""Transformers that read states instead of tokens, with and without a vocabulary, on torch and on native kernels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from forerun.native import library
from forerun.nn.backends.native.transformer import PackedTransformer, pack
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed, Read
from forerun.nn.foreign.network import Foreign
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer, TransformerConfig
from nn.feeding import small_model, some_tokens
from nn.kernel_oracles import BF16, CPU, FP32, INT8, REASON, guarded, instructions, same, some, threads

needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))

STACK = TransformerConfig(0, width=40, layers=2, heads=4, kv_heads=2, head_dim=10, mlp_width=70, max_length=256)
CONFIGS = {
    "one layer": replace(STACK, layers=1),
    "two layers": STACK,
    "everything": replace(STACK, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, windows=(None, 9)),
    "with a vocabulary": replace(STACK, vocab_size=61),
}
KINDS = [(BF16, BF16), (FP32, FP32), (BF16, INT8), (FP32, INT8)]


def some_stack(config: TransformerConfig, dtype: torch.dtype = FP32) -> Transformer:
    model, generator = Transformer(config), torch.Generator().manual_seed(config.layers)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * 1.2 * weight.shape[-1] ** -0.5 if weight.dim() == 2 else weight + noise * 0.2)
    return model.to(dtype).requires_grad_(False)


class Reader:
    """A network and its cache, fed with states by hand."""

    def __init__(self, network: Network, rows: int = 1, capacity: int = 64):
        self.network = network
        self.cache = Cache(network.cache_shape, network.dtype, CPU)
        self.cache.reserve(rows, capacity)
        for _ in range(rows):
            self.cache.admit()

    def read(self, parts: Sequence[Tensor], start: int = 0, last: bool = False, ids: int = -7) -> Read:
        """Commit one piece [N, D] per row, ragged; all hidden states are asked for. The ids mean nothing."""
        counts = np.asarray([len(part) for part in parts])
        lengths = np.asarray(self.cache.lengths[start : start + len(parts)])
        states = torch.full((len(parts), counts.max(), parts[0].shape[1]), 0.0, dtype=parts[0].dtype)
        for row, part in enumerate(parts):
            states[row, : len(part)] = part
        feed = Feed(
            tokens_BN=torch.full(states.shape[:2], ids),
            lengths_B=lengths,
            where_BN=lengths[:, None] + np.arange(counts.max()),
            start=start,
            counts_B=counts,
            last_B=counts - 1 if last else None,
            dtype=self.network.dtype,
            states_BND=states,
        )
        with torch.inference_mode():
            read = self.network.forward(feed, self.cache, range(self.network.cache_shape.layers + 1))
        for row, part in enumerate(parts):
            self.cache.keep(start + row, list(range(len(part))))
        return read


def final(read: Read, row: int, count: int) -> Tensor:
    return read.hidden[max(read.hidden)][row, :count]


# ---- torch


def test_a_stack_without_vocabulary_is_made_without_warnings_or_unused_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Transformer(STACK).initialise(seed=1)
    assert not any(name.startswith(("embedding", "head")) for name, _ in model.named_parameters())
    assert model.dtype == FP32 and model.device == CPU and model.vocab_size == 0


def test_features_are_the_encoded_embeddings() -> None:
    model = some_stack(CONFIGS["with a vocabulary"])
    tokens = torch.tensor([some_tokens(9), some_tokens(9, seed=1)])
    assert torch.equal(model.features(tokens), model.encode(model.embedding(tokens)))


def test_encoded_states_can_be_trained_through() -> None:
    model, x = some_stack(STACK).requires_grad_(True), some(2, 5, 40, seed=1).requires_grad_(True)
    model.encode(x)[:, 2].square().sum().backward()
    assert x.grad is not None and (x.grad[:, :3] != 0).all() and (x.grad[:, 3:] == 0).all()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_states_read_in_ragged_pieces_are_encoded(name: str) -> None:
    model, texts = some_stack(CONFIGS[name]), [some(n, 40, seed=n) for n in (19, 12, 15)]
    reader, begin = Reader(model, rows=3), [0, 0, 0]
    whole = [model.encode(text[None])[0] for text in texts]
    for counts in ((3, 1, 5), (1, 1, 1), (5, 2, 4), (4, 5, 1)):
        parts = [text[at : at + n] for text, at, n in zip(texts, begin, counts, strict=True)]
        read = reader.read(parts)
        assert read.logits_BNV.shape == (3, max(counts), model.vocab_size)
        for row, (at, n) in enumerate(zip(begin, counts, strict=True)):
            torch.testing.assert_close(final(read, row, n), whole[row][at : at + n], atol=1e-5, rtol=1e-5)
        begin = [at + n for at, n in zip(begin, counts, strict=True)]


def test_states_that_are_embeddings_say_what_the_tokens_say() -> None:
    model, tokens = some_stack(CONFIGS["with a vocabulary"]), some_tokens(9)
    read = Reader(model).read([model.input_embedding[tokens]], last=True)
    logits = model.features(torch.tensor([tokens]))[:, -1:] @ model.output_head.T
    torch.testing.assert_close(read.logits_BNV, logits, atol=1e-5, rtol=1e-5)


def test_tokens_cannot_be_read_without_a_vocabulary() -> None:
    model = some_stack(STACK)
    feed = Feed(torch.zeros(1, 1, dtype=torch.int64), np.zeros(1, np.int64), np.zeros((1, 1), np.int64))
    networks: list[Network] = [model, *([] if REASON else [pack(model)])]
    for network in networks:
        with pytest.raises(ValueError, match="states_BND"):
            network.forward(feed, Reader(network).cache)


def test_a_foreign_model_refuses_states_and_shows_its_matrices() -> None:
    model = small_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64)
    foreign = Foreign(model, "a gpt2")
    assert torch.equal(foreign.input_embedding, model.transformer.wte.weight)
    assert torch.equal(foreign.output_head, model.lm_head.weight)
    with pytest.raises(ValueError, match="not states"):
        Reader(foreign).read([some(1, 32, seed=0)])


# ---- native kernels


@needs_kernels
@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_fp32_is_what_torch_encodes(name: str, isa: str) -> None:
    model, texts = some_stack(CONFIGS[name]), [some(17, 40, seed=1), some(6, 40, seed=2)]
    theirs = Reader(model, 2).read(texts)
    with instructions(isa) as there:
        if not there:
            pytest.skip(f"this processor has no {isa}")
        ours = Reader(pack(model), 2).read(texts)
    assert ours.logits_BNV.shape == theirs.logits_BNV.shape == (2, 17, model.vocab_size)
    assert (ours.best_BN is None) == (model.vocab_size == 0)
    for row, text in enumerate(texts):
        torch.testing.assert_close(
            ours.logits_BNV[row, : len(text)], theirs.logits_BNV[row, : len(text)], atol=1e-4, rtol=1e-4
        )
        for layer in theirs.hidden:
            mine, yours = (read.hidden[layer][row, : len(text)] for read in (ours, theirs))
            torch.testing.assert_close(mine, yours, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(final(ours, row, len(text)), model.encode(text[None])[0], atol=1e-4, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("weights", [BF16, INT8], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_rounded_weights_and_inputs_stay_close(name: str, weights: torch.dtype) -> None:
    model, text = some_stack(CONFIGS[name], BF16), some(50, 40, seed=1, dtype=BF16)
    exact = model.float().encode(text[None].float())[0]
    model = model.to(BF16)
    theirs = final(Reader(model).read([text]), 0, 50).float()
    ours = final(Reader(pack(model, weights)).read([text]), 0, 50).float()
    allowed = 1.05 if weights == BF16 else 5
    assert (ours - exact).abs().mean() < allowed * (theirs - exact).abs().mean()


@needs_kernels
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_states_read_in_any_pieces_slots_and_company_are_the_same(
    name: str, kind: tuple[torch.dtype, torch.dtype], count: int
) -> None:
    network = pack(some_stack(CONFIGS[name], kind[0]), kind[1])
    texts = [some(n, 40, seed=n, dtype=kind[0]) for n in (30, 21, 17, 25)]
    alone = [Reader(network).read([text]).hidden for text in texts]
    reader, begin, chance = Reader(network, rows=4), [0] * 4, np.random.default_rng(0)
    with threads(count):
        for _ in range(12):
            start, rows = int(chance.integers(0, 4)), int(chance.integers(1, 5))
            slots = [slot for slot in range(start, min(4, start + rows)) if begin[slot] + 5 <= len(texts[slot])]
            if slots != list(range(start, start + len(slots))) or not slots:
                continue
            parts = [texts[slot][begin[slot] : begin[slot] + int(chance.integers(1, 6))] for slot in slots]
            read = reader.read(parts, start)
            for row, (slot, part) in enumerate(zip(slots, parts, strict=True)):
                for layer, states in alone[slot].items():
                    whole = states[0, begin[slot] : begin[slot] + len(part)]
                    assert same(read.hidden[layer][row, : len(part)], whole)
                begin[slot] += len(part)
    assert min(begin) > 0


@needs_kernels
def test_states_in_fp32_are_not_rounded_for_bf16_weights() -> None:
    """The residual stream is fp32, and so may be what enters it."""
    network, x = pack(some_stack(STACK, BF16)), some(5, 40, seed=1)
    exact = some_stack(STACK, BF16).float().encode(x[None])[0]
    fine, coarse = (final(Reader(network).read([states]), 0, 5).float() for states in (x, x.to(BF16)))
    assert not torch.equal(fine, coarse)
    assert (fine - exact).abs().mean() < (coarse - exact).abs().mean()
    assert torch.equal(final(Reader(network).read([x.double()]), 0, 5).float(), coarse)


@needs_kernels
def test_states_of_a_wrong_shape_are_refused() -> None:
    network = pack(some_stack(STACK))
    with pytest.raises(ValueError, match="width 40"):
        Reader(network).read([some(2, 39, seed=0)])


@needs_kernels
@pytest.mark.parametrize("count", [1, 3])
def test_results_fill_their_memory_and_nothing_beside_it(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, texts = Reader(pack(some_stack(STACK, BF16)), rows=3), [some(n, 40, seed=n, dtype=BF16) for n in (4, 1, 3)]
    with threads(count), guarded(monkeypatch) as made:
        read = reader.read(texts, last=True)
    assert len(made) >= 4
    for memory in made:
        memory.check()
    assert all(
        (states[row, len(text) :] == 0).all() for states in read.hidden.values() for row, text in enumerate(texts)
    )


@needs_kernels
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_network_shows_its_matrices(tied: bool, kind: tuple[torch.dtype, torch.dtype]) -> None:
    model = some_stack(replace(CONFIGS["with a vocabulary"], tied=tied), kind[0])
    network: PackedTransformer = pack(model, kind[1])
    assert same(network.input_embedding, model.input_embedding)
    assert network.input_embedding is network.input_embedding
    head = network.output_head.unpacked()
    assert network.output_head is network.head and head.shape == model.output_head.shape
    assert (head - model.output_head.float()).abs().max() <= (0.01 * head.abs().max() if kind[1] == INT8 else 0)
    assert pack(some_stack(STACK), INT8).input_embedding.shape == (0, 40)
