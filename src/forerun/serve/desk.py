"""The desk between HTTP and the engine: who may come in, how long they may stay, and who leaves when.

Every request holds a place, as many as it has samples, from its arrival until the gate closes its call, whatever
happens in between; so no path through a handler can keep one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from forerun.engine.asynchronous import AsyncEngine
from forerun.engine.engine import Engine
from forerun.engine.prompts import Prompt
from forerun.engine.requests import Output, Piece
from forerun.errors import RequestError
from forerun.sampling import SamplingParams
from forerun.serve.figures import Figures, Watch
from forerun.serve.refusal import RefusalError

LONGEST_WAIT = 60
"""Seconds: nobody is told to come back later than that."""


@dataclass(frozen=True)
class Limits:
    """What one server gives. waiting: samples in the queue. prompt_tokens, new_tokens: of a sample; None: as the
    context has it. body_bytes: of a request. seconds: for an answer. drain_seconds: for those that are being answered
    when the server is told to end."""

    waiting: int = 256
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    body_bytes: int = 4 << 20
    seconds: float = 600.0
    drain_seconds: float = 30.0


@dataclass
class Call:
    """One HTTP request. tenant: whose. places: how many samples it holds at the desk."""

    name: str
    tenant: str = ""
    status: int = 0
    begun: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    watch: Watch | None = None
    places: int = 0
    desk: Desk | None = None

    def close(self) -> None:
        """Give the places back. It may be done again."""
        if self.desk is not None:
            self.desk.leave(self)


@dataclass(frozen=True)
class Job:
    """What was admitted: prompts as token ids."""

    prompts: list[list[int]]
    params: SamplingParams
    watch: Watch

    @property
    def usage(self) -> dict[str, Any]:
        """As far as it has come."""
        read, said = sum(map(len, self.prompts)), self.watch.new_tokens
        return {
            "prompt_tokens": read,
            "completion_tokens": said,
            "total_tokens": read + said,
            "prompt_tokens_details": {"cached_tokens": self.watch.cached_tokens},
        }


class Desk:
    """One engine, and everybody who wants something of it."""

    def __init__(self, engine: Engine, limits: Limits, figures: Figures):
        self.engine, self.limits, self.figures = engine, limits, figures
        self.is_draining = False
        self._asked = AsyncEngine(engine)
        self._taken = 0
        self._pace = 0.0  # seconds that an answer takes, smoothed

    @property
    def is_empty(self) -> bool:
        return self._taken == 0

    def drain(self) -> None:
        """Whoever is here is answered; nobody comes in."""
        self.is_draining = True

    async def close(self) -> None:
        """Whoever is here leaves without an answer."""
        self.is_draining = True
        await self._asked.close()

    async def admit(
        self, prompts: Sequence[Prompt], params: SamplingParams, call: Call, template: Mapping[str, Any] | None = None
    ) -> Job:
        """Take a request in. RefusalError if it cannot be served, now or ever; nothing is generated before."""
        self._enter(len(prompts) * params.n, call)
        try:
            ids = [await asyncio.to_thread(self.engine.encode, prompt, template) for prompt in prompts]
            for one in ids:
                self._demand_room(len(one))
                self.engine.limit_of(one, params)
        except RequestError as error:
            raise RefusalError.of(error) from None
        call.watch = self.figures.watch()
        call.watch.prompts([len(one) for one in ids])
        call.prompt_tokens = sum(map(len, ids))
        return Job(ids, params, call.watch)

    async def bursts(self, job: Job) -> AsyncGenerator[list[Piece]]:
        """What is said, as it comes. RefusalError for what keeps it from coming to its end."""
        try:
            async with (
                asyncio.timeout(self.limits.seconds),
                aclosing(self._asked.bursts(job.prompts, job.params)) as all_,
            ):
                async for burst in all_:
                    for piece in burst:
                        job.watch.piece(piece)
                        if piece.finish_reason == "interrupted":
                            raise RefusalError(503, "the server ends before this answer does: ask again", again=1)
                    yield burst
        except TimeoutError:
            raise RefusalError(
                408,
                f"the answer takes longer than {self.limits.seconds:g} seconds: ask for fewer tokens",
                code="timeout",
            ) from None
        except RequestError as error:
            raise RefusalError.of(error) from None

    async def outputs(self, job: Job) -> list[Output]:
        """One per prompt and sample, in that order."""
        async with aclosing(self.bursts(job)) as bursts:
            found = [piece.output async for burst in bursts for piece in burst if piece.output]
        return sorted(found, key=lambda output: (output.prompt_index, output.sample))

    # ---- places

    def _enter(self, count: int, call: Call) -> None:
        if self.is_draining:
            raise RefusalError(503, "the server is about to end and takes nothing new: ask another one", again=1)
        room = self.engine.max_rows + self.limits.waiting
        if count > room:
            raise RefusalError(
                400, f"{count} samples are asked for at once, and this server holds {room}: ask for fewer", "n"
            )
        if self._taken + count > room:
            raise RefusalError(
                429, "the queue is full: come back later", code="rate_limit_exceeded", again=self._wait()
            )
        self._taken += count
        call.places, call.desk = count, self

    def leave(self, call: Call) -> None:
        if call.places:
            seconds = time.perf_counter() - call.begun
            self._pace = 0.9 * self._pace + 0.1 * seconds if self._pace else seconds
        self._taken -= call.places
        call.places = 0

    def _wait(self) -> int:
        """Seconds until there may be room: about as long as the next answer takes to end, with all rows at work."""
        return min(LONGEST_WAIT, max(1, math.ceil(self._pace / self.engine.max_rows)))

    def _demand_room(self, length: int) -> None:
        most, context = self.limits.prompt_tokens, self.engine.target.max_length
        if length >= context or (most is not None and length > most):
            raise RefusalError(
                400,
                f"the prompt has {length} tokens and may have {min(context - 1, most or context)}: shorten it",
                code="context_length_exceeded",
            )
