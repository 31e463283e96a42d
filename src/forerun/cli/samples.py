"""A prompt and its answer as training reads them: special tokens can be seen, and what is trained on is marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

SPECIAL = "bold black on plum2"
"""Tokens that no text spells."""


def marked(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int], in_colour: bool, lines: int) -> Text:
    """The last lines of the prompt, and the answer marked: by colour, or by brackets where there is none."""
    from rich.text import Text

    from forerun.cli.narration import DRAFTED

    before, said = decoded(tokenizer, prompt, answer)
    before = "\n".join(before.split("\n")[-lines:])
    opening, closing = ("", "") if in_colour else ("⟦", "⟧")
    text = Text.assemble((before, "dim"), opening, (said, DRAFTED), closing)
    if tokenizer is not None:
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        text.highlight_words(special, SPECIAL)
    return text


def decoded(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> tuple[str, str]:
    """Texts of prompt and answer, special tokens included; ids for want of a tokenizer."""
    if tokenizer is None:
        return f"{' '.join(map(str, prompt))} ", " ".join(map(str, answer))
    decode = tokenizer.backend_tokenizer.decode
    before, whole = (decode(list(ids), skip_special_tokens=False) for ids in (prompt, [*prompt, *answer]))
    # Together, because a decoder drops the blank at the beginning of a text.
    is_prefix = whole.startswith(before)
    return before, whole[len(before) :] if is_prefix else decode(list(answer), skip_special_tokens=False)
