"""Requests to a server that speaks OpenAI's language, as many clients would send them, and what became of them.

Two kinds of load. *Open*: requests arrive by chance (Poisson), so many a second, whether or not the server keeps up;
that is what a service meets. *Closed*: so many clients, each of which asks again once it is answered.

Times are seconds on this side of the connection. An event of a stream may hold several tokens where the server
speculates, so tokens are those of the server's own count (`usage`), not events, and what a token takes is the time
between the first event and the last over the tokens behind the first event's.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from forerun.errors import ForerunError

if TYPE_CHECKING:
    import httpx

PATH = "/v1/completions"
MARK, END = "data:", "[DONE]"


@dataclass(frozen=True)
class Ask:
    """What every request is made of. body: fields beside the prompt, such as max_tokens."""

    prompts: Sequence[str]
    body: Mapping[str, Any]


@dataclass
class Seen:
    """One request. Seconds since the load began; error: why there is no answer, "" where there is one.

    tokens, read, cached: of the answer, of the prompt, and of those the ones that the server did not have to read
    again, as it counts them; events: of the stream that had text; silence: the longest time between two.
    """

    begun: float
    first: float = 0.0
    ended: float = 0.0
    tokens: int = 0
    read: int = 0
    cached: int = 0
    events: int = 0
    silence: float = 0.0
    text: str = field(default="", repr=False)
    error: str = ""

    @property
    def wait(self) -> float:
        """Until the first text was there."""
        return self.first - self.begun

    @property
    def pace(self) -> float | None:
        """Seconds per token behind those of the first event; None where there were none."""
        behind = self.tokens - self.tokens / max(1, self.events)
        return (self.ended - self.first) / behind if self.events > 1 else None


@dataclass(frozen=True)
class Promise:
    """A service level: seconds until the first text, and per token after it."""

    wait: float
    pace: float

    def is_kept(self, one: Seen) -> bool:
        return not one.error and one.wait <= self.wait and (one.pace or 0.0) <= self.pace


@dataclass(frozen=True)
class Summary:
    """Of one load. Seconds: medians and the 95th percentile of answered requests, NaN without any. goodput: requests a
    second that kept the promise; tokens_per_second: of all that were answered."""

    load: str
    answered: int
    failed: int
    seconds: float
    tokens_per_second: float
    goodput: float
    wait: float
    wait_95: float
    pace: float
    pace_95: float
    silence_95: float
    cached: float


def summary(load: Load, seen: Sequence[Seen], promise: Promise) -> Summary:
    """The load lasts from its beginning to the end of its last request."""
    fine = [one for one in seen if not one.error]
    seconds = max((one.ended for one in seen), default=0.0) or 1e-9
    paces = [one.pace for one in fine if one.pace is not None]
    return Summary(
        load.name,
        len(fine),
        len(seen) - len(fine),
        seconds,
        sum(one.tokens for one in fine) / seconds,
        sum(map(promise.is_kept, seen)) / seconds,
        *_middle_and_end([one.wait for one in fine]),
        *_middle_and_end(paces),
        _middle_and_end([one.silence for one in fine])[1],
        sum(one.cached for one in fine) / max(1, sum(one.read for one in fine)),
    )


def _middle_and_end(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return float("nan"), float("nan")
    middle, end = np.percentile(values, [50, 95])
    return float(middle), float(end)


# ---- loads


class Load(Protocol):
    """When which request goes out."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> float:
        """What is drawn along the axis."""

    async def send(self, client: Client, count: int) -> list[Seen]:
        """So many requests, and what became of them."""


@dataclass(frozen=True)
class Open:
    """rate: requests a second."""

    rate: float
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.rate:g}/s"

    @property
    def size(self) -> float:
        return self.rate

    async def send(self, client: Client, count: int) -> list[Seen]:
        luck, at, tasks = random.Random(self.seed), 0.0, []
        for number in range(count):
            await asyncio.sleep(max(0.0, at - client.now()))
            tasks.append(asyncio.create_task(client.ask(number)))
            at += luck.expovariate(self.rate)
        return list(await asyncio.gather(*tasks))


@dataclass(frozen=True)
class Closed:
    clients: int

    @property
    def name(self) -> str:
        return f"{self.clients} client{'s' if self.clients > 1 else ''}"

    @property
    def size(self) -> float:
        return self.clients

    async def send(self, client: Client, count: int) -> list[Seen]:
        left = iter(range(count))

        async def one() -> list[Seen]:
            return [await client.ask(number) for number in left]

        parts = await asyncio.gather(*(one() for _ in range(min(self.clients, count))))
        return [seen for part in parts for seen in part]


