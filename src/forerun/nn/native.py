"""The native CPU kernels (kernels/ in the source tree) behind ctypes: the library, its records, and single operations.

They are optional. `why_not()` says what keeps them from being used here; everything then runs on the torch reference in
`nn/ops.py`, which the tests hold them against. FORERUN_KERNELS names another library file, `0` none at all.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from forerun.errors import ForerunError

FORMATS = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}
ISAS = ("portable", "avx2", "avx512", "avx512-bf16")
PANEL, GROUP, WIDEST_HEAD = 32, 128, 512


class Matrix(ctypes.Structure):
    """`fr_matrix`: a packed matrix."""

    _fields_ = (
        ("format", c_int32),
        ("gated", c_int32),
        ("out", c_int64),
        ("in_", c_int64),
        ("padded_in", c_int64),
        ("data", c_void_p),
        ("bias", c_void_p),
    )


class FeedRecord(ctypes.Structure):
    """`fr_feed`."""

    _fields_ = (
        ("rows", c_int32),
        ("count", c_int32),
        ("start", c_int32),
        ("held", c_int32),
        ("counts", c_void_p),
        ("lengths", c_void_p),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("sees", c_void_p),
        ("states", c_void_p),
        ("states_format", c_int32),
    )


class CacheRecord(ctypes.Structure):
    """`fr_cache`."""

    _fields_ = (
        ("store", c_void_p),
        ("format", c_int32),
        ("layers", c_int32),
        ("slots", c_int32),
        ("capacity", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
    )


class LayerRecord(ctypes.Structure):
    """`fr_layer`."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("window", c_int32),
    )


