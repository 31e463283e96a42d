"""Checkpoints of the outside world -> ours.

    path or hub id -> folder -> config.json -> our Transformer, if it is a Llama, Mistral, Qwen2 or Qwen3
                                            -> nn/foreign.py, if it is any other Hugging Face causal LM

Tensors are read one by one into parameters that exist already: loading needs the memory of the model and of one tensor
more. Nothing is skipped silently: a tensor too many, too few or of another shape is an error that lists it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from forerun.errors import CheckpointError
from forerun.nn.folder import Stored, checkpoint_folder, difference, opened, read_config, stored, weight_files
from forerun.nn.foreign import load_foreign
from forerun.nn.network import Network
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.nn.translate import Place, places, translate

FLOATS = ("F64", "F32", "F16", "BF16")


def load_network(path_or_hub_id: str | Path, dtype: torch.dtype, device: torch.device) -> Network:
    """A network from a local folder or a hub id, on `device` in `dtype`, ready to read.

    Raises CheckpointError for anything that is missing, damaged, or of a kind that cannot be run.
    """
    folder = checkpoint_folder(path_or_hub_id)
    outside = read_config(folder)
    config = translate(outside, folder)
    if config is not None:
        return load_transformer(folder, config, dtype, device)
    return load_foreign(folder, outside, dtype, device)


def load_transformer(folder: Path, config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """Our transformer with the weights of a folder, which must hold exactly the tensors that `config` calls for."""
    files = weight_files(folder)
    held = stored(files)
    # A head that is published although the config ties it may differ; transformers believes the weights, and so do we.
    twice = config.tied and "lm_head.weight" in held
    config = replace(config, tied=config.tied and not twice)
    table = places(config)
    _demand_same(folder, table, held)
    model = _allocate(config, dtype, device)
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in table:
                    table[name].within(model).copy_(file.get_tensor(name))
    if twice and torch.equal(model.head.weight, model.embedding.weight):
        model.config, model.head.weight = replace(config, tied=True), model.embedding.weight
    return model


def _demand_same(folder: Path, table: Mapping[str, Place], held: Mapping[str, Stored]) -> None:
    lines = [f"missing     {name} {_shape(table[name].shape)}" for name in table if name not in held]
    lines += [f"unexpected  {name} {_shape(held[name].shape)}" for name in held if name not in table]
    for name in table.keys() & held.keys():
        if held[name].shape != table[name].shape:
            lines.append(f"wrong shape {name} {_shape(held[name].shape)} instead of {_shape(table[name].shape)}")
        elif held[name].dtype not in FLOATS:
            lines.append(f"wrong type  {name} {held[name].dtype} instead of one of {', '.join(FLOATS)}")
    if lines:
        raise CheckpointError(difference(folder, lines))


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _allocate(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """A transformer whose parameters have memory but no values yet."""
    with torch.device("meta"):
        model = Transformer(config)
    try:
        weights = {
            name: nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=device))
            for name, weight in model.named_parameters()
        }
    except RuntimeError as error:
        numbers = sum(weight.numel() for weight in model.parameters())
        raise CheckpointError(
            f"a model of {numbers / 1e9:.1f} billion {dtype} weights does not fit into the memory of {device}: "
            "choose a smaller model or number format"
        ) from error
    if config.tied:
        weights["head.weight"] = weights["embedding.weight"]
    model.load_state_dict(weights, assign=True)
    return model