# ---- one request


class Client:
    """Asks one server. begun: where its seconds begin."""

    def __init__(self, http: httpx.AsyncClient, ask: Ask):
        self._http, self._ask = http, ask
        self.begun = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.begun

    async def ask(self, number: int) -> Seen:
        """Send one request and read its stream to the end. What goes wrong is in the answer."""
        import httpx

        prompts = self._ask.prompts
        body = {
            "prompt": prompts[number % len(prompts)],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._ask.body,
        }
        seen = Seen(self.now())
        try:
            async with self._http.stream("POST", PATH, json=body) as answer:
                if answer.status_code != httpx.codes.OK:
                    await answer.aread()
                    seen.error = f"{answer.status_code} {_reason(answer)}"
                else:
                    await self._listen(answer.aiter_lines(), seen)
        except (httpx.HTTPError, ValueError) as error:
            seen.error = f"{type(error).__name__} {error}".strip()
        seen.ended = seen.ended or self.now()
        return seen

    async def _listen(self, lines: AsyncIterator[str], seen: Seen) -> None:
        is_whole, last = False, 0.0
        async for line in lines:
            if not line.startswith(MARK):
                continue
            data = line[len(MARK) :].strip()
            if data == END:
                is_whole = True
                break
            event = json.loads(data)
            if "error" in event:
                raise ValueError(_message(event))
            if any(choice.get("text") for choice in event.get("choices", ())):
                now = self.now()
                seen.silence = max(seen.silence, now - last) if seen.events else 0.0
                seen.first = seen.first or now
                seen.ended = last = now
                seen.events += 1
                seen.text += event["choices"][0]["text"]
            if usage := event.get("usage"):
                seen.tokens, seen.read = usage["completion_tokens"], usage["prompt_tokens"]
                seen.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if not is_whole:
            raise ValueError("the stream ended before it was done")
        if not seen.events:
            seen.first = seen.ended = self.now()
        if not seen.tokens and seen.events:
            raise ValueError("the server does not count tokens (stream_options.include_usage)")


def _reason(answer: httpx.Response) -> str:
    try:
        return _message(answer.json())
    except ValueError:
        return answer.reason_phrase


def _message(body: Any) -> str:
    error = body.get("error", body) if isinstance(body, Mapping) else body
    return str(error.get("message", error) if isinstance(error, Mapping) else error)


# ---- a server


@dataclass(frozen=True)
class Server:
    """base: its address, as `http://127.0.0.1:8000`. key: what it asks for, if anything."""

    name: str
    base: str
    key: str = ""

    @staticmethod
    def named(word: str, key: str = "") -> Server:
        """NAME=URL, or the URL alone. ForerunError if there is none."""
        name, _, url = ("", "", word) if word.startswith("http") else word.partition("=")
        if not url.startswith(("http://", "https://")):
            raise ForerunError(f"{word!r} is no server: write http://HOST:PORT, or NAME=http://HOST:PORT")
        base = url.rstrip("/").removesuffix("/v1")
        return Server(name or base.partition("://")[2], base, key)

    def run(self, load: Load, ask: Ask, count: int, limit: float = 600.0) -> list[Seen]:
        """So many requests under this load. limit: seconds after which a request is given up."""
        return asyncio.run(self._run(load, ask, count, limit))

    async def _run(self, load: Load, ask: Ask, count: int, limit: float) -> list[Seen]:
        import httpx

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=self.base, headers=headers, timeout=limit, limits=limits) as http:
            return await load.send(Client(http, ask), count)

    def model(self) -> str:
        """What it serves first. ForerunError if it does not answer."""
        import httpx

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            answer = httpx.get(f"{self.base}/v1/models", headers=headers, timeout=30)
        except httpx.HTTPError as error:
            raise ForerunError(f"nothing answers at {self.base} ({error}): is the server running?") from None
        if answer.status_code != httpx.codes.OK:
            raise ForerunError(f"{self.base} answers {answer.status_code}: {_reason(answer)}")
        with suppress(ValueError, KeyError, IndexError, TypeError):
            return str(answer.json()["data"][0]["id"])
        raise ForerunError(f"{self.base}/v1/models names no model: is it a server of OpenAI's kind?")


def demand_httpx() -> None:
    """ForerunError where httpx is missing."""
    try:
        import httpx  # noqa: F401
    except ImportError:
        raise ForerunError("to ask a server takes httpx: install it with pip install 'forerun[serve]'") from None
