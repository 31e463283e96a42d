"""Files that are whole or not there, and claims to them."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: the same failure, in the same place, as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_added_to_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.append(tmp_path / "file", b"text")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    files.put(tmp_path / "file", b"before")
    with little_room(1000), pytest.raises(OSError, match="large"):
        files.put(tmp_path / "file", bytes(2000))
    assert everything(tmp_path) == {"file": "before"}


def test_what_others_write_by_its_name_is_whole_too(tmp_path: Path) -> None:
    with files.beside(tmp_path / "file") as path:
        path.write_text("mine")
        assert not (tmp_path / "file").exists()
    with pytest.raises(KeyboardInterrupt), files.beside(tmp_path / "file") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert everything(tmp_path) == {"file": "mine"}


# ---- folders


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A folder with a config, weights, a folder inside, and something of somebody else's."""
    folder = tmp_path / "model"
    with files.whole_folder(folder) as beside:
        (beside / "config.json").write_text("old")
        (beside / "model.safetensors").write_text("old")
        (beside / "inside").mkdir()
        (beside / "inside" / "left.txt").write_text("old")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_new_folder_appears_complete(tmp_path: Path) -> None:
    with files.whole_folder(tmp_path / "a" / "b") as beside:
        (beside / "one").write_text("1")
        assert not (tmp_path / "a" / "b").exists() and beside.parent == tmp_path / "a"
    assert everything(tmp_path) == {"a/b/one": "1"} and len(list((tmp_path / "a").iterdir())) == 1


def test_in_a_folder_that_is_there_files_are_replaced_and_others_stay(filled: Path) -> None:
    with files.whole_folder(filled) as beside:
        for name in ("config.json", "model.safetensors", "new.json"):
            (beside / name).write_text("new")
        (beside / "inside").mkdir()
        (beside / "inside" / "right.txt").write_text("new")
    new = dict.fromkeys(("config.json", "model.safetensors", "new.json", "inside/right.txt"), "new")
    assert everything(filled) == new | {"notes.txt": "mine"}, "a folder inside is replaced as a whole"
    assert [path.name for path in filled.parent.iterdir()] == [filled.name]


def test_weights_come_last(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, replace = [], Path.replace

    def noted(self: Path, target: Path) -> Path:
        order.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    with files.whole_folder(filled) as beside:
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            (beside / name).write_text("new")
    assert order == ["config.json", "tokenizer.json", "model.safetensors"]


@pytest.mark.parametrize("what", [KeyboardInterrupt, OSError])
def test_a_folder_that_fails_half_way_is_as_it_was(filled: Path, what: type[BaseException]) -> None:
    before = everything(filled.parent)
    for folder in (filled, filled.parent / "new"):
        with pytest.raises(what), files.whole_folder(folder) as beside:
            (beside / "config.json").write_text("new")
            raise what
    assert everything(filled.parent) == before
    assert [path.name for path in filled.parent.iterdir()] == [filled.name]


def test_a_full_disk_leaves_the_folder_as_it_was(filled: Path) -> None:
    before = everything(filled.parent)
    with little_room(1000), pytest.raises(OSError, match="large"), files.whole_folder(filled) as beside:
        (beside / "config.json").write_text("new")
        (beside / "model.safetensors").write_bytes(bytes(2000))
    assert everything(filled.parent) == before


def test_a_folder_inside_that_cannot_take_its_place_leaves_the_older_one(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = everything(filled), Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name == "inside" and target.parent == filled:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), files.whole_folder(filled) as beside:
        (beside / "inside").mkdir()
    assert everything(filled) == before and [path.name for path in filled.parent.iterdir()] == [filled.name]


def test_everybody_may_read_weights_and_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with files.whole_folder(tmp_path / "link") as beside:
        (beside / "model.safetensors").touch(0o600)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError), files.whole_folder(tmp_path / "file") as beside:
        (beside / "one").write_text("1")
    assert everything(tmp_path) == {"file": "mine"}


# ---- claims


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
