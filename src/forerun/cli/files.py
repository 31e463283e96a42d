"""What commands write: results that are either whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forerun.errors import ForerunError
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
