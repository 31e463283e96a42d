"""What TensorBoard is told: the log of a run, whole and once, whatever interrupted it."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from torch import Tensor

from forerun.errors import TrainingError
from forerun.train.events import Events, tag_of
from forerun.train.run import Run, Watch, read_log, unwatched
from forerun.train.schedule import Schedule

tensorboard = pytest.importorskip("tensorboardX")


def shown(folder: Path) -> dict[str, dict[int, float]]:
    """By chart, the points that TensorBoard shows: of its files in their order, what came after the last start."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.iterdir(), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            event, at = Event.FromString(data[at + 12 : at + 12 + size]), at + 16 + size
            if event.session_log.status == SessionLog.START:
                found = {tag: {s: v for s, v in line.items() if s < event.step} for tag, line in found.items()}
            for value in event.summary.value:
                line = found.setdefault(value.tag, {})
                assert event.step not in line, "a point is told once"
                line[event.step] = value.simple_value
    return found


class Falling:
    """An objective whose loss falls, and which may be interrupted."""

    def __init__(self, stop: int = -1):
        self.stop = stop

    def update(self, step: int) -> float:
        if step == self.stop:
            raise KeyboardInterrupt
        return 8.0 / (1 + step)

    def validate(self, watch: Watch = unwatched) -> dict[str, float]:
        return {"loss": 4.0, "head1_loss": 2.0, "head1_given": 0.5, "head2_given": 0.25, "tokens_per_step": 1.5}

    def state(self) -> dict[str, Tensor]:
        return {"nothing": Tensor(1)}

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


def finish(run: Path, board: Path, stop: int = -1) -> None:
    events = Events(board)
    try:
        Run(Falling(stop), Schedule(60, validate_every=20, save_every=15), run, events=events).finish("it")
    finally:
        events.close()


def rows_of(run: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in read_log(run):
        for name, value in row.items():
            if name != "step":
                found.setdefault(tag_of(name), {})[int(row["step"])] = pytest.approx(value, abs=1e-4)
    return found


def test_it_is_told_what_the_log_says(tmp_path: Path) -> None:
    finish(tmp_path / "run", tmp_path / "board")
    found = shown(tmp_path / "board")
    assert found == rows_of(tmp_path / "run")
    assert found["given/head2"] == {20: 0.25, 40: 0.25, 60: 0.25} and set(found["loss/training"]) == {20, 40, 60}
    assert {"loss/held_out", "loss/head1", "given/head1", "tokens_per_step", "time/seconds"} <= found.keys()


def test_an_interrupted_run_tells_all_of_it_again(tmp_path: Path) -> None:
    """Also what it had told before its checkpoint, and nothing that it takes back."""
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "run", tmp_path / "board", stop=50)
    finish(tmp_path / "run", tmp_path / "board")
    assert shown(tmp_path / "board") == rows_of(tmp_path / "run")
    finish(tmp_path / "run", tmp_path / "later")
    assert shown(tmp_path / "later") == rows_of(tmp_path / "run"), "asked for when the run had ended"


def test_without_the_package_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(TrainingError, match=r"pip install 'forerun\[tensorboard\]'"):
        Events(tmp_path)


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="name another --tensorboard"):
        Events(tmp_path / "file")
