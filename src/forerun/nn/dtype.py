"""Which number format a model runs in."""

from __future__ import annotations

import torch

from forerun.errors import ForerunError

NAMED = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype for 'bf16', 'fp32', 'fp16' or 'auto': bf16 where the processor multiplies it natively, else fp32.

    Raises ForerunError for any other name.
    """
    if name == "auto":
        return torch.bfloat16 if multiplies_bf16(device) else torch.float32
    if name not in NAMED:
        raise ForerunError(f"there is no dtype {name!r}: choose one of auto, {', '.join(NAMED)}")
    return NAMED[name]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether this processor has bf16 products of its own; emulated ones are slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(flag, False) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
