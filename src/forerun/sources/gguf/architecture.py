"""What llama.cpp calls an architecture and its tensors, in Hugging Face's words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers

from forerun.errors import CheckpointError
from forerun.sources.folder import brief
from forerun.sources.gguf.head import Head

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""A Mistral is called llama there."""
PERMUTED = ("llama", "mistral")
"""Their rotary pairs are neighbours in the file, and half a head apart in Hugging Face's."""
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
UNKNOWN = (
    "expert_count",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.temperature_length",
    "rope.scale_linear",
    "rope.scaling.yarn_log_multiplier",
)
"""What changes a model's sense and has no word in our families: refused unless it is 0."""


def published(name: str) -> str:
    """A tensor's name in Hugging Face's words; a name that is not known stays."""
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    layer, part, kind = found.groups() if found else (None, "", "")
    if layer is not None and part in IN_LAYER:
        return f"model.layers.{layer}.{IN_LAYER[part]}.{kind}"
    return f"{TOP[part]}.{kind}" if layer is None and part in TOP else name


def config_of(head: Head) -> transformers.PreTrainedConfig:
    """config.json as it would stand beside these weights. CheckpointError for an architecture that is not known."""
    said = _Said(head, str(head.fields.get("general.architecture")))
    if said.kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{head.path} holds the architecture {said.kind}, and of GGUF files {', '.join(ARCHITECTURES)} are read:"
            " take the model's Hugging Face folder"
        )
    strange = [key for key in UNKNOWN if said.optional(key)]
    if strange:
        raise said.refusal(f"{said.kind}.{strange[0]} {said.optional(strange[0])}")
    window = said.optional("attention.sliding_window")
    if window and said.kind != "llama":
        raise said.refusal(f"{said.kind}.attention.sliding_window {window}")
    kind = "mistral" if window else said.kind
    fields = _shape(said) | {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "tie_word_embeddings": "output.weight" not in head.tensors,
        "attention_bias": "blk.0.attn_output.bias" in head.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in head.tensors,
        "rope_parameters": _rope(said),
        "bos_token_id": head.fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": head.fields.get("tokenizer.ggml.eos_token_id"),
        **({"sliding_window": window} if window else {}),
    }
    try:
        return transformers.AutoConfig.for_model(kind, **fields)
    except Exception as error:  # it raises whatever its first victim raises
        raise CheckpointError(
            f"the metadata of {head.path} cannot be used ({brief(error)}): fetch it again or convert it anew"
        ) from error


@dataclass(frozen=True)
class _Said:
    """The metadata of an architecture."""

    head: Head
    kind: str

    def optional(self, key: str, usual: Any = None) -> Any:
        return self.head.fields.get(f"{self.kind}.{key}", usual)

    def number(self, key: str, usual: Any = None) -> Any:
        """One number; of a list, if all its entries are the same."""
        found = self.optional(key, usual)
        if isinstance(found, list) and found and all(one == found[0] for one in found):
            found = found[0]
        if isinstance(found, bool) or not isinstance(found, int | float):
            what = "nothing" if found is None else f"{found!r:.40}"
            raise CheckpointError(
                f"{self.head.path} says {what} for {self.kind}.{key}, which has to be a number:"
                " fetch it again or convert it anew"
            )
        return found

    def refusal(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.head.path} asks for {what}, which is not known here: choose another model")


def _shape(said: _Said) -> dict[str, Any]:
    width, heads = said.number("embedding_length"), said.number("attention.head_count")
    head_dim = said.number("attention.key_length", width // heads if heads else None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if said.number(key, head_dim) != head_dim:
            raise said.refusal(f"{said.kind}.{key} {said.optional(key)} with heads of {head_dim}")
    embedding = said.head.tensors.get("token_embd.weight")
    return {
        "vocab_size": embedding.shape[0] if embedding else said.number("vocab_size"),
        "hidden_size": width,
        "intermediate_size": said.number("feed_forward_length"),
        "num_hidden_layers": said.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": said.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": said.number("context_length"),
        "rms_norm_eps": said.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
    }


def _rope(said: _Said) -> dict[str, Any]:
    theta = {"rope_theta": float(said.number("rope.freq_base", 10000.0))}
    kind, factor = said.optional("rope.scaling.type", "none"), said.optional("rope.scaling.factor")
    if FREQUENCIES in said.head.tensors:
        return theta | _llama3(said)
    if kind == "none" or not factor:
        return {"rope_type": "default"} | theta
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(factor)} | theta
    if kind != "yarn" or said.optional("rope.scaling.attn_factor", 1.0) != 1.0:
        raise said.refusal(f"{said.kind}.rope.scaling {kind} with a factor of {factor}")
    betas = {name: said.optional(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
    return {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": said.number("rope.scaling.original_context_length"),
        **theta,
        **{name: float(value) for name, value in betas.items() if value is not None},
    }


def _llama3(said: _Said) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, of which a file has only what comes of it: factors of frequencies."""
    held = said.head.tensors[FREQUENCIES]
    if held.format != "F32":
        raise said.refusal(f"{FREQUENCIES} in {held.format}")
    there = np.fromfile(held.path, np.float32, held.nbytes // 4, offset=held.offset)
    width = 2 * len(there)
    frequencies = said.number("rope.freq_base", 10000.0) ** (-np.arange(0, width, 2) / width)
    factor = float(there.max(initial=1.0))
    turns = LLAMA3["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    smooth = (turns - LLAMA3["low_freq_factor"]) / (LLAMA3["high_freq_factor"] - LLAMA3["low_freq_factor"])
    smooth = np.clip(smooth, 0.0, 1.0)
    if not np.allclose(there, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise said.refusal(f"factors of rotary frequencies ({FREQUENCIES}) that are not those of Llama 3.1")
    return {"rope_type": "llama3", "factor": round(factor, 4)} | LLAMA3
