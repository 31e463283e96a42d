"""Greedy identity: a drafter must not change a single token id, except where rounding decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from forerun.check.texts import PlainText, finished, with_rows
from forerun.engine.engine import Engine
from forerun.engine.requests import Output
from forerun.sampling import SamplingParams

BIT_FOR_BIT = "; no logit moves by a bit when tokens are read together"


@dataclass(frozen=True)
class Divergence:
    """Where a drafted text left plain decoding's.

    position: new tokens before it. gap: by how much the plain forward preferred its own token, in
    logits; None: more than for any of its best tokens. tie: the gap is within the rounding bound.
    """

    prompt: int
    position: int
    plain_token: int
    drafted_token: int | None
    plain_text: str
    drafted_text: str
    gap: float | None
    tie: bool

    def __str__(self) -> str:
        told = f"{self.plain_token} {self.plain_text!r}, drafted {self.drafted_token} {self.drafted_text!r}"
        gap = "larger than for any likely token" if self.gap is None else f"{self.gap:.3g}"
        return f"prompt {self.prompt + 1}, token {self.position + 1}: plain says {told}; the logit gap there is {gap}"


@dataclass(frozen=True)
class Greedy:
    """The outcome for one batch size. tokens: compared and found equal, ties set aside; bound: see `rounding`."""

    rows: int
    prompts: int
    tokens: int
    bound: float
    divergences: tuple[Divergence, ...]

    @property
    def identical(self) -> bool:
        return not self.divergences

    @property
    def passed(self) -> bool:
        return all(found.tie for found in self.divergences)

    def verdict(self, dtype: str) -> str:
        side_by_side = "1 row" if self.rows == 1 else f"{self.rows} rows"
        head = f"greedy, {side_by_side}: "
        over = f"{self.tokens} tokens over {self.prompts} prompts"
        if self.identical:
            return f"{head}identical, {over}{BIT_FOR_BIT if self.bound == 0 else ''}"
        if self.passed:
            count, first = len(self.divergences), self.divergences[0]
            ties = "1 tie" if count == 1 else f"{count} ties"
            return f"{head}identical but for {ties}, {over}; first at {first}, within the {self._bound(dtype)}"
        first = next(found for found in self.divergences if not found.tie)
        return f"{head}DIFFERENT at {first}, beyond the {self._bound(dtype)}"

    def _bound(self, dtype: str) -> str:
        return f"{self.bound:.3g} that rounding in {dtype} was measured to explain here"

    def as_dict(self, dtype: str) -> dict[str, Any]:
        own = {"passed": self.passed, "identical": self.identical, "verdict": self.verdict(dtype)}
        return asdict(self) | own


def check_greedy(drafted: Engine, texts: Sequence[PlainText], rows: int, bound: float) -> tuple[Greedy, bool]:
    """Generate the texts again with a drafter, `rows` side by side. Also says whether the drafter calls itself exact.

    Where there are fewer texts than rows, some are generated twice. After a tie the rest is generated from plain
    decoding's own token, so that all of it is really compared.
    """
    texts = [texts[index % len(texts)] for index in range(max(rows, len(texts)))]
    open_at = dict.fromkeys(range(len(texts)), 0)
    found: list[Divergence] = []
    equal, exact = 0, True
    while open_at:
        with with_rows(drafted, rows):
            outputs = _continue(drafted, [(texts[index], start) for index, start in open_at.items()])
        later: dict[int, int] = {}
        for (index, start), output in zip(open_at.items(), outputs, strict=True):
            exact &= output.stats.exact
            text = texts[index]
            place = start + _common(output.token_ids, text.new[start:])
            equal += place - start
            if place < len(text.new):
                found.append(_divergence(drafted, index, text, place, output.token_ids[place - start :], bound))
                if found[-1].tie and place + 1 < len(text.new):
                    later[index] = place + 1
        open_at = later
    found.sort(key=lambda one: (one.prompt, one.position))
    return Greedy(rows, len(texts), equal, bound, tuple(found)), exact


def _continue(engine: Engine, parts: Sequence[tuple[PlainText, int]]) -> list[Output]:
    """The rest of each text behind its first `start` new tokens."""
    wish = SamplingParams(ignore_eos=True)
    prompts = [[*text.prompt, *text.new[:start]] for text, start in parts]
    return finished(engine, prompts, [replace(wish, max_new_tokens=len(text.new) - start) for text, start in parts])


def _divergence(
    engine: Engine, index: int, text: PlainText, place: int, drafted: Sequence[int], bound: float
) -> Divergence:
    token = drafted[0] if drafted else None
    gap = text.gap(place, token)
    return Divergence(
        prompt=index,
        position=place,
        plain_token=text.new[place],
        drafted_token=token,
        plain_text=_spelling(engine, text.new[place]),
        drafted_text=_spelling(engine, token),
        gap=gap,
        tie=gap is not None and gap <= bound,
    )


def _spelling(engine: Engine, token: int | None) -> str:
    if engine.tokenizer is None or token is None:
        return ""
    return engine.tokenizer.backend_tokenizer.id_to_token(token) or ""


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
