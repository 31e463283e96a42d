"""One thread per test process, and per process that a test starts: small tensors gain nothing from
more, and threads that wait for one another cost a busy machine much.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # numpy and torch read it when they are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)
