"""Models in memory: what they say themselves, with their weights shared or, for the native kernels, copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import forerun
from forerun.errors import CheckpointError, ForerunError
from forerun.native.library import is_there
from forerun.nn.backends.native.transformer import PackedTransformer
from forerun.nn.foreign.network import Foreign
from nn.feeding import saved, small_model
from test_prompts import tokenizer

PROMPT = [3, 4, 5, 3, 4]
native = pytest.mark.skipif(not is_there(), reason="there are no native kernels here")


def greedy(model: Any, count: int = 30) -> list[int]:
    ids = torch.tensor([PROMPT])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(PROMPT) :].tolist()


def said(engine: forerun.Engine, count: int = 30) -> list[int]:
    return engine.generate(PROMPT, max_new_tokens=count)[0].token_ids


@pytest.mark.parametrize("kernels", ["auto", "torch", pytest.param("native", marks=native)])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_model_of_our_families_says_what_it_says_itself(kind: str, kernels: str) -> None:
    model = small_model(kind, head_dim=8)
    engine = forerun.load(model, drafter="lookup", kernels=kernels)
    assert isinstance(engine.target.network, PackedTransformer if kernels == "native" else Foreign | PackedTransformer)
    assert said(engine) == greedy(model)


@native
@pytest.mark.parametrize("tied", [True, False])
def test_native_kernels_copy_the_weights_tied_or_not(tied: bool) -> None:
    model = small_model("llama", tie_word_embeddings=tied)
    engine = forerun.load(model, kernels="native")
    before = said(engine)
    assert before == greedy(model) and engine.target.network.config.tied is tied
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.randn_like(model.get_input_embeddings().weight))
    assert greedy(model) != before == said(engine)


def test_torch_shares_the_weights() -> None:
    model = small_model("llama")
    engine = forerun.load(model, kernels="torch")
    assert engine.target.network.input_embedding is model.get_input_embeddings().weight
    before = said(engine)
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))
    assert said(engine) == greedy(model) != before


def test_a_model_of_another_family_is_shared() -> None:
    model = small_model("gpt_neox")
    engine = forerun.load(model, drafter="lookup")
    assert isinstance(engine.target.network, Foreign) and said(engine) == greedy(model)
    with pytest.raises(ForerunError, match="they know the Llama family"):
        forerun.load(model, kernels="native")


@pytest.mark.parametrize("change", ["hook", "layer", "method"])
def test_a_model_that_was_changed_runs_as_it_is(change: str) -> None:
    """Its weights are those of its family, but it does not say what they alone would."""
    model = small_model("llama")
    mlp = model.model.layers[1].mlp
    if change == "hook":
        mlp.register_forward_hook(lambda module, given, out: out * 3)
    elif change == "layer":
        mlp.act_fn = torch.nn.ReLU()
    else:
        forward = mlp.forward
        mlp.forward = lambda x: forward(x) * 3
    engine = forerun.load(model)
    assert isinstance(engine.target.network, Foreign)
    assert said(engine) == greedy(model)
    if is_there():
        with pytest.raises(ForerunError, match="does not say what its weights alone would"):
            forerun.load(model, kernels="native")


@native
@pytest.mark.parametrize("change", ["nothing", "listener", "hook", "layer", "method"])
def test_rounding_hides_no_change(change: str) -> None:
    """A change that is smaller than what bf16 may be off by is still no copy."""
    model = small_model("llama").to(torch.bfloat16)
    mlp = model.model.layers[1].mlp
    if change == "listener":
        model(torch.tensor([PROMPT]), output_hidden_states=True)  # transformers hangs hooks on its layers
        assert any(module._forward_hooks for module in model.modules())
    elif change == "hook":
        mlp.register_forward_hook(lambda module, given, out: out * 1.01)
    elif change == "layer":
        mlp.act_fn = torch.nn.GELU()
    elif change == "method":
        forward = mlp.forward
        mlp.forward = lambda x: forward(x) * 1.01
    is_copied = isinstance(forerun.load(model, kernels="auto").target.network, PackedTransformer)
    assert is_copied == (change in ("nothing", "listener"))


@native
def test_another_number_format_is_a_copy_or_refused() -> None:
    model = small_model("llama")
    assert forerun.load(model, dtype="bf16", kernels="native").target.network.dtype == torch.bfloat16
    with pytest.raises(ForerunError, match="convert it to bfloat16 first"):
        forerun.load(model, dtype="bf16", kernels="torch")
    half = forerun.load(small_model("llama").to(torch.bfloat16), kernels="torch")
    assert half.target.network.dtype == torch.bfloat16


def test_a_model_in_training_mode_or_elsewhere_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"call model\.eval"):
        forerun.load(small_model("llama").train())
    with pytest.raises(ForerunError, match="move it first"):
        forerun.load(small_model("llama").to("meta"), device="cpu")


@pytest.mark.parametrize("given", [None, 7, b"models/target", torch.nn.Linear(2, 2), ["models/target"]], ids=type)
def test_what_is_no_model_is_refused_in_one_sentence(given: Any) -> None:
    with pytest.raises(CheckpointError, match=f"cannot be of type {type(given).__name__}: give a folder"):
        forerun.load(given)


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_model_of_no_language_is_refused(kind: str) -> None:
    config = small_model("llama").config
    with pytest.raises(CheckpointError, match=f"{kind} .* load it with AutoModelForCausalLM"):
        forerun.load(getattr(transformers, kind)(config).eval())


def test_a_tokenizer_goes_with_it() -> None:
    model = small_model("llama")
    engine = forerun.load(model, tokenizer=tokenizer())
    (answer,) = engine.chat("hi", max_new_tokens=8, ignore_eos=True)
    assert answer.text is not None and max(answer.token_ids) < 9 and engine.eos == {2}
    with pytest.raises(CheckpointError, match=r"the tokenizer given has no tokenizer\.json"):
        forerun.load(model, tokenizer=object())
    assert forerun.load(model).tokenizer is None


def test_a_folder_may_be_any_path_and_have_another_tokenizer(tmp_path: Path) -> None:
    class Place:
        def __fspath__(self) -> str:
            return str(folder)

    folder = saved(small_model("llama"), tmp_path / "model")
    one = tokenizer()
    assert forerun.load(Place(), tokenizer=one).tokenizer is one


def test_a_drafter_from_a_folder_beside_a_model_in_memory(tmp_path: Path) -> None:
    folder = saved(small_model("llama"), tmp_path / "small")
    model = small_model("qwen2")
    assert said(forerun.load(model, drafter=f"small:{folder}")) == greedy(model)


def test_a_shared_model_that_is_trained_later_says_so() -> None:
    model = small_model("gpt_neox")
    engine = forerun.load(model)
    engine.generate([3, 4], max_new_tokens=2)
    model.train()
    with pytest.raises(CheckpointError, match="is in training mode"):
        engine.generate([3, 4], max_new_tokens=2)
    model.eval()
    assert len(engine.generate([3, 4], max_new_tokens=2)[0].token_ids) == 2
