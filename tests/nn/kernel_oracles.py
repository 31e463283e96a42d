"""What the native kernels should say, in float64 and slowly, and the tools for asking them.

Every reference returns the value and how far a correct fp32 implementation may be from it: a few
roundings of the sum of magnitudes, so that a lost input, a wrong scale or a wrong mask cannot hide.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from forerun.native import library, operations
from forerun.native.matrix import Packed
from forerun.native.records import FORMATS

CPU = torch.device("cpu")
REASON = library.why_not(CPU, torch.bfloat16)
BF16, FP32, INT8 = torch.bfloat16, torch.float32, torch.int8
UNIT = {BF16: 2.0**-8, FP32: 2.0**-24}  # half the distance between neighbouring numbers, relative
GROUP = 128  # inputs of an int8 product that share a scale

EXAMPLES = int(os.environ.get("FORERUN_EXAMPLES", "12"))  # fewer where every instruction is checked (test_sanitized.py)
some_examples = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


# ---- where and how the kernels run


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def instructions(name: str) -> Iterator[bool]:
    """With this instruction set; False where the processor does not have it."""
    before = library.active_isa()
    try:
        yield library.use_isa(name)
    finally:
        library.use_isa(before)


@contextmanager
def guarded(monkeypatch: Any, zone: int = 256) -> Iterator[list[Guarded]]:
    """`torch.empty` gives memory full of NaN (whole numbers: -1) between guard zones of the same."""
    made: list[Guarded] = []

    def empty(*shape: Any, dtype: torch.dtype = FP32, **_: Any) -> Tensor:
        size = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        count = size.numel() * dtype.itemsize
        bytes_ = torch.full((count + 2 * zone,), 255, dtype=torch.uint8)
        made.append(Guarded(bytes_, bytes_[zone : zone + count].view(dtype).view(size), zone))
        return made[-1].inside

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", lambda x, **_: empty(x.shape, dtype=x.dtype))
        yield made


@dataclass(frozen=True)
class Guarded:
    bytes_: Tensor
    inside: Tensor
    zone: int

    def check(self) -> None:
        """All of the inside was written, and nothing beside it."""
        assert (self.bytes_[: self.zone] == 255).all() and (self.bytes_[-self.zone :] == 255).all()
        left = self.inside.isnan() if self.inside.is_floating_point() else self.inside == -1
        assert not left.any()


# ---- numbers


def some(*shape: int, seed: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same numbers, far apart in memory, with NaN between them."""
    wide = torch.full((*x.shape, 3), float("nan"), dtype=x.dtype)
    wide[..., 1] = x
    return wide[..., 1]


