"""One thread per test process, and per process that a test starts: small tensors gain nothing from
more, and threads that wait for one another cost a busy machine much.

No garbage is looked for while the tests are collected, and what has been made by then (thousands of
tests, all of torch) is not walked again later: a quarter of the collection, and most of every full search.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Generator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # numpy and torch read it when they are imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

gc.disable()  # until the tests are collected
torch.set_num_threads(1)

LONGEST = "test_nothing_is_read_or_written_out_of_place"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Round the collection of this process, whether it is a worker or the only one."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first, or the other processes would have to wait for it in the end."""
    items.sort(key=lambda item: item.name != LONGEST)
