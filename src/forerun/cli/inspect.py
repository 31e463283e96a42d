"""`forerun inspect`: what this machine is, and what a model needs on it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forerun.cli import options

if TYPE_CHECKING:
    import torch

EXAMPLES = """
forerun inspect                     this machine
forerun inspect MODEL               what it needs here; also heads, a store, a tree, answers, or a GGUF
"""

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A folder in Hugging Face format, a hub id, or what else forerun reads."),
]


def inspect(
    model: Model = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    kernels: options.Kernels = "auto",
    weights: options.Weights = "auto",
    revision: options.Revision = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
) -> None:
    """What this machine is: versions, device, number format, drafters. With a model also its shape and its memory.

    Draft heads, stores, trees, drafter files, answers and GGUF files are told from one another, and described.
    """
    from forerun.cli.files import print_json
    from forerun.engine.threads import use_threads
    from forerun.nn.dtype import device_of, dtype_of
    from forerun.nn.load import demand_words

    demand_words(kernels, weights)
    use_threads(threads)
    place = device_of(device)
    kind = dtype_of(dtype, place)
    found = _thing(options.at(model, revision), kind, weights) if model is not None else None
    if found is None:
        found = {"machine": machine(place, kind, dtype)}
        if model is not None:
            found["model"] = describe(options.at(model, revision), kind, place, kernels, weights)
    if as_json:
        print_json(found)
    else:
        _print(found)


def _thing(name: str, dtype: torch.dtype, weights: str) -> dict[str, Any] | None:
    """What is there, unless it is a model's folder."""
    from forerun.cli import contents
    from forerun.sources.folder import checkpoint_folder
    from forerun.sources.gguf.head import SUFFIX

    path = Path(name).expanduser()
    if path.is_file() and path.suffix == SUFFIX:
        return {"gguf": contents.gguf(path, dtype, weights)}
    if path.is_file():
        return contents.of_file(path)
    heads = contents.heads_in(checkpoint_folder(name))
    return {"heads": heads} if heads else None


def machine(device: torch.device, dtype: torch.dtype, asked: str) -> dict[str, Any]:
    """Versions and abilities, as plain values."""
    import platform

    import torch
    import transformers

    import forerun
    from forerun.drafting.registry import names
    from forerun.native.library import active_isa, why_not

    missing = why_not(device, dtype)
    return {
        "forerun": forerun.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {device.type}",
        "threads": torch.get_num_threads(),
        "processor": _abilities(),
        "dtype": str(dtype).removeprefix("torch."),
        "dtype_reason": _reason(device, asked),
        "native_kernels": "none" if missing else active_isa(),
        **({"native_kernels_reason": missing} if missing else {}),
        "drafters": names(),
    }


def _abilities() -> list[str]:
    """What matters of a processor's vocabulary: wide and half-precision arithmetic."""
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):
        return []
    wanted = ("avx", "amx", "bf16", "f16", "fp16", "fma", "neon", "sve")
    return sorted(
        name for name, here in torch.cpu.get_capabilities().items() if here is True and name.startswith(wanted)
    )


def _reason(device: torch.device, asked: str) -> str:
    from forerun.nn.dtype import multiplies_bf16

    if asked != "auto":
        return "asked for"
    return f"this {device.type} {'multiplies' if multiplies_bf16(device) else 'does not multiply'} bf16 itself"


def describe(path: str, dtype: torch.dtype, device: torch.device, kernels: str, weights: str) -> dict[str, Any]:
    """A model's shape and needs. Reads the weights, so a damaged checkpoint is found here."""
    from forerun.cli.engines import quiet
    from forerun.nn.load import load_network, why_torch
    from forerun.nn.translate import translate
    from forerun.sources.source import Source

    quiet()
    source = Source.of(path)
    config = source.config
    reason = why_torch(translate(config, source.path), dtype, device, kernels, weights)
    network = load_network(source, dtype, device, kernels, weights)
    shape = network.cache_shape
    return {
        "path": path,
        "architecture": (config.architectures or [config.model_type])[0],
        **asdict(network.footprint),
        **({"not_on_native_kernels": reason} if reason else {}),
        "cache_bytes_per_token": 2 * shape.layers * shape.kv_heads * shape.head_dim * network.dtype.itemsize,
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "context": network.max_length,
        "vocabulary": network.vocab_size,
        "eos": list(source.ends),
        "tokenizer": source.tokenizer is not None,
        "chat_template": source.template is not None,
    }


def _print(found: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    from forerun.cli.narration import on_stdout

    table = Table(box=None, show_header=False, pad_edge=False)
    for kind, values in found.items():
        table.add_row(kind, style="bold")
        for name, value in values.items():
            table.add_row(name.replace("_", " "), _readable(name, value), style=None)
        table.add_row("", "")
    on_stdout().print(table)


def _readable(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in ("weight_bytes", "bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
