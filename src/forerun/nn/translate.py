"""The outside world's names for an architecture, and ours: config.json and tensor names, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from forerun.errors import CheckpointError
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.sources.folder import CONFIG

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def translate(outside: transformers.PreTrainedConfig, source: Path | str) -> TransformerConfig | None:
    """Our words for a config, or None where it asks for something that our transformer does not have."""
    fields = outside.to_dict()
    if not _is_ours(fields):
        return None
    try:
        return _translate(outside, fields)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"the {CONFIG} of {source} is incomplete ({error!r}): repair it") from error


def _is_ours(fields: Mapping[str, Any]) -> bool:
    kind = fields.get("model_type", "")
    rope = fields.get("rope_parameters") or {}
    return (
        kind in ARCHITECTURES
        and (fields.get("architectures") or [ARCHITECTURES[kind]]) == [ARCHITECTURES[kind]]
        and fields["hidden_act"] == "silu"
        and fields.get("is_causal", True)
        and fields.get("quantization_config") is None
        and rope.get("rope_type") in ROPE_TYPES
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and set(fields.get("layer_types") or ()) <= {"full_attention", "sliding_attention"}
    )


def _translate(outside: transformers.PreTrainedConfig, fields: dict[str, Any]) -> TransformerConfig:
    kind, heads, rope = fields["model_type"], fields["num_attention_heads"], fields["rope_parameters"]
    attention_bias = kind in ("llama", "qwen3") and bool(fields["attention_bias"])
    inv_freq, rope_scale = _scaled_frequencies(outside, rope["rope_type"])
    return TransformerConfig(
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        layers=fields["num_hidden_layers"],
        heads=heads,
        kv_heads=fields["num_key_value_heads"],
        head_dim=fields.get("head_dim") or fields["hidden_size"] // heads,
        mlp_width=fields["intermediate_size"],
        max_length=fields["max_position_embeddings"],
        norm_eps=fields["rms_norm_eps"],
        tied=bool(fields["tie_word_embeddings"]),
        qkv_bias=attention_bias or kind == "qwen2",
        out_bias=attention_bias,
        mlp_bias=kind == "llama" and bool(fields["mlp_bias"]),
        qk_norm=kind == "qwen3",
        windows=_windows(fields),
        inv_freq=inv_freq,
        rope_scale=rope_scale,
        rope_theta=float(rope["rope_theta"]),
        source=fields,
    )


def _scaled_frequencies(outside: transformers.PreTrainedConfig, rope_type: str) -> tuple[tuple[float, ...], float]:
    if rope_type == "default":
        return (), 1.0
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope_type](outside)
    return tuple(frequencies.tolist()), float(scale)


def _windows(fields: Mapping[str, Any]) -> tuple[int | None, ...]:
    """One window per layer; empty when no layer has one. A Mistral slides everywhere or nowhere, a Llama never does."""
    window, layers = fields.get("sliding_window"), fields["num_hidden_layers"]
    if fields["model_type"] == "llama" or window is None:
        return ()
    kinds = ["sliding_attention"] * layers if fields["model_type"] == "mistral" else fields["layer_types"]
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return windows if any(windows) else ()


# ---- published tensors -> parameters


@dataclass(frozen=True)
class Slice:
    """Where a published tensor lives: rows `begin .. begin + shape[0]` of one of our parameters."""

    parameter: str
    shape: tuple[int, ...]
    begin: int = 0

    def within(self, model: Transformer) -> Tensor:
        return model.get_parameter(self.parameter).detach()[self.begin : self.begin + self.shape[0]]


def places(config: TransformerConfig) -> dict[str, Slice]:
    """The published name of every tensor, and its place. All four families use the same names."""
    table = {
        "model.embed_tokens.weight": Slice("embedding.weight", (config.vocab_size, config.width)),
        "model.norm.weight": Slice("final_norm", (config.width,)),
    }
    if not config.tied:
        table["lm_head.weight"] = Slice("head.weight", (config.vocab_size, config.width))
    for layer in range(config.layers):
        for name, place in _places_in_layer(config).items():
            table[f"model.layers.{layer}.{name}"] = replace(place, parameter=f"blocks.{layer}.{place.parameter}")
    return table


def _places_in_layer(config: TransformerConfig) -> dict[str, Slice]:
    width, mlp = config.width, config.mlp_width
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    table = {
        "input_layernorm.weight": Slice("attention_norm", (width,)),
        "post_attention_layernorm.weight": Slice("mlp_norm", (width,)),
    }
    if config.qk_norm:
        table["self_attn.q_norm.weight"] = Slice("q_norm", (config.head_dim,))
        table["self_attn.k_norm.weight"] = Slice("k_norm", (config.head_dim,))
    for name, ours, begin, rows, columns, biased in (
        ("self_attn.q_proj", "qkv", 0, queries, width, config.qkv_bias),
        ("self_attn.k_proj", "qkv", queries, keys, width, config.qkv_bias),
        ("self_attn.v_proj", "qkv", queries + keys, keys, width, config.qkv_bias),
        ("self_attn.o_proj", "out", 0, width, queries, config.out_bias),
        ("mlp.gate_proj", "gate_up", 0, mlp, width, config.mlp_bias),
        ("mlp.up_proj", "gate_up", mlp, mlp, width, config.mlp_bias),
        ("mlp.down_proj", "down", 0, width, mlp, config.mlp_bias),
    ):
        table[f"{name}.weight"] = Slice(f"{ours}.weight", (rows, columns), begin)
        if biased:
            table[f"{name}.bias"] = Slice(f"{ours}.bias", (rows,), begin)
    return table


def published_config(config: TransformerConfig, dtype: torch.dtype) -> dict[str, object]:
    """config.json in the words of the family that has what `config` asks for, the plainest first."""
    kind, rope = _family(config), _published_rope(config)
    fields: dict[str, object] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.source.get("bos_token_id", 1),
        "eos_token_id": config.source.get("eos_token_id", 2),
        "rope_parameters": rope,
        # Older readers look for the next three under these names.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    return fields | _published_windows(config, kind)


def _family(config: TransformerConfig) -> str:
    if config.qk_norm:
        return "qwen3"
    if config.qkv_bias and not config.out_bias:
        return "qwen2"
    return "mistral" if any(config.windows) else "llama"


def _published_rope(config: TransformerConfig) -> dict[str, object]:
    """As it was read; scaled frequencies alone do not say how they were scaled."""
    rope = config.source.get("rope_parameters") if config.inv_freq else None
    return dict(rope) if isinstance(rope, Mapping) else {"rope_type": "default", "rope_theta": config.rope_theta}


def _published_windows(config: TransformerConfig, kind: str) -> dict[str, object]:
    if kind == "llama":
        return {}
    window = next((window for window in config.windows if window), None)
    if kind == "mistral":
        return {"sliding_window": window}
    windows = config.windows or (None,) * config.layers
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"sliding_window": window, "use_sliding_window": window is not None, "layer_types": kinds}
