"""EAGLE in the layouts of others: EAGLE-1 as its own code has it, EAGLE-3 as speculators, and as SpecForge
and SGLang.

All hold the same tensors, but for the name of EAGLE-3's layer and what their config.json says.
speculators (and vLLM) number the target's states as we do, by the layer that they enter. SGLang, under
"eagle_config", numbers them by the layer that they leave, which is one less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forerun.drafters.eagle import LAST, EagleConfig
from forerun.drafters.eagle.network import sources_of
from forerun.drafting.trained import LayerConfig
from forerun.errors import CheckpointError, DrafterError
from forerun.layouts.table import Heads, Parcel, Place, Published, Table, name_for_others, origin, packed, target_of
from forerun.layouts.target import Base
from forerun.nn.translate import places
from forerun.sources.folder import CONFIG, WEIGHTS

EMBEDDING = "embed_tokens.weight"
TO_DRAFT, TO_TARGET = "t2d", "d2t"
SAME_EMBEDDING = 2**-7
"""Relative difference that a copy may have, as for Hydra's."""
NORMS = {
    "norm_before_residual": "residual_normed",
    "fc_norm": "sources_normed",
    "norm_before_fc": "joined_normed",
    "norm_output": "output_normed",
}
"""Flags of EAGLE-3, and what they are called here."""
KNOWN_NORMS = {*NORMS, "rms_norm_eps"}
LAYERS = "eagle_aux_hidden_state_layer_ids"


def table_of(config: EagleConfig, first: str = "layers.0") -> Table:
    """first: what the first layer is called."""
    assert config.layer is not None
    width, sources = config.width, len(config.sources)
    inner = config.layer.transformer(width, config.layers, qkv_bias=config.qkv_bias, qk_norm=config.qk_norm)
    table: Table = {"fc.weight": Place("stack.fuse", (width, (sources if config.fused else 2) * width))}
    if config.fuse_bias:
        table["fc.bias"] = Place("stack.fuse_bias", (width,))
    for name, place in places(inner).items():
        if not name.startswith("model.layers."):
            continue
        name, shape = name.removeprefix("model."), place.shape
        if config.fused and place.parameter == "blocks.0.qkv.weight":
            shape = (shape[0], 2 * width)
        if config.fused or name != "layers.0.input_layernorm.weight":
            called = name.replace("layers.0.", f"{first}.", 1)
            table[called] = Place(f"stack.{place.parameter}", shape, (), place.begin)
    return table | (_table_of_three(config, first) if config.fused else {})


def _table_of_three(config: EagleConfig, first: str) -> Table:
    width, sources = config.width, len(config.sources)
    table = {
        f"{first}.hidden_norm.weight": Place("stack.state_norm", (width,)),
        "norm.weight": Place("stack.final_norm", (width,)),
        "lm_head.weight": Place("stack.vocabulary", (len(config.kept) or config.vocab_size, width)),
    }
    if config.joined_normed:
        table["input_norm.weight"] = Place("stack.fuse_norm", (sources * width,), (0,))
    if config.sources_normed:
        table |= {f"fc_norm.{i}.weight": Place("stack.fuse_norm", (width,), (i,)) for i in range(sources)}
    return table


# ---- what is read


def read_one(stored: Published, base: Base | None) -> Heads:
    """EAGLE-1 and -2. vLLM puts the config under "model"."""
    said = stored.config.get("model", stored.config)
    stored, notes = _without_embedding(stored, base)
    biased = said.get("bias", stored.config.get("eagle_fc_bias", "fc.bias" in stored.tensors))
    config = EagleConfig(
        **_sizes(stored, said),
        layers=_count(stored, said, "num_hidden_layers", 1),
        layer=_layer(stored, said),
        qkv_bias=bool(said.get("qkv_bias", False)),
        fuse_bias=bool(biased),
    )
    config, tensors = stored.gather(config, table_of(config))
    return Heads("eagle", config, tensors, target_of(stored, base), origin(stored, "eagle"), notes)


def read_three(stored: Published, base: Base | None) -> Heads:
    """EAGLE-3, in speculators' form or a flat one."""
    theirs = "speculators_model_type" in stored.config
    said = stored.config.get("transformer_layer_config", {}) if theirs else stored.config
    _demand_known_norms(stored)
    first = "midlayer" if any(name.startswith("midlayer.") for name in stored.tensors) else "layers.0"
    stored, notes = _without_embedding(stored, base)
    sizes = _sizes(stored, said)
    stored, kept = _without_maps(stored, sizes["vocab_size"])
    config = EagleConfig(
        **sizes,
        layers=_count(stored, said, "num_hidden_layers", 1),
        layer=_layer(stored, said),
        vocabulary="own",
        fused=True,
        sources=_sources(stored, base),
        kept=kept,
        qk_norm=f"{first}.self_attn.q_norm.weight" in stored.tensors,
        **_norms(stored),
    )
    config, tensors = stored.gather(config, table_of(config, first))
    layout = "eagle3" if theirs else "specforge"
    return Heads(layout, config, tensors, _verifier(stored) or target_of(stored, base), origin(stored, layout), notes)


