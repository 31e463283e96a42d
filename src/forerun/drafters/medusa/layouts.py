"""Medusa's heads in three layouts: that of its own code, that of merged models (Medusa-2), and vLLM's."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from forerun.drafters.medusa import MERGED_PREFIX, MedusaConfig
from forerun.errors import CheckpointError, DrafterError
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
    numbered,
    origin,
    packed,
    target_of,
    usual,
)
from forerun.layouts.target import Base
from forerun.sources.folder import WEIGHTS, difference


@dataclass(frozen=True)
class Names:
    """How a layout of Medusa's names a head's layers and its vocabulary matrix; each # is a number, the head first."""

    block: str
    vocabulary: str

    def of_block(self, head: int, layer: int) -> str:
        return numbered(self.block, head, layer)

    def of_vocabulary(self, head: int, layers: int) -> str:
        return numbered(self.vocabulary, head, layers)


FASTERDECODING = Names("#.#.linear", "#.#.weight")
MERGED = Names(f"{MERGED_PREFIX}#.#.linear", f"{MERGED_PREFIX}#.#.weight")
VLLM = Names("blocks.#.layers.#", "lm_heads.#.weight")
VLLM_PREFIX = "medusa_heads."


def medusa_table(config: MedusaConfig, names: Names, biased: bool = True) -> Table:
    table: Table = {}
    for head in range(config.heads):
        for layer in range(config.layers):
            name, index = names.of_block(head, layer), (0 if config.tied_layers else layer, head)
            table[f"{name}.weight"] = Place("blocks", (config.width, config.width), index)
            if biased:
                table[f"{name}.bias"] = Place("biases", (config.width,), index)
        if config.vocabulary == "own":
            matrix = Place("vocabulary", (config.vocab_size, config.width), (head,))
            table[names.of_vocabulary(head, config.layers)] = matrix
    return table


def read_fasterdecoding(stored: Published, base: Base | None) -> Heads:
    shared = str(stored.config.get("version")) == "2"
    vocab_size = _vocab_size(stored, base) if shared else 0
    config, notes = _medusa_config(stored, FASTERDECODING, shared, vocab_size=vocab_size)
    config, tensors = stored.gather(config, medusa_table(config, FASTERDECODING))
    return Heads("fasterdecoding", config, tensors, target_of(stored, base), origin(stored, "fasterdecoding"), notes)


def _vocab_size(stored: Published, base: Base | None) -> int:
    """Of heads that share the target's vocabulary matrix, whose file need not say it."""
    if base:
        return base.vocab_size
    given = stored.config.get("vocab_size")
    if isinstance(given, int):
        return given
    raise DrafterError(
        f"the heads in {stored.folder} share their target's vocabulary matrix: say with --target which it is"
    )


def read_merged(stored: Published, base: Base | None) -> Heads:
    config, notes = _medusa_config(stored, MERGED, False, *_said_sizes(stored))
    config, tensors = stored.gather(config, medusa_table(config, MERGED))
    name = stored.folder.resolve().name
    belong = (
        f"these heads were trained with the weights in {stored.folder}, and belong to those, not to the original model"
    )
    notes = (belong, *notes)
    if base and base.folder.resolve() != stored.folder.resolve():
        notes = (*notes, f"check that {base.name} holds the weights of {stored.folder}")
    return Heads("merged", config, tensors, name, origin(stored, "merged"), notes)


def read_vllm(stored: Published, base: Base | None) -> Heads:
    stored = replace(stored, tensors={_as_vllm_names(name): tensor for name, tensor in stored.tensors.items()})
    _demand_full_vocabulary(stored)
    biased = bool(stored.config.get("medusa_fc_bias", False))
    shared = bool(stored.config.get("original_lm_head", False))
    stored, original = _without_lm_head(stored) if shared else (stored, None)
    config, notes = _medusa_config(stored, VLLM, shared, *_said_sizes(stored))
    config, tensors = stored.gather(config, medusa_table(config, VLLM, biased))
    if original is not None:
        config, tensors, more = _with_vocabulary(stored, config, tensors, original, base)
        notes = (*notes, *more)
    if not biased:
        notes = (*notes, "the file has no biases (medusa_fc_bias is false): they are zero here")
    if stored.config.get("logit_scale", 1.0) != 1.0:
        notes = (*notes, "its logit_scale is left out: it changes no order of tokens")
    return Heads("vllm", config, tensors, target_of(stored, base), origin(stored, "vllm"), notes)


def _as_vllm_names(name: str) -> str:
    """vLLM reads Medusa's own names too, and a prefix before either."""
    name = name.replace(VLLM_PREFIX, "")
    name = re.sub(r"^(\d+)\.(\d+)\.linear\.(weight|bias)$", r"blocks.\1.layers.\2.\3", name)
    return re.sub(r"^(\d+)\.\d+\.weight$", r"lm_heads.\1.weight", name)


def _demand_full_vocabulary(stored: Published) -> None:
    truncated, full = (stored.config.get(name) for name in ("truncated_vocab_size", "vocab_size"))
    if "token_map" in stored.tensors or truncated not in (None, full):
        raise DrafterError(
            f"the heads in {stored.folder} know {truncated or 'a part'} of {full} tokens (token_map), and ours score"
            " all: a"
            " token without a row would be proposed with the score 0; get heads with the full vocabulary"
        )


