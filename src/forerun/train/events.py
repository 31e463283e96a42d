"""A run's figures as TensorBoard reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from forerun.errors import TrainingError

NAMES = {"train_loss": "loss/training", "loss": "loss/held_out", "seconds": "time/seconds"}
"""What figures are called there; charts of one kind stand side by side."""


class Events:
    """Figures of one run in a folder that TensorBoard is pointed to (with tensorboardX, which needs no TensorBoard)."""

    def __init__(self, folder: Path):
        """Raises TrainingError where the package is missing, or the folder cannot be written to."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise TrainingError(
                "--tensorboard needs tensorboardX: install it with pip install 'forerun[tensorboard]'"
            ) from None
        try:
            # Of what an interrupted run has left in the folder nothing is shown: the run says it again.
            self._writer = SummaryWriter(str(folder), purge_step=0)
        except OSError as error:
            raise TrainingError(
                f"{folder} cannot be written ({error.strerror}): name another --tensorboard, or mend that"
            ) from None

    def begin(self, rows: Iterable[Mapping[str, float]]) -> None:
        """What the run has told so far."""
        for row in rows:
            self.tell(row)

    def tell(self, row: Mapping[str, float]) -> None:
        """A row of the run's log."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(tag_of(name), value, int(row["step"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def tag_of(name: str) -> str:
    """A figure of every head is a group with a chart for each: head2_given is given/head2."""
    found = re.fullmatch(r"(head\d+)_(\w+)", name)
    return f"{found[2]}/{found[1]}" if found else NAMES.get(name, name)
