"""The tokenizer of a model, and the tokens that end its texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from forerun.errors import CheckpointError


class HuggingFaceTokenizer(Protocol):
    """What forerun uses of a transformers tokenizer."""

    backend_tokenizer: Tokenizer

    def __call__(self, text: str) -> Any: ...


def tokenizer_of(path: str | Path) -> HuggingFaceTokenizer | None:
    """The tokenizer beside the weights, or None where there is none (prompts are token ids then)."""
    from transformers import AutoTokenizer

    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")) and not (Path(path) / "vocab.json").exists():
        return None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of a damaged or a strange one
        raise CheckpointError(f"the tokenizer in {path} cannot be read: {' '.join(str(error).split())}") from None
    return fast(tokenizer, f"the tokenizer in {path}")


def fast(tokenizer: Any, called: str) -> HuggingFaceTokenizer:
    """A tokenizer that has a tokenizer.json behind it; CheckpointError for any other."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise CheckpointError(f"{called} has no tokenizer.json: convert it to a fast tokenizer first")
    fitting: HuggingFaceTokenizer = tokenizer
    return fitting


def end_tokens(path: str | Path) -> list[int]:
    """The end-of-sequence ids of a model: from generation_config.json, else from config.json."""
    from transformers import AutoConfig, GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(str(path)).eos_token_id
    except (OSError, ValueError):
        ids = getattr(
            AutoConfig.from_pretrained(str(path), trust_remote_code=False).get_text_config(), "eos_token_id", None
        )
    return _listed(ids)


def end_tokens_of(model: Any) -> list[int]:
    """The same of a transformers model in memory."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    return _listed(getattr(model.config.get_text_config(), "eos_token_id", None) if ids is None else ids)


def _listed(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def ids_without_tokens(tokenizer: HuggingFaceTokenizer, vocab_size: int, ends: Collection[int] = ()) -> list[int]:
    """Which of a model's ids its tokenizer gives to no token: rows that round a matrix up, and gaps.
    What ends a text is a token even if the tokenizer does not know it."""
    known = {*tokenizer.backend_tokenizer.get_vocab().values(), *ends}
    return [token for token in range(vocab_size) if token not in known]


def merges_of(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair of SentencePiece's pieces that makes a third one, best first: it merges by the score of the result,
    and the pieces come in that order."""
    known = set(pieces)
    splits = ((piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece)))
    return [(left, right) for left, right in splits if left in known and right in known]


def fingerprint_of(vocabulary: Mapping[str, int]) -> str:
    """A hash of what a tokenizer calls its tokens (`tokenizer.get_vocab()`)."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()