def _without_lm_head(stored: Published) -> tuple[Published, Tensor]:
    """With `original_lm_head` there is one matrix for all heads."""
    left = dict(stored.tensors)
    matrix = left.pop("lm_head.weight" if "lm_head.weight" in left else "lm_heads.0.weight", None)
    if matrix is None:
        raise CheckpointError(difference(stored.folder, ["missing     lm_head.weight"]))
    return replace(stored, tensors=left), matrix


def _with_vocabulary(
    stored: Published, config: MedusaConfig, tensors: dict[str, Tensor], original: Tensor, base: Base | None
) -> tuple[MedusaConfig, dict[str, Tensor], tuple[str, ...]]:
    """The heads with the one matrix of their file: the target's own, or one of theirs."""
    shape = (config.vocab_size, config.width)
    Published(stored.folder, {}, {"lm_head.weight": original}).demand_same({"lm_head.weight": Place("", shape)})
    if base is None:
        raise DrafterError(
            f"the heads in {stored.folder} share one vocabulary matrix: give --target, to see whether it is the"
            " target's"
        )
    if _is_copy(original, base.head_VD):
        return config, tensors, ()
    config = replace(config, vocabulary="own")
    dtype = torch.promote_types(tensors["blocks"].dtype, original.dtype)
    copies = original.repeat(config.heads, 1, 1)
    tensors = {name: tensor.to(dtype) for name, tensor in (tensors | {"vocabulary": copies}).items()}
    return config, tensors, (f"their vocabulary matrix is not that of {base.name}: every head got a copy of it",)


def _is_copy(copy: Tensor, original: Tensor) -> bool:
    return torch.equal(copy, original.to(copy.dtype))


def _medusa_config(
    stored: Published, names: Names, shared: bool, width: int = 0, vocab_size: int = 0
) -> tuple[MedusaConfig, tuple[str, ...]]:
    """The shape that the tensors have; width, vocab_size: where the file says them."""
    held = stored.tensors
    blocks = [*matching(held, f"{names.block}.weight"), *matching(held, f"{names.block}.bias")]
    if not blocks:
        raise stored.lacks_heads(f"{names.of_block(0, 0)}.weight ...")
    vocabulary = [tensor for _, tensor in matching(held, names.vocabulary)]
    config = MedusaConfig(
        width=width or usual([tensor for _, tensor in blocks]),
        vocab_size=vocab_size or usual(vocabulary),
        heads=1 + max(head for (head, _), _ in blocks),
        layers=1 + max(layer for (_, layer), _ in blocks),
        vocabulary="shared" if shared else "own",
    )
    return config, count_note(stored, "" if names is VLLM and "num_heads" in stored.config else "medusa", config)


def _said_sizes(stored: Published) -> tuple[int, int]:
    """Width and vocabulary in a config that says them."""
    width, vocab_size = (stored.config.get(name) for name in ("hidden_size", "vocab_size"))
    return width if isinstance(width, int) else 0, vocab_size if isinstance(vocab_size, int) else 0


def as_fasterdecoding(heads: Heads, base: Base | None) -> Parcel:
    config = _medusa_only(heads, "Medusa's own code")
    if config.layers > 1 and not config.tied_layers:
        raise DrafterError(
            f"these heads have {config.layers} layers of their own, and Medusa's code repeats one layer (of tied ones"
            " it would"
            " read the last): convert to vllm, or train with tied layers"
        )
    about: dict[str, Any] = {
        "base_model_name_or_path": name_for_others(heads, base),
        "medusa_num_heads": config.heads,
        "medusa_num_layers": config.layers,
    }
    if config.vocabulary == "shared":
        about |= {"version": "2", "vocab_size": config.vocab_size}
    tensors = packed(heads, medusa_table(config, FASTERDECODING))
    return Parcel(about, tensors, ("medusa_lm_head.pt", "medusa_lm_head.safetensors"))


def as_vllm(heads: Heads, base: Base | None) -> Parcel:
    config = _medusa_only(heads, "vLLM")
    shared = config.vocabulary == "shared"
    tensors = packed(heads, medusa_table(config, VLLM))
    if shared:
        if base is None:
            raise DrafterError(
                "these heads share their target's vocabulary matrix, and a folder for vLLM must hold it: give"
                " --target MODEL"
            )
        tensors["lm_head.weight"] = base.head_VD.to(heads.dtype)
    about = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "base_model_name_or_path": name_for_others(heads, base),
        "hidden_size": config.width,
        "vocab_size": config.vocab_size,
        "num_heads": config.heads,
        "num_hidden_layers": config.layers,
        "medusa_fc_bias": True,
        "max_paths": 64,
        "topk": 10,
        "truncated_vocab_size": None,
        **({"original_lm_head": True} if shared else {}),
        "torch_dtype": str(heads.dtype).removeprefix("torch."),
    }
    return Parcel(about, tensors, (WEIGHTS,))


def _medusa_only(heads: Heads, where: str) -> MedusaConfig:
    if isinstance(heads.config, MedusaConfig):
        demand_all_tokens(heads, where)
        return heads.config
    raise DrafterError(
        f"{heads.method.title}'s heads see the tokens drafted before theirs, and {where} gives heads the target's"
        " state alone:"
        f" keep them as they are, or convert to {heads.homes}"
    )
