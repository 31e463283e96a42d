"""The head of a GGUF file: what it says of itself, and where its tensors lie.

The package `gguf` reads heads too, but takes half a minute for 150,000 tokens and their merges. It is
used for what it knows best: the formats of numbers.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from forerun.errors import CheckpointError, ForerunError

SUFFIX = ".gguf"
VERSIONS = (2, 3)
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LENGTH = struct.Struct("<Q")
ALIGNMENT, DIMENSIONS = 32, 4
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Held:
    """Where a tensor lies: its file, its shape as torch has it, its format by name, its first byte, its bytes."""

    path: Path
    shape: tuple[int, ...]
    format: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Head:
    """Of a model in one file or several. fields: its metadata; digest: of all that its first file says of itself."""

    files: tuple[Path, ...]
    fields: Mapping[str, Any]
    tensors: Mapping[str, Held]
    digest: str

    @property
    def path(self) -> Path:
        """The file that holds the metadata."""
        return self.files[0]

    @staticmethod
    def of(path: Path) -> Head:
        """Of the model in a file, or in all files of the set that a shard belongs to.

        Raises CheckpointError for what is no GGUF file, is damaged, cut short, or incomplete;
        ForerunError where the package gguf is missing.
        """
        package()
        files = shards(path)
        first, *others = (_read(one) for one in files)
        tensors = dict(first.tensors)
        for one in others:
            tensors |= one.tensors
        return Head(files, first.fields, tensors, first.digest)


def package() -> Any:
    """The package gguf."""
    try:
        import gguf
    except ImportError:
        raise ForerunError("a GGUF is read with the package gguf: pip install 'forerun[gguf]'") from None
    return gguf


def shards(path: Path) -> tuple[Path, ...]:
    """The file itself, or all files of its set (NAME-00001-of-00003.gguf), the first one first."""
    found = SHARD.fullmatch(path.name)
    if found is None:
        return (path,)
    stem, _, count = found.groups()
    files = tuple(path.with_name(f"{stem}-{number:05}-of-{count}{SUFFIX}") for number in range(1, int(count) + 1))
    missing = [one.name for one in files if not one.is_file()]
    if missing:
        raise CheckpointError(f"{path.name} is one of {int(count)} files, and {missing[0]} is missing: fetch it too")
    return files


def begins(path: Path) -> bool:
    """Whether a file is a model's only or first one, by its name."""
    found = SHARD.fullmatch(path.name)
    return found is None or int(found[2]) == 1


def _read(path: Path) -> Head:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} is no GGUF file: is the end of its name right?")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _head(path, data)
            except (struct.error, ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged or cut short ({error}): fetch it again") from error


def _head(path: Path, data: mmap.mmap) -> Head:
    cursor = _Cursor(data, 4)
    (version,) = cursor.take("I")
    if version not in VERSIONS:
        raise CheckpointError(f"{path} is GGUF of version {version}, and {VERSIONS} are known: convert it anew")
    count, pairs = cursor.take("QQ")
    fields = {cursor.string(): cursor.value(*cursor.take("I")) for _ in range(pairs)}
    infos = [_info(cursor) for _ in range(count)]
    alignment = fields.get("general.alignment", ALIGNMENT)
    begin = -(-cursor.at // alignment) * alignment
    tensors = {name: _held(path, shape, kind, begin + offset) for name, shape, kind, offset in infos}
    needed = max((one.offset + one.nbytes for one in tensors.values()), default=0)
    if needed > len(data):
        raise CheckpointError(
            f"{path} is cut short ({len(data):,} bytes, and its tensors need {needed:,}): fetch it again"
        )
    return Head((path,), fields, tensors, hashlib.sha256(data[: cursor.at]).hexdigest())


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, (dimensions,) = cursor.string(), cursor.take("I")
    if dimensions > DIMENSIONS:
        raise ValueError(f"a tensor of {dimensions} dimensions")
    shape = tuple(reversed(cursor.take(f"{dimensions}Q")))
    kind, offset = cursor.take("IQ")
    return name, shape, kind, offset


def _held(path: Path, shape: tuple[int, ...], kind: int, offset: int) -> Held:
    gguf = package()
    try:
        format_ = gguf.GGMLQuantizationType(kind)
    except ValueError:  # a newer one: it is refused where its numbers are asked for
        return Held(path, shape, f"type {kind}", offset, 0)
    block, nbytes = gguf.GGML_QUANT_SIZES[format_]
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} numbers in blocks of {block}")
    return Held(path, shape, format_.name, offset, prod(shape) // block * nbytes)


class _Cursor:
    """Reads one value after the other."""

    def __init__(self, data: mmap.mmap, at: int):
        self.data, self.at = data, at

    def take(self, kinds: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{kinds}", self.data, self.at)
        self.at += struct.calcsize(f"<{kinds}")
        return found

    def string(self) -> str:
        (length,) = LENGTH.unpack_from(self.data, self.at)  # not by `take`: there may be half a million
        self.at += LENGTH.size
        if length > len(self.data) - self.at:
            raise ValueError("a text is longer than the file")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.take("IQ")
            if count > len(self.data) - self.at:
                raise ValueError("a list is longer than the file")
            if item in SCALARS:
                return [_plain(item, one) for one in self.take(f"{count}{SCALARS[item]}")]
            return [self.value(item) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"metadata of the unknown type {kind}")
        return _plain(kind, *self.take(SCALARS[kind]))


def _plain(kind: int, value: Any) -> Any:
    """A float of four bytes as it was written in decimals: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value))) if SCALARS[kind] == "f" else value
