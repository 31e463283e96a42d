"""The gate that every request passes: its id, its key, the size of its body, and the one line that is logged of it.

Logged are ids, counts and seconds; never a text, nor a path or a message, which may hold one.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
from secrets import token_hex

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from forerun.serve.desk import Call, Limits
from forerun.serve.figures import Figures
from forerun.serve.keys import Keys
from forerun.serve.refusal import GONE, RefusalError

log = logging.getLogger(__name__)

OPEN = frozenset(("/", "/health", "/version", "/metrics"))
"""Asked without a key: by machines that have none, and the page, which asks for one. They tell nothing of texts."""
NAME = re.compile(r"[\w.:-]{1,64}", re.ASCII)
HEADER = "x-request-id"


class Gate:
    """ASGI middleware. It owns the call of a request (`scope["state"]["call"]`), and closes it whatever happens."""

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits, figures: Figures):
        self._app, self._keys, self._limits, self._figures = app, keys, limits, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(HEADER, "")
        call = Call(given if NAME.fullmatch(given) else token_hex(8))
        scope.setdefault("state", {})["call"] = call
        wire = Wire(call, receive, send, self._limits)
        try:
            self._demand_entrance(scope, headers, call)
            await self._app(scope, wire.receive, wire.send)
        except RefusalError as refusal:
            await refusal.response()(scope, wire.receive, wire.send)
        except Exception as error:
            report(call, error)
            if not wire.is_begun:
                await RefusalError(500, f"the server made a mistake ({call.name})").response()(
                    scope, receive, wire.send
                )
        finally:
            call.close()
            if wire.is_gone and not wire.is_over:
                call.status = GONE
            self._note(scope, call)

    def _demand_entrance(self, scope: Scope, headers: Headers, call: Call) -> None:
        if scope["path"] not in OPEN:
            tenant = self._keys.tenant(headers.get("authorization", ""))
            if tenant is None:
                raise RefusalError(
                    401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
                )
            call.tenant = tenant
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.body_bytes:
            raise RefusalError(413, too_large(self._limits.body_bytes))

    def _note(self, scope: Scope, call: Call) -> None:
        endpoint = getattr(scope.get("route"), "path", "other")
        self._figures.responses.labels(endpoint=endpoint, status=str(call.status)).inc()
        told = {
            "request": call.name,
            "method": scope["method"],
            "endpoint": endpoint,
            "status": call.status,
            "tenant": call.tenant or "-",
            "seconds": f"{time.perf_counter() - call.begun:.4f}",
        }
        if call.watch is not None:
            first = call.watch.first_token_seconds
            told |= {"prompt_tokens": call.prompt_tokens, "new_tokens": call.watch.new_tokens}
            told |= {} if first is None else {"first_token_seconds": f"{first:.4f}"}
        line = " ".join(f"{name}={value}" for name, value in told.items())
        log.log(logging.DEBUG if endpoint in OPEN else logging.INFO, "%s", line)


class Wire:
    """What goes to and fro: bodies up to their limits, and the request's id with every answer."""

    def __init__(self, call: Call, receive: Receive, send: Send, limits: Limits):
        self._call, self._receive, self._send, self._limits = call, receive, send, limits
        self._left = limits.body_bytes
        self._is_read = False
        self.is_begun = self.is_over = self.is_gone = False

    async def receive(self) -> Message:
        message = await (self._receive() if self._is_read else self._in_time())
        if message["type"] == "http.disconnect":
            self.is_gone = True
        self._is_read = self._is_read or not message.get("more_body")
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise HTTPException(413, too_large(self._limits.body_bytes))
        return message

    async def _in_time(self) -> Message:
        try:
            async with asyncio.timeout(self._call.begun + self._limits.seconds - time.perf_counter()):
                return await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body takes too long to come: send it at once") from None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.is_begun, self._call.status = True, message["status"]
            MutableHeaders(scope=message)[HEADER] = self._call.name
        elif not message.get("more_body") and not self.is_gone:
            self.is_over = True
        await self._send(message)


def too_large(most: int) -> str:
    return f"the body is larger than {most} bytes: send less"


def report(call: Call, error: Exception) -> None:
    """A mistake of ours: where it happened and of what kind it is, but not its message, which may quote a text."""
    places = "".join(traceback.format_tb(error.__traceback__))
    log.error("request=%s failed=%s\n%s", call.name, type(error).__name__, places.rstrip())
