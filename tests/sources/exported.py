"""Models as GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Vocabulary = Callable[[Any], None]


def export(
    model: Any,
    path: Path,
    formats: Mapping[str, str] | str = "F32",
    vocabulary: Vocabulary | None = None,
    change: Callable[[dict[str, tuple[np.ndarray, str]]], object] = lambda tensors: None,
    metadata: Callable[[Any], object] = lambda writer: None,
) -> Path:
    """A transformers model as a GGUF file. formats: of all matrices, or by the tensor's name without its layer
    ("attn_q"), F32 for the others. change: of tensors by name, before they are written."""
    config = model.config
    kind = "llama" if config.model_type == "mistral" else config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    (vocabulary or (lambda writer: None))(writer)
    metadata(writer)
    found = {}
    for name, weight in _state(model):
        array, theirs = _tensor(name, weight, config), published(name)
        found[theirs] = (array, _format(theirs, array, formats))
    change(found)
    for name, (array, format_) in found.items():
        if format_ in ("F32", "F16"):
            writer.add_tensor(name, array.astype({"F32": np.float32, "F16": np.float16}[format_]))
        else:
            type_ = gguf.GGMLQuantizationType[format_]
            blocks = array if array.dtype == np.uint8 else gguf.quants.quantize(array, type_)
            writer.add_tensor(name, blocks, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def published(name: str) -> str:
    """llama.cpp's name for a tensor."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head's first and second half in turn."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _state(model: Any) -> list[tuple[str, torch.Tensor]]:
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return list(state.items())


def _tensor(name: str, weight: torch.Tensor, config: Any) -> np.ndarray:
    array = weight.detach().float().numpy()
    if config.model_type in ("llama", "mistral"):
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:
                return permuted(array, count)
    return array


def _format(name: str, array: np.ndarray, formats: Mapping[str, str] | str) -> str:
    if array.ndim == 1:
        return "F32"
    return formats if isinstance(formats, str) else formats.get(name.split(".")[-2], "F32")


def sentencepiece(folder: Path) -> Vocabulary:
    """The tokenizer.model of a folder."""
    spm = pytest.importorskip("sentencepiece")
    processor = spm.SentencePieceProcessor(model_proto=(folder / "tokenizer.model").read_bytes())

    def add(writer: Any) -> None:
        ids = range(processor.get_piece_size())
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([processor.id_to_piece(id_) for id_ in ids])
        writer.add_token_scores([processor.get_score(id_) for id_ in ids])
        kinds = ((processor.is_unknown, 2), (processor.is_control, 3), (processor.is_unused, 5), (processor.is_byte, 6))
        writer.add_token_types([next((kind for ask, kind in kinds if ask(id_)), 1) for id_ in ids])
        writer.add_bos_token_id(processor.bos_id())
        writer.add_eos_token_id(processor.eos_id())
        writer.add_unk_token_id(processor.unk_id())
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(True)

    return add
