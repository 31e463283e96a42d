"""Tokens to text as they come: whole characters only, and nothing that a stop string may still take away."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

CONTEXT = 8
"""Prompt tokens that the decoder sees first, so that the first blank of the output is not lost."""
WINDOW = 8
"""Tokens that are decoded again with every new one. Fewer would do: to forget some takes a decoding of its own."""
BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What a decoder shows for bytes that are no character, or not yet."""


class _Decoder:
    """Tokens to whole characters. Each new text is what decoding one token more adds to the text of the last few.

    `tokenizers.decoders.DecodeStream` would be simpler, but it gives up at bytes that never become
    a character (with byte fallback), and repeats the prompt if that ends within one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._tokens, self._known = _whole_characters(tokenizer, prompt)
        self._shown = self._decode(self._tokens[: self._known])

    def feed(self, token: int) -> str:
        """Add a token; return the characters that are now complete."""
        self._tokens.append(token)
        return self._advance(final=False)

    def finish(self) -> str:
        """No token will follow: characters that were begun are broken."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._decode(self._tokens)
        if len(text) <= len(self._shown) or (text.endswith(BROKEN) and not final):
            return ""
        added = text[len(self._shown) :]
        if len(self._tokens) > WINDOW:
            self._tokens = self._tokens[self._known :]
            text = self._decode(self._tokens)
        self._known, self._shown = len(self._tokens), text
        return added

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def _whole_characters(tokenizer: Tokenizer, prompt: Sequence[int]) -> tuple[list[int], int]:
    """The end of a prompt from the beginning of a character on, and how many of its tokens are whole characters.

    A character has up to four tokens, if they are bytes.
    """
    for end in range(len(prompt), max(-1, len(prompt) - 4), -1):
        for start in range(max(0, end - CONTEXT), max(0, end - CONTEXT - 4) - 1, -1):
            text = tokenizer.decode(list(prompt[start:end]), skip_special_tokens=True)
            if not text.startswith(BROKEN) and not text.endswith(BROKEN):
                return list(prompt[start:]), end - start
    return list(prompt[-CONTEXT:]), min(CONTEXT, len(prompt))


class TextStream:
    """The text of one output. `feed` returns what may be shown; `stopped` says that a stop string came."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        self._decoder = _Decoder(tokenizer, prompt)
        self._stops = stops
        self._longest_doubt = max((len(stop) - 1 for stop in stops), default=0)
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        if self.stopped:
            return ""
        self._held += self._decoder.feed(token)
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._show(min(found), drop=True)
        return self._show(len(self._held) - self._doubtful())

    def finish(self) -> str:
        """No token will follow: what was held back is text after all."""
        if self.stopped:
            return ""
        self._held += self._decoder.finish()
        return self._show(len(self._held))

    def _show(self, count: int, drop: bool = False) -> str:
        shown, self._held = self._held[:count], "" if drop else self._held[count:]
        self.text += shown
        return shown

    def _doubtful(self) -> int:
        """Length of the longest tail that may be the beginning of a stop string."""
        for length in range(min(self._longest_doubt, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
