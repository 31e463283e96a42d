"""What a file says about a federation: every field has its default, and a file names what differs."""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from forerun.errors import TrainingError
from forerun.train.federated.losses import KD_LOSSES
from forerun.train.federated.methods import method_of

KINDS = ("shapes", "digits", "folders")


@dataclass(frozen=True)
class DataSettings:
    """kind: "shapes" are drawn, "digits" come with scikit-learn, "folders" are yours: pairs (COCO or Flickr30k style),
    images (CIFAR-100), texts (AG News). public, test, own, paired: images of the public set and of the test, samples
    of one modality, pairs of clients that have both; 0 with folders: all there are. size: of such images, in pixels."""

    kind: str = "shapes"
    public: int = 1000
    test: int = 200
    own: int = 1200
    paired: int = 1600
    pairs: str = ""
    private_pairs: str = ""
    images: str = ""
    texts: str = ""
    size: int = 64


@dataclass(frozen=True)
class ClientSettings:
    """image, text, both: clients of each kind. Architectures are dealt out in turn. The rest: see `world.Shares`."""

    image: int = 3
    text: int = 3
    both: int = 4
    image_architectures: tuple[str, ...] = ("conv:16x32", "conv:16x32x64", "conv:24x48")
    text_architectures: tuple[str, ...] = ("gru:32", "bag:32")
    alpha: float = 0.1
    least: int = 10
    shards: int = 10
    most: int = 0


@dataclass(frozen=True)
class Settings:
    """clients_per_round, rows_per_round: of clients and of public items, 0: all of these. decay: the share of rounds in
    which the rate falls to 0. docs/federated.md has the others."""

    method: str = "creamfl"
    rounds: int = 10
    clients_per_round: int = 5
    local_epochs: int = 2
    rows_per_round: int = 0
    width: int = 64
    server_image: str = "conv:32x64x96x128"
    server_text: str = "gru:64"
    tau: float = 0.5
    gamma: float = 0.5
    kd: float = 0.3
    kd_loss: str = "mse"
    include_positive: bool = True
    tau_agg: float = 1.0
    top_rank: int = 10
    margin: bool = False
    batch: int = 64
    rate: float = 1e-3
    decay: float = 0.0
    shared_adam: bool = False
    clip: float = 2.0
    half: bool = False
    upload_clip: float = 0.0
    upload_noise: float = 0.0
    dropout: float = 0.0
    late: float = 0.0
    folds: int = 5
    seed: int = 0
    data: DataSettings = field(default_factory=DataSettings)
    clients: ClientSettings = field(default_factory=ClientSettings)

    def __post_init__(self) -> None:
        """TrainingError for what makes no sense."""
        method_of(self.method)
        _demand_word("kd_loss", self.kd_loss, KD_LOSSES)
        _demand_word("data.kind", self.data.kind, KINDS)
        counts = {"rounds": self.rounds, "batch": self.batch, "width": self.width, "folds": self.folds}
        counts |= {"local_epochs": self.local_epochs, "clients.shards": self.clients.shards}
        floats = {"tau": self.tau, "tau_agg": self.tau_agg, "rate": self.rate, "clip": self.clip}
        floats["clients.alpha"] = self.clients.alpha
        for name, value in (counts | floats).items():
            if not value > 0:
                raise TrainingError(f"{name} is {value}: give a number above 0")
        for name, value in _numbers(self).items():
            if not (math.isfinite(value) and value >= 0) and name != "seed":
                raise TrainingError(f"{name} is {value}: give a finite number of at least 0")
        for name, value in {"dropout": self.dropout, "late": self.late, "decay": self.decay}.items():
            if value > 1:
                raise TrainingError(f"{name} is {value}: it is a share, from 0 to 1")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


PRESETS: dict[str, dict[str, Any]] = {
    "shapes": {},
    "quick": {
        "rounds": 2,
        "clients_per_round": 3,
        "local_epochs": 1,
        "width": 32,
        "server_image": "conv:16x32",
        "server_text": "gru:32",
        "data": {"public": 128, "test": 40, "own": 160, "paired": 160},
        "clients": {"image": 2, "text": 2, "both": 2, "least": 5},
    },
    "digits": {
        "data": {"kind": "digits", "public": 500, "test": 200, "own": 500, "paired": 500},
        "clients": {"least": 5},
    },
    "equal": {
        "clients": {"image_architectures": ["conv:32x64x96x128"], "text_architectures": ["gru:64"]},
    },
    "paper": {
        "rounds": 30,
        "clients_per_round": 10,
        "local_epochs": 5,
        "width": 256,
        "batch": 128,
        "rate": 2e-4,
        "data": {"kind": "folders", "public": 50_000, "test": 5000, "own": 0, "paired": 0},
        "clients": {"image": 10, "text": 10, "both": 15},
    },
}
"""By name: what differs from the defaults. equal: clients have the server's towers, which FedAvg needs. paper: its
numbers, not its networks, which come with weights that are not here."""


def read(source: str, overrides: Mapping[str, Any] | None = None) -> Settings:
    """A YAML file, or the name of a preset. A file may begin with `preset: NAME`. overrides: fields that differ again.

    Raises TrainingError for a file that cannot be read, or says what nobody knows."""
    if source in PRESETS:
        return settled({"preset": source, **(overrides or {})})
    try:
        found = yaml.safe_load(Path(source).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(
            f"{source} cannot be read ({str(error).splitlines()[0]}): name a YAML file, or one of {', '.join(PRESETS)}"
        ) from None
    if found is not None and not isinstance(found, dict):
        raise TrainingError(f"{source} is no list of settings: write lines such as rounds: 10")
    return settled({**(found or {}), **(overrides or {})})


def settled(given: Mapping[str, Any]) -> Settings:
    """Settings from a preset, if one is named, and what differs."""
    rest = dict(given)
    preset = rest.pop("preset", "shapes")
    if preset not in PRESETS:
        raise TrainingError(f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}")
    found: Settings = _over(_over(Settings(), PRESETS[preset]), rest)
    return found


def _over(base: Any, given: Mapping[str, Any], where: str = "") -> Any:
    known = {one.name: getattr(base, one.name) for one in fields(base)}
    changed = {}
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise TrainingError(f"nobody knows the setting {where}{name}: {hint}")
        changed[name] = _as(known[name], value, f"{where}{name}")
    return replace(base, **changed)


def _as(example: Any, value: Any, name: str) -> Any:
    """The value, if it is of the kind of the example."""
    if is_dataclass(example):
        if not isinstance(value, dict):
            raise TrainingError(f"{name} is a list of settings, not {value!r}: write them below it, indented")
        return _over(example, value, f"{name}.")
    if isinstance(example, tuple):
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise TrainingError(f"{name} is a list of words, not {value!r}: write [conv:16x32, conv:16x32x64]")
        return tuple(value)
    if isinstance(example, float) and isinstance(value, str):  # YAML takes 1e-3 for a word
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(example, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(example):
        raise TrainingError(f"{name} is {value!r}: give {_said(example)}")
    return value


def _said(example: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(type(example), "a word")


def _numbers(record: Any, where: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for one in fields(record):
        value = getattr(record, one.name)
        if is_dataclass(value):
            found |= _numbers(value, f"{one.name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[where + one.name] = value
    return found


def _demand_word(name: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise TrainingError(f"{name} is {word!r}: choose one of {', '.join(known)}")
