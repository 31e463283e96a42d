"""Constraints, followed token by token. llguidance reads the grammars and knows what may come next; here it is asked
at the nodes of a tree, forwards and back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from forerun.constraint import Constraint, Matcher
from forerun.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

END = "<|the text is complete|>"
"""A token of our own by which llguidance says so, whatever the model's ends are: a row has ends of its own."""

KNOWN = 64
"""Constraints that stay compiled."""

LONGEST = 240
"""Characters of a complaint of llguidance's, which may quote the whole grammar."""

OPTIONS = '\n%llguidance {"no_forcing": true}\n'
"""Otherwise, where one text alone can follow, it allows that text's usual spelling alone; the model is to choose."""

WHITESPACE = {"whitespace_pattern": r"[ \t\n\r]{0,40}"}
"""Between the parts of JSON. Without a bound a model that likes blank lines never says the next part. A schema's own
"x-guidance" goes before it."""


class Grammars:
    """The constraints that one tokenizer can spell. Any thread may ask.

    vocab_size: the model's. eos: tokens that end its texts, and are never part of one.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Collection[int]):
        self._given, self._vocab_size, self._eos = tokenizer, vocab_size, frozenset(eos)
        self._tokenizer: LLTokenizer | None = None
        self._compiled = lru_cache(KNOWN)(self._compile)
        self._lock = Lock()

    def matcher(self, constraint: Constraint, ends: Collection[int]) -> Matcher:
        """For one row. ends: the tokens that end its text. RequestError for a constraint that no text can meet, or
        that cannot be read."""
        with self._lock:
            return self._follower(self._compiled(constraint), ends)

    def _follower(self, compiled: LLMatcher, ends: Collection[int]) -> _Follower:
        never = self._eos | {self._spelling().eos_token}  # ours may have an id that the model has, though no token
        return _Follower(compiled.deep_copy, self._vocab_size, never, ends)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        library = _library()
        limits = library.LLParserLimits(verbose_errors=False)
        compiled: LLMatcher = library.LLMatcher(self._spelling(), _lark(constraint), log_level=0, limits=limits)
        if compiled.is_error():
            raise _refusal(constraint, "cannot be used", _sentence(compiled.get_error()))
        start = self._follower(compiled, ())
        if start.is_complete([]):
            raise _refusal(constraint, "allows nothing but the empty text", "give one that allows something")
        if start.allowed([]) is None:
            raise _refusal(constraint, "allows no text that the tokenizer can spell", "give another one")
        return compiled

    def _spelling(self) -> LLTokenizer:
        if self._tokenizer is None:
            known = Tokenizer.from_str(self._given.to_str())
            known.no_padding()
            known.no_truncation()
            known.add_special_tokens([AddedToken(END, special=True)])
            ids = known.get_vocab()
            try:
                if list(ids.values()).count(ids[END]) > 1:  # where ids have gaps, a new token may get an old one's
                    raise ValueError("its ids have gaps")
                size = max(self._vocab_size, *ids.values()) + 1
                self._tokenizer = _library().LLTokenizer(known.to_str(), n_vocab=size, eos_token=ids[END])
            except ValueError as error:
                raise RequestError(
                    "a constraint needs to know the bytes of every token, and this model's tokenizer does not tell them"
                    f" ({_sentence(str(error))}): use processors"
                ) from None
        return self._tokenizer


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise RequestError("constraints need llguidance: install it with pip install 'forerun[grammar]'") from None
    return llguidance


def _lark(constraint: Constraint) -> str:
    """In llguidance's words."""
    kind, value = constraint.kind, constraint.value
    if kind == "lark":
        return f"{value}{OPTIONS}"
    if kind == "regex":
        return f"start: /{_library().regex_to_lark(value, '')}/{OPTIONS}"
    if kind == "choice":
        return f"start: {' | '.join(map(json.dumps, value))}{OPTIONS}"
    schema = {"type": "object"} if kind == "json_object" else value
    wishes = schema.get("x-guidance", {})
    settings = WHITESPACE | wishes if isinstance(wishes, dict) else wishes
    return f"start: %json {json.dumps(schema | {'x-guidance': settings})}{OPTIONS}"


