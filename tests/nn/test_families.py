"""Every family, ours and foreign, says through the cache exactly what transformers says without one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from forerun.native import library
from forerun.nn.backends.native.transformer import PackedTransformer
from forerun.nn.foreign.network import Foreign
from forerun.nn.load import load_network
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer
from nn.feeding import CPU, Reader, Tree, plain, saved, small_model, some_tokens, some_tree

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}

OURS: dict[str, dict[str, Any]] = {
    "llama": {"kind": "llama"},
    "llama with everything": {
        "kind": "llama",
        "num_key_value_heads": 2,
        "head_dim": 12,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "llama tied": {"kind": "llama", "tie_word_embeddings": True},
    "llama linear": {"kind": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
    "llama llama3": {"kind": "llama", "rope_parameters": LLAMA3},
    "llama yarn": {"kind": "llama", "rope_parameters": YARN},
    "mistral": {"kind": "mistral", "num_key_value_heads": 2, "sliding_window": 4},
    "qwen2": {"kind": "qwen2", "num_key_value_heads": 2},
    "qwen2 windowed": {"kind": "qwen2", **WINDOWED},
    "qwen3": {"kind": "qwen3", "head_dim": 16, "num_key_value_heads": 2},
    "qwen3 tied": {"kind": "qwen3", "head_dim": 16, "tie_word_embeddings": True, "attention_bias": True},
}
FOREIGN: dict[str, dict[str, Any]] = {
    "gpt2": {"kind": "gpt2"},
    "gpt-neox": {"kind": "gpt_neox"},
    "gemma": {"kind": "gemma", "head_dim": 8, "num_key_value_heads": 1},
    "gemma2 windowed": {"kind": "gemma2", "head_dim": 8, "sliding_window": 4},
    "phi": {"kind": "phi", "num_key_value_heads": 2},
    "opt": {"kind": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
    "llama dynamic": {"kind": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
}
ROWS = (some_tokens(9, 1), some_tokens(4, 2), some_tokens(13, 3))


@dataclass(frozen=True)
class Family:
    name: str
    kernels: str
    theirs: Any
    ours: Network

    def agrees(self, logits: torch.Tensor, text: list[int]) -> None:
        """`logits` [V] are what transformers says after `text`."""
        torch.testing.assert_close(logits, plain(self.theirs, text).logits[0, -1], atol=2e-5, rtol=1e-4)


WAYS = [(name, kernels) for name in OURS for kernels in ("torch", "native")] + [(name, "auto") for name in FOREIGN]


@pytest.fixture(scope="module", params=WAYS, ids=" on ".join)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    name, kernels = request.param
    if kernels == "native" and (reason := library.why_not(CPU, torch.float32)):
        pytest.skip(reason)
    choices = dict((OURS | FOREIGN)[name])
    theirs = small_model(choices.pop("kind"), **choices)
    folder = saved(theirs, tmp_path_factory.mktemp("family"))
    return Family(name, kernels, theirs, load_network(folder, torch.float32, CPU, kernels))


def test_each_family_is_read_by_the_network_it_should(family: Family) -> None:
    assert isinstance(family.ours, {"torch": Transformer, "native": PackedTransformer, "auto": Foreign}[family.kernels])
    assert family.ours.vocab_size == 61
    assert family.ours.max_length == 64
    assert family.ours.dtype == torch.float32


def test_a_text_read_at_once(family: Family) -> None:
    text, layers = some_tokens(17), range(4)
    read = Reader(family.ours).read([text], layers=layers)
    theirs = plain(family.theirs, text)
    torch.testing.assert_close(read.logits_BNV, theirs.logits, atol=2e-5, rtol=1e-4)
    assert sorted(read.hidden) == list(layers)
    for layer in layers:
        torch.testing.assert_close(read.hidden[layer], theirs.hidden_states[layer], atol=2e-5, rtol=1e-4)


def test_a_text_read_in_pieces(family: Family) -> None:
    text, reader = some_tokens(17), Reader(family.ours)
    pieces = [reader.read([text[begin:end]]).logits_BNV for begin, end in ((0, 1), (1, 4), (4, 11), (11, 12), (12, 17))]
    torch.testing.assert_close(torch.cat(pieces, 1), plain(family.theirs, text).logits, atol=2e-5, rtol=1e-4)


def test_rows_of_different_lengths(family: Family) -> None:
    reader = Reader(family.ours, rows=3)
    first = reader.read(ROWS, last=True).logits_BNV
    assert first.shape == (3, 1, 61)
    for row, text in enumerate(ROWS):
        family.agrees(first[row, 0], text)
    more = [some_tokens(count, 7 + count) for count in (1, 5, 3)]
    then = reader.read(more, last=True).logits_BNV
    for row, text in enumerate(ROWS):
        family.agrees(then[row, 0], text + more[row])


def test_trees_behind_rows_of_different_lengths(family: Family) -> None:
    reader, trees = Reader(family.ours, rows=3), [some_tree(size, size) for size in (9, 7, 4)]
    reader.read(ROWS)
    logits = reader.score(trees)
    for row, tree in enumerate(trees):
        for leaf in set(range(len(tree.tokens))) - set(tree.parents):
            path = tree.path(leaf)
            theirs = plain(family.theirs, ROWS[row] + tree.text(leaf)).logits[0, -len(path) :]
            torch.testing.assert_close(logits[row, path], theirs, atol=2e-5, rtol=1e-4)


def test_a_kept_path_is_as_if_read(family: Family) -> None:
    reader, trees = Reader(family.ours, rows=2), [some_tree(9, 5), some_tree(9, 6)]
    reader.read(ROWS[:2])
    reader.score(trees)
    paths = [max((tree.path(node) for node in range(9)), key=len) for tree in trees]
    for slot, path in enumerate(paths):
        reader.cache.keep(slot, path)
    after = reader.read([[5], [9, 7]], last=True).logits_BNV
    for row, more in enumerate(([5], [9, 7])):
        family.agrees(after[row, 0], ROWS[row] + trees[row].text(paths[row][-1]) + more)


def test_a_single_row_and_a_single_token_need_no_mask(family: Family) -> None:
    reader = Reader(family.ours)
    reader.read([ROWS[0]])
    feed = reader._feed([Tree([8], [-1])], None)
    feed.paths_BNJ = None
    with torch.inference_mode():
        family.agrees(family.ours.forward(feed, reader.cache).logits_BNV[0, 0], [*ROWS[0], 8])


@pytest.mark.parametrize("name", OURS)
def test_the_training_forward_after_reading(name: str, tmp_path: Any) -> None:
    """The rotary tables are made while reading, in inference mode, and must still serve a backward pass."""
    choices = dict(OURS[name])
    theirs = small_model(choices.pop("kind"), **choices)
    ours = load_network(saved(theirs, tmp_path), torch.float32, CPU)
    assert isinstance(ours, Transformer)
    text = some_tokens(17)
    Reader(ours).read([text])
    features = ours.features(torch.tensor([text]))
    torch.testing.assert_close(features, plain(theirs, text).hidden_states[-1], atol=2e-5, rtol=1e-4)
    features.sum().backward()
    assert all(weight.grad is not None for weight in ours.blocks.parameters())
