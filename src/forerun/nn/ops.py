"""The few operations a forward is made of, in plain torch.

This file is the reference: the native kernels (`native/operations.py`) must agree with it. Shapes
use the legend of the project: `B` rows, `N` tokens per row, `S` cache entries read, `D` width, `H`
attention heads, `E` width of one head, `V` vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`; weight is [out, in] as in every published checkpoint."""
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rotary(x_BNHE: Tensor, cos_BN1E: Tensor, sin_BN1E: Tensor) -> Tensor:
    """Rotate each head by its token's angle (rotate-half convention); the sign of the first half sits in `sin`."""
    return x_BNHE * cos_BN1E + x_BNHE.roll(x_BNHE.shape[-1] // 2, -1) * sin_BN1E


def silu_gate(gate_up: Tensor) -> Tensor:
    """SwiGLU's middle: `silu(gate) * up` for the two halves of a fused projection."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def attention(q_BNHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, bias_BNS: Tensor | None, scale: float) -> Tensor:
    """Softmax attention with grouped queries; `bias` is added to the scores (0 or -inf), None lets all see all.

    The queries that share a key head are laid side by side, as if they were tokens: torch's kernels for a single query
    per head are several times slower than those for two.
    """
    rows, count, heads, width = q_BNHE.shape
    kv_heads = k_BSHE.shape[2]
    group = heads // kv_heads
    grouped = q_BNHE.view(rows, count, kv_heads, group, width).permute(0, 2, 3, 1, 4)
    bias = None
    if bias_BNS is not None:
        bias = bias_BNS[:, None].expand(-1, group, -1, -1).reshape(-1, 1, group * count, k_BSHE.shape[1])
    mixed = F.scaled_dot_product_attention(
        grouped.reshape(rows, kv_heads, group * count, width),
        k_BSHE.transpose(1, 2),
        v_BSHE.transpose(1, 2),
        attn_mask=bias,
        scale=scale,
    )
    return mixed.view(rows, kv_heads, group, count, width).permute(0, 3, 1, 2, 4).reshape(rows, count, heads * width)


def causal_attention(q_BNHE: Tensor, k_BNHE: Tensor, v_BNHE: Tensor, scale: float) -> Tensor:
    """The same over whole sequences without a cache: what training uses."""
    out = F.scaled_dot_product_attention(
        q_BNHE.transpose(1, 2),
        k_BNHE.transpose(1, 2),
        v_BNHE.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=q_BNHE.shape[2] != k_BNHE.shape[2],
    )
    return out.transpose(1, 2).flatten(2)
