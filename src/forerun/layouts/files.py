"""The files of published heads: read without running what a pickle asks for, and written all at once."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from forerun.drafting.registry import layouts
from forerun.errors import CheckpointError
from forerun.files import whole_folder
from forerun.layouts.table import Parcel, Tensors
from forerun.sources.folder import CONFIG, INDEX, WEIGHTS, brief, checkpoint_folder, opened, weight_files


def folder_of(source: str | Path) -> Path:
    """The folder itself, or the hub's, whose heads may be pickled."""
    folder = checkpoint_folder(source)
    if Path(source).expanduser().is_dir() or any(folder.glob("*.safetensors")):
        return folder
    try:
        pickles = [*(f"{layout.stem}.pt" for layout in layouts() if layout.stem), "pytorch_model*.bin"]
        return Path(huggingface_hub.snapshot_download(str(source), allow_patterns=["*.json", *pickles]))
    except Exception as error:  # as in `checkpoint_folder`
        raise CheckpointError(
            f"the weights of {source} cannot be had ({brief(error)}): check the connection"
        ) from error


def config_of(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"there is no {folder / CONFIG}: give the folder of trained heads") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read ({brief(error)}): fetch it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / CONFIG} holds no settings: fetch it again")
    return found


def tensors_of(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose names begin so."""
    if path.suffix == ".safetensors":
        with opened(path) as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    return {name: tensor for name, tensor in _unpickled(path).items() if name.startswith(prefix)}


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle. One that calls for anything else is not opened: it could run code."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is damaged, or a pickle of more than tensors, which could run code, and was not opened: get"
            " safetensors"
        ) from None
    except Exception as error:  # what a cut file makes torch raise depends on where it was cut
        raise CheckpointError(f"{path} is damaged or cut short ({brief(error)}): fetch it again") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()
    ):
        raise CheckpointError(f"{path} holds something else than named tensors: give the file of the heads alone")
    return dict(found)


def whole_model(folder: Path) -> list[Path]:
    """The weight files of a model, pickled ones if there are no others."""
    is_safe = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    return weight_files(folder) if is_safe or not pickled else pickled


def write_parcel(parcel: Parcel, folder: Path) -> list[Path]:
    (folder / CONFIG).write_text(json.dumps(parcel.config, indent=2) + "\n")
    for name in parcel.files:
        if name.endswith(".pt"):
            _save_pickle(parcel.tensors, folder / name)
        else:
            apart = {key: tensor.clone().contiguous() for key, tensor in parcel.tensors.items()}
            save_file(apart, folder / name, metadata={"format": "pt"})
    return [folder / name for name in parcel.files]


def _save_pickle(tensors: Tensors, path: Path) -> None:
    try:
        torch.save(dict(tensors), path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(brief(error)) from error


@contextmanager
def staged_beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` if nothing goes wrong, and goes if something does."""
    try:
        with whole_folder(out) as beside:
            yield beside
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{out} cannot be written ({brief(error)}): make room there or choose another folder"
        ) from error
