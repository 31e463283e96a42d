"""Models that are in memory already: transformers' own objects as networks.

our family, and native kernels that carry it   nn/backends/native, with a copy of the weights in its own layout
anything else that can be run                  nn/foreign around the object, which shares its weights
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
import transformers

from forerun.errors import ForerunError
from forerun.nn.backends.native.transformer import PackedTransformer
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed
from forerun.nn.foreign.load import adopt
from forerun.nn.foreign.network import demand_evaluation
from forerun.nn.foreign.rehearsal import HALF_TOLERANCE, TOLERANCE
from forerun.nn.load import demand_words, pack, why_torch
from forerun.nn.network import Network
from forerun.nn.transformer import TransformerConfig
from forerun.nn.translate import ARCHITECTURES, places, translate
from forerun.sources.weights import Piece


def network_of(
    model: transformers.PreTrainedModel,
    dtype: torch.dtype,
    device: torch.device,
    kernels: str = "auto",
    weights: str = "auto",
) -> Network:
    """A network that says what a model in memory says, on the device where it is.

    On torch the model itself runs, and its weights are shared: what changes them changes the
    network. Native kernels have a layout of their own, so there they are copied now, and what
    changes them later is not seen. They run a model of a family that they know, if it has that
    family's weights and the copy says what the model says (a hook or another class of layer may
    change that).

    Raises CheckpointError for a model that cannot be run, ForerunError for kernels, a device or a
    dtype that it cannot have.
    """
    name = f"{type(model).__name__} ({model.config.model_type})"
    demand_evaluation(model, name)
    if device != model.device:
        raise ForerunError(f"the model {name} is on {model.device}, not on {device}: move it first, or name no device")
    demand_words(kernels, weights)
    packed = _packed_copy(model, name, dtype, kernels, weights)
    if packed is not None:
        return packed
    if dtype != model.dtype:
        raise ForerunError(
            f"the model {name} is in {_word(model.dtype)} and its weights are shared: convert it to {_word(dtype)}"
            " first, or name no dtype"
        )
    return adopt(model, name)


def _packed_copy(
    model: transformers.PreTrainedModel, name: str, dtype: torch.dtype, kernels: str, weights: str
) -> PackedTransformer | None:
    """The model on native kernels, or None where they are not wanted, or cannot carry it; ForerunError if they must."""
    config = _family_of(model, name)
    if why_torch(config, dtype, model.device, kernels, weights) is not None or config is None:
        return None
    if _is_as_built(model):
        table = places(config)
        pieces = (Piece(key, 0, tensor) for key, tensor in model.state_dict().items() if key in table)
        packed = pack(config, table, pieces, dtype, torch.int8 if weights == "int8" else dtype, name)
        exact = weights == "auto" and dtype == model.dtype == torch.float32
        if _says_the_same(packed, model, TOLERANCE if exact else HALF_TOLERANCE):
            return packed
    if kernels == "native" or weights == "int8":
        raise ForerunError(
            f"{name} does not say what its weights alone would (a hook, or a changed layer?): use --kernels auto"
        )
    return None


def _family_of(model: transformers.PreTrainedModel, name: str) -> TransformerConfig | None:
    """Our words for a model, if it is one of our families with just its family's weights."""
    config = translate(model.config, name)
    if config is None or type(model).__name__ != ARCHITECTURES[model.config.model_type]:
        return None
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    config = replace(config, tied=head.data_ptr() == embedding.data_ptr())
    held = {key: tensor.shape for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    if config.tied:
        held.pop("lm_head.weight", None)
    same = held == {key: torch.Size(place.shape) for key, place in places(config).items()}
    return config if same else None


def hangings(module: torch.nn.Module) -> tuple[int, ...]:
    """What was hung on a module and may change what it says: hooks, and a forward of its own.
    transformers' own hooks only listen."""
    hooks = (*module._forward_hooks.items(), *module._forward_pre_hooks.items())
    found = [key for key, hook in hooks if not str(getattr(hook, "__module__", "")).startswith("transformers.")]
    own = module.__dict__.get("forward")
    return tuple(found) if own is None else (*found, id(own))


def _is_as_built(model: transformers.PreTrainedModel) -> bool:
    """Its modules are those that its config makes, and nothing was hung on them. In half precision
    a comparison of what is said would not show a small difference."""
    with torch.device("meta"):
        built = type(model)(deepcopy(model.config))
    same = [type(module) for module in model.modules()] == [type(module) for module in built.modules()]
    return same and not any(map(hangings, model.modules()))


@torch.inference_mode()
def _says_the_same(network: Network, model: transformers.PreTrainedModel, tolerance: float) -> bool:
    """Of a short text, read at once by both."""
    ids = torch.tensor([[(7 * step + 3) % network.vocab_size for step in range(8)]])
    cache = Cache(network.cache_shape, network.dtype, network.device)
    cache.reserve(1, ids.shape[1])
    cache.admit()
    where = np.arange(ids.shape[1])[None]
    ours = network.forward(Feed(ids, np.zeros(1, np.int64), where, dtype=network.dtype), cache).logits_BNV
    theirs = model(input_ids=ids, use_cache=False, return_dict=True).logits.float()
    return bool((ours - theirs).abs().max() <= tolerance * (theirs.max() - theirs.min()))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
