"""A foreign model's folder -> a network that has rehearsed, or the reason why there is none."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch
import transformers

from forerun.errors import CheckpointError
from forerun.nn.foreign.network import CACHELESS, NOT_CAUSAL, RECURRENT, Foreign
from forerun.nn.foreign.rehearsal import rehearse
from forerun.sources.folder import brief, difference, weight_files

BUFFERS = re.compile(r"(\.|^)((attn|attention|self_attn)\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")
"""Constants that old exports carry beside the weights; transformers makes them anew."""
ALIBI = (
    "derives positions from the order of its cache (ALiBi and the like), so tree nodes cannot be placed: "
    "choose a model that takes explicit positions"
)


def load_foreign(
    folder: Path, config: transformers.PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> Foreign:
    """A causal LM that transformers knows, wrapped; `config` is the one read from the folder.

    Raises CheckpointError for damaged weights and for models that cannot be rolled back or cannot read a tree.
    """
    name = f"{folder} ({config.model_type})"
    _refuse_by_config(name, config)
    weight_files(folder)
    return adopt(_read(folder, name, config, dtype).to(device).requires_grad_(False).eval(), name)


def adopt(model: transformers.PreTrainedModel, name: str) -> Foreign:
    """A causal LM of transformers that is in memory already. `name` is what errors call it.

    Its weights are shared and nothing about it is changed: it should be in evaluation mode.

    Raises CheckpointError for models that cannot be rolled back or cannot read a tree.
    """
    _refuse_by_config(name, model.config)
    _refuse_by_signature(name, model)
    foreign = Foreign(model, name)
    rehearse(foreign, name)
    return foreign


def _refuse_by_config(name: str, config: transformers.PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise CheckpointError(f"{name} is an encoder-decoder, not a causal language model: choose a decoder-only one")
    if not getattr(config, "is_causal", True):
        raise CheckpointError(f"{name} {NOT_CAUSAL}")
    if getattr(config, "alibi", False):
        raise CheckpointError(f"{name} {ALIBI}")


def _refuse_by_signature(name: str, model: transformers.PreTrainedModel) -> None:
    accepted = inspect.signature(model.forward).parameters
    if "past_key_values" not in accepted:
        recurrent = "cache_params" in accepted or "state" in accepted
        raise CheckpointError(f"{name} {RECURRENT if recurrent else CACHELESS}")
    if "position_ids" not in accepted:
        raise CheckpointError(f"{name} {ALIBI}")


def _read(
    folder: Path, name: str, config: transformers.PreTrainedConfig, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # an unknown kind, a missing package, a damaged file: each has its own class
        raise CheckpointError(
            f"{name} cannot be loaded by transformers {transformers.__version__} ({brief(error)}): "
            "fetch it again or choose another model"
        ) from error
    lines = [f"missing     {key}" for key in info["missing_keys"]]
    lines += [f"unexpected  {key}" for key in info["unexpected_keys"] if not BUFFERS.search(key)]
    if lines:
        raise CheckpointError(difference(folder, lines))
    loaded: transformers.PreTrainedModel = model
    return loaded
