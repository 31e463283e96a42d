"""A model as it lies on a disk: everything about it but its networks, read once and handed on as one record."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import transformers

from forerun.sources.folder import checkpoint_folder
from forerun.sources.gguf.file import GgufFile
from forerun.sources.gguf.head import SUFFIX
from forerun.sources.hugging_face import Folder
from forerun.sources.tokenizer import HuggingFaceTokenizer, fingerprint_of
from forerun.sources.weights import Weights


class Place(Protocol):
    """Where a model lies. Every method raises CheckpointError for what is missing, damaged or of an unknown kind."""

    @property
    def path(self) -> Path:
        """A folder, or a file."""
        ...

    @property
    def name(self) -> str: ...

    def config(self) -> transformers.PreTrainedConfig:
        """As transformers reads config.json."""
        ...

    def settings(self) -> dict[str, Any]:
        """The entries of that."""
        ...

    def weights(self) -> Weights: ...

    def tokenizer(self) -> HuggingFaceTokenizer | None:
        """None where there is none: prompts are token ids then."""
        ...

    def ends(self) -> list[int]: ...

    def fingerprint(self) -> str: ...

    def hand_on(self, folder: Path) -> None:
        """Write what belongs to a model made out of this one: tokenizer, chat template, end tokens. Raises OSError."""
        ...


@dataclass(frozen=True)
class Source:
    """Where a model lies, and what was said to find it. Its parts are read when they are first asked for, and once.

    Every part raises CheckpointError where it is missing, damaged or of an unknown kind.
    """

    asked: str
    place: Place

    @staticmethod
    def of(asked: str | Path | Source) -> Source:
        """A folder in Hugging Face format, a GGUF file, or the hub's model of that name, which is fetched if it is not
        here."""
        if isinstance(asked, Source):
            return asked
        path = Path(asked).expanduser()
        is_gguf = path.suffix == SUFFIX and path.is_file()
        return Source(str(asked), GgufFile(path) if is_gguf else Folder(checkpoint_folder(asked)))

    @property
    def path(self) -> Path:
        """The folder, or the file."""
        return self.place.path

    @property
    def name(self) -> str:
        """What the model is called: its folder's name, or its file's without the end."""
        return self.place.name

    @cached_property
    def config(self) -> transformers.PreTrainedConfig:
        """config.json as transformers reads it."""
        return self.place.config()

    @cached_property
    def weights(self) -> Weights:
        return self.place.weights()

    @cached_property
    def tokenizer(self) -> HuggingFaceTokenizer | None:
        """None where there is none: prompts are token ids then."""
        return self.place.tokenizer()

    @cached_property
    def template(self) -> str | None:
        """The chat template (Jinja) that comes with the tokenizer; of several the default."""
        found = getattr(self.tokenizer, "chat_template", None)
        found = found.get("default") if isinstance(found, dict) else found
        return str(found) if found else None

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return tuple(self.place.ends())

    @cached_property
    def fingerprint(self) -> str:
        """Of config, end tokens, tokenizer and a sample of the weights: what tells one model from another."""
        return self.place.fingerprint()

    @cached_property
    def vocabulary_fingerprint(self) -> str:
        """Of what the tokenizer calls its tokens, by which stores of another one are told; empty
        without a tokenizer."""
        return fingerprint_of(self.tokenizer.backend_tokenizer.get_vocab()) if self.tokenizer else ""
