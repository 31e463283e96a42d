"""From an application to a server that listens, and ends without breaking off what it has begun to say."""

from __future__ import annotations

import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from forerun.errors import ForerunError
from forerun.serve.desk import Desk

LAST_WORDS = 5
"""Seconds for answers that are cut short to reach their clients."""


def bound(host: str, port: int) -> socket.socket:
    """A socket there, before anything that takes long is done. ForerunError if it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, OverflowError) as error:
        raise ForerunError(f"cannot listen on {host}, port {port} ({error}): give another --host or --port") from None
    return made


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT drains: whoever is being answered gets the answer, everybody else 503, and the port
    stays open until then. What is not said after the limit is broken off with an error. A second signal ends it now."""

    def __init__(self, app: FastAPI, keep_alive: int = 5):
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=keep_alive,
                timeout_graceful_shutdown=LAST_WORDS,
            )
        )
        self._desk: Desk = app.state.desk
        self._until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._desk.is_draining:
            super().handle_exit(sig, frame)
            return
        self._until = time.monotonic() + self._desk.limits.drain_seconds
        self._desk.drain()

    async def on_tick(self, counter: int) -> bool:
        if self._desk.is_draining and not self.should_exit:
            if not self._desk.is_empty and time.monotonic() > self._until:
                await self._desk.close()
            self.should_exit = self._desk.is_empty
        return await super().on_tick(counter)
