"""Models of others: which are refused, with which words, and what only they need. That they agree with transformers is
shown for every family in test_families.py."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from forerun.errors import CheckpointError
from forerun.nn.cache import CacheShape
from forerun.nn.foreign.network import Foreign
from forerun.nn.load import load_network
from nn.feeding import CPU, Reader, plain, saved, small_model, some_tokens, some_tree


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Foreign:
    network = load_network(folder, dtype, CPU)
    assert isinstance(network, Foreign)
    return network


def refuse(folder: Path, *words: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_network(folder, torch.float32, CPU)
    message = str(caught.value)
    first = message.splitlines()[0]
    assert str(folder) in first
    assert ": " in first, "no mend"
    for word in words:
        assert word in message
    return message


# ---- what they are like


@pytest.mark.parametrize(
    ("kind", "choices", "shape", "windows"),
    [
        ("gpt2", {}, CacheShape(3, 4, 8), set()),
        ("gemma", {"head_dim": 10, "num_key_value_heads": 1}, CacheShape(3, 1, 10), set()),
        ("gemma2", {"head_dim": 8, "sliding_window": 4}, CacheShape(3, 4, 8), {4}),
        ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 2, "sliding_window": 6}, CacheShape(3, 2, 8), {6}),
    ],
)
def test_the_shape_of_the_cache_is_found_out(
    kind: str, choices: dict[str, Any], shape: CacheShape, windows: set[int], tmp_path: Path
) -> None:
    network = load(saved(small_model(kind, **choices), tmp_path))
    assert network.cache_shape == shape
    assert network.windows == windows


@pytest.mark.parametrize(("kind", "choices"), [("gpt2", {}), ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32})])
def test_learned_positions_reach_to_the_last(kind: str, choices: dict[str, Any], tmp_path: Path) -> None:
    theirs = small_model(kind, max_position_embeddings=16, **choices)
    network, text = load(saved(theirs, tmp_path)), some_tokens(16)
    assert network.max_length == 16
    logits = Reader(network).read([text]).logits_BNV
    torch.testing.assert_close(logits, plain(theirs, text).logits, atol=2e-5, rtol=1e-4)


def test_long_rope_ends_where_its_frequencies_would_change(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "long_factor": [4.0] * 4,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "original_max_position_embeddings": 32,
    }
    theirs = small_model("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    network, text = load(saved(theirs, tmp_path)), some_tokens(32)
    assert network.max_length == 32
    logits = Reader(network).read([text]).logits_BNV
    torch.testing.assert_close(logits, plain(theirs, text).logits, atol=2e-5, rtol=1e-4)


def test_half_precision(tmp_path: Path) -> None:
    theirs = small_model("gpt_neox")
    network, text = load(saved(theirs, tmp_path), torch.bfloat16), some_tokens(12)
    assert network.dtype == torch.bfloat16
    logits = Reader(network).read([text]).logits_BNV
    torch.testing.assert_close(logits.float(), plain(theirs, text).logits, atol=0.3, rtol=0.1)


def test_only_the_logits_asked_for_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = small_model("gpt2")
    network = load(saved(theirs, tmp_path))
    counts = []
    network.model.lm_head.register_forward_hook(lambda module, inputs, output: counts.append(inputs[0].shape[1]))
    texts = [some_tokens(9), some_tokens(2), some_tokens(9, 1)]
    logits = Reader(network, rows=3).read(texts, last=True).logits_BNV
    assert counts == [2]  # one for each different length
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row, 0], plain(theirs, text).logits[0, -1], atol=2e-5, rtol=1e-4)


def test_a_model_that_gives_all_logits_or_none(tmp_path: Path) -> None:
    theirs = small_model("gpt2")
    network, texts = load(saved(theirs, tmp_path)), [some_tokens(9), some_tokens(2)]
    network._trims = False
    logits = Reader(network, rows=2).read(texts, last=True).logits_BNV
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row, 0], plain(theirs, text).logits[0, -1], atol=2e-5, rtol=1e-4)


def test_constants_of_old_exports_do_not_matter(tmp_path: Path) -> None:
    saved(small_model("gpt2"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    weights["transformer.h.0.attn.masked_bias"] = torch.ones(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path)


# ---- refusals


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_positions_that_cannot_be_given(kind: str, tmp_path: Path) -> None:
    refuse(saved(small_model(kind, n_heads=4, d_model=32, n_layers=2), tmp_path), "ALiBi", "takes explicit positions")


def test_alibi_as_an_option(tmp_path: Path) -> None:
    refuse(saved(small_model("falcon", alibi=True), tmp_path), "ALiBi")


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        ("mamba", {"state_size": 4}),
        ("qwen3_next", {"num_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}),
    ],
)
def test_states_that_cannot_be_rolled_back(kind: str, choices: dict[str, Any], tmp_path: Path) -> None:
    refuse(saved(small_model(kind, **choices), tmp_path), "recurrent layers", "cannot be rolled back")


def test_encoder_decoders(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    refuse(saved(transformers.T5ForConditionalGeneration(config), tmp_path), "encoder-decoder", "decoder-only")


def test_models_that_see_later_tokens(tmp_path: Path) -> None:
    config = transformers.LlamaConfig.from_dict(small_model("llama").config.to_dict() | {"is_causal": False})
    refuse(saved(transformers.LlamaForCausalLM(config), tmp_path), "looks at later tokens")


def test_keys_and_values_of_different_shapes(tmp_path: Path) -> None:
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 12}
    choices = {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
    }
    theirs = small_model("deepseek_v3", head_dim=4, first_k_dense_replace=3, **latent, **choices)
    refuse(saved(theirs, tmp_path), "keys and values of different shapes")


def test_chunks(tmp_path: Path) -> None:
    theirs = small_model("llama4_text", head_dim=8, intermediate_size_mlp=48, num_local_experts=2)
    refuse(saved(theirs, tmp_path), "attends in chunks")


def test_windows_by_the_order_of_the_cache(tmp_path: Path) -> None:
    theirs = small_model("gpt_neo", attention_types=[[["global", "local", "global"], 1]], window_size=20)
    refuse(saved(theirs, tmp_path), "(gpt_neo)", "beyond its window_size of 20", "choose another model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_hides_no_window(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(
        small_model("gpt_neo", attention_types=[[["global", "local", "global"], 1]], window_size=20), tmp_path
    )
    with pytest.raises(CheckpointError, match="beyond its window_size of 20"):
        load(folder, dtype)


def test_no_longest_text(tmp_path: Path) -> None:
    theirs = small_model("gpt_neox")
    folder = saved(theirs, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": None}))
    assert "max_position_embeddings" in refuse(folder)


@pytest.mark.parametrize("swallowed", ["attention_mask", "position_ids"])
def test_masks_and_positions_that_are_ignored(swallowed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that swallows what it is given is found out by the rehearsal."""
    hears = transformers.GPT2LMHeadModel.forward

    @functools.wraps(hears)
    def is_deaf(self: Any, **given: Any) -> Any:
        return hears(self, **{name: value for name, value in given.items() if name != swallowed})

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", is_deaf)
    refuse(saved(small_model("gpt2"), tmp_path), "does not honour given masks and positions")


