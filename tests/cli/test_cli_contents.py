"""`forerun inspect` on what is no model: heads, stores, trees, descriptions, answers, texts and GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nn.feeding import small_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def kind(forerun):
    """What a thing is, and the facts about it; also that it can be said in words."""

    def call(thing: Path, *options: str) -> tuple[str, dict]:
        code, out, err = forerun("inspect", thing, "--json", *options)
        assert code == 0, err
        ((name, facts),) = json.loads(out).items()
        code, words, _ = forerun("inspect", thing)
        assert code == 0 and words.startswith(name)
        return name, facts

    return call


def test_heads_of_ours(kind):
    name, facts = kind(ROOT / "models" / "hydra++")
    assert name == "heads" and (facts["drafter"], facts["layout"], facts["preset"]) == ("hydra", "ours", "hydra++")
    assert facts["for_the_target"] == "target" and facts["heads"] == 4 and facts["parameters"] > 10**6
    assert facts["use"] == f"--drafter hydra:{ROOT / 'models' / 'hydra++'}" and facts["tree_nodes"] == 5


def test_heads_of_others(kind, forerun, tmp_path):
    out = tmp_path / "theirs"
    medusa = ROOT / "models" / "medusa"
    assert forerun("convert", medusa, "--to", "vllm", "--out", out, "--target", ROOT / "models" / "target")[0] == 0
    name, facts = kind(out)
    assert name == "heads" and facts["layout"] == "vllm" and facts["use"] == f"forerun convert {out} --to ours"
    assert facts["tree"].startswith("not calibrated")


def test_a_model_is_still_a_model(said, family):
    found = said("inspect", family / "target")
    assert set(found) == {"machine", "model"} and found["model"]["chat_template"] is False


def test_a_store(kind, forerun, family, tmp_path):
    (tmp_path / "a.txt").write_text("def f(x):\n    return x\n" * 9)
    out = tmp_path / "code.store"
    assert forerun("index", tmp_path / "a.txt", "--tokenizer", family / "target", "--out", out)[0] == 0
    name, facts = kind(out)
    assert (name, facts["texts"], facts["vocabulary"]) == ("store", 1, 600) and facts["tokens"] > 20
    assert facts["bytes"] == out.stat().st_size and facts["use"].endswith(str(out))


def test_what_a_model_said(kind, forerun, family, tmp_path):
    spec = json.dumps({"drafter": "hierarchy", "stores": ["context", f"model:{tmp_path / 'said'}"]})
    assert forerun("generate", family / "target", "x", "-n", 20, "--ignore-eos", "--drafter", spec)[0] == 0
    name, facts = kind(tmp_path / "said")
    assert (name, facts["texts"], facts["vocabulary"]) == ("store", 1, 600) and "model:FILE" in facts["what"]


def test_trees_and_descriptions(kind, tmp_path):
    name, facts = kind(ROOT / "models" / "hydra++" / "tree.json")
    assert (name, facts["tree_nodes"], facts["tree_depth"]) == ("tree", 5, 3) and facts["projected_speedup"] > 1
    (tmp_path / "mine.yaml").write_text("drafter: fallback\nsources: [{drafter: lookup}, {drafter: none}]\n")
    name, facts = kind(tmp_path / "mine.yaml")
    assert name == "drafter" and facts["names"] == ["fallback", "lookup", "none"]


def test_answers_and_texts(kind, forerun, family, tmp_path):
    (tmp_path / "p.txt").write_text("def f():\nimport x\n")
    options = ("--prompts", tmp_path / "p.txt", "-n", 6)
    assert forerun("distill", family / "target", "--out", tmp_path / "a.jsonl", *options)[0] == 0
    assert forerun("generate", family / "target", "--out", tmp_path / "t.jsonl", *options)[0] == 0
    name, facts = kind(tmp_path / "a.jsonl")
    assert (name, facts["answers"], facts["target"], facts["prompts"]) == ("answers", 2, "target", "p.txt")
    name, facts = kind(tmp_path / "t.jsonl")
    assert (name, facts["texts"], facts["model"], facts["max_new_tokens"]) == ("texts", 2, "target", "6")


def test_a_gguf(kind, refused, tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Mine")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(8)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.ones((3, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    name, facts = kind(path)
    assert (name, facts["name"], facts["architecture"]) == ("gguf", "Mine", "llama")
    assert (facts["layers"], facts["context"], facts["width"], facts["vocabulary"]) == (2, 128, 8, 3)
    assert facts["parameters"] == 24 and facts["formats"] == ["token_embd 1 F32"] and facts["chat_template"] is False
    assert "says nothing for llama.attention.head_count" in facts["does_not_run"]
    path.write_bytes(path.read_bytes()[:40])
    assert "damaged" in refused("inspect", path)


def test_a_gguf_that_runs(kind, tmp_path):
    pytest.importorskip("gguf")
    from sources.exported import export

    formats = {"attn_q": "F16", "token_embd": "BF16"}
    model = small_model("llama", tie_word_embeddings=True)
    path = export(model, tmp_path / "m.gguf", formats)
    _, facts = kind(path, "--dtype", "bf16")
    assert facts["formats"][:3] == ["token_embd 1 BF16", "attn_q 3 F16", "attn_k 3 F32"]
    assert facts["weight_bytes"] == 2 * model.num_parameters() == 2 * facts["parameters"]
    assert facts["cache_bytes_per_token"] == 2 * 3 * 4 * 8 * 2 and "does_not_run" not in facts
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    assert "holds the architecture mamba" in kind(path)[1]["does_not_run"]


def test_a_gguf_without_its_package(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "pip install 'forerun[gguf]'" in refused("inspect", tmp_path / "m.gguf")


@pytest.mark.parametrize("content", [b"", b"hello", b"{}\n", b"[1]\n", b"\xff\xfe"])
def test_strangers(refused, tmp_path, content):
    for name in ("thing", "thing.jsonl", "thing.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert "nothing that forerun knows" in refused("inspect", tmp_path / name)
    for name in ("thing.json", "thing.yaml"):
        (tmp_path / name).write_bytes(content)
        refused("inspect", tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("t.json", '{"paths": 3}', "t.json"),
        ("t.json", '{"paths": [[0], [0, "a"]]}', "is not a path"),
        ("a.jsonl", '{"forerun": ["distilled"]}\n', "nothing that forerun knows"),
        ("a.jsonl", '{"settings": 3, "prompt_index": 1, "token_ids": []}\n', "nothing that forerun knows"),
        ("config.json", '{"model_type": "llama"}', "give that"),
        ("folder/config.json", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_what_only_looks_like_something(refused, tmp_path, name, content, word):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert word in refused("inspect", path.parent if path.parent != tmp_path else path)
