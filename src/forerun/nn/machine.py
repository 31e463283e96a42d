"""What the machine is called that something runs on, and how much memory it has."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

from forerun.nn.network import Network

CPUINFO = Path("/proc/cpuinfo")
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""How much memory a container may have, in the two ways in which Linux says it."""


def processor(device: torch.device) -> str:
    """The name that its maker gave it, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    named = _from_cpuinfo(CPUINFO.read_text()) if CPUINFO.exists() else ""
    return named or platform.processor() or platform.machine()


def described(device: torch.device) -> str:
    """The processor, and how many of its threads work."""
    threads = torch.get_num_threads()
    return processor(device) + (f", {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else "")


def memory(device: torch.device) -> int:
    """Bytes of a device, or those that this process may use of the machine; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
    told = [path.read_text().strip() for path in LIMITS if path.exists()]
    return min([whole, *(int(limit) for limit in told if limit.isdigit())])


def record(network: Network) -> dict[str, str | int]:
    """What seconds are true of, as files have it."""
    return {
        "processor": processor(network.device),
        "threads": torch.get_num_threads(),
        "device": str(network.device),
        "dtype": str(network.dtype).removeprefix("torch."),
        "weights": str(network.weights).removeprefix("torch."),
        "kernels": network.backend.name,
    }


def _from_cpuinfo(text: str) -> str:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return re.sub(r"\((R|TM)\)| CPU| Processor| @.*", "", " ".join(value.split()))
    return ""
