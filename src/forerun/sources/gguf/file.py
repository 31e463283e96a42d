"""A GGUF file as a place where a model lies."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers

from forerun.sources.fingerprint import sample
from forerun.sources.gguf.architecture import PERMUTED, config_of
from forerun.sources.gguf.head import SHARD, Head
from forerun.sources.gguf.vocabulary import ends_of, tokenizer_of
from forerun.sources.gguf.weights import GgufWeights
from forerun.sources.tokenizer import HuggingFaceTokenizer


@dataclass(frozen=True)
class GgufFile:
    """One file, or the first of several. See `Place`."""

    path: Path

    @property
    def name(self) -> str:
        found = SHARD.fullmatch(self.path.name)
        return found[1] if found else self.path.stem

    @cached_property
    def head(self) -> Head:
        return Head.of(self.path)

    def config(self) -> transformers.PreTrainedConfig:
        return config_of(self.head)

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.config().to_diff_dict()
        return found

    def weights(self) -> GgufWeights:
        config = self.config()
        heads = {
            "self_attn.q_proj.": config.num_attention_heads,
            "self_attn.k_proj.": config.num_key_value_heads,
        }
        return GgufWeights(self.head, heads if config.model_type in PERMUTED else {})

    def tokenizer(self) -> HuggingFaceTokenizer | None:
        return tokenizer_of(self.head)

    def ends(self) -> list[int]:
        return ends_of(self.head)

    def hand_on(self, folder: Path) -> None:
        tokenizer: Any = self.tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": self.ends()}) + "\n")

    def fingerprint(self) -> str:
        """Of all that the file says of itself, and of a sample of the weights; a copy of another name has the same."""
        found = hashlib.sha256(self.head.digest.encode())
        for path in self.head.files:
            sample(path, found)
        return found.hexdigest()
