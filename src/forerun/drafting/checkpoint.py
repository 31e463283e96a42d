"""Checkpoints of draft heads: a folder with config.json, model.safetensors and, once calibrated, tree.json.

config.json holds the kind of drafter, every architectural choice, and where the heads come from:

    {"forerun": 1, "drafter": "medusa", "architecture": {"width": 512, ...}, "target": "target", "training": {...}}

Reading is strict: fields and tensors are exactly those that the kind calls for, or the difference is named.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from forerun.errors import CheckpointError, DrafterError
from forerun.files import whole_folder
from forerun.nn.network import Network
from forerun.ranktree import PUBLISHED, RankTree
from forerun.sources.folder import CONFIG, WEIGHTS, brief, difference, opened

VERSION = 1
TREE = "tree.json"
DEFAULT_TREE = RankTree([(0,), (0, 0), (1,), (0, 0, 0), (2,), (0, 1), (1, 0), (0, 0, 0, 0), (0, 0, 1), (3,)])
"""For heads that were never calibrated: few nodes, because every machine can afford them."""

Config = TypeVar("Config")
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds. architecture: the fields of the kind's config. target: the name of the model that the
    heads belong to. training: how they came about."""

    folder: Path
    drafter: str
    architecture: Mapping[str, Any]
    target: str
    training: Mapping[str, Any]

    def config(self, kind: type[Config]) -> Config:
        """The architecture as a checked record of this kind."""
        known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        unknown = sorted(set(self.architecture) - known)
        if unknown:
            raise CheckpointError(
                f"{self.folder / CONFIG} has unknown architecture fields ({', '.join(unknown)}): it was written by"
                " another"
                " version of forerun"
            )
        try:
            return kind(**self.architecture)
        except TypeError as error:
            raise CheckpointError(f"{self.folder / CONFIG} lacks architecture fields ({brief(error)})") from None

    def module(self, make: Callable[[Config], Module], kind: type[Config]) -> Module:
        """The heads of this folder. They get memory only once the file is known to fit."""
        config = self.config(kind)
        with torch.device("meta"):
            module = make(config)
        self.fill(module)
        return module

    def fill(self, module: nn.Module) -> None:
        """Give the module the folder's weights, which must be exactly its parameters. It may be
        without memory yet (on the device meta)."""
        own = dict(module.named_parameters())
        with opened(self.folder / WEIGHTS) as file:
            held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)
            lines = [f"missing     {name} {list(own[name].shape)}" for name in own if name not in held]
            lines += [f"unexpected  {name} {list(held[name])}" for name in held if name not in own]
            lines += [
                f"wrong shape {name} {list(held[name])} instead of {list(own[name].shape)}"
                for name in own.keys() & held.keys()
                if held[name] != tuple(own[name].shape)
            ]
            if lines:
                raise CheckpointError(difference(self.folder, lines))
            if any(parameter.is_meta for parameter in own.values()):
                own = dict(module.to_empty(device="cpu").named_parameters())
            with torch.no_grad():
                for name, parameter in own.items():
                    parameter.copy_(file.get_tensor(name))


def load(path: str | None, drafter: str) -> Checkpoint:
    """The checkpoint of a drafter of this kind; DrafterError or CheckpointError says what is wrong."""
    if path is None:
        raise DrafterError(f"the drafter {drafter} needs a checkpoint: write {drafter}:PATH")
    found = read(path)
    if found.drafter != drafter:
        raise DrafterError(f"{path} holds a drafter of the kind {found.drafter}: write {found.drafter}:{path}")
    return found


def read(path: str | Path) -> Checkpoint:
    """The checkpoint in a folder, whatever its kind."""
    folder = Path(path)
    try:
        found = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"there is no {folder / CONFIG}: give the folder of trained heads") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read ({brief(error)}): fetch it again") from None
    if not isinstance(found, dict) or found.get("forerun") != VERSION:
        raise CheckpointError(
            f"{folder} does not hold heads of this library: bring published ones into its format with forerun convert"
        )
    kinds = {"drafter": str, "architecture": dict, "target": str, "training": dict}
    wrong = next((name for name, kind in kinds.items() if not isinstance(found.get(name), kind)), None)
    if wrong:
        raise CheckpointError(
            f"{folder / CONFIG} lacks the field {wrong!r}, or has no sense in it: write the checkpoint again"
        )
    return Checkpoint(folder, *(found[name] for name in kinds))


