"""The larger-cost target of the benchmarks says what the target says, bit for bit in fp32."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from drafters.heading import every_kernel
from forerun.model import Inputs, Model
from forerun.nn.load import load_network

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "models" / "target"
HAD, DEEP = 8, 11


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("deeper") / "target"
    script = runpy.run_path(str(ROOT / "benchmarks" / "deeper.py"))
    assert script["layers_for"](TARGET, script["deepen"](TARGET, out, DEEP)) == DEEP
    return out


@every_kernel
def test_silent_layers_change_no_bit(deeper: Path, kernels: str) -> None:
    cpu = torch.device("cpu")
    tokens = torch.arange(5, 45)[None]
    reads = []
    for folder, layers in ((TARGET, HAD), (deeper, DEEP)):
        network = load_network(folder, torch.float32, cpu, kernels)
        assert network.cache_shape.layers == layers
        model = Model(network, 0)
        model.reserve(1, tokens.shape[1])
        model.cache.admit()
        reads.append(model.append(Inputs.whole(tokens), layers=(2, 5, layers)))
    assert torch.equal(reads[0].logits_BNV, reads[1].logits_BNV)
    for mine, theirs in ((2, 2), (5, 5), (HAD, DEEP)):
        assert torch.equal(reads[0].hidden[mine], reads[1].hidden[theirs])
