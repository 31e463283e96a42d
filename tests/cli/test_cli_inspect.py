"""`forerun inspect`: the machine, and a model's needs on it."""

from __future__ import annotations

import pytest
import torch
import transformers

from forerun.native import library


def test_the_machine(said):
    machine = said("inspect")["machine"]
    assert machine["torch"] == torch.__version__ and machine["transformers"] == transformers.__version__
    assert {"none", "lookup", "small", "verified"} <= set(machine["drafters"])
    assert machine["dtype"] in ("bfloat16", "float32") and "bf16" in machine["dtype_reason"]


def test_a_model(family, said):
    found = said("inspect", family / "target", "--dtype", "fp32", "--kernels", "torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(family / "target")
    model = found["model"]
    assert model["parameters"] == theirs.num_parameters() and model["weight_bytes"] == 4 * model["parameters"]
    assert model["cache_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert (model["context"], model["vocabulary"], model["eos"]) == (1024, 600, [2])
    assert model["architecture"] == "LlamaForCausalLM" and model["runs_on"] == "forerun's own transformer, torch"
    assert model["tokenizer"] is True and found["machine"]["dtype_reason"] == "asked for"


def test_a_model_on_native_kernels(family, said):
    if reason := library.why_not(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    found = said("inspect", family / "target", "--dtype", "fp32", "--kernels", "native")
    plain = said("inspect", family / "target", "--dtype", "fp32", "--kernels", "torch")["model"]
    assert found["machine"]["native_kernels"] in library.ISAS
    assert found["model"]["runs_on"] == "forerun's own transformer, native kernels (float32 weights)"
    assert found["model"]["parameters"] == plain["parameters"]
    rounded = said("inspect", family / "target", "--weights", "int8")["model"]
    assert rounded["parameters"] == plain["parameters"] and rounded["weight_bytes"] < found["model"]["weight_bytes"]


def test_without_native_kernels_the_reason_is_told(family, said, forerun, monkeypatch):
    monkeypatch.setattr(library, "_opened", lambda: (None, "they were not built"))
    machine = said("inspect")["machine"]
    assert machine["native_kernels"] == "none" and machine["native_kernels_reason"] == "they were not built"
    assert said("inspect", family / "target")["model"]["runs_on"] == "forerun's own transformer, torch"
    for option in (("--kernels", "native"), ("--weights", "int8")):
        code, _, err = forerun("inspect", family / "target", *option)
        assert code == 2 and "they were not built" in err


@pytest.mark.parametrize("option", ["--kernels", "--weights"])
@pytest.mark.parametrize("command", ["inspect", "generate", "check", "demo"])
def test_unknown_kernels_or_weights_are_refused(family, forerun, command, option):
    model = [family / "target"]
    text = {"generate": ["text"], "check": ["--drafter", "lookup"]}.get(command, [])
    for given in ([], model) if command == "inspect" else (model,):
        code, _, err = forerun(command, *given, *text, option, "fast")
        assert code == 2 and "'fast'" in err and "choose" in err and "Traceback" not in err


def test_a_foreign_model_without_a_tokenizer(tmp_path, said):
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = said("inspect", tmp_path)["model"]
    assert model["runs_on"] == "transformers' model" and model["tokenizer"] is False and model["context"] == 64


def test_in_words(family, forerun):
    code, out, _ = forerun("inspect", family / "target")
    assert code == 0 and "cache bytes per token" in out and "drafters" in out
