"""What layouts of drafters with decoder layers have in common: the layers in a config's words, copies of the target's
matrices, the maps of a part of the vocabulary, and the frame of speculators' config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forerun.drafting.trained import HeadsConfig, LayerConfig
from forerun.errors import CheckpointError, DrafterError
from forerun.layouts.table import Heads, Published, name_for_others
from forerun.layouts.target import Base
from forerun.sources.folder import CONFIG

EMBEDDING = "embed_tokens.weight"
TO_DRAFT, TO_TARGET = "t2d", "d2t"
SAME = 2**-7
"""Relative difference that a copy of the target's matrix may have, as for Hydra's."""


# ---- what is read


def sizes(stored: Published, said: Mapping[str, Any]) -> dict[str, Any]:
    return {name: count(stored, said, key) for name, key in (("width", "hidden_size"), ("vocab_size", "vocab_size"))}


def count(stored: Published, said: Mapping[str, Any], name: str, default: int | None = None) -> int:
    found = said.get(name)
    if found is None:
        found = default
    if type(found) is not int:
        raise CheckpointError(f"{stored.folder / CONFIG} does not say {name}: fetch it again")
    return found


def layer_of(stored: Published, said: Mapping[str, Any]) -> LayerConfig:
    """DrafterError for layers of another kind than ours."""
    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    strange = {
        f"rotary frequencies that are scaled ({kind})": kind != "default",
        "rotary frequencies of several kinds": any(isinstance(value, Mapping) for value in rope.values()),
        "biases in its attention": said.get("attention_bias", False),
        "biases in its perceptron": said.get("mlp_bias", False),
        f"the activation {said.get('hidden_act')}": said.get("hidden_act", "silu") != "silu",
        "a sliding window": said.get("use_sliding_window", False)
        or "sliding_attention" in (said.get("layer_types") or ()),
    }
    for what, is_so in strange.items():
        if is_so:
            raise DrafterError(f"the drafter in {stored.folder} has {what}, and ours has none: get a plain one")
    width, heads = (count(stored, said, name) for name in ("hidden_size", "num_attention_heads"))
    return LayerConfig(
        heads=heads,
        kv_heads=count(stored, said, "num_key_value_heads", heads),
        head_dim=count(stored, said, "head_dim", width // heads),
        mlp_width=count(stored, said, "intermediate_size"),
        max_length=count(stored, said, "max_position_embeddings", 2048),
        norm_eps=float(said.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or said.get("rope_theta") or 10000.0),
    )


def demand_as_wide(stored: Published, width: int) -> None:
    """A drafter that is not as wide as its target is none of ours."""
    if stored.config.get("target_hidden_size") not in (None, width):
        raise DrafterError(f"the drafter in {stored.folder} is not as wide as its target: get one that is")


def without_embedding(stored: Published, base: Base | None) -> tuple[Published, tuple[str, ...]]:
    """The target's own embedding is read; DrafterError if the file's is that of another model."""
    return without_copy(stored, EMBEDDING, "embedding", base, lambda base: base.embedding_VD)


def without_copy(
    stored: Published, name: str, what: str, base: Base | None, theirs: Callable[[Base], Tensor]
) -> tuple[Published, tuple[str, ...]]:
    """Leave out a copy of something of the target's; DrafterError if it is that of another model."""
    left = dict(stored.tensors)
    copy = left.pop(name, None)
    stored = replace(stored, tensors=left)
    if copy is None:
        return stored, ()
    if base is None:
        return stored, (f"its {what} is left out; --target would hold it against the target's own",)
    own = theirs(base)
    if copy.shape != own.shape or not torch.allclose(
        copy.float(), own.float(), rtol=SAME, atol=SAME * own.float().std().item()
    ):
        raise DrafterError(
            f"the {what} in {stored.folder} is not that of {base.name}: give the target that it was trained for"
        )
    return stored, (f"its {what}, left out here, is that of {base.name}",)


def without_maps(stored: Published, vocab_size: int) -> tuple[Published, tuple[int, ...]]:
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


def verifier(stored: Published) -> str | None:
    """What speculators' config calls the target."""
    named = stored.config.get("speculators_config", {}).get("verifier", {})
    return named.get("name_or_path") or None


# ---- what is written


def maps(kept: Sequence[int], vocab_size: int) -> dict[str, Tensor]:
    """Of the tokens that it knows; none where it knows all."""
    if not kept:
        return {}
    ids = torch.tensor(kept)
    return {
        TO_TARGET: ids - torch.arange(len(ids)),
        TO_DRAFT: torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, ids, True),
    }


def demand_all_tokens(heads: Heads, where: str) -> None:
    """Refuse heads that know a part of the vocabulary, for layouts that have no place for maps of it."""
    if heads.config.kept:
        raise DrafterError(
            f"this drafter knows {len(heads.config.kept)} of {heads.config.vocab_size} tokens, and {where} wants them"
            " all: keep it as it is"
        )


def published(config: HeadsConfig, layer: LayerConfig, qk_norm: bool) -> dict[str, Any]:
    """Layers in the words of Llama's config, or of Qwen3's where their queries are normed."""
    return {
        "model_type": "qwen3" if qk_norm else "llama",
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


def frame(heads: Heads, base: Base | None, algorithm: str, tokens: int) -> dict[str, Any]:
    """What speculators' config.json says whatever the drafter is. tokens: that it proposes in a step."""
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "speculators_model_type": algorithm,
        "speculators_config": {
            "algorithm": algorithm,
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": name_for_others(heads, base), "architectures": _architectures(base)},
        },
    }


def dtype_of(heads: Heads) -> str:
    return str(heads.dtype).removeprefix("torch.")


def _architectures(base: Base | None) -> list[str]:
    source = base.config.source if base and base.config else {}
    found = source.get("architectures")
    return list(found) if isinstance(found, list | tuple) else ["LlamaForCausalLM"]
