"""The ablation of KOALA's halves, on a target of a few thousand parameters and for no time at all."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from drafters.heading import lively
from forerun.nn.save import save_pretrained
from train.test_heads import own_answers, written

ROOT = Path(__file__).parents[2]


def test_every_case_is_trained_once_and_then_only_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    script = runpy.run_path(str(ROOT / "benchmarks" / "koala.py"))
    save_pretrained(lively(), tmp_path / "target", dtype=torch.float32)
    answers = written(tmp_path / "answers.jsonl", own_answers())
    how = {"minutes": 0.0, "layers": [1, 2], "loss": ["supervised", "adversarial"], "length": 64}
    script["main"](str(tmp_path / "target"), answers, tmp_path / "out", **how)
    cases = [f"medusa-{layers}-{loss}" for layers in (1, 2) for loss in ("supervised", "adversarial")]
    said = capsys.readouterr().out
    assert all(case in said for case in cases)
    for case in cases:
        config = json.loads((tmp_path / "out" / case / "config.json").read_text())
        assert config["architecture"]["layers"] == int(case[7])
        assert bool(config["training"]["adversary"]) == case.endswith("adversarial")
        assert config["training"]["schedule"]["steps"] == script["TIMED"]
    script["main"](str(tmp_path / "target"), answers, tmp_path / "out", **how)
    assert capsys.readouterr().out == said
