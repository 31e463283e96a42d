"""An engine for asyncio: many tasks ask, one thread drives, and the requests of all run in one batch."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any, Self

from forerun.engine.engine import Engine
from forerun.engine.prompts import Prompts, conversations
from forerun.engine.requests import Output, Piece
from forerun.engine.session import Session, Wishes, wanted


class _Mail(deque[Piece]):
    """The inbox of a task: whatever comes wakes its loop. error: nothing will come any more, because of this."""

    def __init__(self) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self._loop, self._arrival = asyncio.get_running_loop(), asyncio.Event()

    def append(self, piece: Piece) -> None:
        super().append(piece)
        self._wake()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._arrival.set)

    async def arrived(self) -> None:
        """Return when there is a piece; raise what keeps pieces from coming."""
        while not self:
            self._arrival.clear()
            if self:
                return
            if self.error:
                raise self.error
            await self._arrival.wait()


class AsyncEngine:
    """`Engine.generate`, `stream` and `chat` for asyncio, on an engine that others may go on calling.

        async with forerun.AsyncEngine(forerun.load("models/target", drafter="lookup")) as engine:
            async for piece in engine.stream("def main():", max_new_tokens=64):
                print(piece.text, end="")

    Any number of tasks, of any number of event loops, may ask at the same time. A task that is
    cancelled, or leaves its loop over the pieces, takes its requests along. The steps are made in a
    thread that ends when nobody is waiting, so the event loop is never blocked by them; prompts are
    tokenized in threads too.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._driver: threading.Thread | None = None
        self._guard = threading.Lock()
        self._open: dict[int, _Mail] = {}

    async def generate(self, prompts: Prompts, params: Wishes = None, **wishes: Any) -> list[Output]:
        """As `Engine.generate`."""
        found = [piece.output async for piece in self.stream(prompts, params, **wishes) if piece.output]
        return sorted(found, key=lambda output: (output.prompt_index, output.sample))

    async def chat(
        self, messages: str | Prompts, params: Wishes = None, *, system: str | None = None, **wishes: Any
    ) -> list[Output]:
        """As `Engine.chat`."""
        return await self.generate(conversations(messages, system), params, **wishes)

    async def stream(
        self, prompts: Prompts, params: Wishes = None, text: bool = True, **wishes: Any
    ) -> AsyncGenerator[Piece]:
        """As `Engine.stream`."""
        async with aclosing(self.bursts(prompts, params, text, **wishes)) as bursts:
            async for burst in bursts:
                for piece in burst:
                    yield piece

    async def bursts(
        self, prompts: Prompts, params: Wishes = None, text: bool = True, **wishes: Any
    ) -> AsyncGenerator[list[Piece]]:
        """As `stream`, but all that has come by then at once: who is slower than the engine has less to do then."""
        asked, mail = wanted(params, wishes), _Mail()
        session = await asyncio.to_thread(Session, self.engine, prompts, asked, text, mail)
        self._drive_for(mail)
        try:
            while not session.is_over:
                await mail.arrived()
                yield [next(session) for _ in range(len(mail))]
        finally:
            self._open.pop(id(mail), None)
            session.close()

    async def close(self) -> None:
        """As `Engine.close`; returns when the thread that drives has ended."""
        self.engine.close()
        if driver := self._driver:
            await asyncio.to_thread(driver.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _drive_for(self, mail: _Mail) -> None:
        with self._guard:
            self._open[id(mail)] = mail
            if self._driver is None:
                self._driver = threading.Thread(target=self._drive, name="forerun", daemon=True)
                self._driver.start()

    def _drive(self) -> None:
        """Make steps until nobody waits. Who asks while this thread is about to end starts another one."""
        while True:
            try:
                while self.engine.drive():
                    pass
            except Exception as error:  # no request could be told of it, so all are
                for mail in list(self._open.values()):
                    mail.fail(error)
            except BaseException as error:  # the thread is told to exit: the next one who asks starts another
                with self._guard:
                    self._driver, left = None, list(self._open.values())
                for mail in left:
                    mail.fail(error)
                return
            with self._guard:
                if not self.engine.is_busy:
                    self._driver = None
                    return
