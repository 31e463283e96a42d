"""The few operations a forward is made of, in plain torch.

This file is the reference: any faster implementation must agree with it. Shapes use the legend of the project: `B` rows,
`N` tokens per row, `S` cache entries read, `D` width, `H` attention heads, `E` width of one head.
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


def attention(q_BNHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, bias_B1NS: Tensor | None, scale: float) -> Tensor:
    """Softmax attention with grouped queries; `bias` is added to the scores (0 or -inf), None lets all see all."""
    out = F.scaled_dot_product_attention(
        q_BNHE.transpose(1, 2),
        k_BSHE.transpose(1, 2),
        v_BSHE.transpose(1, 2),
        attn_mask=bias_B1NS,
        scale=scale,
        enable_gqa=q_BNHE.shape[2] != k_BSHE.shape[2],
    )
    return out.transpose(1, 2).flatten(2)


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