def bits(x: Tensor) -> Tensor:
    """Floats as whole numbers: a NaN equals itself, and -0 is not 0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and torch.equal(bits(x), bits(y))


@dataclass(frozen=True)
class Expected:
    """The value, and the rounding that a correct implementation may have done on the way."""

    value: Tensor
    slack: Tensor

    def check(self, y: Tensor) -> None:
        allowed = self.slack + 1.01 * UNIT[y.dtype] * (self.value.abs() + self.slack) + 1e-35
        far = (y.double() - self.value).abs() > allowed
        wrong = far | y.isnan()
        assert y.shape == self.value.shape
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {y.numel()} are wrong, the first at {wrong.nonzero()[0].tolist()}"
        )


# ---- products


def quantised(x: Tensor) -> Tensor:
    """Inputs as an int8 product sees them: per 128 of them a scale that makes the largest 127, ties to even."""
    parts = x.float().split(GROUP, -1)
    return torch.cat([_quantised(part) for part in parts], -1)


def _quantised(x: Tensor) -> Tensor:
    largest = x.abs().amax(-1, keepdim=True)
    steps = torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, 0.0)
    return (x * steps).round().double() * (largest / 127).double()


def linear(x: Tensor, weight: Packed, residual: Tensor | None = None) -> Expected:
    dtype = {number: dtype for dtype, number in FORMATS.items()}[weight.record.format]
    inputs = quantised(x) if dtype == INT8 else x.to(dtype).double()
    parts = [_product(inputs, weight, part, dtype) for part in range(1 + bool(weight.record.gated))]
    if weight.record.gated:
        return _silu_gated(*parts)
    added = torch.zeros(()) if residual is None else residual.double()
    value, slack = parts[0].value + added, parts[0].slack + 4 * UNIT[FP32] * added.abs()
    return Expected(value, slack)


def _product(inputs: Tensor, weight: Packed, part: int, dtype: torch.dtype) -> Expected:
    rows, width = weight.unpacked(part=part).double(), inputs.shape[-1]
    bias = torch.zeros(weight.out, dtype=torch.float64)
    if weight.bias is not None:
        outputs = torch.arange(weight.out)
        if weight.record.gated:
            outputs = outputs // 16 * 32 + part * 16 + outputs % 16
        bias = weight.bias[outputs].double()
    magnitude = inputs.abs() @ rows.abs().T + bias.abs()
    additions = width / GROUP if dtype == INT8 else width
    return Expected(inputs @ rows.T + bias, (8 + additions**0.5) * UNIT[FP32] * magnitude)


def _silu_gated(gate: Expected, value: Expected) -> Expected:
    silu = gate.value * gate.value.sigmoid()
    y = silu * value.value
    return Expected(y, 1.2 * gate.slack * value.value.abs() + silu.abs() * value.slack + 4 * UNIT[FP32] * y.abs())


# ---- norms and gates


def norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None, centred: bool = False) -> Expected:
    x64, width = x.double(), x.shape[-1]
    mean = x64.mean(-1, keepdim=True) if centred else 0.0
    scale = ((x64 - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    value = (x64 - mean) * scale * weight.double()
    magnitude = (x64.abs() + x64.abs().amax(-1, keepdim=True)) * scale * weight.double().abs()
    if bias is not None:
        value, magnitude = value + bias.double(), magnitude + bias.double().abs()
    return Expected(value, (8 + (width / 16) ** 0.5) * UNIT[FP32] * magnitude)


def silu_gate(gate_up: Tensor) -> Expected:
    gate, up = gate_up.double().chunk(2, -1)
    exact = torch.zeros_like(gate)
    return _silu_gated(Expected(gate, exact), Expected(up, exact))


# ---- attention


@dataclass
class Attending:
    """A call of `operations.attention`: queries of B rows with N tokens over slots that hold their keys and values."""

    q: Tensor
    store: Tensor
    lengths: np.ndarray
    held: int = 0
    paths: np.ndarray | None = None
    counts: np.ndarray | None = None
    start: int = 0
    window: int | None = None
    layer: int = 0

    def run(self, store: Tensor | None = None) -> Tensor:
        store = self.store if store is None else store
        return operations.attention(
            self.q, store, self.layer, self.lengths, self.held, self.paths, self.counts, self.start, self.window
        )

    def real(self) -> list[tuple[int, int]]:
        """Row and number of every token that is not padding."""
        counts = [self.q.shape[1]] * self.q.shape[0] if self.counts is None else self.counts.tolist()
        return [(row, token) for row, count in enumerate(counts) for token in range(count)]

    def seen(self, row: int, token: int) -> list[int]:
        """The entries of its slot that a token sees, in the order of the text."""
        length, chain = int(self.lengths[row]), range(self.held + token + 1)
        own = chain if self.paths is None else [s for s in self.paths[row, token].tolist() if s >= 0]
        entries = [*range(length), *(length + s for s in own)]
        return entries if self.window is None else entries[-self.window :]

    def expected(self) -> Expected:
        """Padding: zeros."""
        rows, count, heads, width = self.q.shape
        value = torch.zeros(rows, count, heads * width, dtype=torch.float64)
        slack = torch.zeros_like(value)
        for row, token in self.real():
            value[row, token], slack[row, token] = self._one(row, token)
        return Expected(value, slack)

    def _one(self, row: int, token: int) -> tuple[Tensor, Tensor]:
        heads, width = self.q.shape[2:]
        keys, values = self.store[self.layer, :, self.start + row, self.seen(row, token)].double()
        q = self.q[row, token].double().view(keys.shape[1], -1, width)
        scores = torch.einsum("kge,ske->kgs", q, keys) * width**-0.5
        weights = scores.softmax(-1)
        # A score is off by its products' rounding, a weight by as much relatively; bf16 weights are rounded once more.
        far = (q.norm(dim=-1, keepdim=True) * keys.norm(dim=-1).max()) * width**-0.5 + 16
        rounding = 8 * UNIT[FP32] * far + (UNIT[BF16] if self.q.dtype == BF16 else 0)
        mixed = torch.einsum("kgs,ske->kge", weights, values)
        slack = torch.einsum("kgs,ske->kge", weights * rounding, values.abs())
        return mixed.reshape(heads * width), slack.reshape(heads * width)

    def only(self, row: int, token: int) -> Attending:
        """The call for one of its tokens alone, which then stands behind more held ones."""
        held = self.held + token
        paths = None if self.paths is None else self.paths[row : row + 1, token : token + 1]
        q, lengths = self.q[row : row + 1, token : token + 1], self.lengths[row : row + 1]
        return Attending(q, self.store, lengths, held, paths, None, self.start + row, self.window, self.layer)

    def as_text(self, row: int, token: int) -> Attending:
        """The call for one of its tokens whose path has become committed text, in a cache of its own."""
        whole = Attending(self.q, self.store, self.lengths, self.held, self.paths, self.counts, self.start)
        entries = whole.seen(row, token)
        store = self.store[self.layer, :, self.start + row, entries][None, :, None].contiguous()
        q = self.q[row : row + 1, token : token + 1]
        return Attending(q, store, np.asarray([len(entries) - 1]), window=self.window)

    def poisoned(self) -> Tensor:
        """The store with NaN wherever nobody may look."""
        store = torch.full_like(self.store, float("nan"))
        for row, token in self.real():
            entries = self.seen(row, token)
            store[self.layer, :, self.start + row, entries] = self.store[self.layer, :, self.start + row, entries]
        return store


def some_paths(rows: int, count: int, held: int, seed: int) -> np.ndarray:
    """Random trees [rows, count, held + count]; the held entries are a chain that any token may
    continue from anywhere."""
    chance = np.random.default_rng(seed)
    paths = np.full((rows, count, held + count), -1, np.int32)
    for row in range(rows):
        for token in range(count):
            parent = int(chance.integers(-1, held + token))
            above = paths[row, parent - held] if parent >= held else np.arange(parent + 1)
            path = [*(entry for entry in above if entry >= 0), held + token]
            paths[row, token, : len(path)] = path
    return paths
