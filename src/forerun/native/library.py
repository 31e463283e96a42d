"""The native kernels as a loaded library.

They are optional. `why_not()` says what keeps them from being used here; everything then runs on the torch reference in
`nn/ops.py`, which the tests hold them against. FORERUN_KERNELS names another library file, `0` none at all.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_int32
from functools import lru_cache
from pathlib import Path

import torch

from forerun.errors import ForerunError
from forerun.native.records import RECORDS, SIGNATURES

ERRORS: dict[int, tuple[type[Exception], str]] = {
    1: (IndexError, "a token is outside the vocabulary"),
    2: (IndexError, "the cache has no room for these tokens: reserve more"),
    3: (IndexError, "a position is beyond the longest text"),
    4: (MemoryError, "no memory for the scratch space of a forward"),
    5: (IndexError, "a path does not ascend through scratch entries to its own token"),
}
"""`fr_error`, as networks and heads mean it."""
ISAS = ("portable", "avx2", "avx512", "avx512-bf16", "amx")


@lru_cache(maxsize=1)
def _opened() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    chosen = os.environ.get("FORERUN_KERNELS", "")
    if chosen == "0":
        return None, "FORERUN_KERNELS is 0"
    path = Path(chosen) if chosen else Path(__file__).with_name("_kernels.so")
    if not path.exists():
        return None, f"FORERUN_KERNELS names {path}, which is not there" if chosen else _why_not_built(path)
    try:
        library = _signed(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded ({error}): install forerun again"
    sizes = (c_int32 * 64)()  # room for those of any version
    library.fr_sizes(sizes)
    expected = [ctypes.sizeof(record) for record in RECORDS]
    if list(sizes) != expected + [0] * (len(sizes) - len(expected)):
        return None, f"{path} belongs to another version of forerun: install forerun again"
    return library, ""


def _signed(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _why_not_built(path: Path) -> str:
    note = path.with_suffix(".txt")
    reason = f" ({note.read_text().strip()})" if note.exists() else ""
    return f"they were not built{reason}: install forerun again where a C++ compiler is (g++ or clang++)"


def kernels() -> ctypes.CDLL:
    """The loaded kernels. Raises ForerunError where there are none."""
    found, reason = _opened()
    if found is None:
        raise ForerunError(f"there are no native kernels here: {reason}")
    return found


def demand_fine(error: int) -> None:
    """Raise what an `fr_error` of a network's forward means."""
    if error:
        kind, said = ERRORS[error]
        raise kind(said)


def is_there() -> bool:
    """Whether there are kernels here at all, for this processor or any."""
    return _opened()[0] is not None


@lru_cache(maxsize=1)
def quick() -> ctypes.CDLL:
    """The same kernels, called without giving up the interpreter's lock: for a few microseconds of
    work, after which another thread's turn of 5 ms is not worth waiting for."""
    return _signed(ctypes.PyDLL(kernels()._name))


def why_not(device: torch.device, dtype: torch.dtype, at_any_speed: bool = False) -> str | None:
    """What keeps the kernels from running a network of this kind, or from being the better choice; None: nothing.

    at_any_speed: only what keeps them from running at all.
    """
    if device.type != "cpu":
        return f"they run on the CPU, not on {device}"
    if dtype not in (torch.bfloat16, torch.float32):
        return f"they know bf16 and fp32, not {str(dtype).removeprefix('torch.')}"
    found, reason = _opened()
    if found is None:
        return reason
    if found.fr_isa_best() == 0 and not at_any_speed:
        return "this processor has no AVX2, and torch is faster than the portable kernels"
    return None


def active_isa() -> str:
    """The instruction set in use."""
    return ISAS[kernels().fr_isa_active()]


def use_isa(name: str) -> bool:
    """Use another instruction set, in the whole process; False if this processor does not have it. For tests."""
    return bool(kernels().fr_isa_use(ISAS.index(name)))
