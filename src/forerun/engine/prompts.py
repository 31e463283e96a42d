"""Prompts as callers have them, read in one place.

    "text"                                        through the tokenizer
    [1, 2, 3], an array or tensor of integers     token ids, as they are
    {"input_ids": ..., "attention_mask": ...}     what a tokenizer returns; padding on either side is dropped
    [{"role": "user", "content": "text"}, ...]    a conversation, through the model's chat template

A batch is a list of any of these, or anything of two dimensions. What is none of them is refused:
nothing is read as text that is not a string.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch

from forerun.errors import RequestError
from forerun.sources.folder import brief
from forerun.sources.tokenizer import HuggingFaceTokenizer

Message: TypeAlias = Mapping[str, Any]
"""Who speaks ("role") and what ("content"), as chat templates want it."""
Prompt: TypeAlias = str | Sequence[int] | Sequence[Message] | Mapping[str, Any] | torch.Tensor | np.ndarray
Prompts: TypeAlias = Prompt | Sequence[Prompt]

HALF = re.compile("[\ud800-\udfff]")
"""How Python keeps what no UTF-8 text can hold."""
UNDERSTOOD = "text, token ids, what a tokenizer returns, or messages with role and content"
BESIDE_IDS = frozenset(
    "attention_mask token_type_ids special_tokens_mask offset_mapping length overflow_to_sample_mapping"
    " assistant_masks".split()
)
"""What a tokenizer may return beside ids without changing their meaning."""


def separate(prompts: Prompts) -> list[Prompt]:
    """The prompts of a batch, each as text, as a list of token ids or as a list of messages. A
    prompt by itself is a batch of one. RequestError for what is no prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        return [[prompts]] if _is_message(prompts) else _rows_of_encoding(prompts)
    if isinstance(prompts, torch.Tensor | np.ndarray):
        return list(_rows(prompts))
    if isinstance(prompts, bytes | bytearray | set | frozenset) or not isinstance(prompts, Iterable):
        raise RequestError(f"a prompt cannot be of type {type(prompts).__name__}: give {UNDERSTOOD}")
    items: list[Any] = list(prompts)
    if items and all(map(_is_id, items)):
        return [[int(item) for item in items]]
    if items and all(map(_is_message, items)):
        return [items]
    return [_alone(item) for item in items]


def tokens_of(
    prompt: Prompt, tokenizer: HuggingFaceTokenizer | None, template: Mapping[str, Any] | None = None
) -> list[int]:
    """The token ids of one prompt. RequestError if it is none, empty, or needs what the model does not have.

    template: what a chat template is told beside the messages, as `Engine.encode` says.
    """
    one: Any = _alone(prompt)
    if isinstance(one, str):
        if tokenizer is None:
            raise RequestError("this model has no tokenizer: give the prompt as token ids")
        demand_characters(one)
        one = tokenizer(one)["input_ids"]
    elif one and _is_message(one[0]):
        one = _through_template(one, tokenizer, template or {})
    if not one:
        raise RequestError("the prompt is empty: give at least one token")
    return [int(token) for token in one]


def conversations(messages: str | Prompts, system: str | None = None) -> list[Prompt]:
    """Each as a list of messages; text is what the user says. system: is said first."""
    found = []
    for one in separate(messages):
        talk: Any = [{"role": "user", "content": one}] if isinstance(one, str) else one
        if not (talk and _is_message(talk[0])):
            raise RequestError("chat takes messages with role and content: use generate for token ids")
        if system is not None and talk[0]["role"] == "system":
            raise RequestError("the messages begin with a system message already: give no other one")
        found.append([*([] if system is None else [{"role": "system", "content": system}]), *talk])
    return list(found)


def demand_characters(text: object) -> None:
    """RequestError for a text that holds half a character: bytes that are not UTF-8, or half of a JSON escape."""
    if isinstance(text, str) and HALF.search(text):
        raise RequestError("the text holds bytes or escapes that are no characters: give it as UTF-8")


def _alone(prompt: Prompt) -> Prompt:
    found = separate(prompt)
    if len(found) > 1:
        raise RequestError(f"one prompt holds {len(found)}: give a batch by itself, not within another one")
    return found[0] if found else []


def _is_id(value: object) -> bool:
    if type(value) is int:  # nearly all, of many thousands
        return True
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and "role" in value


def _is_bit(value: object) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def _rows(ids: Any, fits: Callable[[object], bool] = _is_id) -> list[list[int]]:
    """Token ids (or a mask) of one or two dimensions, row by row."""
    if isinstance(ids, torch.Tensor | np.ndarray):
        ids = ids.tolist()
    if not isinstance(ids, list | tuple):
        raise RequestError("token ids are whole numbers in one row or several: give them so, or give text")
    rows = ids if all(isinstance(row, list | tuple) for row in ids) else [ids]
    for row in rows:
        if wrong := [value for value in row if not fits(value)]:
            kind = "token id: give whole numbers" if fits is _is_id else "part of a mask: give 0 or 1"
            raise RequestError(f"{wrong[0]!r} is no {kind}, one row per prompt")
    return [[int(value) for value in row] for row in rows]


def _rows_of_encoding(encoding: Mapping[str, Any]) -> list[Prompt]:
    """What a tokenizer has returned, for one text or several."""
    if "input_ids" not in encoding:
        raise RequestError(
            f"a mapping with {', '.join(map(str, encoding)) or 'nothing'} is no prompt: it has no input_ids"
        )
    if unknown := [name for name in encoding if name not in BESIDE_IDS and name != "input_ids"]:
        raise RequestError(f"a prompt's {unknown[0]} cannot be read: give text or token ids alone")
    rows = _rows(encoding["input_ids"])
    given = encoding.get("attention_mask")
    if given is None:
        return list(rows)
    masks = _rows(given, _is_bit)
    if [*map(len, masks)] != [*map(len, rows)]:
        raise RequestError("attention_mask and input_ids differ in shape: give one number per token")
    return [_unpadded(row, mask) for row, mask in zip(rows, masks, strict=True)]


def _unpadded(ids: list[int], mask: list[int]) -> list[int]:
    """Without the padding before or behind it."""
    seen = [place for place, bit in enumerate(mask) if bit]
    if not seen:
        return []
    if seen[-1] - seen[0] + 1 != len(seen):
        raise RequestError("the attention_mask has a hole: padding may stand before or behind a prompt, not within")
    return ids[seen[0] : seen[-1] + 1]


def _through_template(messages: Sequence[Message], tokenizer: Any, told: Mapping[str, Any]) -> list[int]:
    """With the beginning of the answer behind it; where the last message is the assistant's own, it is gone on with."""
    if not (told.get("chat_template") or getattr(tokenizer, "chat_template", None)):
        raise RequestError("this model has no chat template: give the prompt as text, or load one with a template")
    for message in messages:
        if message.get("content") is None and not message.get("tool_calls"):
            raise RequestError(f"a message of {message['role']!r} has no content: give it some text")
        demand_characters(message.get("content"))
    goes_on = messages[-1]["role"] == "assistant"
    try:
        encoding = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            tokenize=True,
            return_dict=True,
            **told,
        )
    except Exception as error:  # a template raises what its author, Jinja or Python like
        raise RequestError(
            f"the model's chat template refuses these messages ({brief(error)}): give them as it wants them"
        ) from error
    found: list[int] = encoding["input_ids"]
    return found
