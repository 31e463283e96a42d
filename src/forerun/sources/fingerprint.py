"""What tells one model, or one file, from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

BLOCK, BLOCKS = 65536, 64
"""Bytes of a look into a large file, and how many looks: training moves every weight, so a sample
tells models apart."""


class Hash(Protocol):
    """One of hashlib's."""

    def update(self, data: bytes, /) -> None: ...


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash of files' names, sizes and contents; of a large file, 64 blocks from end to end, so
    that it takes no time."""
    found = hashlib.sha256()
    for path in paths:
        found.update(f"{path.name} ".encode())
        sample(path, found)
    return found.hexdigest()


def sample(path: Path, into: Hash) -> None:
    """A file's size and contents, but of a large one 64 blocks from end to end, go into a hash."""
    size = path.stat().st_size
    into.update(f"{size}\n".encode())
    with path.open("rb") as file:
        for block in range(BLOCKS):
            file.seek(max(block * BLOCK, block * (size - BLOCK) // (BLOCKS - 1)))
            into.update(file.read(BLOCK))


def digest(value: Any) -> str:
    """A hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
