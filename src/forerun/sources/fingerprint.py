"""What tells one model, or one file, from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from forerun.sources.folder import CONFIG, weight_files

BLOCK, BLOCKS = 65536, 64
"""Bytes of a look into a large file, and how many looks: training moves every weight, so a sample
tells models apart."""


def fingerprint_of_model(folder: Path) -> str:
    """Of its config, its end tokens, its tokenizer and a sample of its weights."""
    described = [folder / name for name in (CONFIG, "generation_config.json", "tokenizer.json")]
    return fingerprint([*(path for path in described if path.is_file()), *weight_files(folder)])


def fingerprint(paths: Iterable[Path]) -> str:
    """A hash of files' names, sizes and contents; of a large file, 64 blocks from end to end, so
    that it takes no time."""
    found = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for block in range(BLOCKS):
                file.seek(max(block * BLOCK, block * (size - BLOCK) // (BLOCKS - 1)))
                found.update(file.read(BLOCK))
    return found.hexdigest()


def digest(value: Any) -> str:
    """A hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
