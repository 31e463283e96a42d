"""EAGLE in the layouts of others: EAGLE-1 as its own code has it, EAGLE-3 as speculators, and as SpecForge
and SGLang.

All hold the same tensors, but for the name of EAGLE-3's layer and what their config.json says.
speculators (and vLLM) number the target's states as we do, by the layer that they enter. SGLang, under
"eagle_config", numbers them by the layer that they leave, which is one less.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from forerun.drafters.eagle import LAST, EagleConfig
from forerun.drafters.eagle.network import sources_of
from forerun.errors import DrafterError
from forerun.layouts.decoders import (
    EMBEDDING,
    count,
    demand_all_tokens,
    demand_as_wide,
    dtype_of,
    frame,
    layer_of,
    maps,
    published,
    sizes,
    verifier,
    without_embedding,
    without_maps,
)
from forerun.layouts.table import Heads, Parcel, Place, Published, Table, name_for_others, origin, packed, target_of
from forerun.layouts.target import Base
from forerun.nn.translate import places
from forerun.sources.folder import CONFIG, WEIGHTS

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
        "lm_head.weight": Place("stack.vocabulary", (config.candidates, width)),
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
    stored, notes = without_embedding(stored, base)
    biased = said.get("bias", stored.config.get("eagle_fc_bias", "fc.bias" in stored.tensors))
    config = EagleConfig(
        **sizes(stored, said),
        layers=count(stored, said, "num_hidden_layers", 1),
        layer=layer_of(stored, said),
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
    stored, notes = without_embedding(stored, base)
    shape = sizes(stored, said)
    demand_as_wide(stored, shape["width"])
    stored, kept = without_maps(stored, shape["vocab_size"])
    config = EagleConfig(
        **shape,
        layers=count(stored, said, "num_hidden_layers", 1),
        layer=layer_of(stored, said),
        vocabulary="own",
        fused=True,
        sources=_sources(stored, base),
        kept=kept,
        qk_norm=f"{first}.self_attn.q_norm.weight" in stored.tensors,
        **_norms(stored),
    )
    config, tensors = stored.gather(config, table_of(config, first))
    layout = "eagle3" if theirs else "specforge"
    return Heads(layout, config, tensors, verifier(stored) or target_of(stored, base), origin(stored, layout), notes)


def _demand_known_norms(stored: Published) -> None:
    """A flag that is not heeded would show in nothing but a low acceptance."""
    unknown = sorted(name for name in stored.config if "norm" in name and name not in KNOWN_NORMS)
    if unknown:
        raise DrafterError(
            f"{stored.folder / CONFIG} asks for {', '.join(unknown)}, which is not known here: get a drafter without"
        )


def _norms(stored: Published) -> dict[str, Any]:
    return {ours: bool(stored.config.get(flag, False)) for flag, ours in NORMS.items()}


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
    demand_all_tokens(heads, "EAGLE-1's code")
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
    about = {
        "architectures": ["Eagle3Speculator"],
        **frame(heads, base, "eagle3", 5),
        "transformer_layer_config": _published(config),
        "draft_vocab_size": config.candidates,
        "target_hidden_size": None,
        LAYERS: list(config.sources),
        **{flag: getattr(config, ours) for flag, ours in NORMS.items()},
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype_of(heads),
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
        "draft_vocab_size": config.candidates,
        "eagle_config": {LAYERS: [layer - 1 for layer in config.sources], "use_aux_hidden_state": True},
        **{flag: True for flag, ours in NORMS.items() if getattr(config, ours)},
        **_ends(heads, base),
    }
    return Parcel(about, _tensors(heads, config, "midlayer", base), (WEIGHTS,))


def _tensors(heads: Heads, config: EagleConfig, first: str, base: Base | None) -> dict[str, Tensor]:
    """With the target's embedding, where it is known: some readers do without."""
    tensors = packed(heads, table_of(config, first)) | maps(config.kept, config.vocab_size)
    return tensors | ({EMBEDDING: base.embedding_VD.to(heads.dtype)} if base else {})


def _published(config: EagleConfig) -> dict[str, Any]:
    assert config.layer is not None
    return published(config, config.layer, config.qk_norm)


def _ends(heads: Heads, base: Base | None) -> dict[str, Any]:
    return {"base_model_name_or_path": name_for_others(heads, base), "torch_dtype": dtype_of(heads)}


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
