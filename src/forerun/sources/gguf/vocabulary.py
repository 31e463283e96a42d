"""The tokenizer that a GGUF file describes, as transformers has it.

"llama"  SentencePiece's pairs: the best token that two neighbours make, by its score; unknown characters as bytes
"gpt2"   pairs of bytes in the order of a list; before that the text is split, by one of a few rules known by name
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from forerun.errors import CheckpointError
from forerun.sources.folder import brief
from forerun.sources.gguf.head import Head
from forerun.sources.tokenizer import HuggingFaceTokenizer, merges_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
FILLER = re.compile(r"\[PAD\d+\]")
"""What converters call ids that have no token."""
ENDS = frozenset(
    "</s> <|eot_id|> <|eom_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> <|end_of_text|> <EOT> _<EOT>".split()
)
"""Control tokens that end a text or a turn wherever they are known: files name only one of several."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """How a text is split before pairs are merged. digits: each is split off first. whole: a word that is a token stays
    one, whatever the pairs say. composed: the text is brought into the form NFC. begins: with the begin token, where
    the file does not say."""

    pattern: str
    digits: bool = False
    whole: bool = False
    composed: bool = False
    begins: bool = False


_LLAMA3 = Split(_WORDS + r"|\p{N}{1,3}" + _REST, whole=True, begins=True)
_QWEN2 = Split(_WORDS + r"|\p{N}" + _REST, composed=True)
_QWEN2_AS_IT_IS = Split(_QWEN2.pattern)
_TEKKEN = Split(_CASED % ("", "") + r"|\p{N}" + _CASED_REST, whole=True, begins=True)
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = Split(_CASED % (_SHORT, _SHORT) + r"|\p{N}{1,3}" + _CASED_REST)
_DIGITS = Split(_GPT2, digits=True)

SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"), _LLAMA3),
    "smaug-bpe": Split(_LLAMA3.pattern),
    "qwen2": _QWEN2,
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), _QWEN2_AS_IT_IS),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS),
    **dict.fromkeys(("gpt-2", "olmo", "trillion"), Split(_GPT2)),
}


def tokenizer_of(head: Head) -> HuggingFaceTokenizer | None:
    """With its chat template; None where the file has none. CheckpointError for one of a kind that is not known."""
    from transformers import PreTrainedTokenizerFast

    kind = _field(head, "model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in KINDS:
        raise CheckpointError(
            f"{head.path} has a tokenizer of the kind {kind}, and {', '.join(KINDS)} are read: take the model's"
            " Hugging Face folder"
        )
    try:
        backend = _with_special_tokens(KINDS[kind](head), head)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers raises plain exceptions for what does not fit together
        raise CheckpointError(f"the tokenizer in {head.path} is damaged ({brief(error)}): fetch it again") from error
    tokens = _field(head, "tokens")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: _field(head, f"{theirs}_token_id") for ours, theirs in names.items()}
    special = {f"{name}_token": tokens[id_] for name, id_ in ids.items() if id_ is not None and id_ < len(tokens)}
    made: Any = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
    made.chat_template = _templates(head.fields)
    fitting: HuggingFaceTokenizer = made
    return fitting


def ends_of(head: Head) -> list[int]:
    """What the file names as ends of a text or a turn, and the control tokens that are known for that."""
    named = [_field(head, f"{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, types = _field(head, "tokens", []), _field(head, "token_type", [])
    known = [
        id_ for id_, (token, type_) in enumerate(zip(tokens, types, strict=False)) if type_ == CONTROL and token in ENDS
    ]
    return list(dict.fromkeys([*(id_ for id_ in named if id_ is not None), *known]))


def _field(head: Head, name: str, usual: Any = None) -> Any:
    return head.fields.get(f"tokenizer.ggml.{name}", usual)


def _templates(fields: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The one that is there; of several all by their names."""
    first, start = fields.get("tokenizer.chat_template"), "tokenizer.chat_template."
    others = {key.removeprefix(start): value for key, value in fields.items() if key.startswith(start)}
    return {"default": first, **others} if first and others else first


def _types(head: Head) -> list[int]:
    tokens = _field(head, "tokens")
    return list(_field(head, "token_type", [NORMAL] * len(tokens)))


def _vocabulary(head: Head) -> dict[str, int]:
    pairs = zip(_field(head, "tokens"), _types(head), strict=True)
    return {token: id_ for id_, (token, type_) in enumerate(pairs) if not (type_ == UNUSED and FILLER.fullmatch(token))}


def _sentencepiece(head: Head) -> Tokenizer:
    vocabulary, types, scores = _vocabulary(head), _types(head), _field(head, "scores")
    unknown = next((token for token, id_ in vocabulary.items() if types[id_] == UNKNOWN), None)
    ordinary = [token for token, id_ in vocabulary.items() if types[id_] in (NORMAL, USER_DEFINED)]
    merges = merges_of(sorted(ordinary, key=lambda token: -scores[vocabulary[token]]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaced = _field(head, "add_space_prefix", True)
    marked = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), marked]) if spaced else marked
    parts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if spaced else [])])
    return tokenizer


def _byte_level(head: Head) -> Tokenizer:
    split = _split(head)
    merges = [tuple(pair.split(" ", 1)) for pair in _field(head, "merges", [])]
    tokenizer = Tokenizer(models.BPE(_vocabulary(head), merges, ignore_merges=split.whole))
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([pre_tokenizers.Digits(individual_digits=True)] if split.digits else []),
            pre_tokenizers.Split(Regex(split.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


KINDS = {"llama": _sentencepiece, "gpt2": _byte_level}


def _split(head: Head) -> Split:
    name = _field(head, "pre")
    if name not in SPLITS:
        said = "does not say how its tokenizer splits a text" if name is None else f"splits a text as {name}"
        raise CheckpointError(
            f"{head.path} {said} (tokenizer.ggml.pre), and {', '.join(SPLITS)} are known: take the model's"
            " Hugging Face folder"
        )
    return SPLITS[name]


def _with_special_tokens(tokenizer: Tokenizer, head: Head) -> Tokenizer:
    """Tokens that are found whole in any text, and those that every text begins or ends with."""
    tokens, types = _field(head, "tokens"), _types(head)
    whole = [
        AddedToken(token, normalized=False, special=type_ != USER_DEFINED)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(whole)
    begins = _field(head, "model") == "llama" or _split(head).begins
    around = [
        _field(head, f"{name}_token_id") if _field(head, f"add_{name}_token", usual) else None
        for name, usual in (("bos", begins), ("eos", False))
    ]
    first, last = ([] if id_ is None else [tokens[id_]] for id_ in around)
    if first or last:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
            special_tokens=[(tokens[id_], id_) for id_ in dict.fromkeys(around) if id_ is not None],
        )
    return tokenizer
