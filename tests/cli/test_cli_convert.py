"""`forerun convert`: heads of the outside world, and what the command says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from forerun.layouts import exchange
from forerun.train import exchange_check

WIDTH, VOCABULARY, HEADS = 32, 600, 4


@pytest.fixture(scope="session")
def trained(family, tmp_path_factory) -> Path:
    """Medusa heads that sometimes agree with the target: its own vocabulary matrix, and small
    blocks. In Medusa's layout."""
    folder = tmp_path_factory.mktemp("heads") / "medusa"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    matrix = load_file(family / "target" / "model.safetensors")["lm_head.weight"].bfloat16()
    tensors = {}
    for head in range(HEADS):
        tensors[f"{head}.0.linear.weight"] = (torch.randn(WIDTH, WIDTH, generator=generator) * 0.05).bfloat16()
        tensors[f"{head}.0.linear.bias"] = torch.zeros(WIDTH).bfloat16()
        tensors[f"{head}.1.weight"] = matrix.clone()
    torch.save(tensors, folder / "medusa_lm_head.pt")
    config = {"base_model_name_or_path": "lmsys/tiny", "medusa_num_heads": 2, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_to_every_engine_and_back_with_equal_acceptance(forerun, family, trained, tmp_path):
    source, figures = trained, []
    for layout in ("ours", "vllm", "fasterdecoding", "ours"):
        out = tmp_path / f"{len(figures)}-{layout}"
        code, said, err = forerun("convert", source, "--to", layout, "--out", out, "--target", family / "target")
        assert code == 0, err
        first, written, acceptance = said.splitlines()
        assert f"{source}: medusa" in first and f"{HEADS} heads of 1 layer" in first and "bfloat16" in first
        assert written == f"{out}: {layout}; all 3 tensors are the same bit by bit when read back"
        assert ("says 2 heads" in err) == (source == trained)
        before, after = (float(part.split()[-2]) for part in acceptance.rsplit(":", 1)[1].split(","))
        figures.append((before, after))
        source = out
    assert len({figure for pair in figures for figure in pair}) == 1 and figures[0][0] > 1
    assert (tmp_path / "0-ours" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_the_engine_takes_what_was_converted(forerun, said, family, trained, tmp_path):
    code, _, err = forerun("convert", trained, "--to", "ours", "--out", tmp_path / "heads")
    assert code == 0, err
    wish = ("generate", family / "target", "def f(", "--max-new-tokens", 24, "--dtype", "fp32")
    drafted = said(*wish, "--drafter", f"medusa:{tmp_path / 'heads'}")
    assert drafted["token_ids"] == said(*wish)["token_ids"] and drafted["stats"]["drafter"] == "medusa"


def test_without_a_target_bits_are_compared_and_nothing_else(forerun, trained, tmp_path):
    code, out, _ = forerun("convert", trained, "--to", "vllm", "--out", tmp_path / "v")
    assert code == 0 and "bit by bit" in out and "acceptance was not compared: that needs --target" in out
    assert "tokens per step" not in out


def test_prompts_of_your_own(forerun, family, trained, tmp_path, monkeypatch):
    asked = []
    original = exchange_check.tokens_per_step

    def noted(heads, network, samples):
        asked.append(samples)
        return original(heads, network, samples)

    monkeypatch.setattr(exchange_check, "tokens_per_step", noted)
    rows = [json.dumps({"prompt": f"def f{number}("}) for number in range(6)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    options = ("--target", family / "target", "--prompts", tmp_path / "mine.jsonl")
    code, _, err = forerun("convert", trained, "--to", "ours", "--out", tmp_path / "o", *options)
    assert code == 0, err
    assert len(asked) == 2 and asked[0] == asked[1]
    assert len(asked[0]) == 4 and max(len(sample.prompt) for sample in asked[0]) < 12


def test_heads_that_never_agree_are_named(forerun, family, trained, tmp_path):
    tensors = torch.load(trained / "medusa_lm_head.pt")
    never = {name: -t if name.endswith(".1.weight") else t for name, t in tensors.items()}
    (tmp_path / "never").mkdir()
    (tmp_path / "never" / "config.json").write_text((trained / "config.json").read_text())
    save_file(never, tmp_path / "never" / "medusa_lm_head.safetensors")
    code, _, err = forerun(
        "convert", tmp_path / "never", "--to", "ours", "--out", tmp_path / "o", "--target", family / "target"
    )
    assert code == 0 and "hardly ever agree" in err


def test_figures_that_differ_fail(forerun, family, trained, tmp_path, monkeypatch):
    figures = iter((1.5, 1.4))
    monkeypatch.setattr(exchange_check, "tokens_per_step", lambda *_: next(figures))
    code, out, err = forerun("convert", trained, "--to", "ours", "--out", tmp_path / "o", "--target", family / "target")
    assert code == 1 and "1.500 before, 1.400 after" in out and "do not use" in err


def test_a_target_without_a_tokenizer(forerun, family, trained, tmp_path):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((family / "target" / name).read_bytes())
    code, out, _ = forerun("convert", trained, "--to", "ours", "--out", tmp_path / "o", "--target", tmp_path / "bare")
    assert code == 0 and "has no tokenizer" in out


def test_what_cannot_be_converted(refused, family, trained, tmp_path):
    to = ("--out", tmp_path / "o")
    assert "no layout 'onnx'" in refused("convert", trained, "--to", "onnx", *to)
    assert "holds no heads that we know" in refused("convert", family / "target", "--to", "ours", *to)
    assert "no folder" in refused("convert", trained, "--to", "ours", "--out", tmp_path / "no" / "o")
    assert "not empty" in refused("convert", trained, "--to", "ours", "--out", trained)
    assert "--prompts needs --target" in refused("convert", trained, "--to", "ours", *to, "--prompts", "x.txt")
    assert "do not see drafted tokens" in refused("convert", trained, "--to", "hydra", *to)
    other = refused("convert", trained, "--to", "ours", *to, "--target", family / "other")
    assert "600 tokens" in other and "608 tokens" in other
    exchange.write(exchange.read(trained), "ours", tmp_path / "mine")
    assert "in our layout already" in refused("convert", tmp_path / "mine", "--to", "ours", *to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_difference_is_listed_on_one_line(refused, trained, tmp_path):
    tensors = torch.load(trained / "medusa_lm_head.pt")
    del tensors["1.0.linear.bias"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text((trained / "config.json").read_text())
    torch.save(tensors, tmp_path / "a" / "medusa_lm_head.pt")
    said = refused("convert", tmp_path / "a", "--to", "ours", "--out", tmp_path / "o")
    assert "missing 1.0.linear.bias [32]" in said
