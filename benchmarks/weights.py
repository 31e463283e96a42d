"""What a number format costs in quality: loss on held-out text, and how far the law moves from the fp32 model's.

    python benchmarks/weights.py models/target [--json FILE]

Reads the prompts of the built-in suite (source files that the reference family was never trained
on) with every format and prints the mean negative log-likelihood per token and the mean KL
divergence of the fp32 law from each format's law, in nats.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from forerun.bench import suites
from forerun.nn.cache import Cache
from forerun.nn.feed import Feed
from forerun.nn.load import load_network
from forerun.nn.network import Network
from forerun.sources.tokenizer import tokenizer_of

CPU = torch.device("cpu")
FORMATS = {
    "fp32, torch": (torch.float32, "torch", "auto"),
    "bf16, torch": (torch.bfloat16, "torch", "auto"),
    "fp32, native": (torch.float32, "native", "auto"),
    "bf16, native": (torch.bfloat16, "native", "auto"),
    "int8, native": (torch.bfloat16, "native", "int8"),
}


@torch.inference_mode()
def laws(network: Network, texts: list[list[int]]) -> Iterator[Tensor]:
    """Log-probabilities [N, V] of what follows every token but the last, per text, fp32."""
    for tokens in texts:
        cache = Cache(network.cache_shape, network.dtype, CPU)
        cache.reserve(1, len(tokens))
        cache.admit()
        feed = Feed(torch.tensor([tokens]), np.zeros(1, np.int64), np.arange(len(tokens))[None], dtype=network.dtype)
        yield network.forward(feed, cache).logits_BNV[0, :-1].float().log_softmax(-1)


def measure(path: str, texts: list[list[int]]) -> dict[str, dict[str, float]]:
    """Loss and divergence per format."""
    reference: list[Tensor] = []
    found = {}
    for name, (dtype, kernels, weights) in FORMATS.items():
        said = list(laws(load_network(path, dtype, CPU, kernels, weights), texts))
        reference = reference or said
        losses = torch.cat(
            [-law.gather(1, torch.tensor(t[1:])[:, None])[:, 0] for law, t in zip(said, texts, strict=True)]
        )
        moved = [(true.exp() * (true - law)).sum(-1) for true, law in zip(reference, said, strict=True)]
        same = [(true.argmax(-1) == law.argmax(-1)).float() for true, law in zip(reference, said, strict=True)]
        found[name] = {
            "loss": float(losses.mean()),
            "divergence": float(torch.cat(moved).mean()),
            "same_best": float(torch.cat(same).mean()),
            "tokens": len(losses),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = tokenizer_of(arguments.model)
    if tokenizer is None:
        parser.error("the model has no tokenizer")
    texts = [tokenizer(prompt.prompt)["input_ids"] for prompt in suites.load()]
    found = measure(arguments.model, texts)
    table = Table("weights", "loss, nats/token", "KL(fp32, this), nats", "same best token", box=None)
    for name, values in found.items():
        table.add_row(name, f"{values['loss']:.4f}", f"{values['divergence']:.2e}", f"{values['same_best']:.2%}")
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
