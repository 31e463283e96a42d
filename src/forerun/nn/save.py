"""Our transformer -> a folder that transformers, llama.cpp and vLLM read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from forerun.errors import CheckpointError
from forerun.files import whole_folder
from forerun.nn.transformer import Transformer, TransformerConfig
from forerun.nn.translate import ARCHITECTURES, places, published_config, translate
from forerun.sources.folder import CONFIG, WEIGHTS, brief
from forerun.sources.source import Source


def save_pretrained(
    model: Transformer,
    folder: str | Path,
    extra_config: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write config.json and model.safetensors as transformers, llama.cpp and vLLM read them.

    extra_config: entries of config.json to add or to override (token ids, for instance). The folder is made if need be;
    other files in it stay. Raises CheckpointError where it cannot be written; then nothing half-written is left.
    """
    folder = Path(folder)
    fields = published_config(model.config, dtype) | dict(extra_config or {})
    _demand_faithful(fields, model.config, folder)
    tensors = {
        name: place.within(model).to(device="cpu", dtype=dtype).contiguous()
        for name, place in places(model.config).items()
    }
    try:
        with whole_folder(folder) as beside:
            save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
            (beside / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be written ({brief(error)}): make room there or choose another folder"
        ) from error


def is_readable(config: TransformerConfig) -> bool:
    """Whether transformers would read such a model back as what it is."""
    try:
        _demand_faithful(published_config(config, torch.float32), config, Path())
    except CheckpointError:
        return False
    return True


def _demand_faithful(fields: Mapping[str, Any], config: TransformerConfig, folder: Path) -> None:
    """What is about to be written must be read back as the same architecture."""
    try:
        again = translate(transformers.AutoConfig.for_model(**fields), folder)
    except Exception as error:  # as in `read_config`
        raise CheckpointError(
            f"{folder} was not written, for transformers would refuse its {CONFIG} ({brief(error)}): change that"
        ) from error
    if again != (config if any(config.windows) else replace(config, windows=())):
        raise CheckpointError(
            f"{folder} was not written, for none of {', '.join(ARCHITECTURES)} has the shape of this model: {config}"
        )


def save_beside(network: Transformer, original: Source, folder: Path) -> None:
    """A model made from an original, with everything that lies beside the original's weights: tokenizer, end tokens,
    templates.

    In the original's number format, unless it was trained in less. Raises OSError and CheckpointError.
    """
    dtype = original.weights.dtype if network.dtype == torch.float32 else network.dtype
    theirs = original.place.settings()
    known = {*published_config(network.config, dtype), "dtype"}
    save_pretrained(network, folder, {name: value for name, value in theirs.items() if name not in known}, dtype)
    original.place.hand_on(folder)
