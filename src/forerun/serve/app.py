"""The endpoints of one engine. What clients see of them is OpenAI's, or has vLLM's names."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from inspect import signature
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response, StreamingResponse

import forerun
from forerun.engine.engine import Engine
from forerun.engine.requests import Output
from forerun.errors import RequestError
from forerun.serve.asked import Asked, Chat, Completion, Detokenize, Tokenize
from forerun.serve.desk import Call, Desk, Job, Limits
from forerun.serve.figures import Figures
from forerun.serve.gate import Gate, report
from forerun.serve.keys import Keys
from forerun.serve.refusal import GONE, RefusalError, answer, misfit
from forerun.serve.said import DONE, Chats, Completions, Endpoint, Envelope, Spelling, chunks, error_event

T = TypeVar("T")

PAGE = {
    "content-security-policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}
"""The page asks this server and nobody else, and stands in no other page."""

AT_ONCE = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Proxies are to keep nothing of a stream back."""

REFUSED = {
    400: "what is asked for makes no sense, or does not fit into the context",
    401: "the API key is missing or wrong",
    404: "there is no such model or path",
    408: "the answer takes longer than it may",
    413: "the body is too large",
    422: "this model cannot do that",
    429: "the queue is full",
    500: "a mistake of the server",
    503: "the server is about to end",
}


@dataclass(frozen=True)
class Service:
    """What a server is made of. name: of the model. template: a chat template instead of the model's own. origins: of
    web pages that may ask (CORS)."""

    engine: Engine
    name: str
    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=Keys)
    template: str | None = None
    origins: Sequence[str] = ()


def app_of(service: Service) -> FastAPI:
    """The application; `app.state.desk` is its desk. One process, one application, one engine."""
    figures = Figures(service.name, service.engine)
    desk = Desk(service.engine, service.limits, figures)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await desk.close()

    app = FastAPI(
        title="forerun",
        version=forerun.__version__,
        lifespan=lifespan,
        docs_url=None,  # pages that load scripts from elsewhere
        redoc_url=None,
        responses={status: {"description": sense} for status, sense in REFUSED.items()},
    )
    app.state.desk = desk
    app.add_middleware(Gate, keys=service.keys, limits=service.limits, figures=figures)
    if service.origins:
        app.add_middleware(CORSMiddleware, allow_origins=service.origins, allow_methods=["*"], allow_headers=["*"])
    app.add_exception_handler(RefusalError, _refused)
    app.add_exception_handler(RequestValidationError, _misfit)
    app.add_exception_handler(HTTPException, _no_such_thing)
    clerk = Clerk(service, desk)
    _generating(app, clerk)
    _spelling(app, clerk)
    _telling(app, service, desk, figures)
    return app


# ---- the endpoints


