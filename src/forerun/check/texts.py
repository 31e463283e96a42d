"""Plain decoding's own texts: what a drafter is held against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from forerun.engine.engine import Engine
from forerun.engine.requests import Output
from forerun.sampling import SamplingParams

ALTERNATIVES = 16
"""How many of the best tokens are remembered at every place. A token beyond them was no near-tie."""


@dataclass(frozen=True)
class PlainText:
    """A prompt, what plain greedy decoding makes of it, and the log-probabilities of the best tokens at every place.

    Differences of log-probabilities are differences of logits.
    """

    prompt: list[int]
    new: list[int]
    best: list[dict[int, float]]

    def gap(self, place: int, token: int | None) -> float | None:
        """By how much plain decoding preferred its token there to this one (logits); None: it was
        not among the best."""
        other = self.best[place].get(token) if token is not None else None
        return None if other is None else self.best[place][self.new[place]] - other


def plain_texts(plain: Engine, prompts: Sequence[Sequence[int]], tokens: int, length: int) -> list[PlainText]:
    """One request at a time, until there are `tokens` new tokens or no more prompts.

    Texts are `length` tokens long, or longer where there are few prompts; prompts are cut where the
    context asks for it.
    """
    context = plain.target.max_length
    length = min(max(length, -(-tokens // len(prompts))), context // 2)
    texts: list[PlainText] = []
    for prompt in prompts:
        if sum(len(text.new) for text in texts) >= tokens:
            break
        start = list(prompt[: context - length])
        params = SamplingParams(max_new_tokens=length, ignore_eos=True, logprobs=ALTERNATIVES)
        (output,) = finished(plain, [start], [params])
        best = [one.alternatives | {one.token_id: one.logprob} for one in output.logprobs or []]
        texts.append(PlainText(start, output.token_ids, best))
    return texts


def finished(engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[Output]:
    """What the engine says to the end. It answers Ctrl-C with what it has; a check must not judge by that."""
    outputs = engine.generate(list(prompts), list(params))
    wanted = sum(one.n for one in params)
    if len(outputs) < wanted or any(output.finish_reason == "interrupted" for output in outputs):
        raise KeyboardInterrupt
    return outputs


@contextmanager
def with_rows(engine: Engine, rows: int) -> Iterator[None]:
    """So many rows side by side, for a while."""
    before, engine.max_rows = engine.max_rows, rows
    try:
        yield
    finally:
        engine.max_rows = before
