"""`forerun train medusa2`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import forerun as library
from forerun.sampling import SamplingParams

FEW = ("--steps", 2, "--rows", 4, "--length", 64, "--heads", 2, "--rank", 4, "--dtype", "fp32")


@pytest.fixture(scope="session")
def answers(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine = library.load(str(family / "target"), dtype="fp32", kernels="torch")
    luck = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 600, (6,), generator=luck).tolist() for _ in range(60)]
    outputs = engine.generate(prompts, SamplingParams(max_new_tokens=48, ignore_eos=True))
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = [{"prompt": p, "answer": o.token_ids} for p, o in zip(prompts, outputs, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_target_and_heads_are_trained_and_the_new_target_is_announced(forerun, said, family, answers, tmp_path):
    out = tmp_path / "joint"
    base = ("train", "medusa2", "--target", family / "target", "--data", answers)
    code, output, err = forerun(*base, "--out", out, *FEW, "--seed", 3)
    assert code == 0, err
    assert f"This changes the target, through adapters of 0.0 M parameters: {out / 'model'} will be a new one." in err
    assert f"{out / 'model'}: a new target, 0." in output and f"away from {family / 'target'}" in output
    assert "its loss on the held-out answers is " in output
    assert f"{out / 'heads'}: " in output and "tokens per step projected" in output
    assert sorted(path.name for path in out.iterdir()) == ["heads", "model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joint", "joint.run"]
    names = {path.name for path in (family / "target").iterdir()}
    assert {path.name for path in (out / "model").iterdir()} == names
    assert transformers.AutoTokenizer.from_pretrained(out / "model")("x")["input_ids"][0] == 1
    asked = (out / "model", "def ", "--max-new-tokens", 12, "--dtype", "fp32", "--kernels", "torch")
    plain, drafted = said("generate", *asked), said("generate", *asked, "--drafter", f"medusa:{out / 'heads'}")
    assert drafted["text"] == plain["text"]

    again = tmp_path / "again"
    more = (
        "--init-from",
        out / "heads",
        "--keep",
        "text",
        "--ramp",
        "sine:0.5",
        "--head-weight",
        0.1,
        "--head-rate",
        2,
    )
    code, _, err = forerun(*base, "--out", again, *FEW, *more, "--rate", 1e-3, "--alpha", 8, "--head-decay", 0.7)
    assert code == 0, err
    about = json.loads((again / "heads" / "config.json").read_text())["training"]
    assert about["joint"] == {"keep": "text", "head_weight": 0.1, "ramp": "sine:0.5", "rank": 4, "alpha": 8.0}
    assert about["schedule"]["scales"] == [["heads.", 2.0]] and about["schedule"]["adam_rate"] == 1e-3
    assert about["weights"]["decay"] == 0.7


def test_what_cannot_be_trained(refused, family, answers, tmp_path):
    out = tmp_path / "out"
    base = ("train", "medusa2", "--target", family / "target", "--data", answers, "--out", out, *FEW)
    assert "original or text" in refused(*base, "--keep", "both")
    assert "sine:R" in refused(*base, "--ramp", "steep")
    for option in ("--alpha", "--head-decay", "--head-weight", "--head-rate", "--rate"):
        assert "finite number" in refused(*base, option, "inf")
        for value in ("nan", -1):
            refused(*base, option, value)
    assert "--length from 8 to 1024" in refused(*base, "--length", 0)
    assert "cannot be read" in refused(*base, "--data", tmp_path / "no.jsonl")
    assert "config.json" in refused(*base, "--init-from", tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot be a folder" in refused(*base, "--out", tmp_path / "file")
    assert "model's folder" in refused(*base, "--out", family / "target")
    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert "not a Llama, Mistral or Qwen" in refused(*base, "--target", tmp_path / "gpt2")
    assert not out.exists() and not (tmp_path / "out.run").exists()
