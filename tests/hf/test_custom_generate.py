"""`model.generate(..., custom_generate=forerun.hf.generate)` returns what `model.generate` returns."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from scipy import stats

import forerun
from forerun.hf.custom_generate import ENGINES
from nn.feeding import small_model

IDS = torch.tensor([[0, 0, 3, 4, 5, 3, 4], [9, 8, 7, 6, 9, 8, 7], [0, 0, 0, 0, 0, 0, 11]])
MASK = (IDS != 0).long()
BATCH = {"input_ids": IDS, "attention_mask": MASK}
ONE = {"input_ids": IDS[1:2], "attention_mask": MASK[1:2]}


def named(value: object) -> str:
    """The same in every process that collects tests."""
    return re.sub(r" at 0x\w+", "", str(value))


def model_of(kind: str = "llama", **choices: Any) -> Any:
    """With weights so large that texts do not repeat at once."""
    model = small_model(kind, max_position_embeddings=256, **choices)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3)
    return model


def both(model: Any, inputs: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    ours = {name: settings.pop(name) for name in ("drafter", "kernels") if name in settings}
    theirs = model.generate(**inputs, **settings)
    return model.generate(**inputs, custom_generate=forerun.hf.generate, **settings, **ours), theirs


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt_neox"])
def test_greedy_text_is_the_models_own(kind: str, kernels: str) -> None:
    model = model_of(kind)
    for inputs in (ONE, BATCH):
        ours, theirs = both(model, inputs, max_new_tokens=80, do_sample=False, eos_token_id=None, kernels=kernels)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        assert len(ours[0].unique()) > 6  # else it shows little


@pytest.mark.parametrize("padding", [0, None])
def test_rows_that_end_early_are_padded(padding: int | None) -> None:
    model = model_of()
    model.generation_config.pad_token_id = padding
    plain = model.generate(**BATCH, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)
    ends = [int(plain[0, IDS.shape[1] + 4]), int(plain[1, IDS.shape[1] + 30])]
    ours, theirs = both(model, BATCH, max_new_tokens=60, do_sample=False, eos_token_id=ends)
    assert torch.equal(ours, theirs)
    assert (ours[0, -1] == (ends[0] if padding is None else 0)).item()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 20},
        {"max_new_tokens": 1},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [3, 4, 5, 20, 21]},
        {"bad_words_ids": [[3], [9, 8]]},
        {"sequence_bias": {(5,): 3.0, (20,): 2.0, (9, 8): 4.0}, "repetition_penalty": 1.5},
        {"logits_processor": [transformers.RepetitionPenaltyLogitsProcessor(factor) for factor in (1.5, 1.2)]},
        {"logits_processor": [transformers.TemperatureLogitsWarper(0.5), transformers.TopKLogitsWarper(5)]},
        {"renormalize_logits": True, "return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=named,
)
def test_settings_that_are_honoured(settings: dict[str, Any]) -> None:
    model = model_of()
    limits = {} if "max_length" in settings or "max_new_tokens" in settings else {"max_new_tokens": 40}
    ours, theirs = both(model, ONE, do_sample=False, eos_token_id=None, **limits, **settings)
    if settings.get("return_dict_in_generate"):
        assert isinstance(ours, transformers.generation.GenerateDecoderOnlyOutput)
        ours, theirs = ours.sequences, theirs.sequences
    assert torch.equal(ours, theirs)


def test_sampled_text_follows_the_law_and_torchs_seed() -> None:
    model = small_model("llama")
    wish = {"do_sample": True, "temperature": 0.5, "top_k": 8, "top_p": 0.9, "max_new_tokens": 1, "eos_token_id": None}
    wish |= {"custom_generate": forerun.hf.generate, "num_return_sequences": 2000}
    transformers.set_seed(5)
    first = model.generate(**ONE, **wish)
    assert first.shape == (2000, IDS.shape[1] + 1)
    transformers.set_seed(5)
    assert torch.equal(model.generate(**ONE, **wish), first)
    assert not torch.equal(model.generate(**ONE, **wish), first)
    scores = model(**ONE).logits[:, -1].float() / 0.5
    for warper in (transformers.TopKLogitsWarper(8), transformers.TopPLogitsWarper(0.9)):
        scores = warper(None, scores)
    law = {token: share for token, share in enumerate(scores.softmax(-1)[0].tolist()) if share}
    counts = Counter(first[:, -1].tolist())
    assert set(counts) <= set(law)
    assert stats.chisquare([counts[token] for token in law], [2000 * share for share in law.values()]).pvalue > 1e-3


SAMPLED = {"do_sample": True, "temperature": 0.5}


class Stop(transformers.StoppingCriteria):  # type: ignore[misc]
    pass


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_beams": 3}, "does not do beam search"),
        ({"logits_processor": [lambda ids, scores: scores]}, "the logits processor function may depend"),
        ({"min_new_tokens": 3}, "the logits processor Min"),
        ({"guidance_scale": 2.0}, "the logits processor UnbatchedClassifierFreeGuidanceLogitsProcessor"),
        ({"logits_processor": [transformers.RepetitionPenaltyLogitsProcessor(1.5, 7)]}, "the logits processor Repet"),
        ({"logits_processor": [transformers.TopPLogitsWarper(0.5, min_tokens_to_keep=3)]}, "the logits processor TopP"),
        ({"logits_processor": [transformers.TopPLogitsWarper(0.5)], **SAMPLED}, "the logits processor Temperature"),
        ({"stopping_criteria": [Stop()]}, "the stopping criterion Stop"),
        ({"max_time": 1.0}, "the stopping criterion MaxTimeCriteria"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores is not kept"),
        ({"inputs_embeds": torch.zeros(1, 7, 32)}, "inputs_embeds cannot be handed"),
        ({"position_ids": torch.arange(7)[None] + 3}, "position_ids are not those"),
        ({"max_new_tokens": 400}, "the context holds 256"),
        ({"drafter": "lookout"}, "did you mean lookup"),
    ],
    ids=named,
)
def test_what_cannot_be_honoured_is_refused_in_one_sentence(settings: dict[str, Any], says: str) -> None:
    settings = {"max_new_tokens": 8, "eos_token_id": 2} | settings
    with pytest.raises(forerun.ForerunError) as caught:
        model_of().generate(**ONE, custom_generate=forerun.hf.generate, **settings)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "says"), [([1, 1, 1, 1, 1, 0, 0], "ends with padding"), ([1, 1, 0, 1, 1, 1, 1], "has a hole")]
)
def test_padding_elsewhere_is_refused(mask: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model_of().generate(
            IDS[1:2], attention_mask=torch.tensor([mask]), max_new_tokens=4, custom_generate=forerun.hf.generate
        )


def test_a_cache_that_was_begun_is_refused() -> None:
    model = model_of()
    begun = model.generate(**ONE, max_new_tokens=2, return_dict_in_generate=True, eos_token_id=None)
    inputs = {"input_ids": begun.sequences, "past_key_values": begun.past_key_values}
    with pytest.raises(ValueError, match="holds a text already"):
        model.generate(**inputs, max_new_tokens=2, custom_generate=forerun.hf.generate)


# ---- the engine of a model


def engines(model: Any) -> list[Any]:
    return [engine for _, engine in model.__dict__[ENGINES].by_kernels.values()]


def test_an_engine_is_made_once_and_saves_forwards() -> None:
    model = model_of("gpt_neox")  # which soon repeats itself, so that lookup drafts well
    ask = partial(model.generate, **ONE, max_new_tokens=80, custom_generate=forerun.hf.generate, eos_token_id=None)
    ask()
    (engine,) = engines(model)
    begun = engine.target.passes
    ask()
    assert engines(model) == [engine]
    assert 0 < engine.target.passes - begun < 50  # of 80


@pytest.mark.parametrize("is_busy", [False, True])
def test_another_drafter_takes_the_network_over_from_one_that_rests(is_busy: bool) -> None:
    model = model_of()
    ask = partial(model.generate, **ONE, max_new_tokens=4, custom_generate=forerun.hf.generate)
    expected = ask()
    (engine,) = engines(model)
    if is_busy:
        engine.add([1, 2, 3])
    assert torch.equal(ask(drafter="none"), expected)
    (other,) = engines(model)
    assert other is not engine and other.drafter.name == "none"
    assert (other.target.network is engine.target.network) != is_busy
    ask(kernels="torch")
    assert len(engines(model)) == 2


def test_a_model_that_was_trained_in_between_says_the_new_text() -> None:
    model = model_of()
    before, _ = both(model, ONE, max_new_tokens=20, do_sample=False, eos_token_id=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(**ONE, labels=IDS[1:2]).loss.backward()
    optimizer.step()
    ours, theirs = both(model, ONE, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(ours, theirs) and not torch.equal(ours, before)
    model.load_state_dict(model_of("llama", attention_bias=False).state_dict())
    ours, theirs = both(model, ONE, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(ours, theirs) and torch.equal(ours, before)


@pytest.mark.parametrize("change", ["data", "hook", "forward"])
def test_changes_that_no_version_tells_are_seen(change: str) -> None:
    model = model_of()
    before, _ = both(model, ONE, max_new_tokens=20, do_sample=False, eos_token_id=None)
    head = model.lm_head
    if change == "data":
        head.weight.data.copy_(head.weight.flip(0))
    elif change == "hook":
        head.register_forward_hook(lambda module, given, said: -said)
    else:
        own = head.forward
        head.forward = lambda *given: -own(*given)
    ours, theirs = both(model, ONE, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert torch.equal(ours, theirs) and not torch.equal(ours, before)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_model_that_is_being_trained_is_refused(kernels: str) -> None:
    model = model_of()
    ask = {**ONE, "max_new_tokens": 4, "custom_generate": forerun.hf.generate, "kernels": kernels}
    model.generate(**ask)
    model.train()
    with pytest.raises(forerun.ForerunError, match=r"is in training mode.* call model.eval\(\)"):
        model.generate(**ask)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_a_model_goes_when_nobody_holds_it_and_can_be_copied(kernels: str) -> None:
    model = model_of()
    ask = {**ONE, "max_new_tokens": 4, "custom_generate": forerun.hf.generate, "kernels": kernels}
    model.generate(**ask)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.__dict__[ENGINES].by_kernels == {}
        assert torch.equal(twin.generate(**ask), model.generate(**ask))
    gone = weakref.ref(model)
    del model, twin
    gc.collect()
    assert gone() is None
