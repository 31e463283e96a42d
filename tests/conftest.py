"""One thread per test process: small tensors gain nothing from more, and a busy machine loses much."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
