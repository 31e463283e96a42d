"""What cannot be answered gets OpenAI's error with the right status, one sentence, and nothing of it stays."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from serving import CONTEXT, Serving

from forerun.serve.desk import Limits
from forerun.serve.keys import Keys

TALK = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"bogus": 1}, "bogus", "Unrecognized request argument supplied: bogus"),
        ({"stream_options": {"bogus": 1}, "stream": True}, "stream_options", "Unrecognized"),
        ({"temperature": -1}, "temperature", "temperature=-1"),
        ({"temperature": "1"}, "temperature", "number"),
        ({"temperature": float("nan")}, "temperature", "makes no sense"),
        ({"top_p": 0}, "top_p", "top_p=0"),
        ({"max_tokens": 0}, "max_new_tokens", "1 or more"),
        ({"n": 0}, "n", "n=0"),
        ({"n": 2, "temperature": 0}, "n", "greedy samples"),
        ({"n": 1000}, "n", "1000 samples"),
        ({"best_of": 3}, "best_of", "best_of is not here"),
        ({"suffix": "x"}, "suffix", "suffix is not here"),
        ({"echo": True, "logprobs": 1}, "echo", "one of them"),
        ({"logprobs": 21}, "logprobs", "0 to 20"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"400": 1}}, None, "outside the vocabulary"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "1024"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": ""}, None, "stop string is empty"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "for streams"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [400]}, None, "outside the vocabulary"),
        ({"prompt": "\ud800"}, None, "no characters"),
        ({"prompt": [1] * CONTEXT}, None, f"{CONTEXT} tokens"),
        ({"prompt": None}, "prompt", "makes no sense"),
    ],
    ids=str,
)
def test_completions_that_make_no_sense(served_once, asked, param, words):
    body = {"model": "tiny", "prompt": "x", **asked}
    found = served_once("/v1/completions", body, 400)
    assert words in found["message"] and found["type"] == "invalid_request_error"
    assert "\n" not in found["message"] and found["param"] == param


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"content": "x"}]}, "messages", "role is missing"),
        ({"messages": [{"role": "user"}]}, None, "no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "image_url"),
        ({"response_format": {"type": "yaml"}}, None, "use text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 1}}}}, None, "schema"),
        ({"constraint": {"regex": "["}}, None, "regex"),
        ({"constraint": {"regex": "a"}, "response_format": {"type": "text"}}, "constraint", "give one of them"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs to true"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "the same"),
        ({"functions": []}, "functions", "Unrecognized"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "cannot set chat_template"),
    ],
    ids=str,
)
def test_chats_that_make_no_sense(served_once, asked, param, words):
    found = served_once("/v1/chat/completions", {"model": "tiny", "messages": TALK, **asked}, 400)
    assert words in found["message"] and found["param"] == param


@pytest.fixture(scope="module")
def engine(made):
    return made()


@pytest.fixture
def served_once(served, engine):
    """One question that is refused; the error."""

    def call(path: str, body: Any, status: int) -> Any:
        async def work(serving: Serving) -> Any:
            text = json.dumps(body).encode()
            response = await serving.client.post(path, content=text, headers={"content-type": "application/json"})
            assert response.status_code == status, response.text
            assert response.headers["x-request-id"]
            return response.json()["error"]

        return served(work, engine.beside(engine.drafter))

    return call


def test_what_is_not_here(served):
    async def work(serving: Serving) -> None:
        found = await serving.post("/v1/completions", {"model": "gpt-9", "prompt": "x"}, 404)
        assert found["code"] == "model_not_found" and "'tiny'" in found["message"]
        assert (await serving.client.get("/v1/models/gpt-9")).status_code == 404
        assert (await serving.client.get("/nowhere")).json()["error"]["message"] == "there is nothing at this path"
        assert (await serving.client.get("/v1/completions")).status_code == 405
        found = await serving.post("/v1/embeddings", {"model": "tiny", "input": "x"}, 422)
        assert "no embeddings" in found["message"]
        assert (await serving.client.get("/docs")).status_code == 404  # it would load scripts from elsewhere

    served(work)


def test_what_is_here(served):
    async def work(serving: Serving) -> None:
        (card,) = (await serving.client.get("/v1/models")).json()["data"]
        assert card["id"] == "tiny" and card["max_model_len"] == CONTEXT
        assert (await serving.client.get("/v1/models/tiny")).json() == card
        assert (await serving.client.get("/health")).json() == {"status": "ok"}
        assert (await serving.client.get("/version")).json()["version"]
        paths = (await serving.client.get("/openapi.json")).json()["paths"]
        assert {"/v1/completions", "/v1/chat/completions", "/tokenize"} <= paths.keys()

    served(work)


@pytest.mark.parametrize("text", [b"{", b"", b"[]", b'"x"', b"\xff", b"[" * 100_000, b"1" * 5000])
def test_bodies_that_are_none(served, engine, text):
    async def work(serving: Serving) -> None:
        headers = {"content-type": "application/json"}
        response = await serving.client.post("/v1/completions", content=text, headers=headers)
        assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"

    served(work, engine.beside(engine.drafter))


def test_bodies_that_are_too_large(served):
    async def drip() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    async def work(serving: Serving) -> None:
        assert "2000 bytes" in (await serving.complete("x" * 2000, 413))["message"]
        headers = {"content-type": "application/json"}
        response = await serving.client.post("/v1/completions", content=drip(), headers=headers)
        assert response.status_code == 413 and "2000 bytes" in response.json()["error"]["message"]

    served(work, limits=Limits(body_bytes=2000))


def test_a_body_that_does_not_come(served):
    async def drip() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(20)

    async def work(serving: Serving) -> None:
        headers = {"content-type": "application/json"}
        response = await serving.client.post("/v1/completions", content=drip(), headers=headers)
        assert response.status_code == 408 and "takes too long" in response.json()["error"]["message"]

    served(work, limits=Limits(seconds=0.02))


def test_keys(served, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# who may ask\nsesame anna\n\nmellon\n")
    keys = Keys.of("third", file)

    async def work(serving: Serving) -> None:
        for wrong in ("", "Bearer ", "Bearer nothing", "Basic sesame", "sesame", "Bearer Sésame"):
            body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
            headers = {"authorization": wrong.encode()}
            response = await serving.client.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        for right in ("sesame", "mellon", "third"):
            await serving.post("/v1/completions", body, authorization=f"Bearer {right}")
        assert (await serving.client.get("/v1/models")).status_code == 401
        assert (await serving.client.get("/nowhere")).status_code == 401
        assert (await serving.client.get("/health")).status_code == 200

    served(work, keys=keys)
    assert keys.tenant("Bearer sesame") == "anna"
    assert (
        keys.tenant("Bearer mellon") == Keys.of("mellon", None).tenant("Bearer mellon") != keys.tenant("Bearer third")
    )


def test_other_origins_are_not_let_in_unless_they_are_named(served):
    async def asked(serving: Serving) -> Any:
        headers = {"origin": "http://page", "access-control-request-method": "POST"}
        return (await serving.client.options("/v1/completions", headers=headers)).headers

    assert "access-control-allow-origin" not in served(asked)
    assert served(asked, origins=("http://page",))["access-control-allow-origin"] == "http://page"


def test_a_queue_that_is_full(served, made):
    async def work(serving: Serving) -> None:
        first = asyncio.create_task(serving.complete(max_tokens=400, ignore_eos=True))
        while serving.desk.is_empty:
            await asyncio.sleep(0)
        body = {"model": "tiny", "prompt": "x"}
        response = await serving.client.post("/v1/completions", json=body)
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
        await serving.chat(n=3, status=400)
        await first
        await serving.complete(max_tokens=1)

    served(work, made("none", 1), limits=Limits(waiting=0))


def test_limits_of_prompts_and_answers(served):
    async def work(serving: Serving) -> None:
        assert (await serving.complete([1] * 11, 400))["code"] == "context_length_exceeded"
        assert (await serving.complete(max_tokens=7, status=400))["param"] == "max_tokens"
        found = await serving.chat([{"role": "u", "content": "x"}], ignore_eos=True)
        assert found["usage"]["completion_tokens"] == 6  # who says nothing gets what there is

    served(work, limits=Limits(prompt_tokens=10, new_tokens=6), template="{{ messages[0].content }}")


def test_an_answer_that_takes_too_long(served, made):
    async def work(serving: Serving) -> None:
        asked = {"max_tokens": 500, "ignore_eos": True}
        body = {"model": "tiny", "prompt": "x", **asked}
        response = await serving.client.post("/v1/completions", json=body)
        assert response.status_code == 408 and response.headers["x-should-retry"] == "false"
        *_, last = await serving.events("/v1/completions", prompt="x", **asked)
        assert last["error"]["code"] == "timeout"

    served(work, made("none"), limits=Limits(seconds=0.02))


def test_a_model_without_a_template(served, made):
    engine = made()
    engine.tokenizer, own = bare(engine.tokenizer), engine.tokenizer
    assert own.chat_template

    async def work(serving: Serving) -> None:
        assert "--chat-template" in (await serving.chat(status=422))["message"]

    served(work, engine)


def bare(tokenizer: Any) -> Any:
    """The same words, and no template."""
    return type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
