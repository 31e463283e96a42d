"""Every causal architecture that transformers knows, small enough to build by the dozen, and what becomes of each.

Its windows are short, so that texts of some dozen tokens reach beyond them, and its layers are of every kind that the
published config has.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LAYERS, WINDOW = 4, 8

ALWAYS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WHERE_KNOWN: dict[str, Any] = (
    dict.fromkeys(("sliding_window", "sliding_window_size", "window_size", "keep_window_size"), WINDOW)
    | dict.fromkeys(("attention_chunk_size", "local_attention", "index_topk"), WINDOW)
    | dict.fromkeys(("ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_feedforward", "d_ff", "dff", "dim_ff"), 48)
    | dict.fromkeys(("embedding_size", "word_embed_proj_dim", "image_size", "hidden_size_global"), 32)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16)
    | dict.fromkeys(("kv_lora_rank", "q_lora_rank", "v_head_dim", "index_head_dim", "global_head_dim"), 16)
    | dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8)
    | dict.fromkeys(("mamba_n_heads", "mamba_d_head", "linear_head_dim"), 8)
    | dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), 32)
    | dict.fromkeys(("vocab_size_per_layer_input",), 61)
    | dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8)
    | dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size", "encoder_hash_byte_group_vocab"), 61)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "index_n_heads", "linear_num_heads"), 4)
    | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "encoder_layers", "decoder_layers"), 2)
    | dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1)
    | {"max_window_layers": 0, "use_sliding_window": True, "is_decoder": True}
)
ABSENT = object()
EVERY = ["sliding_attention", "full_attention"]
SLIDING = {"layer_types": EVERY * 2}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_size": [2]},
    "cohere_compass_text": {**SLIDING, "rope_parameters": {kind: {"rope_theta": 1e4} for kind in EVERY}},
    "dbrx": {
        "hidden_size": ABSENT,
        "d_model": 32,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim", "v_head_dim")},
        "swa_qk_nope_head_dim": 8,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"num_hidden_layers": 42, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {**SLIDING, "num_kv_shared_layers": 2, "activation_sparsity_pattern": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "laguna": SLIDING,
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    "mamba2": {"num_heads": 8},
    "mellum": SLIDING,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "prophetnet": {"num_hidden_layers": ABSENT, "num_decoder_layers": 2, "num_encoder_layers": 2},
    "qwen2": SLIDING,
    "qwen2_moe": SLIDING,
    "qwen3": SLIDING,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8)},
    "smollm3": SLIDING,
    "xlnet": {"max_position_embeddings": ABSENT, "d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What an architecture wants beside or instead of the sizes above."""

WINDOWED = frozenset(
    """
    afmoe beam cohere2 cohere2_moe cohere_compass_text cwm doge exaone4 exaone_moe flint gemma2 gemma3
    gemma3_text got_ocr2 gpt_oss granite_swa granitemoe_swa kolibri1 laguna mellum ministral ministral3 mistral
    mixtral modernbert-decoder olmo3 phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_moe smollm3
    starcoder2 vaultgemma
    """.split()
)
RUNS = WINDOWED | frozenset(
    """
    apertus arcee aria_text bert bert-generation big_bird biogpt bitnet codegen cohere ctrl dbrx diffllama dots1
    electra emu3 ernie ernie4_5 ernie4_5_moe falcon flex_olmo fuyu gemma git glm glm4 glm4_moe gpt-sw3 gpt2
    gpt_bigcode gpt_neox gptj granite granitemoe granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe llama megatron-bert minimax_m2 nanochat
    nemotron olmo olmo2 olmoe opt persimmon phi rembert roc_bert seed_oss solar_open stablelm xglm
    """.split()
)
"""They say what transformers says; those with windows, beyond them too."""

LONG = {"max_position_embeddings": 32768, "sliding_window": 4096}
USED = {**LONG, "use_sliding_window": True, "max_window_layers": 0}
PUBLISHED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"num_hidden_layers": LAYERS, **OWN["cohere_compass_text"]},
    "doge": {**LONG, "keep_window_size": 32768},
    "exaone4": LONG,
    "exaone_moe": LONG,
    "got_ocr2": {"text_config": USED},
    "laguna": {"num_hidden_layers": LAYERS, **SLIDING},
    "mellum": {"num_hidden_layers": LAYERS, **SLIDING},
    "ministral": {"head_dim": 128},
    "ministral3": LONG,
    "mixtral": LONG,
    "olmo3": LONG,
    "phi3": LONG,
    "phimoe": LONG,
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3"), USED),
    "starcoder2": LONG,
}
"""What published configs have and their classes leave out: windows above all."""

