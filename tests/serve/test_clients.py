"""Clients that nobody here wrote, against the command as it is: OpenAI's, over a real port."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from forerun.cli import run
from forerun.serve.run import Server

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
KEY = "sesame"


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    """Of `forerun serve`, which runs in a thread and is ended as SIGTERM ends it."""
    begun: list[Server] = []
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        free.close()
        patch.setattr(Server, "startup", noted(Server.startup, begun))
        words = f"serve {folder} --port {port} --api-key {KEY} --drafter hierarchy --dtype fp32 --max-rows 4 -q"
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(run(words.split())), daemon=True)
        thread.start()
        asyncio.run(started(begun, thread))
        yield f"http://127.0.0.1:{port}/v1"
        begun[0].handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert codes == [0]


def noted(startup: Callable[..., Any], begun: list[Server]) -> Callable[..., Any]:
    async def call(server: Server, *arguments: Any, **named: Any) -> None:
        begun.append(server)
        await startup(server, *arguments, **named)

    return call


async def started(begun: list[Server], thread: threading.Thread) -> None:
    async with asyncio.timeout(30):
        while not (begun and begun[0].started):
            assert thread.is_alive(), "the command has ended"
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def client(address) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0) as made:
        yield made


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]


def test_completions(client, offline):
    found = client.completions.create(model="tiny", prompt="def main", max_tokens=9, seed=3, n=2)
    expected = [one.text for one in offline.generate("def main", max_new_tokens=9, seed=3, n=2, temperature=1)]
    assert [choice.text for choice in found.choices] == expected
    stream = client.completions.create(model="tiny", prompt="def main", max_tokens=9, seed=3, n=2, stream=True)
    texts = ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected


def test_chats_with_our_own_parameters(client, offline):
    found = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        max_completion_tokens=7,
        seed=1,
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 5, "forerun": {"metrics": True}},
    )
    expected = offline.chat("Hi", max_new_tokens=7, seed=1, temperature=1, top_k=5)[0]
    assert found.choices[0].message.content == expected.text
    assert len(found.choices[0].logprobs.content) == len(expected.token_ids) == found.usage.completion_tokens
    assert found.usage.prompt_tokens_details.cached_tokens == 0
    assert found.model_extra["metrics"]["speculative_decoding"]["exact"] is True


def test_a_stream_of_a_chat(client, offline):
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, *others, last = list(stream)
    assert first.choices[0].delta.role == "assistant" and others[-1].choices[0].finish_reason
    expected = offline.chat("Hi", system="Be brief.", max_new_tokens=12)[0]
    assert "".join(one.choices[0].delta.content or "" for one in others) == expected.text
    assert last.usage.completion_tokens == len(expected.token_ids) and last.choices == []


def test_tools_go_through(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
    plain = client.chat.completions.create(**asked)
    first = client.chat.completions.create(**asked, tools=[TOOL], tool_choice="auto")
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    talk = [
        *asked["messages"],
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        first.choices[0].message,  # as clients put an answer back
        {"role": "user", "content": "And?"},
    ]
    second = client.chat.completions.create(**{**asked, "messages": talk}, tools=[TOOL])
    assert plain.usage.prompt_tokens < first.usage.prompt_tokens < second.usage.prompt_tokens


def test_errors_are_the_clients_own(client, address):
    asked = {"model": "tiny", "prompt": "x"}
    with pytest.raises(openai.BadRequestError, match="temperature=-1"):
        client.completions.create(**asked, temperature=-1)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.UnprocessableEntityError, match="no embeddings"):
        client.embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").completions.create(**asked)


def test_many_at_once_are_what_they_are_alone_though_some_go_away(address, offline):
    asked = [{"prompt": f"def f{number}(", "seed": number, "temperature": number % 2} for number in range(10)]

    async def whole(client: openai.AsyncOpenAI, one: dict[str, Any]) -> str:
        found = await client.completions.create(model="tiny", max_tokens=30, **one)
        return found.choices[0].text

    async def streamed(client: openai.AsyncOpenAI, one: dict[str, Any]) -> str:
        stream = await client.completions.create(model="tiny", max_tokens=30, stream=True, **one)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def broken_off(client: openai.AsyncOpenAI, one: dict[str, Any]) -> None:
        endless = {"model": "tiny", "max_tokens": 450, "extra_body": {"ignore_eos": True}}
        async with await client.completions.create(**endless, stream=True, **one) as stream:
            async for _ in stream:
                break

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
            gone = asyncio.gather(*(broken_off(client, one) for one in asked[:3]))
            texts = await asyncio.gather(*((whole, streamed)[i % 2](client, one) for i, one in enumerate(asked)))
            await gone
        return texts

    found = asyncio.run(asyncio.wait_for(main(), 60))
    for one, text in zip(asked, found, strict=True):
        assert text == offline.generate(one["prompt"], params_of(one))[0].text


def params_of(one: dict[str, Any]) -> dict[str, Any]:
    return {"seed": one["seed"], "temperature": one["temperature"], "max_new_tokens": 30}
