"""Texts to be indexed: files and folders of them, rows of .jsonl, and answers that are token ids already."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forerun.errors import ForerunError

SUFFIXES = frozenset(
    (
        ".txt .md .rst .tex .html .css .jsonl .json .yaml .yml .toml .ini .cfg .sql"
        " .py .pyi .js .jsx .ts .tsx .rb .php .lua .sh .jl .r"
        " .c .h .cc .cpp .hpp .cu .rs .go .java .kt .swift"
    ).split()
)
"""What is read of a folder. A file that is named itself is read whatever it is called."""
LARGEST = 10_000_000
"""Bytes of a file in a folder; what is larger there is data rather than text."""

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class File:
    """path, its size in bytes, and whether the user named it, so that it must not be skipped."""

    path: Path
    size: int
    named: bool


@dataclass
class Texts:
    """Files that hold texts. skipped: how many files of folders were left out, by reason; complete
    when all were read."""

    files: list[File]
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.size for file in self.files)

    def documents(self, encode: Encode, watch: Callable[[int], None] = lambda _: None) -> Iterator[Sequence[int]]:
        """Token ids of one text after the other. watch: told the bytes of every file that is done.

        Raises ForerunError for a named file that cannot be read, is no UTF-8 text, or has a row that is no text.
        """
        for file in self.files:
            text = self._read(file)
            if text is not None:
                yield from self._documents(file, text, encode)
            watch(file.size)

    def _documents(self, file: File, text: str, encode: Encode) -> Iterable[Sequence[int]]:
        if file.path.suffix != ".jsonl":
            return [encode(text)]
        rows = _rows(file.path, text, encode)
        if file.named:
            return rows
        try:
            return list(rows)
        except ForerunError:
            self.skipped["are not rows of texts"] += 1
            return []

    def _read(self, file: File) -> str | None:
        try:
            return file.path.read_bytes().decode("utf-8")
        except OSError as error:
            reason, why = "cannot be read", f"cannot read {file.path} ({error.strerror}): name a file of text"
        except UnicodeDecodeError:
            reason, why = "are not UTF-8", f"{file.path} is not UTF-8 text: convert it first"
        if file.named:
            raise ForerunError(why)
        self.skipped[reason] += 1
        return None


def find(paths: Sequence[Path]) -> Texts:
    """The files among `paths`, and in their folders those that look like text, in order of their names.

    Raises ForerunError for a path that is not there, and if there is nothing to read.
    """
    texts = Texts([])
    for path in paths:
        if path.is_dir():
            _search(path, texts)
        elif path.is_file():
            texts.files.append(File(path, path.stat().st_size, named=True))
        else:
            raise ForerunError(f"there is no file or folder {path}: name texts to index")
    if not texts.files:
        raise ForerunError(
            f"no texts in {', '.join(map(str, paths))}: name the files, or folders with code or .txt, .md, .jsonl"
        )
    return texts


def _search(folder: Path, texts: Texts) -> None:
    """Hidden files and folders are nobody's text; links are not followed, so that there is no circle."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_symlink() or not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        size = path.stat().st_size
        if path.suffix.lower() not in SUFFIXES:
            texts.skipped["have another suffix"] += 1
        elif size > LARGEST:
            texts.skipped[f"have more than {LARGEST // 1_000_000} MB"] += 1
        else:
            texts.files.append(File(path, size, named=False))


def _rows(path: Path, text: str, encode: Encode) -> Iterator[Sequence[int]]:
    """A document per row. A last line without its end was cut off, and is left out if it cannot be read."""
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                return
            raise ForerunError(f"{path}, line {number} is not JSON: remove the line") from None
        if number == 1 and isinstance(row, dict) and "forerun" in row:
            continue  # says what made the answers
        ids = _ids(row, encode)
        if ids is None:
            raise ForerunError(f'{path}, line {number} has no "text", and no "prompt" and "answer": remove the line')
        yield ids


def _ids(row: Any, encode: Encode) -> Sequence[int] | None:
    """Ids as they are; of prompts that are ids nothing is kept, for they are not what the model says."""
    if not isinstance(row, dict):
        return None
    text, prompt, answer = row.get("text"), row.get("prompt"), row.get("answer")
    if isinstance(text, str):
        return encode(text)
    if isinstance(prompt, str) and isinstance(answer, str):
        return encode(prompt + answer)
    if isinstance(answer, list) and all(type(token) is int for token in answer):
        return answer
    return None
