"""Draft heads in the layouts of the outside world, both ways. Ours is `drafting/checkpoint.py`; the
others stand beside the methods whose heads they hold, as their entries say.

A layout is a table from its tensor names to places in our parameters (`Place`). The same table
reads and writes, so what one way does the other undoes. Tensors keep their number format, and none
is skipped silently: one too many, too few or of another shape is an error that lists it. What is
written is read back and compared bit by bit before it moves into place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forerun.drafting import checkpoint as checkpoints
from forerun.drafting import registry
from forerun.drafting.checkpoint import TREE, Checkpoint
from forerun.drafting.trained import Layout
from forerun.errors import CheckpointError, DrafterError
from forerun.layouts.files import config_of, folder_of, staged_beside, tensors_of, whole_model, write_parcel
from forerun.layouts.table import Heads, Place, Published, skeleton
from forerun.layouts.target import Base
from forerun.sources.folder import CONFIG, WEIGHTS

__all__ = ["OURS", "Base", "Heads", "demand_layout", "demand_new", "read", "write"]


def read(source: str | Path, base: Base | None = None) -> Heads:
    """Heads in any layout. base: their target, which some layouts need, and which others are held against.

    Raises CheckpointError for what is missing, damaged or not what its config says, DrafterError
    for heads that we do not have or that belong to another target.
    """
    folder = folder_of(source)
    config = config_of(folder)
    layout, files = _recognised(folder, config)
    return _read(layout, folder, config, files, base)


def _read(layout: Layout, folder: Path, config: Mapping[str, Any], files: Sequence[Path], base: Base | None) -> Heads:
    tensors = {name: tensor for path in files for name, tensor in tensors_of(path, layout.prefix).items()}
    heads: Heads = layout.read(Published(folder, config, tensors), base)
    if base and (heads.config.width, heads.config.vocab_size) != (base.width, base.vocab_size):
        raise DrafterError(
            f"{folder} holds heads for {heads.target} (width {heads.config.width}, {heads.config.vocab_size} tokens),"
            " and"
            f" {base.name} has width {base.width} and {base.vocab_size} tokens: give the target that they were"
            " trained for"
        )
    return heads


def _recognised(folder: Path, config: Mapping[str, Any]) -> tuple[Layout, list[Path]]:
    """The layout of this folder, and the files that hold the heads."""
    if "forerun" in config:
        return OURS, [folder / WEIGHTS]
    foreign = registry.layouts()
    for layout in foreign:
        for suffix in (".safetensors", ".pt"):
            if layout.stem and (folder / f"{layout.stem}{suffix}").is_file():
                return layout, [folder / f"{layout.stem}{suffix}"]
    for layout in foreign:
        if layout.knows(config):
            return layout, whole_model(folder)
    stems = " nor ".join(layout.stem for layout in foreign if layout.stem)
    titles = " or ".join(one.title for one in registry.trained().values())
    raise CheckpointError(
        f"{folder} holds no heads that we know (there is neither {stems}, and its {CONFIG} does not speak of"
        f" {titles}): give"
        " the folder of trained heads"
    )


def _read_ours(stored: Published, base: Base | None) -> Heads:
    found = checkpoints.read(stored.folder)
    kinds = registry.trained()
    if found.drafter not in kinds:
        raise DrafterError(
            f"{stored.folder} holds a drafter of the kind {found.drafter}: there is no layout to exchange it in"
        )
    config = found.config(kinds[found.drafter].config)
    own = {name: Place(name, tuple(p.shape)) for name, p in skeleton(config).named_parameters()}
    config, tensors = stored.gather(config, own)
    left = "its calibrated tree stays behind: no other layout has a place for one"
    notes = (left,) if (stored.folder / TREE).is_file() else ()
    return Heads("ours", config, tensors, found.target, found.training, notes)


OURS = Layout("ours", "our own", _read_ours)


def write(heads: Heads, layout: str, out: Path, base: Base | None = None) -> int:
    """Write heads to the new folder `out`, unless what is read back differs; how many tensors of ours were compared.

    Raises DrafterError for heads that the layout has no place for, CheckpointError if the folder cannot be written.
    """
    chosen = demand_layout(layout)
    demand_new(out)
    parcel = chosen.pack(heads, base) if chosen.pack else None
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


def _read_back(folder: Path, path: Path, heads: Heads, base: Base | None) -> Heads:
    """What one of the files that were written says. Without a target, the one that the heads imply must do."""
    config = config_of(folder)
    layout, _ = _recognised(folder, config)
    return _read(layout, folder, config, [path], base or layout.implied(heads, folder))


def demand_layout(name: str) -> Layout:
    """The layout that is written by this name."""
    written = {layout.name: layout for layout in (OURS, *registry.layouts()) if layout is OURS or layout.pack}
    if name not in written:
        raise DrafterError(f"there is no layout {name!r}: choose one of {', '.join(written)}")
    return written[name]


def demand_new(out: Path) -> None:
    """Refuse a folder that holds something: parts of two checkpoints must not mix."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty: choose another --out")


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
