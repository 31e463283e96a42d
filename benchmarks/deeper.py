"""The same law at the cost of a larger model: layers are appended to a Llama whose output projections are zero.

    python benchmarks/deeper.py models/target /tmp/at-200m --parameters 200e6

Such a layer reads all of its weights and adds nothing, so logits stay equal bit for bit in fp32, while a forward costs
what one of so many parameters costs. A small target makes every drafter look dear; figures on this one show what
the same tokens per step are worth where the target is larger. They are labelled: no model of that size was trained.

The states of layers that both have are the same, and so is the last one, behind the final norm. So drafters run on
both unchanged that read the last one by name and not by its number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

LAYER = "model.layers.{}."
SILENT = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
"""What a layer adds goes through one of these."""


def deepen(source: Path, out: Path, layers: int) -> int:
    """Write the model in `source` with layers appended up to so many; its parameters then. Matrices of the new layers
    are random, but for those that are zero: zeros everywhere could be multiplied faster."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    had, generator = config["num_hidden_layers"], torch.Generator().manual_seed(0)
    prefix = LAYER.format(had - 1)
    like = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    for layer in range(had, layers):
        for name, value in like.items():
            noise = (torch.randn(value.shape, generator=generator) * 0.02).to(value.dtype)
            made = torch.ones_like(value) if value.dim() == 1 else torch.zeros_like(value) if name in SILENT else noise
            tensors[LAYER.format(layer) + name] = made
    out.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, out / path.name)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}, indent=2) + "\n")
    return sum(value.numel() for value in tensors.values())


def layers_for(source: Path, parameters: float) -> int:
    """As many as come nearest to so many parameters."""
    config = json.loads((source / "config.json").read_text())
    tensors, had = load_file(source / "model.safetensors"), config["num_hidden_layers"]
    each = sum(value.numel() for name, value in tensors.items() if name.startswith(LAYER.format(had - 1)))
    return had + max(0, round((parameters - sum(value.numel() for value in tensors.values())) / each))


def main(
    source: Path, out: Path, parameters: Annotated[float, typer.Option(help="of the deeper model, nearly")] = 200e6
) -> None:
    layers = layers_for(source, parameters)
    print(f"{out}: {deepen(source, out, layers):,} parameters in {layers} layers, those of {source} and silent ones")


if __name__ == "__main__":
    typer.run(main)
