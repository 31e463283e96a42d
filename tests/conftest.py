"""One thread per test process, and per process that a test starts: small tensors gain nothing from more, and threads that
wait for one another cost a busy machine much. numpy's and the children's are only counted by the environment."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch and numpy are imported: before both
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

torch.set_num_threads(1)
