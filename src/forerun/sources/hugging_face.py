"""A folder in Hugging Face format as a place where a model lies."""

from __future__ import annotations

import fnmatch
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from forerun.sources.fingerprint import fingerprint
from forerun.sources.folder import CONFIG, DOWNLOADED, INDEX, read_config, weight_files
from forerun.sources.tokenizer import HuggingFaceTokenizer, end_tokens, tokenizer_of
from forerun.sources.weights import SafeTensors

OWN = ("tree.json", "forerun-plan.json", "pruning.json")
"""What forerun has left beside a model is true of that one alone."""


@dataclass(frozen=True)
class Folder:
    """See `Place`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def config(self) -> transformers.PreTrainedConfig:
        return read_config(self.path)

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / CONFIG).read_text())
        return found

    def weights(self) -> SafeTensors:
        return SafeTensors(weight_files(self.path))

    def tokenizer(self) -> HuggingFaceTokenizer | None:
        return tokenizer_of(self.path)

    def ends(self) -> list[int]:
        """Of generation_config.json, else of config.json."""
        return end_tokens(self.path)

    def fingerprint(self) -> str:
        """Of config, end tokens, tokenizer and a sample of the weights."""
        described = [self.path / name for name in (CONFIG, "generation_config.json", "tokenizer.json")]
        return fingerprint([*(path for path in described if path.is_file()), *weight_files(self.path)])

    def hand_on(self, folder: Path) -> None:
        for path in sorted(self.path.iterdir()):
            if path.is_file() and _travels(path.name):
                shutil.copyfile(path, folder / path.name)


def _travels(name: str) -> bool:
    wanted = any(fnmatch.fnmatch(name, pattern) for pattern in DOWNLOADED)
    return wanted and name not in (CONFIG, INDEX, *OWN) and not name.endswith(".safetensors")