def test_weights_that_are_missing_or_too_many(tmp_path: Path) -> None:
    saved(small_model("gpt2"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.more"] = weights.pop("transformer.ln_f.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = refuse(tmp_path, "do not fit its config.json")
    assert message.splitlines()[1:] == ["  missing     transformer.ln_f.weight", "  unexpected  transformer.more"]


def test_weights_of_another_shape(tmp_path: Path) -> None:
    saved(small_model("gpt2"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.ln_f.weight"] = torch.ones(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refuse(tmp_path, "cannot be loaded by transformers")


def test_weights_cut_short(tmp_path: Path) -> None:
    saved(small_model("gpt2"), tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-5])
    refuse(tmp_path, "cannot be loaded by transformers", "fetch it again")


def test_only_pickles(tmp_path: Path) -> None:
    saved(small_model("gpt2"), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refuse(tmp_path, "only pickled weights (pytorch_model.bin)")


def test_a_model_that_is_not_for_text(tmp_path: Path) -> None:
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    refuse(saved(transformers.ViTModel(config), tmp_path), "cannot be loaded by transformers")


def test_a_quantised_llama_goes_to_transformers(tmp_path: Path) -> None:
    folder = saved(small_model("llama"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    refuse(folder, "cannot be loaded by transformers")


def test_rows_beside_each_other_do_not_matter(tmp_path: Path) -> None:
    """The logits of a row are the same whatever stands in the other rows (same shapes)."""
    network = load(saved(small_model("gemma2", head_dim=8, sliding_window=4), tmp_path))

    def first_row(neighbour: int) -> Tensor:
        reader = Reader(network, rows=2)
        reader.read([some_tokens(9), some_tokens(6, neighbour)])
        return reader.score([some_tree(7, 1), some_tree(7, neighbour)])[0]

    assert torch.equal(first_row(2), first_row(3))
