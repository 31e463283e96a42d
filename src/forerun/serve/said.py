"""What the model says, as OpenAI's clients read it: whole answers and the chunks of streams, of both endpoints."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from secrets import token_hex
from typing import Any, Protocol

from forerun.engine.requests import Output, Piece, TokenLogprob
from forerun.engine.text import BROKEN
from forerun.serve.refusal import RefusalError, packed

IMPOSSIBLE = -9999.0
"""What stands for the logarithm of nothing, which JSON does not have."""
DONE = b"data: [DONE]\n\n"

Choice = dict[str, Any]


class Spelling:
    """Single tokens as text, for log-probabilities. A token that is no whole character has a broken one."""

    def __init__(self, tokenizer: Any):
        self._backend = tokenizer.backend_tokenizer
        self._before = self._backend.encode("a", add_special_tokens=False).ids  # else the first blank would be lost
        self._skipped = len(self._decode(self._before))
        self.text = lru_cache(65_536)(self._text)

    def _text(self, token: int) -> str:
        return self._decode([*self._before, token])[self._skipped :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._backend.decode(tokens, skip_special_tokens=False)
        return text


class Endpoint(Protocol):
    """What differs between completions and chats. `begin`: choices of a sample's stream before its first text."""

    kind: str
    chunk_kind: str
    prefix: str

    def begin(self, index: int) -> Iterable[Choice]: ...

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob], end: str | None) -> Iterable[Choice]: ...

    def choice(self, index: int, output: Output) -> Choice: ...


@dataclass
class Completions:
    """echoed: what stands before every text, by prompt; none without `echo`. n: samples of each prompt."""

    spelling: Spelling
    n: int
    echoed: Sequence[str] = ()
    kind = chunk_kind = "text_completion"
    prefix = "cmpl-"
    _offsets: dict[int, int] = field(default_factory=dict)

    def begin(self, index: int) -> Iterator[Choice]:
        if self.echoed:
            yield self._choice(index, self._echo(index), None, None)

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob], end: str | None) -> Iterator[Choice]:
        yield self._choice(index, text, self._logprobs(index, logprobs) if logprobs else None, end)

    def choice(self, index: int, output: Output) -> Choice:
        told = None if output.logprobs is None else self._logprobs(index, output.logprobs)
        return self._choice(index, self._echo(index) + (output.text or ""), told, output.finish_reason)

    def _echo(self, index: int) -> str:
        return self.echoed[index // self.n] if self.echoed else ""

    @staticmethod
    def _choice(index: int, text: str, logprobs: Any, end: str | None) -> Choice:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": end}

    def _logprobs(self, index: int, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        spell, at = self.spelling.text, self._offsets.get(index, 0)
        texts = [spell(one.token_id) for one in found]
        offsets = []
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        return {
            "tokens": texts,
            "token_logprobs": [_finite(one.logprob) for one in found],
            "top_logprobs": [self._best(one) for one in found],
            "text_offset": offsets,
        }

    def _best(self, one: TokenLogprob) -> dict[str, float]:
        """By text: of two tokens that look alike, the more probable one."""
        best: dict[str, float] = {}
        for token, logprob in one.alternatives.items():
            best.setdefault(self.spelling.text(token), _finite(logprob))
        best.setdefault(self.spelling.text(one.token_id), _finite(one.logprob))
        return best


@dataclass
class Chats:
    spelling: Spelling
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl-"

    def begin(self, index: int) -> Iterator[Choice]:
        yield self._piece(index, {"role": "assistant", "content": ""}, None, None)

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprob], end: str | None) -> Iterator[Choice]:
        if text or logprobs or not end:
            yield self._piece(index, {"content": text}, self._logprobs(logprobs) if logprobs else None, None)
        if end:
            yield self._piece(index, {}, None, end)

    def choice(self, index: int, output: Output) -> Choice:
        return {
            "index": index,
            "message": {"role": "assistant", "content": output.text or "", "refusal": None},
            "logprobs": None if output.logprobs is None else self._logprobs(output.logprobs),
            "finish_reason": output.finish_reason,
        }

    @staticmethod
    def _piece(index: int, delta: Mapping[str, str], logprobs: Any, end: str | None) -> Choice:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end}

    def _logprobs(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            self._entry(one.token_id, one.logprob)
            | {"top_logprobs": [self._entry(*pair) for pair in one.alternatives.items()]}
            for one in found
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.spelling.text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": None if BROKEN in text else list(text.encode())}


@dataclass(frozen=True)
class Envelope:
    """What stands round the choices of one answer."""

    endpoint: Endpoint
    model: str
    fingerprint: str
    identity: str = field(default_factory=lambda: token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, outputs: Sequence[Output], usage: Mapping[str, Any], metrics: Mapping[str, Any] | None) -> Any:
        choices = [self.endpoint.choice(index, output) for index, output in enumerate(outputs)]
        return self._around(self.endpoint.kind, choices, usage=usage, **_told(metrics))

    def chunk(self, choices: Sequence[Choice], **more: Any) -> bytes:
        return b"data: " + packed(self._around(self.endpoint.chunk_kind, choices, **more)) + b"\n\n"

    def _around(self, kind: str, choices: Sequence[Choice], **more: Any) -> dict[str, Any]:
        return {
            "id": self.endpoint.prefix + self.identity,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }


def _told(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if metrics is None else {"metrics": {"speculative_decoding": metrics}}


def _finite(logprob: float) -> float:
    return max(IMPOSSIBLE, logprob)


def error_event(refusal: RefusalError) -> bytes:
    """What a stream ends with if it cannot go on."""
    return b"data: " + packed(refusal.body) + b"\n\n"


async def chunks(
    envelope: Envelope, bursts: AsyncIterator[list[Piece]], n: int, running_usage: Any, by_step: bool = False
) -> AsyncGenerator[tuple[bytes, list[Output]]]:
    """Events for every burst, and the outputs that ended in it. What came at once for a sample is one event.
    running_usage: makes what every event says of usage, as a mapping of fields. by_step: every step is an event, and
    told."""
    begun: set[int] = set()
    endpoint = envelope.endpoint
    async for burst in bursts:
        choices: list[Choice] = []
        for index, pieces in _singly(burst, n) if by_step else _by_sample(burst, n):
            if index not in begun:
                begun.add(index)
                choices += endpoint.begin(index)
            text = "".join(piece.text for piece in pieces)
            logprobs = [one for piece in pieces for one in piece.logprobs]
            end = pieces[-1].finish_reason
            if by_step:
                first, *others = endpoint.delta(index, text, logprobs, end)
                choices += [first | {"forerun": _step(pieces[0])}, *others]
            elif text or logprobs or end:
                choices += endpoint.delta(index, text, logprobs, end)
        more = running_usage()
        events = b"".join(envelope.chunk([choice], **more) for choice in choices)
        yield events, [piece.output for piece in burst if piece.output]


def _step(piece: Piece) -> dict[str, Any]:
    """Who proposed the tokens of a step ("": the target itself), and how many were drafted."""
    tokens = [{"text": text, "by": by} for text, by in zip(piece.texts, piece.origins, strict=True)]
    return {"tokens": tokens, "drafted": piece.proposed}


def _singly(burst: Sequence[Piece], n: int) -> Iterator[tuple[int, list[Piece]]]:
    for piece in burst:
        yield piece.prompt_index * n + piece.sample, [piece]


def _by_sample(burst: Sequence[Piece], n: int) -> Iterable[tuple[int, list[Piece]]]:
    found: dict[int, list[Piece]] = {}
    for index, pieces in _singly(burst, n):
        found.setdefault(index, []).extend(pieces)
    return found.items()