def _generating(app: FastAPI, clerk: Clerk) -> None:
    @app.post("/v1/completions")
    async def completions(body: Completion, request: Request) -> Response:
        return await clerk.complete(body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        return await clerk.chat(body, request)

    @app.post("/v1/embeddings")
    async def embeddings() -> Response:
        raise RefusalError(422, "this server has no embeddings, its model continues texts: ask a model made for them")


def _spelling(app: FastAPI, clerk: Clerk) -> None:
    @app.post("/tokenize")
    async def tokenize(body: Tokenize) -> Response:
        ids = await clerk.encoded(body.words, {})
        return answer({"tokens": ids, "count": len(ids), "max_model_len": clerk.engine.target.max_length})

    @app.post("/detokenize")
    async def detokenize(body: Detokenize) -> Response:
        return answer({"prompt": await asyncio.to_thread(clerk.decoded, body.tokens)})


def _telling(app: FastAPI, service: Service, desk: Desk, figures: Figures) -> None:
    born = int(time.time())

    def card() -> dict[str, Any]:
        engine = service.engine
        can_chat = bool(service.template or getattr(engine.tokenizer, "chat_template", None))
        return {
            "id": service.name,
            "object": "model",
            "created": born,
            "owned_by": "forerun",
            "max_model_len": engine.target.max_length,
            "forerun": {"target": service.name, "drafter": engine.drafter.name, "chat": can_chat},
        }

    page = resources.files("forerun.serve").joinpath("page.html").read_bytes()

    @app.get("/", include_in_schema=False)
    async def watch() -> Response:
        return Response(page, media_type="text/html", headers=PAGE)

    @app.get("/v1/models")
    async def models() -> Response:
        return answer({"object": "list", "data": [card()]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        _demand_model(model, service.name)
        return answer(card())

    @app.get("/health")
    async def health() -> Response:
        if desk.is_draining:
            raise RefusalError(503, "the server is about to end")
        return answer({"status": "ok"})

    @app.get("/version")
    async def version() -> Response:
        return answer({"version": forerun.__version__})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(figures.text(), media_type=CONTENT_TYPE_LATEST)


# ---- how they answer


class Clerk:
    """Reads what is asked, has it answered, and writes the answer."""

    def __init__(self, service: Service, desk: Desk):
        self.engine, self._name, self._desk = service.engine, service.name, desk
        self._tokenizer: Any = service.engine.tokenizer
        self._spelling = Spelling(self._tokenizer)
        self._template = {"chat_template": service.template} if service.template else {}
        self._own = _reserved(self._tokenizer)
        self._fingerprint = f"forerun-{forerun.__version__}"

    async def complete(self, asked: Completion, request: Request) -> Response:
        job = await self._admitted(asked, asked.prompts, request, {})
        echoed = [one if isinstance(one, str) else self.decoded(one) for one in asked.prompts] if asked.echo else ()
        return await self._answer(asked, job, Completions(self._spelling, job.params.n, echoed), request)

    async def chat(self, asked: Chat, request: Request) -> Response:
        if not (self._template or getattr(self._tokenizer, "chat_template", None)):
            raise RefusalError(
                422, "this model has no chat template: use /v1/completions, or serve it with --chat-template"
            )
        if strange := [name for name in asked.told if name in self._own]:
            raise RefusalError(
                400, f"chat_template_kwargs cannot set {strange[0]}: leave it out", "chat_template_kwargs"
            )
        talk = asked.talk
        job = await self._admitted(asked, [talk], request, asked.told)
        if "tools" in asked.told and await self.encoded(talk, {**asked.told, "tools": None}) == job.prompts[0]:
            raise RefusalError(422, "this model's chat template takes no tools: leave them out", "tools")
        return await self._answer(asked, job, Chats(self._spelling), request)

    async def encoded(self, words: Any, told: Mapping[str, Any]) -> list[int]:
        """Token ids of a text or of messages."""
        try:
            return await asyncio.to_thread(self.engine.encode, words, {**told, **self._template})
        except RequestError as error:
            raise RefusalError.of(error) from None

    def decoded(self, ids: Sequence[int]) -> str:
        if any(not 0 <= token < self.engine.target.vocab_size for token in ids):
            raise RefusalError(400, f"token ids are 0 to {self.engine.target.vocab_size - 1}", "tokens")
        text: str = self._tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    async def _admitted(self, asked: Asked, prompts: Any, request: Request, told: Mapping[str, Any]) -> Job:
        _demand_model(asked.model, self._name)
        call: Call = request.state.call
        params = asked.params(call.tenant, self._desk.limits.new_tokens)
        return await self._desk.admit(prompts, params, call, {**told, **self._template})

    async def _answer(self, asked: Asked, job: Job, endpoint: Endpoint, request: Request) -> Response:
        envelope = Envelope(endpoint, self._name, self._fingerprint)
        if asked.stream:
            events = self._events(asked, job, envelope, request.state.call)
            return StreamingResponse(events, media_type="text/event-stream", headers=AT_ONCE)
        outputs = await unless_gone(request, self._desk.outputs(job))
        return answer(envelope.whole(outputs, job.usage, self._metrics(asked, job, outputs)))

    async def _events(self, asked: Asked, job: Job, envelope: Envelope, call: Call) -> AsyncGenerator[bytes]:
        """Once a stream has begun its status is told, so errors are events."""
        outputs: list[Output] = []
        nothing = {"usage": None} if asked.wants_usage else {}

        def usage() -> dict[str, Any]:
            return {"usage": job.usage} if asked.wants_running_usage else nothing

        bursts = self._desk.bursts(job)
        told = chunks(envelope, bursts, job.params.n, usage, asked.forerun.steps)
        try:
            async with aclosing(bursts), aclosing(told) as events:
                async for event, ended in events:
                    outputs += ended
                    if event:
                        yield event
            if metrics := self._metrics(asked, job, outputs):
                yield envelope.chunk([], usage=job.usage, metrics={"speculative_decoding": metrics})
            elif asked.wants_usage:
                yield envelope.chunk([], usage=job.usage)
        except RefusalError as refusal:
            call.status = refusal.status
            yield error_event(refusal)
        except Exception as error:
            report(call, error)
            call.status = 500
            yield error_event(RefusalError(500, f"the server made a mistake ({call.name})"))
        yield DONE

    @staticmethod
    def _metrics(asked: Asked, job: Job, outputs: Sequence[Output]) -> dict[str, object] | None:
        return job.watch.speculation.as_dict(outputs[0].stats) if asked.forerun.metrics and outputs else None


def _reserved(tokenizer: Any) -> set[str]:
    """What a chat template is told by the server, and not by clients."""
    return {*signature(tokenizer.apply_chat_template).parameters} - {"tools"}


def _demand_model(asked: str, name: str) -> None:
    if asked != name:
        raise RefusalError(404, f"the model {asked[:100]!r} is not here: ask for {name!r}", "model", "model_not_found")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result, or RefusalError (499) as soon as the client has gone; the work is cancelled then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RefusalError(GONE, "the client has gone")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---- refusals


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusalError)
    return error.response()


async def _misfit(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return misfit(error.errors()).response()


async def _no_such_thing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {404: "there is nothing at this path", 405: "this path takes another method"}
    response = RefusalError(error.status_code, said.get(error.status_code, str(error.detail))).response()
    response.headers.update(error.headers or {})
    return response
