"""Our transformer -> a folder that transformers, llama.cpp and vLLM read."""

from __future__ import annotations

import fnmatch
import json
import shutil
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
from forerun.sources.folder import CONFIG, DOWNLOADED, INDEX, WEIGHTS, brief, stored, weight_files

FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OWN = ("tree.json", "forerun-plan.json", "pruning.json")
"""What forerun has left beside a model is true of that one alone."""


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


def save_beside(network: Transformer, original: Path, folder: Path) -> None:
    """A model made from an original, with everything that lies beside the original's weights: tokenizer, end tokens,
    templates.

    In the original's number format, unless it was trained in less. Raises OSError and CheckpointError.
    """
    formats = {tensor.dtype for tensor in stored(weight_files(original)).values()}
    format_ = FORMATS.get(formats.pop(), torch.float32) if len(formats) == 1 else torch.float32
    dtype = format_ if network.dtype == torch.float32 else network.dtype
    theirs: dict[str, Any] = json.loads((original / CONFIG).read_text())
    known = {*published_config(network.config, dtype), "dtype"}
    save_pretrained(network, folder, {name: value for name, value in theirs.items() if name not in known}, dtype)
    for path in sorted(original.iterdir()):
        if path.is_file() and _travels(path.name):
            shutil.copyfile(path, folder / path.name)


def _travels(name: str) -> bool:
    wanted = any(fnmatch.fnmatch(name, pattern) for pattern in DOWNLOADED)
    return wanted and name not in (CONFIG, INDEX, *OWN) and not name.endswith(".safetensors")