def _verifier(stored: Published) -> str | None:
    verifier = stored.config.get("speculators_config", {}).get("verifier", {})
    return verifier.get("name_or_path") or None


def _demand_known_norms(stored: Published) -> None:
    """A flag that is not heeded would show in nothing but a low acceptance."""
    unknown = sorted(name for name in stored.config if "norm" in name and name not in KNOWN_NORMS)
    if unknown:
        raise DrafterError(
            f"{stored.folder / CONFIG} asks for {', '.join(unknown)}, which is not known here: get a drafter without"
        )
    target = stored.config.get("target_hidden_size")
    if target is not None and target != stored.config.get("hidden_size", target):
        raise DrafterError(f"the drafter in {stored.folder} is not as wide as its target: get one that is")


def _norms(stored: Published) -> dict[str, Any]:
    return {ours: bool(stored.config.get(flag, False)) for flag, ours in NORMS.items()}


def _sizes(stored: Published, said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _count(stored, said, key) for name, key in (("width", "hidden_size"), ("vocab_size", "vocab_size"))}


def _count(stored: Published, said: Mapping[str, Any], name: str, default: int | None = None) -> int:
    found = said.get(name)
    if found is None:
        found = default
    if type(found) is not int:
        raise CheckpointError(f"{stored.folder / CONFIG} does not say {name}: fetch it again")
    return found


def _layer(stored: Published, said: Mapping[str, Any]) -> LayerConfig:
    """DrafterError for layers of another kind than ours."""
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    strange = {
        f"rotary frequencies that are scaled ({kind})": kind != "default",
        "biases in its attention": said.get("attention_bias", False),
        "biases in its perceptron": said.get("mlp_bias", False),
        f"the activation {said.get('hidden_act')}": said.get("hidden_act", "silu") != "silu",
        "a sliding window": said.get("use_sliding_window", False) or "sliding_attention" in said.get("layer_types", ()),
    }
    for what, is_so in strange.items():
        if is_so:
            raise DrafterError(f"the drafter in {stored.folder} has {what}, and ours has none: get a plain one")
    width, heads = (_count(stored, said, name) for name in ("hidden_size", "num_attention_heads"))
    return LayerConfig(
        heads=heads,
        kv_heads=_count(stored, said, "num_key_value_heads", heads),
        head_dim=_count(stored, said, "head_dim", width // heads),
        mlp_width=_count(stored, said, "intermediate_size"),
        max_length=_count(stored, said, "max_position_embeddings", 2048),
        norm_eps=float(said.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or said.get("rope_theta") or 10000.0),
    )


def _without_embedding(stored: Published, base: Base | None) -> tuple[Published, tuple[str, ...]]:
    """The target's own embedding is read; DrafterError if the file's is that of another model."""
    left = dict(stored.tensors)
    copy = left.pop(EMBEDDING, None)
    stored = replace(stored, tensors=left)
    if copy is None:
        return stored, ()
    if base is None:
        return stored, ("its embedding is left out; --target would hold it against the target's own",)
    theirs = base.embedding_VD
    if copy.shape != theirs.shape or not torch.allclose(
        copy.float(), theirs.float(), rtol=SAME_EMBEDDING, atol=SAME_EMBEDDING * theirs.float().std().item()
    ):
        raise DrafterError(
            f"the embedding in {stored.folder} is not that of {base.name}: give the target that it was trained for"
        )
    return stored, (f"its embedding, left out here, is that of {base.name}",)


def _without_maps(stored: Published, vocab_size: int) -> tuple[Published, tuple[int, ...]]:
    """The tokens that it knows, by the maps of the file: for every one its offset, and of all whether they are."""
    left = dict(stored.tensors)
    offsets, mask = left.pop(TO_TARGET, None), left.pop(TO_DRAFT, None)
    stored = replace(stored, tensors=left)
    if offsets is None:
        return stored, ()
    ids = (torch.arange(len(offsets)) + offsets.long()).tolist()
    same = mask is None or (len(mask) == vocab_size and mask.nonzero().flatten().tolist() == ids)
    if not same or ids != sorted(set(ids)) or not 0 <= ids[0] <= ids[-1] < vocab_size:
        raise CheckpointError(f"{TO_TARGET} and {TO_DRAFT} in {stored.folder} do not map its tokens: fetch it again")
    return stored, () if len(ids) == vocab_size else tuple(ids)


def _sources(stored: Published, base: Base | None) -> tuple[int, ...]:
    if entered := stored.config.get(LAYERS):
        return tuple(entered)
    if left := stored.config.get("eagle_config", {}).get(LAYERS):
        return tuple(layer + 1 for layer in left)
    if base is None or base.config is None:
        raise DrafterError(
            f"{stored.folder / CONFIG} does not say which layers of its target are read, so the number of the"
            " target's decides: give --target MODEL"
        )
    return sources_of(base.config.layers)


# ---- what is written


def as_one(heads: Heads, base: Base | None) -> Parcel:
    config = _eagle_only(heads, "EAGLE's own code")
    if config.fused or config.qk_norm:
        raise DrafterError("EAGLE-1's code has no place for EAGLE-3: convert to eagle3 or specforge")
    about = {
        "architectures": ["LlamaForCausalLM"],
        **_published(config),
        "bias": config.fuse_bias,
        "qkv_bias": config.qkv_bias,
        **_ends(heads, base),
    }
    return Parcel(about, packed(heads, table_of(config)), (WEIGHTS,))


def as_speculators(heads: Heads, base: Base | None) -> Parcel:
    config = _three_only(heads)
    proposal = {"proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    about = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": name_for_others(heads, base), "architectures": _architectures(base)},
        },
        "transformer_layer_config": _published(config),
        "draft_vocab_size": len(config.kept) or config.vocab_size,
        "target_hidden_size": None,
        LAYERS: list(config.sources),
        **{flag: getattr(config, ours) for flag, ours in NORMS.items()},
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "torch_dtype": _dtype(heads),
    }
    return Parcel(about, _tensors(heads, config, "layers.0", base), (WEIGHTS,))


