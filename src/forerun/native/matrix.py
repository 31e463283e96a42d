"""Weight matrices in the kernels' own layout."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.native.library import kernels
from forerun.native.records import FORMATS, GROUP, PANEL, Matrix


def padded(count: int, to: int) -> int:
    return -(-count // to) * to


@dataclass
class Packed:
    """A weight matrix [out, in] in the kernels' own layout (kernels/forerun_kernels.h), and what
    keeps its memory alive.

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
        return int(kernels().fr_packed_bytes(FORMATS[dtype], gated, out, in_))

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
        kernels().fr_pack(
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
        kernels().fr_unpack(ctypes.byref(self.record), rows.data_ptr(), begin, count, part)
        return rows
