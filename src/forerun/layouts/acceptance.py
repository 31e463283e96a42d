"""Acceptance heads as the code of SpecDec++ has them: {"hidden_size": D, "num_layers": blocks}, and a sequence of
blocks and one last layer under the name `model`. It is read alone.

That code repeats one block, so its files hold one, under the first name or under all; a fork of it has blocks of their
own. What a rejection counted in the loss is not in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forerun.drafting import checkpoint as checkpoints
from forerun.drafting.acceptance import KIND, AcceptanceConfig
from forerun.drafting.acceptance.head import AcceptanceHead
from forerun.drafting.checkpoint import Checkpoint
from forerun.errors import CheckpointError
from forerun.layouts.files import config_of, staged_beside, tensors_of, whole_model
from forerun.sources.folder import difference

RECOMMENDED = 6.0
"""What a rejection counts in the examples of that code."""


def knows(config: Mapping[str, Any]) -> bool:
    """Of a config.json: it is that of such a head."""
    return {"hidden_size", "num_layers"} <= config.keys() and not {"model_type", "architectures", "forerun"} & set(
        config
    )


def read(folder: Path) -> AcceptanceHead:
    """The head in a folder, in its number format. CheckpointError for tensors that do not fit."""
    config = config_of(folder)
    tensors = {name: one for path in whole_model(folder) for name, one in tensors_of(path).items()}
    depth = config["num_layers"]
    if type(depth) is not int or depth < 0:
        raise CheckpointError(f"{folder} speaks of {depth!r} layers: give the folder of an acceptance head")
    blocks = [f"model.{number}.linear" for number in range(depth)]
    tied = depth > 1 and all(_same(tensors, blocks[0], one) for one in blocks[1:])
    made = AcceptanceConfig(config["hidden_size"], depth, tied, RECOMMENDED)
    with torch.device("meta"):
        head = AcceptanceHead(made)
    places = {
        f"{ours}.{name}": f"{theirs}.{name}" for ours, theirs in _names(blocks, made) for name in ("weight", "bias")
    }
    _demand_fit(folder, head, places, {name: one for name, one in tensors.items() if _belongs(name, blocks, tied)})
    head.load_state_dict({ours: tensors[theirs] for ours, theirs in places.items()}, assign=True)
    return head


def _names(blocks: list[str], config: AcceptanceConfig) -> list[tuple[str, str]]:
    """What layers are called here, and there."""
    stored = blocks[:1] if config.tie_blocks else blocks
    return [*((f"blocks.{number}", one) for number, one in enumerate(stored)), ("last", f"model.{config.depth}")]


def _same(tensors: Mapping[str, Tensor], one: str, other: str) -> bool:
    """Both are the same layer, or the other was left out as such."""
    pairs = [(tensors.get(f"{one}.{name}"), tensors.get(f"{other}.{name}")) for name in ("weight", "bias")]
    return all(b is None or (a is not None and torch.equal(a, b)) for a, b in pairs)


def _belongs(name: str, blocks: list[str], tied: bool) -> bool:
    """Not one of the other names of a tied block."""
    return not (tied and name.rpartition(".")[0] in blocks[1:])


def _demand_fit(folder: Path, head: AcceptanceHead, places: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    own = {places[name]: tuple(one.shape) for name, one in head.named_parameters()}
    held = {name: tuple(one.shape) for name, one in tensors.items()}
    lines = [f"missing     {name} {list(own[name])}" for name in own if name not in held]
    lines += [f"unexpected  {name} {list(held[name])}" for name in held if name not in own]
    lines += [
        f"wrong shape {name} {list(held[name])} instead of {list(own[name])}"
        for name in own.keys() & held.keys()
        if held[name] != own[name]
    ]
    if lines:
        raise CheckpointError(difference(folder, lines))


def write(head: AcceptanceHead, target: str, out: Path) -> int:
    """Write the head to the new folder `out` in our layout, unless what is read back differs; its tensors then."""
    own = dict(head.named_parameters())
    with staged_beside(out) as staged:
        about = Checkpoint(staged, KIND, {}, target, {})
        checkpoints.write(head, head.config, about, next(iter(own.values())).dtype)
        again = dict(checkpoints.read(staged).module(AcceptanceHead, AcceptanceConfig).named_parameters())
        if not all(torch.equal(again[name].to(one.dtype), one) for name, one in own.items()):
            raise CheckpointError(f"{out} was not written, for reading it back gave something else: report this")
    return len(own)
