"""Files that are whole or not there, and claims to them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from forerun import files


def test_what_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail() -> None:
        with files.whole(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("file", b"before")]


def test_the_file_beside_is_this_process_alone(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_bytes(b"somebody else's")
    with files.whole(tmp_path / "file") as file:
        file.write(b"mine")
    assert (tmp_path / "file.partial").read_bytes() == b"somebody else's"
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with files.whole(tmp_path / "link") as file:
        file.write(b"text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"text"
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with files.whole(tmp_path / "pipe") as file:
        file.write(b"text")
    assert os.read(end, 9) == b"text" and (tmp_path / "pipe").is_fifo()
    os.close(end)


def test_nothing_is_added_to_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.append(tmp_path / "file", b"text")
    assert not list(tmp_path.iterdir())


def test_a_claim_ends_with_its_owner(tmp_path: Path) -> None:
    first = files.claim(tmp_path / "file")
    with pytest.raises(BlockingIOError):
        files.claim(tmp_path / "file")
    circle: list[object] = [first]
    circle.append(circle)
    del first, circle  # waits to be collected
    files.claim(tmp_path / "file").give_up()


def test_without_locks_there_are_claims_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    first, second = files.claim(tmp_path / "file"), files.claim(tmp_path / "file")
    assert not first.give_up.alive and not second.give_up.alive, "an open file could not be renamed over on Windows"
