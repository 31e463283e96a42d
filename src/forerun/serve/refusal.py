"""Answers that are errors, in OpenAI's shape: one sentence, the parameter it is about, a code for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from forerun.errors import ForerunError, RequestError

GONE = 499
"""The client has gone before its answer: nobody reads this status but the log and the metrics."""
RATE, SERVER, INVALID = "rate_limit_error", "server_error", "invalid_request_error"
ABOUT = re.compile(r"(\w+)=")


class RefusalError(ForerunError):
    """status: of HTTP. again: after so many seconds it is worth another try; None: it is not."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, again: int | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.again = status, param, code, again

    @staticmethod
    def of(error: RequestError) -> RefusalError:
        """What the engine refuses; its sentences about a parameter begin with NAME=."""
        about = ABOUT.match(str(error))
        return RefusalError(400, str(error), about[1] if about else None)

    @property
    def body(self) -> dict[str, object]:
        kind = RATE if self.status == 429 else SERVER if self.status >= 500 else INVALID
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """`x-should-retry` is read by OpenAI's clients, which would otherwise try some of these again."""
        if self.again is not None:
            return {"retry-after": str(self.again)}
        return {"x-should-retry": "false"} if self.status in (408, 500) else {}

    def response(self) -> Response:
        return answer(self.body, self.status, self.headers)


def packed(value: object) -> bytes:
    """As JSON in UTF-8. Half characters, which a client may have sent as escapes, go back as escapes."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(packed(value), status, headers, media_type="application/json")


def misfit(errors: Sequence[Any]) -> RefusalError:
    """What a body was refused for, of pydantic's complaints the first."""
    error = errors[0]
    place = [str(part) for part in error["loc"] if part != "body"]
    name = next(iter(place), None)
    if error["type"] == "json_invalid" or not place:
        return RefusalError(400, "the body is no JSON object: send one as application/json")
    if error["type"] == "extra_forbidden":
        return RefusalError(
            400, f"Unrecognized request argument supplied: {'.'.join(place)}", name, "unknown_parameter"
        )
    if error["type"] == "missing":
        return RefusalError(400, f"{'.'.join(place)} is missing: give it", name, "missing_required_parameter")
    return RefusalError(400, f"{name} makes no sense: {error['msg']}", name, "invalid_value")
