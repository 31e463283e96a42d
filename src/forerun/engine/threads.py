"""How many threads a step is made with, and a word of warning where others want the processor too."""

from __future__ import annotations

import logging
import os

import torch

from forerun.errors import ForerunError

VARIABLE = "FORERUN_THREADS"
"""How many, where nobody says it in the program; without it, as torch has it (OMP_NUM_THREADS, or one per core)."""

MOST = 1024
"""A runtime of threads that cannot start as many as were asked for ends the process."""

log = logging.getLogger(__name__)


def use_threads(threads: int | None) -> int:
    """Compute with so many threads from now on, in the whole process, torch's own operations
    included; returns how many these are. ForerunError for a number that makes no sense."""
    wanted = threads if threads is not None else _from_environment()
    if wanted is not None:
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
            raise ForerunError(f"threads={wanted!r} makes no sense: give 1 or more")
        if wanted > MOST:
            raise ForerunError(
                f"{wanted} threads are more than any machine has use for: give {available_cpus()} or fewer"
            )
        torch.set_num_threads(wanted)
    return torch.get_num_threads()


def _from_environment() -> int | None:
    said = os.environ.get(VARIABLE, "")
    if not said:
        return None
    if not said.isdecimal() or not int(said):
        raise ForerunError(f"{VARIABLE} is {said!r}: set it to a number of threads, 1 or more")
    return int(said)


def warn_if_busy(threads: int) -> None:
    """Say so where other work leaves too few processors for these threads: a step waits for the
    slowest of them, so it may then take many times as long as with one."""
    load, cpus = _load(), available_cpus()
    if threads > 1 and load > max(1.0, cpus - threads + cpus / 4):
        log.warning(
            "this machine is busy (load %.1f on %d CPUs), and %d threads that wait for one another may be slower than"
            " one: set fewer (load(threads=1), --threads 1 or %s=1), or wait",
            load,
            cpus,
            threads,
            VARIABLE,
        )


def available_cpus() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load() -> float:
    """How many processes have wanted a processor in the last minute, on average; 0 where nobody counts them."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return 0.0
