"""The folder of a checkpoint: where it is, what its config says, which files hold its weights.

Weights are read from safetensors only: a pickle can run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from safetensors import SafetensorError, safe_open

from forerun.errors import CheckpointError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DOWNLOADED = ("*.safetensors", "*.json", "tokenizer*", "*.model", "vocab.txt", "merges.txt", "*.jinja")
NOT_DOWNLOADED = ("*/*", "consolidated*.safetensors")
SHOWN = 12
"""Differences between weights and config.json that a message lists before it only counts."""


def checkpoint_folder(path_or_hub_id: str | Path) -> Path:
    """The folder itself, or a local copy of the hub's model of that name: weights, config and tokenizer, no pickles.

    A name may end in `@REVISION`: a branch, tag or commit of the hub's.
    """
    name, path = str(path_or_hub_id), Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    if "@" in name and Path(name.rpartition("@")[0]).expanduser().is_dir():
        raise CheckpointError(f"{name.rpartition('@')[0]} is a folder, which has no revisions: leave the revision out")
    if path.exists():
        raise CheckpointError(f"{name} is a file: give the folder that holds {CONFIG} and the weights, or a GGUF file")
    if isinstance(path_or_hub_id, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?", name):
        raise CheckpointError(f"there is no folder {name}: check the path")
    repository, _, revision = name.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(DOWNLOADED),
                ignore_patterns=list(NOT_DOWNLOADED),
            )
        )
    except Exception as error:  # the client raises a dozen kinds that have no ancestor in common
        raise CheckpointError(
            f"{name} is neither a folder here nor a model that the hub hands out ({brief(error)}): "
            "check the name and the connection"
        ) from error


def read_config(folder: Path) -> transformers.PreTrainedConfig:
    """The config.json of a checkpoint as transformers reads it."""
    if not (folder / CONFIG).is_file():
        files = sorted(folder.glob("*.gguf"))
        if files:
            raise CheckpointError(f"{folder} holds models in GGUF files: give one of them, such as {files[0]}")
        raise CheckpointError(f"{folder} has no {CONFIG}: give the folder of a Hugging Face checkpoint")
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # a wrong config.json makes transformers raise whatever its first victim raises
        raise CheckpointError(
            f"{folder / CONFIG} cannot be used ({brief(error)}): repair it or fetch it again"
        ) from error


def brief(error: BaseException) -> str:
    """The first line of an error, to be quoted within a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or the shards that its index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    try:
        shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX} is damaged ({error!r}): fetch it again") from error
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which its index names: fetch the missing files")
    return [folder / shard for shard in shards]


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        return (
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when they are opened: "
            "convert them to safetensors where you trust them"
        )
    return f"{folder} has no {WEIGHTS}: give the folder of a checkpoint that is complete"


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, to be read tensor by tensor; CheckpointError if it is damaged or cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({brief(error)}): fetch it again") from error


@dataclass(frozen=True)
class Stored:
    """What a file says about a tensor: its shape, and its number format in safetensors' words."""

    shape: tuple[int, ...]
    dtype: str


def stored(files: Sequence[Path]) -> dict[str, Stored]:
    """What the files say about their tensors, by name."""
    found: dict[str, Stored] = {}
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = Stored(tuple(part.get_shape()), part.get_dtype())
    # Old exports carry the rotary frequencies, which follow from the config.
    return {name: tensor for name, tensor in found.items() if not name.endswith("rotary_emb.inv_freq")}


def difference(folder: Path, lines: Sequence[str]) -> str:
    """The message for weights that are not those of their config.json or of a file's metadata, a line per tensor."""
    listed = [f"  {line}" for line in sorted(lines)[:SHOWN]]
    if len(lines) > SHOWN:
        listed.append(f"  and {len(lines) - SHOWN} more")
    head = (
        f"the tensors in {folder} are not those that its metadata calls for: fetch it again, or convert it anew"
        if folder.is_file()
        else f"the weights in {folder} do not fit its {CONFIG}: repair that file or fetch the weights that belong to it"
    )
    return "\n".join([head, *listed])
