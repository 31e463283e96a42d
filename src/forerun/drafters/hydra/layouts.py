"""Hydra's heads in the layout of its own code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from forerun.drafters.hydra import HydraConfig
from forerun.drafting.trained import LayerConfig
from forerun.errors import DrafterError
from forerun.layouts.decoders import demand_all_tokens
from forerun.layouts.table import (
    Heads,
    Parcel,
    Place,
    Published,
    Table,
    count_note,
    matching,
    name_for_others,
    origin,
    packed,
    target_of,
    usual,
)
from forerun.layouts.target import Base
from forerun.nn.translate import places
from forerun.sources.folder import CONFIG
from forerun.sources.hugging_face import Folder
from forerun.sources.source import Source

PREFIX_LAYER = "prefix_embeding_layer."
SAME_EMBEDDING = 2**-7
"""Relative difference that a copy may have: heads were trained beside a model in bf16 that is published in fp16."""


def hydra_table(config: HydraConfig) -> Table:
    """In the layout of heads with a prefix layer every second slot is dropout, which has no tensors."""
    width, vocabulary = config.width, (config.vocab_size, config.width)
    begin, stride, last = (1, 2, ".1") if config.prefix else (0, 1, "")
    table: Table = {}
    for head in range(config.heads):
        first, *later = [f"hydra_mlp.{head}.{begin + stride * layer}" for layer in range(config.layers)]
        table |= {
            f"{first}.linear.weight": Place(f"first.{head}", (width, (head + 2) * width)),
            f"{first}.linear.bias": Place("first_biases", (width,), (head,)),
            f"{first}.res_connection.weight": Place(f"through.{head}", (width, (head + 2) * width)),
            f"{first}.res_connection.bias": Place("through_biases", (width,), (head,)),
        }
        for slot in later:
            table[f"{slot}.linear.weight"] = Place("blocks", (width, width), (0, head))
            table[f"{slot}.linear.bias"] = Place("biases", (width,), (0, head))
        table[f"hydra_lm_head.{head}{last}.weight"] = Place("vocabulary", vocabulary, (head,))
        table[f"hydra_lm_head.{head}{last}.bias"] = Place("vocabulary_biases", vocabulary[:1], (head,))
    return table | _prefix_table(config)


def _prefix_table(config: HydraConfig) -> Table:
    if config.prefix is None:
        return {}
    inner = places(config.prefix.transformer(config.width))
    return {
        name.replace("model.", PREFIX_LAYER, 1): Place(f"prefix.{place.parameter}", place.shape, (), place.begin)
        for name, place in inner.items()
        if name not in ("model.embed_tokens.weight", "lm_head.weight")
    }


def read_hydra(stored: Published, base: Base | None) -> Heads:
    with_prefix = _demand_known_hydra(stored)
    notes = _left_out(stored, base)
    kept = {name: tensor for name, tensor in stored.tensors.items() if not _is_unused(name)}
    stored = replace(stored, tensors=kept)
    config = _hydra_config(stored, prefix_like(stored, base) if with_prefix else None)
    notes += count_note(stored, "hydra", config)
    config, tensors = stored.gather(config, hydra_table(config))
    return Heads("hydra", config, tensors, target_of(stored, base), origin(stored, "hydra"), notes)


def _demand_known_hydra(stored: Published) -> bool:
    """DrafterError for heads that are not Hydra's in our sense; whether there is a prefix layer."""
    config, name = stored.config, stored.folder / CONFIG
    if config.get("grounded_heads") is not True:
        said = (
            "says grounded_heads false"
            if "grounded_heads" in config
            else "does not say grounded_heads (then it is false)"
        )
        raise DrafterError(f"{name} {said}: such heads do not see drafted tokens, as Hydra's do; get grounded ones")
    if config.get("hidden_state_offset", 0) != 0:
        raise DrafterError(
            f"{name} has hidden_state_offset {config['hidden_state_offset']}: ours read the last state alone (offset 0)"
        )
    arch = config.get("hydra_head_arch", "mlp")
    if arch not in ("mlp", "prefix-mlp"):
        raise DrafterError(f"{name} has heads of the kind {arch!r}: only mlp and prefix-mlp can be read")
    return bool(arch == "prefix-mlp")


