"""Which device a model runs on, and in which number format."""

from __future__ import annotations

from pathlib import Path

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
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and not _cpu_flags().isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def _cpu_flags() -> set[str]:
    """What the processor can do; nothing where neither torch nor the system tells."""
    if hasattr(torch.cpu, "get_capabilities"):
        return {flag for flag, present in torch.cpu.get_capabilities().items() if present}
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


def device_of(name: str) -> torch.device:
    """auto, or any torch device that is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ForerunError(f"unknown device {name!r}: use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ForerunError("there is no CUDA device here: use --device cpu")
    return device
