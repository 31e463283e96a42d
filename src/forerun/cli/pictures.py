"""The picture that a training leaves in its run's folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PICTURE = "training.png"


def picture(run: Path, title: str, facts: str, device: torch.device) -> None:
    """Draw what the run's log has, on light and on dark ground. What cannot be drawn is said in a
    sentence, for the training itself has ended well."""
    from forerun.errors import ForerunError
    from forerun.nn.machine import described
    from forerun.plots.style import write
    from forerun.plots.training import drawing
    from forerun.train.run import read_log

    rows = read_log(run)
    if not any("loss" in row for row in rows):
        return
    try:
        light, dark = write(drawing(rows, title, f"{facts}  ·  {described(device)}"), run / PICTURE)
    except ForerunError as error:
        print(error, file=sys.stderr)
    else:
        print(f"{light}: a picture of the training; {dark.name} beside it is for dark ground", file=sys.stderr)
