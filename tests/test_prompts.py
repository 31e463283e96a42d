"""Prompts of every form say the same, and nothing is read as text that is not a string."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from fakes import TableNetwork, engine_of, plain
from forerun import RequestError
from forerun.engine.prompts import conversations, separate, tokens_of

WORDS = ["<pad>", "hi", "there", "you", "<user>", "<assistant>", "<system>", "input_ids", "attention_mask"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE, side: str = "left") -> Any:
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", padding_side=side, chat_template=template
    )


TALK = [{"role": "user", "content": "hi there"}]
TALK_IDS = [4, 1, 2, 5]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hi there", ["hi there"]),
        (["hi", "there"], ["hi", "there"]),
        (("hi", [1, 2]), ["hi", [1, 2]]),
        ([1, 2], [[1, 2]]),
        (range(1, 3), [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([np.int64(1), np.int32(2)], [[1, 2]]),
        (np.array([1, 2]), [[1, 2]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([1, 2]), [[1, 2]]),
        (torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), [[1, 2], [3, 4]]),
        ([torch.tensor([1, 2]), torch.tensor([[3]])], [[1, 2], [3]]),
        (list(torch.tensor([1, 2])), [[1, 2]]),
        (map(str, ["hi", "there"]), ["hi", "there"]),
        ({"input_ids": [1, 2]}, [[1, 2]]),
        ({"input_ids": [[0, 1], [2, 3]], "attention_mask": [[0, 1], [1, 1]]}, [[1], [2, 3]]),
        ({"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}, [[1, 2]]),
        ({"input_ids": torch.tensor([[0, 1]]), "attention_mask": torch.tensor([[False, True]])}, [[1]]),
        ({"input_ids": np.array([0, 1]), "attention_mask": np.array([0.0, 1.0])}, [[1]]),
        ([{"input_ids": [1]}, "hi"], [[1], "hi"]),
        (TALK, [TALK]),
        (TALK[0], [TALK]),
        ([TALK, TALK, "hi"], [TALK, TALK, "hi"]),
        ([], []),
        ([[]], [[]]),
        (np.empty((0, 3), int), []),
    ],
    ids=lambda value: re.sub(r" at 0x\w+", "", repr(value)),
)
def test_a_batch_of_any_form_comes_apart(given: Any, expected: Any) -> None:
    assert separate(given) == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "type NoneType"),
        (7, "type int"),
        (b"hi", "type bytes"),
        ({1, 2}, "type set"),
        ([1, "hi"], "type int"),
        (["hi", None], "type NoneType"),
        (["hi", b"hi"], "type bytes"),
        ([True, False], "type bool"),
        ([1.0, 2.0], "type float"),
        (torch.tensor([1.0]), "1.0 is no token id"),
        (np.array(["hi"]), "'hi' is no token id"),
        (torch.tensor(3), "in one row or several"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), "no token id"),
        ({}, "has no input_ids"),
        ({"prompt": "hi"}, "a mapping with prompt is no prompt"),
        ({"attention_mask": [1]}, "has no input_ids"),
        ({"input_ids": [1], "pixel_values": [0.5]}, "pixel_values cannot be read"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "differ in shape"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "has a hole"),
        ({"input_ids": [1, 2], "attention_mask": [1, 0.5]}, "0.5 is no part of a mask"),
        ({"input_ids": [1, 2], "attention_mask": None, "position_ids": [3, 4]}, "position_ids cannot be read"),
        ({"input_ids": "hi"}, "in one row or several"),
        ([[1, 2], [[3], [4]]], "one prompt holds 2"),
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_refused_in_one_sentence(given: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        separate(given)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("side", ["left", "right"])
def test_whatever_a_tokenizer_returns_is_its_token_ids(side: str) -> None:
    one = tokenizer(side=side)
    both = one(["hi there", "you"], padding=True, return_tensors="pt")
    assert both["input_ids"].shape == (2, 2)
    assert [tokens_of(p, one) for p in separate(both)] == [[1, 2], [3]]
    for kind in (None, "pt", "np"):
        assert tokens_of(one("hi there", return_tensors=kind), one) == [1, 2]
        templated = one.apply_chat_template(TALK, add_generation_prompt=True, return_tensors=kind)
        assert isinstance(templated, transformers.BatchEncoding)  # else there is nothing to mistake
        assert tokens_of(templated, one) == TALK_IDS


def test_a_conversation_goes_through_the_template() -> None:
    one = tokenizer()
    assert tokens_of(TALK, one) == TALK_IDS
    begun = [*TALK, {"role": "assistant", "content": "you"}]
    assert tokens_of(begun, one) == [4, 1, 2, 5, 3]  # is gone on with
    assert tokens_of(conversations("hi", system="you")[0], one) == [6, 3, 4, 1, 5]
    assert conversations([TALK, "hi"]) == [TALK, [{"role": "user", "content": "hi"}]]


@pytest.mark.parametrize(
    ("template", "talk", "says"),
    [
        (None, TALK, "has no chat template"),
        (TEMPLATE, [{"role": "tool", "content": "hi"}], "no tools here"),
        (TEMPLATE, [{"role": "user", "text": "hi"}, *TALK], "a message of 'user' has no content"),
        (TEMPLATE, [*TALK, {"role": "assistant"}], "a message of 'assistant' has no content"),
        (TEMPLATE.replace("content", "content.text"), [*TALK, TALK[0] | {"role": "tool"}], "chat template refuses"),
    ],
)
def test_what_the_template_refuses_is_refused_in_one_sentence(template: Any, talk: Any, says: str) -> None:
    with pytest.raises(RequestError) as caught:
        tokens_of(talk, tokenizer(template))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_without_tokenizer_has_no_template() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        tokens_of(TALK, None)


@pytest.mark.parametrize(("messages", "system"), [([1, 2], None), ([{"role": "system", "content": "hi"}], "you")])
def test_chat_takes_conversations(messages: Any, system: str | None) -> None:
    with pytest.raises(RequestError, match=r"chat takes messages|begin with a system message"):
        conversations(messages, system)


def test_an_engine_reads_prompts_of_every_form() -> None:
    target, one = TableNetwork(len(WORDS)), tokenizer()
    engine = engine_of(target, tokenizer=one)
    forms: list[Any] = [TALK, one.apply_chat_template(TALK, add_generation_prompt=True), torch.tensor([TALK_IDS])]
    for form in forms:
        (output,) = engine.generate(form, max_new_tokens=5)
        assert output.token_ids == plain(target, TALK_IDS, 5)
    both = engine.generate(one(["hi there", "you"], padding=True, return_tensors="pt"), {"max_tokens": 4})
    assert [output.token_ids for output in both] == [plain(target, ids, 4) for ids in ([1, 2], [3])]
    (answer,) = engine.chat(TALK, max_new_tokens=5)
    assert answer.token_ids == plain(target, TALK_IDS, 5) and answer.text is not None
    (answer,) = engine.chat("hi", system="you", max_new_tokens=5)
    assert answer.token_ids == plain(target, [6, 3, 4, 1, 5], 5)
    with pytest.raises(RequestError, match="did you mean"):
        engine.generate("hi", max_new_token=5)
