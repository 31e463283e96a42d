"""Tokens to text as they come: whole characters only, and nothing that a stop string may still take away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

CONTEXT = 8
"""Prompt tokens that the decoder sees first, so that the first blank of the output is not lost."""


class TextStream:
    """The text of one output. `feed` returns what may be shown; `stopped` says that a stop string came."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self._tokenizer = tokenizer
        self._stream = DecodeStream(ids=list(prompt[-CONTEXT:]), skip_special_tokens=True)
        self._stops = stops
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        if self.stopped:
            return ""
        self._held += self._stream.step(self._tokenizer, token) or ""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._show(min(found), drop=True)
        return self._show(len(self._held) - self._doubtful())

    def finish(self) -> str:
        """No token will follow: what was held back is text after all."""
        return "" if self.stopped else self._show(len(self._held))

    def _show(self, count: int, drop: bool = False) -> str:
        shown, self._held = self._held[:count], "" if drop else self._held[count:]
        self.text += shown
        return shown

    def _doubtful(self) -> int:
        """Length of the longest tail that may be the beginning of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0


class HuggingFaceTokenizer(Protocol):
    """What forerun uses of a transformers tokenizer."""

    backend_tokenizer: Tokenizer

    def __call__(self, text: str) -> Any: ...