def as_specforge(heads: Heads, base: Base | None) -> Parcel:
    config = _three_only(heads)
    if config.layers > 1:
        raise DrafterError(f"SpecForge's EAGLE-3 has one layer, and this one {config.layers}: convert to eagle3")
    if 0 in config.sources:
        raise DrafterError("this drafter reads the target's embeddings, which leave no layer: convert to eagle3")
    about = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **_published(config),
        "draft_vocab_size": len(config.kept) or config.vocab_size,
        "eagle_config": {LAYERS: [layer - 1 for layer in config.sources], "use_aux_hidden_state": True},
        **{flag: True for flag, ours in NORMS.items() if getattr(config, ours)},
        **_ends(heads, base),
    }
    return Parcel(about, _tensors(heads, config, "midlayer", base), (WEIGHTS,))


def _tensors(heads: Heads, config: EagleConfig, first: str, base: Base | None) -> dict[str, Tensor]:
    """With the target's embedding, where it is known: some readers do without."""
    tensors = packed(heads, table_of(config, first))
    if config.kept:
        ids = torch.tensor(config.kept)
        tensors[TO_TARGET] = ids - torch.arange(len(ids))
        tensors[TO_DRAFT] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    return tensors | ({EMBEDDING: base.embedding_VD.to(heads.dtype)} if base else {})


def _published(config: EagleConfig) -> dict[str, Any]:
    """Its layers in the words of Llama's config, or of Qwen3's where their queries are normed."""
    layer = config.layer
    assert layer is not None
    return {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": layer.mlp_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": layer.heads,
        "num_key_value_heads": layer.kv_heads,
        "head_dim": layer.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": layer.max_length,
        "rms_norm_eps": layer.norm_eps,
        "rope_theta": layer.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def _ends(heads: Heads, base: Base | None) -> dict[str, Any]:
    return {"base_model_name_or_path": name_for_others(heads, base), "torch_dtype": _dtype(heads)}


def _dtype(heads: Heads) -> str:
    return str(heads.dtype).removeprefix("torch.")


def _architectures(base: Base | None) -> Sequence[str]:
    source = base.config.source if base and base.config else {}
    found = source.get("architectures")
    return list(found) if isinstance(found, list | tuple) else ["LlamaForCausalLM"]


def _three_only(heads: Heads) -> EagleConfig:
    config = _eagle_only(heads, "EAGLE-3's code")
    wrong = {
        "is an EAGLE-1": not config.fused,
        "shares its target's projection": config.vocabulary == "shared",
        "reads the target's last state": LAST in config.sources,
        "has biases in its attention": config.qkv_bias,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise DrafterError(f"this drafter {what}, for which EAGLE-3's layouts have no place: keep it, or use eagle")
    return config


def _eagle_only(heads: Heads, where: str) -> EagleConfig:
    if isinstance(heads.config, EagleConfig):
        return heads.config
    raise DrafterError(f"{heads.method.title}'s heads are no EAGLE, which {where} wants: convert to {heads.homes}")
