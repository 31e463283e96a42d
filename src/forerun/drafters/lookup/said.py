"""The file in which a model store keeps what the model said.

UTF-8 JSON lines. The first line is the header, every other one a text, the oldest first:

    {"forerun": "said", "version": 1, "vocabulary": 4096, "tokenizer": null}
    {"tenant": "", "tokens": [17, 4, 1023]}

vocabulary: its size. tokenizer: a fingerprint that the writer chose; null: none was given. Texts are
appended with one write each. A last line without its newline was cut short by a crash and counts as not written. One process
at a time may use a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from forerun.errors import DrafterError


class Said(NamedTuple):
    """A text, and whose it is."""

    tenant: str
    tokens: Sequence[int]


class SaidFile:
    """`tokens`: how many the file holds, one more for every text."""

    def __init__(self, path: Path, vocabulary: int, tokenizer: str | None):
        self.path, self._vocabulary, self._tokenizer = path, vocabulary, tokenizer
        self.tokens = 0

    def load(self) -> list[Said]:
        """All texts; none of a file that is not there or empty, which is made. Raises DrafterError with what is wrong."""
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            if not content:
                self.rewrite(())
                return []
            *lines, rest = content.split(b"\n")
            self._check(lines[0] if lines else rest)
            found = [self._text(number, line) for number, line in enumerate(lines[1:], 2)]
            if rest:
                os.truncate(self.path, len(content) - len(rest))
        except OSError as error:
            raise DrafterError(
                f"{self.path} cannot be used for what the model said ({error.strerror}): name another file"
            ) from None
        self.tokens = sum(len(text.tokens) + 1 for text in found)
        return found

    def append(self, text: Said) -> None:
        """Raises OSError."""
        with self.path.open("ab", buffering=0) as file:
            file.write(_line({"tenant": text.tenant, "tokens": list(text.tokens)}))
        self.tokens += len(text.tokens) + 1

    def rewrite(self, texts: Iterable[Said]) -> None:
        """The file holds these texts alone, at once or (after a crash) not at all. Raises OSError."""
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        self.tokens = 0
        try:
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(_line(self._header()))
                for text in texts:
                    file.write(_line({"tenant": text.tenant, "tokens": list(text.tokens)}))
                    self.tokens += len(text.tokens) + 1
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)

    def _header(self) -> dict[str, object]:
        return {"forerun": "said", "version": 1, "vocabulary": self._vocabulary, "tokenizer": self._tokenizer}

    def _check(self, line: bytes) -> None:
        header = _parsed(line)
        if header.get("forerun") != "said":
            self._refuse("its first line is not the header of one")
        if header.get("version") != 1:
            self._refuse(f"it is of version {header.get('version')!r}, and this is 1")
        if header.get("vocabulary") != self._vocabulary:
            self._refuse(f"its vocabulary is {header.get('vocabulary')!r}, and here it is {self._vocabulary}")
        if None not in (theirs := header.get("tokenizer"), self._tokenizer) and theirs != self._tokenizer:
            self._refuse(f"its tokenizer is {theirs!r}, and here it is {self._tokenizer!r}")

    def _text(self, number: int, line: bytes) -> Said:
        found = _parsed(line)
        tenant, tokens = found.get("tenant"), found.get("tokens")
        if not isinstance(tenant, str) or not isinstance(tokens, list):
            self._refuse(f"line {number} is not a text")
        if not all(type(token) is int and 0 <= token < self._vocabulary for token in tokens):
            self._refuse(f"line {number} has a token that is no whole number from 0 to {self._vocabulary - 1}")
        return Said(tenant, tokens)

    def _refuse(self, reason: str) -> NoReturn:
        raise DrafterError(
            f"{self.path} is no file of what this model said: {reason}; name another file, or remove this one"
        )


def _line(record: dict[str, object]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any]:
    """Empty if the line holds anything else."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
