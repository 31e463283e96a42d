"""Engines for commands: quietly loaded, and several drafters on one target whose weights are read once."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.utils.tqdm import enable_progress_bars

from forerun.accept.lossy import lossy_of
from forerun.drafting.spec import Description, describe
from forerun.engine import load as assembly
from forerun.engine.engine import Engine
from forerun.engine.prompts import Prompt
from forerun.nn.network import Network
from forerun.sampling import SamplingParams


@dataclass(frozen=True)
class Machine:
    """How networks run: the words of the options `--dtype`, `--device`, `--kernels`, `--weights` and `--threads`."""

    dtype: str = "auto"
    device: str = "auto"
    kernels: str = "auto"
    weights: str = "auto"
    threads: int | None = None


def load(
    model: str,
    drafter: str | Description,
    machine: Machine,
    max_rows: int = 16,
    acceptance: str = "exact",
    prefix_cache: int | None = 0,
) -> Engine:
    """As `forerun.load`; a wrong drafter is found before the model is read. What measures reads every prompt."""
    describe(drafter)
    lossy_of(acceptance)
    quiet()
    words = asdict(machine)
    return assembly.load(model, drafter, max_rows=max_rows, acceptance=acceptance, prefix_cache=prefix_cache, **words)


def machine_of(network: Network) -> str:
    """On what a network runs, for the caption of a figure: processor, threads, kernels, number format."""
    dtype = str(network.dtype).removeprefix("torch.")
    if network.device.type == "cuda":
        return f"{torch.cuda.get_device_name(network.device)}, {dtype}"
    kernels = "native kernels" if network.backend.keeps_bits else "torch"
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'' if threads == 1 else 's'}, {kernels}, {dtype}"


def _processor() -> str:
    """Linux keeps its processor's name in a file; elsewhere Python may know it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def fitted(engine: Engine, prompt: Prompt, params: SamplingParams) -> list[int]:
    """The prompt's token ids, cut so that the new tokens have room in the context."""
    room = engine.target.max_length - (params.max_new_tokens or 0)
    return engine.encode(prompt)[: max(1, room)]


def quiet() -> None:
    """No bars and no advice from transformers, which belong to its own ways. Downloads keep their bar."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    enable_progress_bars()


def beside(engine: Engine, spec: str | Description, machine: Machine) -> Engine:
    """An engine with the same target and another drafter.

    Raises DrafterError or CheckpointError as `forerun.load` does.
    """
    network = engine.target.network
    return engine.beside(assembly.drafter_for(network, spec, machine.kernels, machine.weights, engine.tokenizer))