class TransformerRecord(ctypes.Structure):
    """`fr_transformer`."""

    _fields_ = (
        ("layers", c_int32),
        ("width", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("mlp_width", c_int32),
        ("norm_eps", c_float),
        ("scale", c_float),
        ("layer", POINTER(LayerRecord)),
        ("final_norm", c_void_p),
        ("head", Matrix),
        ("embedding", c_void_p),
        ("embedding_format", c_int32),
        ("vocabulary", c_int32),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("table_length", c_int64),
    )


class WantedRecord(ctypes.Structure):
    """`fr_wanted`."""

    _fields_ = (
        ("logits", c_void_p),
        ("best", c_void_p),
        ("last", c_void_p),
        ("hidden_count", c_int32),
        ("hidden_format", c_int32),
        ("hidden_layers", c_void_p),
        ("hidden", c_void_p),
    )


class HeadRecord(ctypes.Structure):
    """`fr_head`."""

    _fields_ = (("first", Matrix), ("blocks", POINTER(Matrix)), ("block_count", c_int64), ("vocabulary", Matrix))


class HeadsRecord(ctypes.Structure):
    """`fr_heads`."""

    _fields_ = (
        ("count", c_int32),
        ("width", c_int32),
        ("vocabulary", c_int32),
        ("format", c_int32),
        ("head", POINTER(HeadRecord)),
        ("embedding", c_void_p),
    )


class LevelRecord(ctypes.Structure):
    """`fr_level`."""

    _fields_ = (
        ("first", c_int32),
        ("nodes", c_int32),
        ("parents", c_int32),
        ("widest", c_int32),
        ("begin", c_void_p),
        ("ranks", c_void_p),
        ("grown", c_void_p),
    )


class TreeRecord(ctypes.Structure):
    """`fr_tree`."""

    _fields_ = (("nodes", c_int32), ("levels", c_int32), ("parents", c_void_p), ("level", POINTER(LevelRecord)))


class CursorRecord(ctypes.Structure):
    """`fr_cursor`."""

    _fields_ = (("state", c_int32), ("length", c_int32))


class ViewRecord(ctypes.Structure):
    """`fr_view`."""

    _fields_ = (
        ("automaton", c_void_p),
        ("prior", c_void_p),
        ("odds", c_double * 9),
        ("cursor", CursorRecord),
        ("own", c_int32),
        ("studied", c_int32),
        ("nodes", c_int32),
        ("depth", c_int32),
        ("min_match", c_int32),
        ("room", c_int32),
        ("ends_count", c_int32),
        ("cost", c_double),
        ("ends", c_void_p),
        ("tokens", c_void_p),
        ("parents", c_void_p),
        ("survival", c_void_p),
    )


class CorpusRecord(ctypes.Structure):
    """`fr_corpus`."""

    _fields_ = (
        ("tokens", c_void_p),
        ("order", c_void_p),
        ("starts", c_void_p),
        ("size", c_int64),
        ("entries", c_int64),
        ("vocabulary", c_int32),
        ("wide", c_int32),
    )


class CorpusWishRecord(ctypes.Structure):
    """`fr_corpus_wish`."""

    _fields_ = (
        ("nodes", c_int32),
        ("depth", c_int32),
        ("min_match", c_int32),
        ("places", c_int32),
        ("enough", c_int32),
        ("end_count", c_int32),
        ("cost", c_double),
        ("ends", c_void_p),
        ("weights", c_void_p),
        ("odds", c_void_p),
    )


class CorpusDraftRecord(ctypes.Structure):
    """`fr_corpus_draft`."""

    _fields_ = (
        ("tokens", c_void_p),
        ("parents", c_void_p),
        ("survival", c_void_p),
        ("nodes", c_int32),
        ("length", c_int32),
        ("first", c_int32),
        ("chance", c_double),
    )


RECORDS = (
    Matrix,
    FeedRecord,
    CacheRecord,
    LayerRecord,
    TransformerRecord,
    WantedRecord,
    HeadRecord,
    HeadsRecord,
    LevelRecord,
    TreeRecord,
    CursorRecord,
    ViewRecord,
    CorpusRecord,
    CorpusWishRecord,
    CorpusDraftRecord,
)
SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "fr_sizes": (None, (c_void_p,)),
    "fr_isa_best": (c_int32, ()),
    "fr_isa_active": (c_int32, ()),
    "fr_isa_use": (c_int32, (c_int32,)),
    "fr_packed_bytes": (c_int64, (c_int32, c_int32, c_int64, c_int64)),
    "fr_pack": (None, (c_void_p, c_void_p, c_int32, c_int64, c_int64, c_int32, c_int32)),
    "fr_unpack": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int32)),
    "fr_linear": (None, (c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int64, c_int32)),
    "fr_norm": (None, (*(c_void_p,) * 4, c_int32, c_int64, c_int64, c_float, c_int32, c_int32)),
    "fr_silu_gate": (None, (c_void_p, c_void_p, c_int32, c_int64, c_int64, c_int32)),
    "fr_attention": (None, (*(c_void_p,) * 3, c_int32, c_int32, c_int32, c_float, c_void_p, c_int32)),
    "fr_top": (None, (c_void_p, c_int64, c_int64, c_int32, *(c_void_p,) * 3, c_int32)),
    "fr_forward": (c_int32, (*(c_void_p,) * 4, c_int32)),
    "fr_draft": (c_int32, (*(c_void_p,) * 5, c_int64, c_int32)),
    "fr_automaton_new": (c_void_p, (c_int32,)),
    "fr_automaton_free": (None, (c_void_p,)),
    "fr_automaton_extend": (c_int32, (c_void_p, c_void_p, c_int64)),
    "fr_automaton_size": (None, (c_void_p, c_void_p)),
    "fr_automaton_match": (None, (c_void_p, c_void_p)),
    "fr_automaton_advance": (c_int32, (c_void_p, c_void_p, c_void_p, c_int64)),
    "fr_automaton_outlook": (c_int32, (c_void_p, c_void_p, c_void_p)),
    "fr_automaton_continuations": (c_int32, (c_void_p, c_void_p, c_int32, c_int32, c_void_p)),
    "fr_view_read": (c_int32, (c_void_p, c_void_p, c_int64)),
    "fr_view_draft": (c_int32, (c_void_p, c_void_p, c_int64, c_int64, c_int32)),
    "fr_view_next": (c_int32, (c_void_p, c_int32)),
    "fr_corpus_grow": (c_int32, (c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_void_p)),
}


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


def library() -> ctypes.CDLL:
    """The loaded kernels. Raises ForerunError where there are none."""
    found, reason = _opened()
    if found is None:
        raise ForerunError(f"there are no native kernels here: {reason}")
    return found


