"""A model of the same config, small enough to read long texts, whose windows are short enough to look beyond."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy

import torch
import transformers

WINDOW = re.compile(r"(window(_size|_len|_length)?|chunk_(size|len|length)|local_attention|block_size|index_topk)$")
"""Fields that say how far a token looks, or how many it looks at, as the configs of transformers call them."""
STEP = 8
"""Tokens: the shortest window of a miniature, and how much longer the next one is."""
LARGEST = 50_000_000
"""Weights: what a miniature may have at most."""
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
}
"""What a miniature is made of. Layers stay as many as they are: what configs list for each layer stays true."""


def windows_of(config: transformers.PreTrainedConfig, max_length: int) -> dict[str, int]:
    """Every window that a text of `max_length` tokens reaches beyond, by the name of its field, whatever uses it."""
    fields = config.get_text_config(decoder=True).to_dict()
    windows: dict[str, int] = {}
    for name, size in _integers(fields):
        if WINDOW.search(name) and 0 < size < max_length:
            windows[name] = max(size, windows.get(name, 0))
    return windows


def _integers(fields: Mapping[object, object], inherited: str = "") -> Iterator[tuple[str, int]]:
    """Names and values of all integers. What stands in a list, or under a number (a layer), is
    called as the list, or as the field around it."""
    for key, value in fields.items():
        name = key if isinstance(key, str) and key != "per_layer_config" else inherited
        if name.endswith("_config"):  # another model beside this one
            continue
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from _integers(value, name)
        elif type(value) is int:
            yield name, value


def miniature(config: transformers.PreTrainedConfig, windows: Mapping[str, int]) -> transformers.PreTrainedModel:
    """The language model of a config with short `windows` and random weights, the same at every
    call, in fp32 on the CPU. The global random state is left as it is.

    Raises ValueError where it would not be small, and whatever transformers raises.
    """
    small = deepcopy(config.get_text_config(decoder=True))
    for name, size in (SIZES | _shorter(windows)).items():
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, size)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.no_grad():
        with torch.device("meta"):
            numbers = _built(small).num_parameters()
        if numbers > LARGEST:
            raise ValueError(f"it would have {numbers / 1e6:.0f} million weights")
        torch.manual_seed(0)
        model = _built(small)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)  # nothing stays at its neutral value
    return model.requires_grad_(False).eval()


def _built(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _shorter(windows: Mapping[str, int]) -> dict[str, int]:
    """Windows of different sizes stay different, and in order."""
    sizes = sorted(set(windows.values()))
    return {name: min(size, STEP * (1 + sizes.index(size))) for name, size in windows.items()}
