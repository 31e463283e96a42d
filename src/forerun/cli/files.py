"""What commands read and write: prompts, and results that are either whole or not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from forerun.errors import ForerunError, RequestError
from forerun.files import put


def write_whole(path: Path, content: bytes) -> None:
    """Write beside and rename, so that nobody ever finds half a file. Raises ForerunError if it cannot be done."""
    try:
        put(path, content)
    except OSError as error:
        raise ForerunError(f"cannot write {path} ({error.strerror}): make room, or name another place") from None


def demand_place(path: Path | None) -> None:
    """Refuse a result file whose folder does not exist, before hours are spent on the result."""
    if path is not None and not path.parent.is_dir():
        raise ForerunError(f"cannot write {path}: there is no folder {path.parent}")


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2))


def text_of(source: str) -> str:
    """The text of a prompt argument: `-` is standard input."""
    return sys.stdin.read() if source == "-" else source


def prompts_in(path: Path) -> list[str]:
    """The prompts of a file: every row's "prompt" in a .jsonl file, the whole text of any other."""
    from forerun.bench import suites

    if path.suffix == ".jsonl":
        return [prompt.prompt for prompt in suites.load(path)]
    try:
        return [path.read_text(encoding="utf-8")]
    except OSError as error:
        raise RequestError(f"cannot read the prompt file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"the prompt file {path} is not UTF-8 text: convert it first") from None
