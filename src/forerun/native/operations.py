"""Single operations on contiguous bf16 or fp32 tensors: what the tests hold against the torch
reference in `nn/ops.py`."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from forerun.native.library import demand_fine, kernels
from forerun.native.matrix import Packed
from forerun.native.records import FORMATS, WIDEST_HEAD, FeedRecord, cache_record


def linear(x: Tensor, weight: Packed, residual: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias (+ residual)`; for gated weights `silu(x @ gate.T) * (x @ value.T)`. Any
    leading dimensions."""
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], weight.out), dtype=x.dtype)
    if x.shape[-1] != weight.record.in_:
        raise ValueError(f"inputs of width {x.shape[-1]} for a matrix of {weight.record.in_}")
    if residual is not None and (weight.record.gated or residual.shape != y.shape or residual.dtype != y.dtype):
        raise ValueError("a residual has the shape and the dtype of the product, which is not gated")
    added = None if residual is None else residual.contiguous()
    kernels().fr_linear(
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
    kernels().fr_norm(
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
    kernels().fr_silu_gate(
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
    kernels().fr_top(
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
    paths: np.ndarray | None = None,
    counts: np.ndarray | None = None,
    start: int = 0,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention [B, N, heads * head_dim] of queries [B, N, heads, head_dim] over a cache `store`
    that holds their keys and values already (see `Cache.store`); the other arguments are those of
    `Feed`. Padding gives zeros. Raises IndexError for paths that lead nowhere."""
    rows, count, heads, width = q.shape
    if width > WIDEST_HEAD or q.dtype != store.dtype:
        raise ValueError(f"heads of at most {WIDEST_HEAD}, queries and cache of one dtype")
    q, y = q.contiguous(), torch.empty((rows, count, heads * width), dtype=q.dtype)
    small = [np.ascontiguousarray(a, np.int32) for a in (np.full(rows, count) if counts is None else counts, lengths)]
    positions = np.zeros(rows * count, np.int32)
    ways = None if paths is None else np.ascontiguousarray(paths, np.int32)
    feed = FeedRecord(rows, count, start, held, small[0].ctypes.data, small[1].ctypes.data, None, positions.ctypes.data)
    if ways is not None:
        feed.paths, feed.reach = ways.ctypes.data, ways.shape[2]
    error = kernels().fr_attention(
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
    demand_fine(error)
    return y