def _is_unused(name: str) -> bool:
    """Copies of the target's embeddings that nothing reads, and what follows from its config."""
    tables = ("input_embed_fn.weight", f"{PREFIX_LAYER}embed_tokens.weight")
    return name in tables or name.endswith("rotary_emb.inv_freq")


def _left_out(stored: Published, base: Base | None) -> tuple[str, ...]:
    """What is said about the file's copy of the target's embeddings; DrafterError if it is that of another model."""
    copy = stored.tensors.get("input_embed_fn.weight")
    if copy is None:
        return ()
    if base is None:
        return ("its copy of the target's embeddings is left out; --target would hold it against the target's own",)
    same = copy.shape == base.embedding_VD.shape and torch.allclose(
        copy.float(), base.embedding_VD.float(), rtol=SAME_EMBEDDING, atol=1e-6
    )
    if not same:
        raise DrafterError(
            f"the copy of the embeddings in {stored.folder} is not that of {base.name}: give the target that the"
            " heads were"
            " trained for"
        )
    return (f"its copy of the embeddings, left out here, is that of {base.name}",)


def prefix_like(stored: Published, base: Base | None) -> LayerConfig:
    """The prefix layer has the shape of one of the target's own, and the file does not say which."""
    if base is None:
        raise DrafterError(
            f"the prefix layer in {stored.folder} has the shape of its target's layers, which the file does not say:"
            " give"
            " --target MODEL"
        )
    config = base.config
    if config is None or config.qkv_bias or config.mlp_bias or config.qk_norm or config.inv_freq or config.windows:
        raise DrafterError(f"Hydra's prefix layer is that of a plain Llama, and {base.name} is none: give its target")
    return LayerConfig(
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        mlp_width=config.mlp_width,
        max_length=config.max_length,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
    )


def _hydra_config(stored: Published, prefix: LayerConfig | None) -> HydraConfig:
    held = stored.tensors
    blocks = [*matching(held, "hydra_mlp.#.#.linear.weight"), *matching(held, "hydra_mlp.#.#.linear.bias")]
    if not blocks:
        raise stored.lacks_heads("hydra_mlp.0.0.linear.weight ...")
    last = "hydra_lm_head.#.1" if prefix else "hydra_lm_head.#"
    vocabulary = [tensor for part in ("weight", "bias") for _, tensor in matching(held, f"{last}.{part}")]
    return HydraConfig(
        width=usual([tensor for _, tensor in blocks]),
        vocab_size=usual(vocabulary),
        heads=1 + max(head for (head, _), _ in blocks),
        layers=1 + max(slot for (_, slot), _ in blocks) // (2 if prefix else 1),
        prefix=prefix,
    )


def as_hydra(heads: Heads, base: Base | None) -> Parcel:
    config = heads.config
    if not isinstance(config, HydraConfig):
        raise DrafterError(
            f"{heads.method.title}'s heads do not see drafted tokens, and Hydra's code needs such: convert to"
            f" {heads.homes}"
        )
    if config.layers > 2 and not config.tied_layers:
        raise DrafterError(
            f"these heads have {config.layers - 1} different blocks after the first, and Hydra's code repeats one:"
            " train with"
            " tied layers"
        )
    demand_all_tokens(heads, "Hydra's code")
    if config.vocabulary == "shared":
        raise DrafterError(
            "these heads share their target's vocabulary matrix, and Hydra's code wants one per head: keep them"
        )
    if base and config.prefix and config.prefix != prefix_like(Published(base.folder, {}, {}), base):
        raise DrafterError(
            f"the prefix layer of these heads is not shaped like those of {base.name}, as Hydra's code will have it:"
            " keep them"
        )
    about = {
        "base_model_name_or_path": name_for_others(heads, base),
        "grounded_heads": True,
        "hidden_state_offset": 0,
        "hydra_head_arch": "prefix-mlp" if config.prefix else "mlp",
        "hydra_num_heads": config.heads,
        "hydra_num_layers": config.layers,
    }
    return Parcel(about, packed(heads, hydra_table(config)), ("hydra_lm_head.pt",))


def implied(heads: Heads, folder: Path) -> Base | None:
    """Without a target, the one that a prefix layer implies: reading it back asks for nothing else."""
    config = heads.config
    if config.prefix is None:
        return None
    shape = replace(config.prefix.transformer(config.width), vocab_size=config.vocab_size)
    return Base(heads.target, Source(str(folder), Folder(folder)), config.width, config.vocab_size, shape)