def is_there() -> bool:
    """Whether there are kernels here at all, for this processor or any."""
    return _opened()[0] is not None


@lru_cache(maxsize=1)
def quick() -> ctypes.CDLL:
    """The same kernels, called without giving up the interpreter's lock: for a few microseconds of work, after which another
    thread's turn of 5 ms is not worth waiting for."""
    return _signed(ctypes.PyDLL(library()._name))


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
    return ISAS[library().fr_isa_active()]


def use_isa(name: str) -> bool:
    """Use another instruction set, in the whole process; False if this processor does not have it. For tests."""
    return bool(library().fr_isa_use(ISAS.index(name)))


# ---- packed matrices


def padded(count: int, to: int) -> int:
    return -(-count // to) * to


@dataclass
class Packed:
    """A weight matrix [out, in] in the kernels' own layout (kernels/forerun_kernels.h), and what keeps its memory alive.

    gated: two matrices [out, in] in one; a product is `silu(gate) * value`.
    """

    record: Matrix
    memory: object
    bias: Tensor | None

    @property
    def out(self) -> int:
        """Columns of a product."""
        return int(self.record.out)

    @staticmethod
    def bytes_for(dtype: torch.dtype, out: int, in_: int, gated: bool = False) -> int:
        return int(library().fr_packed_bytes(FORMATS[dtype], gated, out, in_))

    @staticmethod
    def at(
        address: int, memory: object, dtype: torch.dtype, out: int, in_: int, gated: bool = False, biased: bool = False
    ) -> Packed:
        """An empty matrix in zeroed memory at `address`; `fill` gives it values."""
        columns = padded(in_, GROUP if dtype == torch.int8 else PANEL)
        bias = torch.zeros(2 * padded(out, PANEL // 2) if gated else padded(out, PANEL)) if biased else None
        record = Matrix(FORMATS[dtype], gated, out, in_, columns, address, None if bias is None else bias.data_ptr())
        return Packed(record, memory, bias)

    @staticmethod
    def of(weight: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None, gated: bool = False) -> Packed:
        """A packed copy of `weight` [out, in]; gated: of [2 * out, in], the gates first."""
        dtype, out = dtype or weight.dtype, weight.shape[0] // (1 + gated)
        memory = torch.zeros(Packed.bytes_for(dtype, out, weight.shape[1], gated) + 64, dtype=torch.uint8)
        address = padded(memory.data_ptr(), 64)
        made = Packed.at(address, memory, dtype, out, weight.shape[1], gated, bias is not None)
        for part in range(1 + gated):
            made.fill(weight[part * out : (part + 1) * out], 0, part)
            if bias is not None:
                made.fill_bias(bias[part * out : (part + 1) * out], 0, part)
        return made

    def fill(self, weight: Tensor, begin: int, part: int = 0) -> None:
        """Outputs `begin ..` become the rows of `weight` (bf16 or fp32; other floats are converted)."""
        if weight.dtype not in (torch.bfloat16, torch.float32):
            weight = weight.float()
        weight = weight.contiguous()
        library().fr_pack(
            ctypes.byref(self.record),
            weight.data_ptr(),
            FORMATS[weight.dtype],
            begin,
            weight.shape[0],
            part,
            torch.get_num_threads(),
        )

    def fill_bias(self, bias: Tensor, begin: int, part: int = 0) -> None:
        assert self.bias is not None
        outputs = torch.arange(begin, begin + len(bias))
        if self.record.gated:
            outputs = outputs // 16 * PANEL + part * 16 + outputs % 16
        self.bias[outputs] = bias.float()

    def unpacked(self, begin: int = 0, count: int | None = None, part: int = 0) -> Tensor:
        """Rows of the matrix as it will be multiplied, fp32 [count, in]."""
        count = self.out - begin if count is None else count
        rows = torch.empty(count, self.record.in_)
        library().fr_unpack(ctypes.byref(self.record), rows.data_ptr(), begin, count, part)
        return rows


# ---- single operations, on contiguous bf16 or fp32 tensors


def linear(x: Tensor, weight: Packed, residual: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias (+ residual)`; for gated weights `silu(x @ gate.T) * (x @ value.T)`. Any leading dimensions."""
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], weight.out), dtype=x.dtype)
    if x.shape[-1] != weight.record.in_:
        raise ValueError(f"inputs of width {x.shape[-1]} for a matrix of {weight.record.in_}")
    if residual is not None and (weight.record.gated or residual.shape != y.shape or residual.dtype != y.dtype):
        raise ValueError("a residual has the shape and the dtype of the product, which is not gated")
    added = None if residual is None else residual.contiguous()
    library().fr_linear(
        ctypes.byref(weight.record),
        x.data_ptr(),
        None if added is None else added.data_ptr(),
        y.data_ptr(),
        FORMATS[x.dtype],
        x.numel() // x.shape[-1],
        torch.get_num_threads(),
    )
    return y


def norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None, centred: bool = False) -> Tensor:
    """RMS norm over the last dimension, or with `centred` layer norm; weight and bias are fp32."""
    if any(part is not None and (part.dtype != torch.float32 or part.shape != x.shape[-1:]) for part in (weight, bias)):
        raise ValueError(f"weight and bias of a norm are fp32 [{x.shape[-1]}]")
    x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    library().fr_norm(
        x.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        FORMATS[x.dtype],
        x.numel() // x.shape[-1],
        x.shape[-1],
        eps,
        centred,
        torch.get_num_threads(),
    )
    return y


def silu_gate(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` for the two halves of the last dimension."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    y = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype)
    library().fr_silu_gate(
        gate_up.data_ptr(),
        y.data_ptr(),
        FORMATS[y.dtype],
        gate_up.numel() // (2 * width),
        width,
        torch.get_num_threads(),
    )
    return y


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of every row (equal ones by index) as values and indices [..., k], and log-sum-exp [...]. fp32."""
    logits = logits.contiguous()
    shape, vocabulary = logits.shape[:-1], logits.shape[-1]
    if logits.dtype != torch.float32 or not 1 <= k <= vocabulary:
        raise ValueError(f"the {k} largest of {vocabulary} {logits.dtype} numbers")
    values, indices = torch.empty((*shape, k)), torch.empty((*shape, k), dtype=torch.int64)
    total = torch.empty(shape)
    library().fr_top(
        logits.data_ptr(),
        logits.numel() // vocabulary,
        vocabulary,
        k,
        values.data_ptr(),
        indices.data_ptr(),
        total.data_ptr(),
        torch.get_num_threads(),
    )
    return values, indices, total


def attention(
    q: Tensor,
    store: Tensor,
    layer: int,
    lengths: np.ndarray,
    held: int = 0,
    sees: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    start: int = 0,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention [B, N, heads * head_dim] of queries [B, N, heads, head_dim] over a cache `store` that holds their keys and
    values already (see `Cache.store`); the other arguments are those of `Feed`. Padding gives zeros."""
    rows, count, heads, width = q.shape
    if width > WIDEST_HEAD or q.dtype != store.dtype:
        raise ValueError(f"heads of at most {WIDEST_HEAD}, queries and cache of one dtype")
    q, y = q.contiguous(), torch.empty((rows, count, heads * width), dtype=q.dtype)
    small = [np.ascontiguousarray(a, np.int32) for a in (np.full(rows, count) if counts is None else counts, lengths)]
    positions = np.zeros(rows * count, np.int32)
    seen = None if sees is None else np.ascontiguousarray(sees, np.bool_)
    feed = FeedRecord(rows, count, start, held, small[0].ctypes.data, small[1].ctypes.data, None, positions.ctypes.data)
    if seen is not None:
        feed.sees = seen.ctypes.data
    library().fr_attention(
        q.data_ptr(),
        ctypes.byref(feed),
        ctypes.byref(cache_record(store)),
        layer,
        heads,
        window or 0,
        width**-0.5 if scale is None else scale,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def cache_record(store: Tensor) -> CacheRecord:
    """The record of a cache's memory [layers, 2, slots, capacity, kv_heads, head_dim]."""
    layers, _, slots, capacity, kv_heads, head_dim = store.shape
    return CacheRecord(store.data_ptr(), FORMATS[store.dtype], layers, slots, capacity, kv_heads, head_dim)
