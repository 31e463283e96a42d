"""`forerun check`: verdicts, the exit code, and a drafter that lies."""

from __future__ import annotations

import json

import pytest
import torch

from forerun.check.greedy import BIT_FOR_BIT
from forerun.drafting import registry
from forerun.native import library

QUICK = ("--tokens", 60, "--rows", "1,3", "--max-new-tokens", 20, "--samples", 60, "--dtype", "fp32")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"def f{n}(a, b):\n    return"}) + "\n" for n in range(3)))
    return path


@pytest.fixture
def liar(monkeypatch):
    monkeypatch.setitem(registry.REGISTRY, "liar", "liars")


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_an_exact_drafter_passes(family, said, prompts, kernels):
    if kernels == "native" and (reason := library.why_not(torch.device("cpu"), torch.float32)):
        pytest.skip(reason)
    drafter = f"small:{family / 'small'}"
    how = ("--drafter", drafter, "--prompt-file", prompts, "--kernels", kernels)
    found = said("check", family / "target", *how, *QUICK)
    assert found["passed"] is True and found["lossy"] is False and found["dtype"] == "float32"
    assert [(one["rows"], one["tokens"], one["passed"]) for one in found["greedy"]] == [(1, 60, True), (3, 60, True)]
    assert found["sampled"] and all(one["passed"] and one["p"] >= 0.001 for one in found["sampled"])
    for one in found["greedy"]:
        assert one["bound"] == 0 if kernels == "native" else 0 < one["bound"] < 1e-3
        assert one["verdict"].endswith(BIT_FOR_BIT) == (kernels == "native")


def test_the_verdict_in_words(family, forerun, prompts):
    code, out, _ = forerun("check", family / "target", "--drafter", "lookup", "--prompt-file", prompts, *QUICK)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 4
    assert lines[0].startswith("greedy, 1 row: identical, 60 tokens over 3 prompts")
    assert lines[2].startswith("law: no difference found, 60 samples")
    assert lines[3] == "EXACT: drafter lookup, float32"


def test_a_drafter_that_lies_fails_with_exit_code_1(family, forerun, prompts, liar):
    code, out, _ = forerun("check", family / "target", "--drafter", "liar", "--prompt-file", prompts, *QUICK, "--json")
    found = json.loads(out)
    assert code == 1 and found["passed"] is False
    assert any(not one["passed"] for one in found["sampled"])
    assert "NOT EXACT" in found["verdicts"][-1]
