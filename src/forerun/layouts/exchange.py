"""Draft heads in the layouts of the outside world, both ways.

    ours            see `drafters/checkpoint.py`
    fasterdecoding  Medusa's own: config.json, and medusa_lm_head.safetensors or .pt with "{head}.{layer}.linear.weight";
                    version "2" has no vocabulary matrices. Read also: heads inside a merged model (Medusa-2)
    vllm            Medusa as vLLM reads it: "blocks.{head}.layers.{layer}.weight", "lm_heads.{head}.weight"
    hydra           Hydra's own: config.json and hydra_lm_head.pt

A layout is a table from its tensor names to places in our parameters (places.py). The same table reads and writes, so what one
way does the other undoes. Tensors keep their number format, and none is skipped silently: one too many, too few or of another
shape is an error that lists it. What is written is read back and compared bit by bit before it moves into place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forerun.drafters.hydra.layouts import as_hydra, read_hydra
from forerun.drafters.hydra.method import HydraConfig
from forerun.drafters.medusa.layouts import (
    MERGED_PREFIX,
    as_fasterdecoding,
    as_vllm,
    read_fasterdecoding,
    read_merged,
    read_vllm,
)
from forerun.drafters.medusa.method import MedusaConfig
from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.checkpoint import TREE, Checkpoint
from forerun.errors import CheckpointError, DrafterError
from forerun.layouts.files import config_of, folder_of, staged_beside, tensors_of, whole_model, write_parcel
from forerun.layouts.table import Heads, Parcel, Place, Stored, skeleton
from forerun.layouts.target import Base
from forerun.sources.folder import CONFIG, WEIGHTS

__all__ = ["LAYOUTS", "Base", "Heads", "demand_layout", "demand_new", "read", "write"]

LAYOUTS = ("ours", "fasterdecoding", "vllm", "hydra")

Reader = Callable[[Stored, Base | None], Heads]


def read(source: str | Path, base: Base | None = None) -> Heads:
    """Heads in any layout. base: their target, which some layouts need, and which others are held against.

    Raises CheckpointError for what is missing, damaged or not what its config says, DrafterError for heads that we do not
    have or that belong to another target.
    """
    folder = folder_of(source)
    config = config_of(folder)
    reader, files, prefix = _recognised(folder, config)
    return _read(reader, folder, config, files, prefix, base)


def _read(
    reader: Reader, folder: Path, config: Mapping[str, Any], files: Sequence[Path], prefix: str, base: Base | None
) -> Heads:
    tensors = {name: tensor for path in files for name, tensor in tensors_of(path, prefix).items()}
    heads = reader(Stored(folder, config, tensors), base)
    if base and (heads.config.width, heads.config.vocab_size) != (base.width, base.vocab_size):
        raise DrafterError(
            f"{folder} holds heads for {heads.target} (width {heads.config.width}, {heads.config.vocab_size} tokens), and"
            f" {base.name} has width {base.width} and {base.vocab_size} tokens: give the target that they were trained for"
        )
    return heads


def _recognised(folder: Path, config: Mapping[str, Any]) -> tuple[Reader, list[Path], str]:
    """Who reads this folder, from which files, and how the names of its tensors begin."""
    if "forerun" in config:
        return _read_ours, [folder / WEIGHTS], ""
    for stem, reader in (("hydra_lm_head", read_hydra), ("medusa_lm_head", read_fasterdecoding)):
        for suffix in (".safetensors", ".pt"):
            if (folder / f"{stem}{suffix}").is_file():
                return reader, [folder / f"{stem}{suffix}"], ""
    if config.get("model_type") == "medusa" or config.get("architectures") == ["MedusaModel"]:
        return read_vllm, whole_model(folder), ""
    if "medusa_num_heads" in config:
        return read_merged, whole_model(folder), MERGED_PREFIX
    raise CheckpointError(
        f"{folder} holds no heads that we know (there is neither medusa_lm_head nor hydra_lm_head, and its {CONFIG} does not"
        " speak of Medusa): give the folder of trained heads"
    )


def _read_ours(stored: Stored, base: Base | None) -> Heads:
    found = checkpoints.read(stored.folder)
    kinds: dict[str, Any] = {"medusa": MedusaConfig, "hydra": HydraConfig}
    if found.drafter not in kinds:
        raise DrafterError(
            f"{stored.folder} holds a drafter of the kind {found.drafter}: there is no layout to exchange it in"
        )
    config = found.config(kinds[found.drafter])
    own = {name: Place(name, tuple(p.shape)) for name, p in skeleton(config).named_parameters()}
    config, tensors = stored.gather(config, own)
    left = "its calibrated tree stays behind: no other layout has a place for one"
    notes = (left,) if (stored.folder / TREE).is_file() else ()
    return Heads("ours", config, tensors, found.target, found.training, notes)


def write(heads: Heads, layout: str, out: Path, base: Base | None = None) -> int:
    """Write heads to the new folder `out`, unless what is read back differs; how many tensors of ours were compared.

    Raises DrafterError for heads that the layout has no place for, CheckpointError if the folder cannot be written.
    """
    demand_layout(layout)
    demand_new(out)
    parcel = PARCELS[layout](heads, base) if layout in PARCELS else None
    with staged_beside(out) as staged:
        if parcel is None:
            about = Checkpoint(staged, heads.drafter, {}, heads.target, heads.training)
            checkpoints.write(heads.module(), heads.config, about, heads.dtype)
            files = [staged / WEIGHTS]
        else:
            files = write_parcel(parcel, staged)
        for path in files:
            _demand_equal(_read_back(staged, path, heads, base), heads, out)
    return len(heads.tensors)


PARCELS: Mapping[str, Callable[[Heads, Base | None], Parcel]] = {
    "fasterdecoding": as_fasterdecoding,
    "vllm": as_vllm,
    "hydra": as_hydra,
}


def _read_back(folder: Path, path: Path, heads: Heads, base: Base | None) -> Heads:
    """What one of the files that were written says."""
    config = config_of(folder)
    reader, _, prefix = _recognised(folder, config)
    return _read(reader, folder, config, [path], prefix, base or _stand_in(heads, folder))


def demand_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise DrafterError(f"there is no layout {layout!r}: choose one of {', '.join(LAYOUTS)}")


def demand_new(out: Path) -> None:
    """Refuse a folder that holds something: parts of two checkpoints must not mix."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty: choose another --out")


def _stand_in(heads: Heads, out: Path) -> Base | None:
    """Without a target, the one that a prefix layer implies: reading it back asks for nothing else."""
    config = heads.config
    if isinstance(config, MedusaConfig) or config.prefix is None:
        return None
    shape = replace(config.prefix.transformer(config.width), vocab_size=config.vocab_size)
    return Base(heads.target, out, config.width, config.vocab_size, shape)


def _demand_equal(again: Heads, heads: Heads, out: Path) -> None:
    """What was read back is what was to be written, bit by bit."""
    same = again.config == heads.config and again.tensors.keys() == heads.tensors.keys()
    if not same or not all(_same_bits(again.tensors[name], heads.tensors[name]) for name in heads.tensors):
        raise CheckpointError(
            f"{out} was not written, for reading it back gave something else: report this, with {heads.config}"
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