def write(
    module: nn.Module,
    config: Any,
    checkpoint: Checkpoint,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write heads to `checkpoint.folder`, all at once at the end. `config` is the record behind the architecture; what
    belongs to training, or says nothing, is left out. A tree that was calibrated for older weights there goes."""
    folder = checkpoint.folder
    said = {name: value for name, value in asdict(config).items() if value not in (None, ())}
    architecture = {name: value for name, value in said.items() if name not in ("dropout", "known")}
    about = {
        "forerun": VERSION,
        "drafter": checkpoint.drafter,
        "architecture": architecture,
        "target": checkpoint.target,
        "training": dict(checkpoint.training),
    }
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in module.named_parameters()}
    try:
        with whole_folder(folder) as beside:
            save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
            (beside / CONFIG).write_text(json.dumps(about, indent=1) + "\n")
            if not _same(beside / WEIGHTS, folder / WEIGHTS):
                (folder / TREE).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder} cannot be written ({brief(error)}): make room there or choose another folder"
        ) from None


def _same(new: Path, old: Path) -> bool:
    return old.is_file() and filecmp.cmp(new, old, shallow=False)


def demand_fit(checkpoint: Checkpoint, width: int, vocab_size: int, network: Network) -> None:
    """DrafterError unless heads of this shape belong on this target."""
    has = network.output_shape
    if has != (vocab_size, width):
        raise DrafterError(
            f"{checkpoint.folder} holds heads for {checkpoint.target} (width {width}, {vocab_size} tokens), and this"
            " target has"
            f" width {has[1]} and {has[0]} tokens: use the target that they were trained for"
        )


def demand_layers(name: str, layers: Sequence[int], network: Network) -> None:
    """DrafterError unless the target has all these layers, each of which is read once. name: whose they are."""
    top = network.cache_shape.layers
    if max(layers) > top:
        raise DrafterError(
            f"{name} reads layer {max(layers)}, and this target has {top}: use the target that it was trained for"
        )
    twice = next((layer for layer in layers if list(layers).count(layer) > 1), None)
    if twice is not None:
        raise DrafterError(f"{name} reads layer {twice} of this target twice: name it once")


# ---- trees


def tree_for(checkpoint: Checkpoint, wish: object, heads: int, vocab_size: int) -> RankTree:
    """The tree to grow: the one asked for, else the calibrated one beside the checkpoint, else a small one."""
    if wish is None:
        beside = checkpoint.folder / TREE
        tree = read_tree(beside) if beside.is_file() else _shallow(DEFAULT_TREE, heads)
    elif isinstance(wish, str):
        tree = RankTree.named(wish) if wish in PUBLISHED else read_tree(Path(wish))
    else:
        tree = _tree(wish, "the drafter's tree")
    if tree.widest > vocab_size:
        raise DrafterError(f"the tree asks for rank {tree.widest - 1}, and there are only {vocab_size} tokens")
    if tree.depth > heads:
        raise DrafterError(
            f"the tree is {tree.depth} deep and {checkpoint.folder} has {heads} heads: choose a shallower one"
        )
    return tree


def read_tree(path: Path) -> RankTree:
    """A tree that `forerun calibrate` wrote, or any JSON file with the paths."""
    try:
        return _tree(json.loads(path.read_text()), str(path))
    except FileNotFoundError:
        raise DrafterError(f"there is no tree {path}: name a file, or one of {', '.join(PUBLISHED)}") from None
    except (OSError, ValueError) as error:
        raise DrafterError(f"the tree {path} cannot be read ({brief(error)}): calibrate again") from None


def _tree(found: object, source: str) -> RankTree:
    paths = found.get("paths") if isinstance(found, Mapping) else found
    if not isinstance(paths, list) or not all(isinstance(path, list) for path in paths):
        raise DrafterError(f"{source} holds no tree: give a list of paths of ranks such as [[0], [0, 0], [1]]")
    return RankTree(paths)


def _shallow(tree: RankTree, heads: int) -> RankTree:
    return tree.within(heads, tree.size) or tree