REFUSED: dict[str, str] = {
    "has recurrent layers": """
        bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid inkling2_text inkling_text jamba kimi_linear lfm2
        lfm2_moe lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
        qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2 zaya
    """,
    "derives positions from the order of its cache": """
        bart bigbird_pegasus blenderbot blenderbot-small bloom cpmant marian mbart moss_transcribe_diarize mpt mvp
        pegasus plbart prophetnet roformer trocr whisper
    """,
    "keeps keys and values of different shapes": """
        axk1 deepseek_v2 deepseek_v3 gemma4 gemma4_text gemma4_unified gemma4_unified_text glm4_moe_lite longcat_flash
        mimo_v2_flash minicpm3 youtu
    """,
    "has a layer without keys and values of its own": """
        axk2 deepseek_v32 deepseek_v4 dots3_note dots3_note_text gemma3n_text glm_moe_dsa hy_v4 minimax_m3_vl_text
    """,
    "keeps no keys and values that could be rolled back": "mllama openai-gpt reformer xlm xlnet",
    "attends in chunks": "llama4 llama4_text",
    "cannot read a tree": "blt gpt_neox_japanese",
    "does not honour given masks and positions, from token 1 on": """
        camembert data2vec-text roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod
    """,  # they count positions from the number of their padding token
    "does not honour given masks and positions beyond its window_size of 8, from token 18 on": "gpt_neo",
    "does not honour given masks and positions beyond its sliding_window of 8, from token 9 on": "moshi",
}
"""What the error says -> the architectures that are refused with it."""

UNBUILT: dict[str, str] = {
    "requires the timm library": "gemma3n",
    "hidden_size_per_layer_input must be 0": "gemma4_assistant",
    "set of layer types producing a cache": "gemma4_unified_assistant",
    "has no attribute 'dropout'": "musicgen musicgen_melody",
}
"""What transformers itself says about their configs, as made here or at all."""


def expected(kind: str) -> str | None:
    """None: it runs. Otherwise words of the error."""
    if kind in RUNS:
        return None
    for words, kinds in (REFUSED | UNBUILT).items():
        if kind in kinds.split():
            return words
    raise AssertionError(
        f"transformers has learnt {kind}, and nobody has looked at it yet: run this test with {kind} in RUNS of "
        "tests/nn/architectures.py and see whether it stays there or is refused with which words; if it cannot be "
        "built this small, OWN takes what it wants"
    )


def small_config(kind: str, **choices: Any) -> transformers.PreTrainedConfig:
    fields = _sizes(CONFIG_MAPPING[kind]) | OWN.get(kind, {}) | choices
    return CONFIG_MAPPING[kind](**{name: value for name, value in fields.items() if value is not ABSENT})


def built(config: transformers.PreTrainedConfig) -> Any:
    """A random model, with nothing left at its neutral value (norms, biases)."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


def _sizes(kind: Any) -> dict[str, Any]:
    """For the config's class, and for those of the models in it."""
    published = kind()
    names = [*ALWAYS, *(name for name in WHERE_KNOWN if _has(published, name))]
    sizes = {name: (ALWAYS | WHERE_KNOWN)[name] for name in names if _takes(kind, name)}
    kinds = list(dict.fromkeys(getattr(published, "layer_types", None) or ()))
    if kinds and _takes(kind, "layer_types") and _takes(kind, "layers_block_type"):
        sizes["layer_types"] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]
    inner = {name: getattr(published, name, None) for name in kind.sub_configs}
    return sizes | {
        name: _sizes(type(config)) | OWN.get(config.model_type, {})
        for name, config in inner.items()
        if config is not None
    }


def _has(config: transformers.PreTrainedConfig, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # it differs from layer to layer
        return True


def _takes(kind: Any, name: str) -> bool:
    own = getattr(kind, kind.attribute_map.get(name, name), None)
    return not (isinstance(own, property) and own.fset is None)
