"""Files and folders that are either whole or not there, and files that one process at a time may use."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

BINARY = getattr(os, "O_BINARY", 0)  # Windows translates the ends of lines without it
WEIGHTS = ".safetensors"
"""How the files are named that are read only when all others are there."""


def is_special(path: Path) -> bool:
    """A folder, a device or a pipe: nothing must be renamed over it."""
    return path.exists() and not path.is_file()


@contextmanager
def whole(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Write beside a file, or beside what it is a link to, and rename, so that nobody ever finds
    half a file. What is special is written itself. mode: permissions, less the umask. Raises
    OSError."""
    if is_special(path):
        with path.open("wb") as file:
            yield file
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY
    with beside(path) as partial, os.fdopen(os.open(partial, flags, mode), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def put(path: Path, content: bytes) -> None:
    """Make this the content of a file, at once. Raises OSError."""
    with whole(path) as file:
        file.write(content)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Where somebody may write what becomes a file, or what it is a link to, if all goes well. Raises OSError."""
    place = Path(os.path.realpath(path))
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside, whose content moves into `folder` if all goes well; anyone may read
    it then. Raises OSError.

    A new folder appears complete. In one that is there, files are replaced one by one, weights
    last, and folders at once; what else it holds stays.
    """
    place = Path(os.path.realpath(folder))
    partial = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        yield partial
        _open_to_all(partial)
        if place.exists():
            for path in sorted(partial.iterdir(), key=lambda path: (path.suffix == WEIGHTS, path.name)):
                _move(path, place / path.name)
        else:
            partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open_to_all(folder: Path) -> None:
    """Safetensors writes for the owner alone."""
    for path in folder.rglob(f"*{WEIGHTS}"):
        path.chmod(0o644)


def _move(path: Path, place: Path) -> None:
    """A folder takes the place of an older one as a whole, which goes with what stands beside."""
    if not (path.is_dir() and place.is_dir()):
        path.replace(place)
        return
    old = path.with_name(f".{path.name}.old")
    place.rename(old)
    try:
        path.rename(place)
    except BaseException:
        old.rename(place)
        raise


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
    """Of a file, against everybody else's claims, until it is given up or nobody has it any more.
    Where files cannot be locked there is nothing to fear from others."""

    def __init__(self, descriptor: int):
        """Raises BlockingIOError: somebody else has a claim. The descriptor is the claim's own from then on."""
        self.give_up = weakref.finalize(self, os.close, descriptor)
        is_locked = False
        try:
            is_locked = _lock(descriptor)
        finally:
            if not is_locked:
                self.give_up()


def claim(path: Path, mode: int = 0o600) -> Claim:
    """Claim a folder, or a file, which is made if it is not there. mode: its permissions then, less the umask.

    Raises OSError; BlockingIOError if somebody else has a claim.
    """
    try:
        return _claim(path, mode)
    except BlockingIOError:
        gc.collect()  # claims of objects that only wait to be collected count for nothing
        return _claim(path, mode)


def _claim(path: Path, mode: int) -> Claim:
    while True:
        descriptor = os.open(path, os.O_RDONLY | (0 if path.is_dir() else os.O_CREAT), mode)
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
