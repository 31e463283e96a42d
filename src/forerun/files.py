"""Files that are either whole or not there, and that one process at a time may use."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

BINARY = getattr(os, "O_BINARY", 0)  # Windows translates the ends of lines without it


def is_special(path: Path) -> bool:
    """A folder, a device or a pipe: nothing must be renamed over it."""
    return path.exists() and not path.is_file()


@contextmanager
def whole(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Write beside a file, or beside what it is a link to, and rename, so that nobody ever finds half a file. What is special is
    written itself. mode: permissions, less the umask. Raises OSError."""
    if is_special(path):
        with path.open("wb") as file:
            yield file
        return
    place = Path(os.path.realpath(path))
    beside = place.with_name(f"{place.name}.{os.getpid()}.partial")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def append(path: Path, content: bytes) -> None:
    """Add this to a file that is there, or nothing. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | BINARY)
    try:
        before = os.fstat(descriptor).st_size
        if os.write(descriptor, content) < len(content):  # the disk is nearly full
            os.ftruncate(descriptor, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


class Claim:
    """Of a file, against everybody else's claims, until it is given up or nobody has it any more. Where files cannot be locked
    there is nothing to fear from others."""

    def __init__(self, descriptor: int):
        """Raises BlockingIOError: somebody else has a claim. The descriptor is the claim's own from then on."""
        self.give_up = weakref.finalize(self, os.close, descriptor)
        is_locked = False
        try:
            is_locked = _lock(descriptor)
        finally:
            if not is_locked:
                self.give_up()


def claim(path: Path) -> Claim:
    """Claim a file, which is made if it is not there. Raises OSError; BlockingIOError if somebody else has a claim."""
    try:
        return _claim(path)
    except BlockingIOError:
        gc.collect()  # claims of objects that only wait to be collected count for nothing
        return _claim(path)


def _claim(path: Path) -> Claim:
    while True:
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o600)
        there = os.fstat(descriptor)
        claimed = Claim(descriptor)
        if os.path.samestat(there, path.stat()):  # or it was renamed over in the meantime
            return claimed
        claimed.give_up()


def claim_open(file: BinaryIO) -> Claim:
    """Claim a file that is open, beyond its closing and renaming."""
    return Claim(os.dup(file.fileno()))


def _lock(descriptor: int) -> bool:
    """False: it cannot be locked."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        return False
    return True
