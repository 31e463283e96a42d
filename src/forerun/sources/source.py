"""A model as it lies in its folder: everything about it but its networks, read once and handed on as one record."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import transformers

from forerun.sources.fingerprint import fingerprint_of_model
from forerun.sources.folder import checkpoint_folder, read_config, weight_files
from forerun.sources.tokenizer import HuggingFaceTokenizer, end_tokens, fingerprint_of, tokenizer_of


@dataclass(frozen=True)
class Source:
    """The folder of a model, and what was said to find it. Its parts are read when they are first asked for, and once.

    Every part raises CheckpointError where it is missing, damaged or of an unknown kind.
    """

    asked: str
    folder: Path

    @staticmethod
    def of(path_or_hub_id: str | Path | Source) -> Source:
        """A folder in Hugging Face format, or the hub's model of that name, which is fetched if it is not here."""
        if isinstance(path_or_hub_id, Source):
            return path_or_hub_id
        return Source(str(path_or_hub_id), checkpoint_folder(path_or_hub_id))

    @property
    def name(self) -> str:
        """What the model is called: its folder's name."""
        return self.folder.resolve().name

    @cached_property
    def config(self) -> transformers.PreTrainedConfig:
        """config.json as transformers reads it."""
        return read_config(self.folder)

    @cached_property
    def weights(self) -> list[Path]:
        """The safetensors files: one, or the shards that an index names."""
        return weight_files(self.folder)

    @cached_property
    def tokenizer(self) -> HuggingFaceTokenizer | None:
        """None where there is none: prompts are token ids then."""
        return tokenizer_of(self.folder)

    @cached_property
    def template(self) -> str | None:
        """The chat template (Jinja) that comes with the tokenizer; of several the default."""
        found = getattr(self.tokenizer, "chat_template", None)
        found = found.get("default") if isinstance(found, dict) else found
        return str(found) if found else None

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return tuple(end_tokens(self.folder))

    @cached_property
    def fingerprint(self) -> str:
        """Of config, end tokens, tokenizer and a sample of the weights: what tells one model from another."""
        return fingerprint_of_model(self.folder)

    @cached_property
    def vocabulary_fingerprint(self) -> str:
        """Of what the tokenizer calls its tokens, by which stores of another one are told; empty
        without a tokenizer."""
        return fingerprint_of(self.tokenizer.backend_tokenizer.get_vocab()) if self.tokenizer else ""