def _sentence(error: str) -> str:
    """Without the pictures of where it is wrong, and not without end."""
    lines = [line.strip(" ^~") for line in re.split(r"\n\s+\d+ \|", error)[0].splitlines()]
    told = " ".join(line for line in lines if line).removesuffix("<non-verbose/>").strip()
    return told if len(told) <= LONGEST else f"{told[: LONGEST // 2]} ... {told[-LONGEST // 2 :]}"


def _refusal(constraint: Constraint, wrong: str, mend: str) -> RequestError:
    shown = constraint.text if len(constraint.text) <= 80 else f"{constraint.text[:77]}..."
    return RequestError(f"the constraint {constraint.kind} {shown} {wrong}: {mend}".replace("\n", " "))


class _Follower:
    """A `Matcher`: stands behind one text, and goes from there to the next one that it is asked about.

    The nodes of a tree are asked in turn, often by the drafter first and then by the judge. So what was answered is
    remembered until the row has gone on.
    """

    def __init__(self, begin: Callable[[], LLMatcher], vocab_size: int, never: Collection[int], ends: Collection[int]):
        self._begin, self._now, self._said = begin, begin(), list[int]()
        self._vocab_size = vocab_size
        self._never, self._ends = ([token for token in ids if 0 <= token < vocab_size] for ids in (never, ends))
        self._answers: dict[tuple[int, ...], _Answer] = {}
        self.problem = ""

    def allowed(self, said: Sequence[int]) -> NDArray[np.bool_] | None:
        packed, _ = self._answer(said)
        return None if packed is None else np.unpackbits(packed, count=self._vocab_size).view(np.bool_)

    def is_complete(self, said: Sequence[int]) -> bool:
        _, is_complete = self._answer(said)
        self._answers = {text: answer for text, answer in self._answers.items() if len(text) >= len(said)}
        return is_complete

    def _answer(self, said: Sequence[int]) -> _Answer:
        text = tuple(said)
        if text not in self._answers:
            self._answers[text] = self._ask() if self._go(text) else (None, False)
        return self._answers[text]

    def _go(self, said: tuple[int, ...]) -> bool:
        """Stand behind this text; False if the constraint does not allow it."""
        shared = _shared(self._said, list(said))
        if shared < len(self._said):
            self._now.rollback(len(self._said) - shared)
            del self._said[shared:]
        rest = said[shared:]
        self._said += rest[: self._now.try_consume_tokens(list(rest))]
        return not self._gave_up() and len(self._said) == len(said)

    def _ask(self) -> _Answer:
        """What may follow where it stands."""
        bits = np.frombuffer(self._now.compute_bitmask(), np.uint8)
        if self._gave_up():
            return None, False
        may = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        may[self._never] = 0
        goes_on, accepts = bool(may.any()), self._now.is_accepting()
        if not goes_on:
            return None, accepts
        if accepts:
            may[self._ends] = 1
        return np.packbits(may), False

    def _gave_up(self) -> bool:
        """Where llguidance stops at one of its limits it is of no use any more: begin anew, and say what it was."""
        if not self._now.is_error():
            return False
        self.problem = _sentence(self._now.get_error())
        self._now, self._said = self._begin(), []
        return True


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with alike. By halves: lists are compared faster than their items."""
    known, end = 0, min(len(one), len(other))
    while known < end:
        middle = (known + end + 1) // 2
        known, end = (middle, end) if one[known:middle] == other[known:middle] else (known, middle - 1)
    return known


_Answer = tuple[NDArray[np.uint8] | None, bool]
"""The tokens that may follow, packed, None for none; and whether the text is complete."""
