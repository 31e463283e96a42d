"""Requests: what is wanted of an engine, what it has said so far, and what is told of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from forerun.cost import Step
from forerun.engine.text import TextStream
from forerun.row import Row


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of the model's own law at one token: its own, and those of the most probable alternatives."""

    token_id: int
    logprob: float
    alternatives: dict[int, float]


@dataclass
class Stats:
    """What a request cost. Seconds count from its admission; a step is shared by the rows that make it together.

    accepted: mean surviving draft tokens per step. tokens_per_step: new tokens per step, what a user
    feels. cached_tokens: those of the prompt that the target did not have to read, because another
    request's text began with them.
    """

    drafter: str
    rule: str = ""
    exact: bool = True
    steps: int = 0
    new_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    def add(self, step: Step) -> None:
        """The request had a row in this step."""
        self.draft_seconds += step.draft_seconds
        self.verify_seconds += step.verify_seconds

    @property
    def tokens_per_step(self) -> float:
        return self.new_tokens / self.steps if self.steps else 0.0

    @property
    def accepted(self) -> float:
        return self.accepted_tokens / self.steps if self.steps else 0.0

    @property
    def discard_rate(self) -> float:
        """Drafted tokens that were not kept, per new token."""
        return (self.drafted_tokens - self.accepted_tokens) / self.new_tokens if self.new_tokens else 0.0

    @property
    def verification_rate(self) -> float:
        """Steps per new token."""
        return self.steps / self.new_tokens if self.new_tokens else 0.0

    @property
    def other_seconds(self) -> float:
        return max(0.0, self.seconds - self.prefill_seconds - self.draft_seconds - self.verify_seconds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of decoding (reading the prompt is not in it)."""
        decoding = self.seconds - self.prefill_seconds
        return self.new_tokens / decoding if decoding > 0 else 0.0

    def as_dict(self) -> dict[str, object]:
        names = (
            "steps new_tokens tokens_per_step accepted seconds prefill_seconds draft_seconds verify_seconds"
            " other_seconds"
            " tokens_per_second drafted_tokens accepted_tokens cached_tokens drafter rule exact"
        )
        return {name: getattr(self, name) for name in names.split()}


@dataclass(frozen=True)
class Output:
    """One finished sample. token_ids: the new tokens, the ending one included. text: None without a tokenizer.

    finish_reason: "stop" (end of sequence, stop token, stop string, or a constraint behind which nothing may follow),
    "length", or "interrupted".
    """

    text: str | None
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None
    stats: Stats
    prompt_index: int = 0
    sample: int = 0


@dataclass(frozen=True)
class Piece:
    """What one step added to one sample.

    origins[i]: who thought of token i, the drafter's part of that name (and the target agreed), or
    "", the target itself. A request's last piece says why it ended and carries its output. That of a request which was
    cancelled adds no token; error: what went wrong in the step that ended it. proposed: how many tokens were drafted in
    this step. logprobs: of its tokens, where they were asked for.
    """

    request: int
    prompt_index: int
    sample: int
    token_ids: list[int]
    origins: list[str]
    texts: list[str]
    finish_reason: str | None = None
    output: Output | None = None
    error: Exception | None = None
    proposed: int = 0
    logprobs: Sequence[TokenLogprob] = ()

    @property
    def drafted(self) -> list[bool]:
        """Which tokens came from the drafter."""
        return [bool(origin) for origin in self.origins]

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Seen:
    """The target's states of what has been read of a row, from token `since` on."""

    def __init__(self) -> None:
        self.since = 0
        self._parts: dict[int, list[Tensor]] = {}

    def append(self, states: Mapping[int, Tensor]) -> None:
        """Of the tokens that come next, [1, n, D] per layer."""
        for layer, part in states.items():
            self._parts.setdefault(layer, []).append(part)

    def joined(self) -> dict[int, Tensor]:
        """[1, n, D] per layer; {} where nothing was read."""
        self._parts = {
            layer: [torch.cat(parts, 1)] if len(parts) > 1 else parts for layer, parts in self._parts.items()
        }
        return {layer: whole for layer, (whole,) in self._parts.items()}

    def forget(self, number: int) -> None:
        """The states of the tokens before this one."""
        self._parts = {layer: [part[:, number - self.since :].clone()] for layer, part in self.joined().items()}
        self.since = number

    def clear(self) -> None:
        self.since = 0
        self._parts.clear()


@dataclass(eq=False)
class Request:
    """A row and everything the engine alone needs to know about it.

    inbox: where its pieces go. spell: makes the stream of its text from the start; None where
    nobody wants text. seen: states of what has been read, for the drafter and for whoever begins
    alike. is_over: its last piece has been told. is_told: the row holds nothing but what was told; a
    step that broke off may have added more.
    """

    number: int
    prompt_index: int
    sample: int
    row: Row
    stats: Stats
    inbox: deque[Piece]
    spell: Callable[[], TextStream] | None = None
    stream: TextStream | None = None
    started: float = 0.0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    finish_reason: str | None = None
    is_over: bool = False
    is_told: bool = True

    def __post_init__(self) -> None:
        self.stream = self.spell() if self.spell else None

    def commit(self, said: Sequence[int]) -> list[str]:
        """Append what was said up to the first token that ends the text. Returns the text of every token appended."""
        texts = []
        for token in said:
            self.row.tokens.append(token)
            texts.append(self.stream.feed(token) if self.stream else "")
            self.finish_reason = self._ending(token)
            if self.finish_reason:
                break
        if self.finish_reason and self.stream:
            texts[-1] += self.stream.finish()
        return texts

    def _ending(self, token: int) -> str | None:
        if token in self.row.ends:
            return "stop"
        if self.stream and self.stream.stopped:
            return "stop"
        if self.row.matcher and self.row.matcher.is_complete(self.row.tokens[self.row.prompt_length :]):
            return "stop"
        return "length" if self.row.remaining <= 0 else None

    def tell(self, tokens: list[int], texts: list[str], drafted: int, accepted: Sequence[str]) -> None:
        """Count a step that has committed these tokens, and hand out the piece. drafted: how many
        were proposed; accepted: who thought of each that survived."""
        stats, count = self.stats, len(tokens)
        self.row.step += 1
        stats.steps += 1
        stats.drafted_tokens += drafted
        stats.accepted_tokens += min(len(accepted), count)
        stats.new_tokens += count
        stats.seconds = time.perf_counter() - self.started
        self._hand_out(tokens, [*accepted, ""][:count], texts, proposed=drafted)

    def begin(self) -> None:
        """It is its turn, for the first time or again."""
        self.started = self.started or time.perf_counter()
        self._rewind()

    def interrupt(self, error: Exception | None = None) -> None:
        """End with what has been told."""
        self._rewind()
        self.finish_reason = "interrupted"
        if self.started:
            self.stats.seconds = time.perf_counter() - self.started
        self._hand_out([], [], [], error=error)

    def _rewind(self) -> None:
        """Back to what has been told."""
        if self.is_told:
            return
        row, told = self.row, self.stats.new_tokens
        del row.tokens[row.prompt_length + told :], self.logprobs[told:]
        self.finish_reason = None
        self.seen.clear()
        if self.spell:
            self.stream = self.spell()
            for token in row.tokens[row.prompt_length :]:
                self.stream.feed(token)
        self.is_told = True

    def _hand_out(
        self, tokens: list[int], origins: list[str], texts: list[str], proposed: int = 0, error: Exception | None = None
    ) -> None:
        output = self._output(self.finish_reason) if self.finish_reason else None
        place = self.number, self.prompt_index, self.sample
        logprobs = self.logprobs[-len(tokens) :] if tokens and self.logprobs else ()
        self.inbox.append(Piece(*place, tokens, origins, texts, self.finish_reason, output, error, proposed, logprobs))
        self.is_over = output is not None

    def _output(self, finish_reason: str) -> Output:
        return Output(
            text=self.stream.text if self.stream else None,
            token_ids=self.row.tokens[self.row.prompt_length :],
            finish_reason=finish_reason,
            logprobs=self.logprobs if self.row.params.logprobs is not None else None,
            stats=self.stats,
            prompt_index=self.prompt_index,
            sample=self.sample,
        )
