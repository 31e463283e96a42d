"""Draft heads between layouts: what was read, and where each published tensor lives among our parameters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forerun.drafting.heads import HeadsModule
from forerun.drafting.registry import trained_of
from forerun.drafting.trained import HeadsConfig, Trained
from forerun.errors import CheckpointError
from forerun.layouts.target import Base
from forerun.sources.folder import CONFIG, difference

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Heads:
    """Draft heads, whatever layout they come from.

    tensors: our parameters by name, in the number format of their file. target: the name of the
    model that they belong to. notes: what whoever converts them should know.
    """

    layout: str
    config: Any
    tensors: Tensors
    target: str
    training: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def drafter(self) -> str:
        return trained_of(self.config)[0]

    @property
    def method(self) -> Trained:
        return trained_of(self.config)[1]

    @property
    def homes(self) -> str:
        """The layouts that have a place for heads of this method."""
        return " or ".join(layout.name for layout in self.method.layouts if layout.pack) or "ours"

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors.values())).dtype

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    def module(self) -> HeadsModule:
        """The heads themselves, in the tensors' number format."""
        made = skeleton(self.config)
        made.load_state_dict(dict(self.tensors), assign=True)
        return made


def skeleton(config: HeadsConfig) -> HeadsModule:
    """Heads of this shape, without memory."""
    with torch.device("meta"):
        made: HeadsModule = trained_of(config)[1].network(config)
        return made


@dataclass(frozen=True)
class Place:
    """Where a published tensor lives: rows `begin .. begin + shape[0]` of parameter[index]. Tied
    tensors have one place."""

    parameter: str
    shape: tuple[int, ...]
    index: tuple[int, ...] = ()
    begin: int = 0

    def within(self, tensors: Tensors) -> Tensor:
        return tensors[self.parameter][self.index][self.begin : self.begin + self.shape[0]]


Table = dict[str, Place]


@dataclass(frozen=True)
class Parcel:
    """A folder to be written: config.json, and the same tensors in each of these files. Tied names share one tensor."""

    config: Mapping[str, Any]
    tensors: Tensors
    files: Sequence[str]


def packed(heads: Heads, table: Table) -> dict[str, Tensor]:
    """Each tensor with memory of its own, one for names that share a place."""
    apart = {place: place.within(heads.tensors).clone() for place in set(table.values())}
    return {name: apart[place] for name, place in table.items()}


@dataclass(frozen=True)
class Published:
    """What a folder holds: its config.json, and the tensors of some of its files."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Tensors

    def lacks_heads(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.folder} holds no heads ({what}): give the folder of trained heads")

    def gather(self, config: HeadsConfig, table: Table) -> tuple[Any, dict[str, Tensor]]:
        """Our config and tensors. CheckpointError unless the tensors are exactly those of the table."""
        self.demand_same(table)
        dtype = reduce(torch.promote_types, (self.tensors[name].dtype for name in table))
        shapes = {name: p.shape for name, p in skeleton(config).named_parameters()}
        ours = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
        first: dict[Place, str] = {}
        differing = []
        for name, place in table.items():
            if place not in first:
                place.within(ours).copy_(self.tensors[name])
            elif not torch.equal(self.tensors[name], self.tensors[first[place]]):
                differing.append(
                    f"differs     {name} from {first[place]}, and they are one block in the published code"
                )
            first.setdefault(place, name)
        if differing:
            raise CheckpointError(difference(self.folder, differing))
        return _settled(config, ours)

    def demand_same(self, table: Table) -> None:
        held = self.tensors
        lines = [f"missing     {name} {list(table[name].shape)}" for name in table if name not in held]
        lines += [f"unexpected  {name} {list(held[name].shape)}" for name in held if name not in table]
        for name in table.keys() & held.keys():
            if tuple(held[name].shape) != table[name].shape:
                lines.append(f"wrong shape {name} {list(held[name].shape)} instead of {list(table[name].shape)}")
            elif held[name].dtype not in FLOATS:
                lines.append(f"wrong type  {name} {held[name].dtype} instead of float32, float16 or bfloat16")
        if lines:
            raise CheckpointError(difference(self.folder, lines))


def _settled(config: HeadsConfig, tensors: dict[str, Tensor]) -> tuple[HeadsConfig, dict[str, Tensor]]:
    """Layers that are equal are tied, and of layers that cannot differ every kind of heads says it
    in one way, its default."""
    blocks, biases = tensors.get("blocks"), tensors.get("biases")
    if blocks is None or biases is None:
        return replace(config, tied_layers=type(config).tied_layers), tensors
    if len(blocks) == 1:
        return replace(config, tied_layers=type(config).tied_layers or config.layers > 1), tensors
    if not all(torch.equal(layer, stack[0]) for stack in (blocks, biases) for layer in stack):
        return config, tensors
    return replace(config, tied_layers=True), tensors | {"blocks": blocks[:1].clone(), "biases": biases[:1].clone()}


def count_note(stored: Published, kind: str, config: HeadsConfig) -> tuple[str, ...]:
    """What is said about a config with too few heads, which published ones are known to have. One
    with too many, or with other layers than are stored, means that something is missing:
    CheckpointError."""
    heads, layers = (f"{kind}_num_heads", f"{kind}_num_layers") if kind else ("num_heads", "num_hidden_layers")
    said = stored.config.get(heads, config.heads)
    for key, count, is_wrong in (
        (heads, config.heads, not isinstance(said, int) or said > config.heads),
        (layers, config.layers, stored.config.get(layers, config.layers) != config.layers),
    ):
        if is_wrong:
            raise CheckpointError(
                f"{stored.folder / CONFIG} says {key} {stored.config[key]}, and the weights have {count}: fetch the"
                " weights that"
                " belong to it, or correct that file"
            )
    if said == config.heads:
        return ()
    return (f"its {CONFIG} says {said} heads ({heads}), and {config.heads} are stored: {config.heads} it is",)


def target_of(stored: Published, base: Base | None) -> str:
    named = stored.config.get("base_model_name_or_path")
    return named if isinstance(named, str) and named else base.name if base else "unknown"


def name_for_others(heads: Heads, base: Base | None) -> str:
    """How other code finds the target: a name on the hub stays, a bare folder name gives way to the
    path that was given."""
    return base.name if base and "/" not in heads.target else heads.target


def origin(stored: Published, layout: str) -> dict[str, Any]:
    return {"converted_from": layout, "source": stored.folder.resolve().name}


def numbered(template: str, *numbers: int) -> str:
    return template.replace("#", "{}").format(*numbers)


def matching(held: Tensors, template: str) -> list[tuple[tuple[int, ...], Tensor]]:
    """The tensors whose names are the template with numbers in it, and the numbers."""
    pattern = re.compile(r"(\d+)".join(map(re.escape, template.split("#"))))
    found = [(pattern.fullmatch(name), tensor) for name, tensor in held.items()]
    return [(tuple(map(int, match.groups())), tensor) for match, tensor in found if match]


def usual(tensors: Sequence[Tensor], dim: int = 0) -> int:
    """The size that most of these have, so that a single wrong one is named as such; 0 where there are none."""
    sizes = Counter(tensor.shape[dim] for tensor in tensors if tensor.dim() > dim)
    return sizes.most_common(1)[0][0] if sizes else 0
