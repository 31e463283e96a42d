"""Llama checkpoints with random weights for timing kernels: bf16 safetensors in Hugging Face format.

    python benchmarks/peers/models.py OUT 12m 34m 190m --tokenizer models/target

Every shape becomes a folder OUT/NAME. The tokenizer files are copied so that converters find one;
the larger vocabularies have ids that it does not know, which is no matter to benchmarks that feed
ids.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER_FILES = "tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json".split()


@dataclass(frozen=True)
class Shape:
    """Sizes in elements, heads and layers; a head is 64 wide."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool = False

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=64,
            max_position_embeddings=2048,
            tie_word_embeddings=self.tied,
            bos_token_id=1,
            eos_token_id=2,
        )


SHAPES = {
    "12m": Shape(width=384, layers=6, heads=6, kv_heads=3, mlp=1024, vocabulary=4096, tied=True),
    "34m": Shape(width=512, layers=8, heads=8, kv_heads=4, mlp=1536, vocabulary=8192),
    "190m": Shape(width=1024, layers=12, heads=16, kv_heads=8, mlp=3200, vocabulary=16000),
}


def write(shape: Shape, folder: Path, tokenizer: Path) -> int:
    """Write one checkpoint; returns its number of parameters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(shape.config()).to(torch.bfloat16)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
    return sum(weight.numel() for weight in model.parameters())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model folder to copy the tokenizer files from")
    given = parser.parse_args(arguments)
    for name in given.names or SHAPES:
        count = write(SHAPES[name], given.out / name, given.tokenizer)
        print(f"{given.out / name}: {count / 1e6:.1f} million parameters")


if __name__ == "__main__":
    main()
