"""The file in which a model store keeps what the model said.

UTF-8 JSON lines. The first line is the header, every other one a text, the oldest first:

    {"forerun": "said", "version": 1, "vocabulary": 4096, "tokenizer": null}
    {"tenant": "", "tokens": [17, 4, 1023]}

vocabulary: its size. tokenizer: a fingerprint that the writer chose; null: none was given. Texts
are appended with one write each. A last line without its newline was cut short by a crash and
counts as not written; a line that is no text is skipped with a warning. One process at a time may
use a file.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from forerun.errors import DrafterError
from forerun.files import Claim, append, claim, claim_open, is_special, whole


class Said(NamedTuple):
    """A text, and whose it is."""

    tenant: str
    tokens: Sequence[int]


class SaidFile:
    """`tokens`: how many the file holds, one more for every text."""

    def __init__(self, path: Path, vocabulary: int, tokenizer: str | None):
        self.path, self._vocabulary, self._tokenizer = path, vocabulary, tokenizer
        self._claim: Claim | None = None
        self.tokens = 0

    def load(self) -> list[Said]:
        """All texts; none of a file that is not there or empty, which is made. The file is this object's until `shut`.

        Raises DrafterError with what is wrong, and if somebody else uses the file.
        """
        try:
            return self._load()
        except BlockingIOError:
            raise DrafterError(
                f"{self.path} is in use by another engine, or another process: end that one, or name another file"
            ) from None
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            self.shut()
            why = error.strerror if isinstance(error, OSError) else error
            raise DrafterError(
                f"{str(self.path)!r} cannot be used for what the model said ({why}): name another file"
            ) from None
        except DrafterError:
            self.shut()
            raise

    def _load(self) -> list[Said]:
        if is_special(self.path):
            raise OSError(errno.EINVAL, "it is no regular file")
        self._claim = claim(self.path)
        content = self.path.read_bytes()
        if not content:
            self.rewrite(())
            return []
        *lines, rest = content.split(b"\n")
        self._check(lines[0] if lines else rest)
        found = [self._text(line) for line in lines[1:]]
        if None in found:
            self._warn(found)
        if rest:
            os.truncate(self.path, len(content) - len(rest))
        texts = [text for text in found if text is not None]
        self.tokens = sum(len(text.tokens) + 1 for text in texts)
        return texts

    def shut(self) -> None:
        """Somebody else may use the file."""
        if self._claim is not None:
            self._claim.give_up()
            self._claim = None

    def append(self, text: Said) -> None:
        """Raises OSError; the file is then as before."""
        append(self.path, _line({"tenant": text.tenant, "tokens": list(text.tokens)}))
        self.tokens += len(text.tokens) + 1

    def rewrite(self, texts: Iterable[Said]) -> None:
        """The file holds these texts alone, at once or (after a crash) not at all. Raises OSError."""
        self.tokens = 0
        with whole(self.path, 0o600) as file:
            claimed = claim_open(file)
            file.write(_line(self._header()))
            for text in texts:
                file.write(_line({"tenant": text.tenant, "tokens": list(text.tokens)}))
                self.tokens += len(text.tokens) + 1
        self.shut()
        self._claim = claimed

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

    def _text(self, line: bytes) -> Said | None:
        """None: the line is no text of this model."""
        found = _parsed(line)
        tenant, tokens = found.get("tenant"), found.get("tokens")
        if not isinstance(tenant, str) or not isinstance(tokens, list):
            return None
        if not all(type(token) is int and 0 <= token < self._vocabulary for token in tokens):
            return None
        return Said(tenant, tokens)

    def _warn(self, found: Sequence[Said | None]) -> None:
        warnings.warn(
            f"{self.path}: {found.count(None)} of {len(found)} lines are no texts of this model and are skipped, the"
            " first one"
            f" is line {found.index(None) + 2}: remove them",
            RuntimeWarning,
            stacklevel=5,
        )

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
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
