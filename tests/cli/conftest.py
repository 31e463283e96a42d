"""A tiny Llama with a tokenizer, as transformers writes it, and a smaller one beside it."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from forerun.cli import run
from forerun.train import tokenizer

pytest.importorskip("sentencepiece")

VOCABULARY = 600


def write_llama(folder: Path, model: bytes, seed: int, layers: int = 2, vocabulary: int = VOCABULARY) -> Path:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.write(model, folder)
    return folder


@pytest.fixture(scope="session")
def vocabulary_model() -> bytes:
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (textwrap, argparse)]
    return tokenizer.train(sources, tokenizer.Settings(vocabulary=VOCABULARY))


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory, vocabulary_model: bytes) -> Path:
    """A folder with target, small, and other (another vocabulary). Tests must not change it."""
    folder = tmp_path_factory.mktemp("family")
    write_llama(folder / "target", vocabulary_model, seed=0)
    write_llama(folder / "small", vocabulary_model, seed=0, layers=1)
    write_llama(folder / "other", vocabulary_model, seed=2, vocabulary=VOCABULARY + 8)
    return folder


@pytest.fixture
def forerun(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; its exit code, and what it wrote to stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return (code, *capfd.readouterr())

    return call


@pytest.fixture
def refused(forerun: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Run a command line that must be refused as the contract says; the one sentence."""

    def call(*arguments: object) -> str:
        code, out, err = forerun(*arguments)
        assert code == 2, (out, err)
        assert len(err.splitlines()) == 1 and err.startswith("forerun: "), err
        assert "Traceback" not in err and out == ""
        return err

    return call


@pytest.fixture
def said(forerun: Callable[..., tuple[int, str, str]]) -> Callable[..., dict]:
    """Run a command with --json; the object."""

    def call(*arguments: object) -> dict:
        code, out, err = forerun(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call
