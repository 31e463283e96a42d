"""Answers in OpenAI's shape, whole and streamed, and the same as offline bit for bit."""

from __future__ import annotations

import asyncio
import json
import math
import re
from typing import Any

import pytest
from serving import CONTEXT, Serving

from forerun.sampling import SamplingParams

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def usage(read: int, said: int) -> dict[str, Any]:
    details = {"prompt_tokens_details": {"cached_tokens": 0}}
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said, **details}


def test_a_completion(served, offline):
    async def work(serving: Serving) -> Any:
        return await serving.complete("def main", max_tokens=12, temperature=0)

    found, expected = served(work), offline.generate("def main", max_new_tokens=12)[0]
    assert found.pop("id").startswith("cmpl-") and found.pop("created") > 0 and found.pop("system_fingerprint")
    choice = {"index": 0, "text": expected.text, "logprobs": None, "finish_reason": expected.finish_reason}
    read = len(offline.encode("def main"))
    assert found == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [choice],
        "usage": usage(read, len(expected.token_ids)),
    }


def test_a_chat_goes_through_the_template(served, offline):
    talk = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1?"}]},
        {"role": "assistant", "content": "2", "name": None},
        {"role": "user", "content": "Sure?"},
    ]
    prompt = "<system>Be brief.<user>1 + 1?<assistant>2<user>Sure?<assistant>"

    async def work(serving: Serving) -> Any:
        return await serving.chat(talk, max_completion_tokens=9, temperature=0)

    found, expected = served(work), offline.generate(prompt, max_new_tokens=9)[0]
    assert found["object"] == "chat.completion" and found["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": expected.text, "refusal": None}
    reason = expected.finish_reason
    assert found["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}]
    assert found["usage"]["prompt_tokens"] == len(offline.encode(prompt))


def test_tools_are_the_templates_affair(served, offline):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    talk.append({"role": "tool", "tool_call_id": "1", "content": "2"})
    told = offline.encode(
        [talk[0], {**talk[1], "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}, talk[2]],
        {"tools": [tool]},
    )

    async def work(serving: Serving) -> Any:
        found = await serving.chat(talk, tools=[tool], max_tokens=5, temperature=0)
        without = await serving.chat(talk, tools=[tool], tool_choice="none", max_tokens=5, temperature=0)
        assert (await serving.chat(talk, 400, tools=[tool], tool_choice="required"))["param"] == "tool_choice"
        return found, without

    found, without = served(work)
    assert found["choices"][0]["message"]["content"] == offline.generate(told, max_new_tokens=5)[0].text
    assert found["usage"]["prompt_tokens"] == len(told) > without["usage"]["prompt_tokens"]


def test_a_template_that_takes_no_tools_is_not_asked_to(served):
    tool = {"type": "function", "function": {"name": "add"}}

    async def work(serving: Serving) -> Any:
        return await serving.chat("x", 422, tools=[tool], max_tokens=2)

    found = served(work, template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert found["param"] == "tools"


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_a_stream_says_the_same_and_is_framed_as_clients_expect(served, path):
    asked = {"prompt": "def main"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "Hi"}]}
    asked |= {"n": 2, "seed": 5, "max_tokens": 10, "stop": ["zzz"]}

    async def work(serving: Serving) -> Any:
        options = {"include_usage": True}
        return await serving.post(path, {"model": "tiny", **asked}), await serving.events(
            path, **asked, stream_options=options
        )

    whole, events = served(work)
    *told, last = events
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in told) and len({event["id"] for event in events}) == 1
    for choice in whole["choices"]:
        mine = [one for event in told for one in event["choices"] if one["index"] == choice["index"]]
        assert [one["finish_reason"] for one in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        if path == CHATS:
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(one["delta"].get("content", "") for one in mine) == choice["message"]["content"]
        else:
            assert "".join(one["text"] for one in mine) == choice["text"]


def test_logprobs_of_completions(served, offline):
    async def work(serving: Serving) -> Any:
        asked = {"max_tokens": 8, "temperature": 0, "logprobs": 3}
        events = await serving.events(COMPLETIONS, prompt="def main", **asked)
        return (await serving.complete(**asked))["choices"][0], [event["choices"][0]["logprobs"] for event in events]

    choice, streamed = served(work)
    told = choice["logprobs"]
    expected = offline.generate("def main", max_new_tokens=8, logprobs=3)[0].logprobs
    assert told["token_logprobs"] == [one.logprob for one in expected]
    assert "".join(told["tokens"]) == choice["text"] or "\ufffd" in "".join(told["tokens"])
    assert told["text_offset"] == [len("".join(told["tokens"][:at])) for at in range(len(expected))]
    for best, one in zip(told["top_logprobs"], expected, strict=True):
        assert max(best.values()) == max(one.alternatives.values()) == one.logprob
    for name, values in told.items():
        assert [value for part in streamed if part for value in part[name]] == values


def test_logprobs_of_chats(served, offline):
    async def work(serving: Serving) -> Any:
        asked = {"max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 2}
        events = await serving.events(CHATS, messages=[{"role": "user", "content": "Hi"}], **asked)
        parts = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
        return (await serving.chat(**asked))["choices"][0], [one for part in parts for one in part["content"]]

    choice, streamed = served(work)
    content = choice["logprobs"]["content"]
    assert content == streamed
    expected = offline.chat("Hi", max_new_tokens=6, logprobs=2)[0].logprobs
    assert [one["logprob"] for one in content] == [one.logprob for one in expected]
    assert [[best["logprob"] for best in one["top_logprobs"]] for one in content] == [
        list(one.alternatives.values()) for one in expected
    ]
    assert all(one["bytes"] is None or bytes(one["bytes"]).decode() == one["token"] for one in content)


def test_parameters_reach_the_engine(served, offline):
    """Each changes the text, and to what it is offline."""
    base = {"max_tokens": 12, "seed": 3}
    for asked in (
        {},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 2},
        {"min_p": 0.3},
        {"repetition_penalty": 3.0},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"logit_bias": {"70": 100}},
        {"stop": "e"},
        {"ignore_eos": True},
        {"stop_token_ids": [5, 6, 7, 8, 9, 10]},
    ):

        async def work(serving: Serving, asked: dict[str, Any] = asked) -> Any:
            return (await serving.complete(**base, **asked))["choices"][0]

        ours = {name: value for name, value in asked.items() if name != "logit_bias"}
        bias = {int(token): value for token, value in asked.get("logit_bias", {}).items()}
        params = SamplingParams.of({"temperature": 1.0, **base, **ours, "logit_bias": bias})
        expected, choice = offline.generate("def main", params)[0], served(work)
        assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason), asked


def test_filters_mean_nothing_to_greedy_decoding(served, offline):
    async def work(serving: Serving) -> Any:
        return await serving.complete(temperature=0, top_p=0.5, top_k=3, max_tokens=5)

    assert served(work)["choices"][0]["text"] == offline.generate("def main", max_new_tokens=5)[0].text


def test_many_prompts_echoed(served, offline):
    ids = [offline.encode(text) for text in ("a", "def f")]

    async def work(serving: Serving) -> Any:
        asked = {"temperature": 1, "seed": 1, "n": 2, "max_tokens": 4, "echo": True}
        events = await serving.events(COMPLETIONS, prompt=ids, **asked)
        return await serving.complete(ids, **asked), await serving.complete(["a", "def f"], **asked), events

    by_ids, by_text, events = served(work)
    texts = [output.text for output in offline.generate(ids, temperature=1, seed=1, n=2, max_new_tokens=4)]
    expected = [before + text for before, text in zip(["a", "a", "def f", "def f"], texts, strict=True)]
    assert [choice["text"] for choice in by_ids["choices"]] == expected
    assert [choice["text"] for choice in by_text["choices"]] == expected
    streamed = ["".join(c["text"] for e in events for c in e["choices"] if c["index"] == i) for i in range(4)]
    assert streamed == expected and by_ids["usage"]["prompt_tokens"] == sum(map(len, ids))


def test_a_chat_without_a_length_goes_on_to_the_context(served):
    async def work(serving: Serving) -> Any:
        return await serving.chat("x", temperature=0, ignore_eos=True)

    found = served(work)
    assert found["usage"]["total_tokens"] == CONTEXT and found["choices"][0]["finish_reason"] == "length"


def test_what_speculation_did_is_told_to_whoever_asks(served):
    async def work(serving: Serving) -> Any:
        asked = {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "forerun": {"metrics": True}}
        events = await serving.events(COMPLETIONS, prompt="a a a a a a", **asked)
        return await serving.complete("a a a a a a", **asked), events

    whole, events = served(work)
    for told in (whole["metrics"]["speculative_decoding"], events[-1]["metrics"]["speculative_decoding"]):
        histogram, count = told["acceptance_histogram"], told["num_spec_steps"]
        assert sum(histogram) == count > 0 and told["exact"] is True
        assert sum(kept * times for kept, times in enumerate(histogram)) == told["num_accepted_draft_tokens"] > 0
        assert math.isclose(told["mean_acceptance_length"], 1 + told["num_accepted_draft_tokens"] / count)
        assert math.isclose(told["draft_acceptance_rate"], told["num_accepted_draft_tokens"] / told["num_draft_tokens"])
        by_length = told["acceptance_histogram_by_draft_length"]
        assert sum(map(sum, by_length.values())) == count
        assert sum(int(length) * sum(one) for length, one in by_length.items()) == told["num_draft_tokens"]


def test_usage_can_run_along(served):
    """One event may hold several tokens."""

    async def work(serving: Serving) -> Any:
        options = {"continuous_usage_stats": True}
        return await serving.events(COMPLETIONS, prompt="a", max_tokens=9, ignore_eos=True, stream_options=options)

    counts = [event["usage"]["completion_tokens"] for event in served(work)]
    assert counts == sorted(counts) and counts[-1] == 9


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_a_stream_tells_its_steps_to_whoever_asks(served, offline, path):
    asked = {"prompt": "a a a a a a"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a a a"}]}

    async def work(serving: Serving) -> Any:
        told = {"steps": True, "metrics": True}
        return await serving.events(path, temperature=0, max_tokens=60, ignore_eos=True, forerun=told, **asked)

    *events, last = served(work)
    steps = [choice["forerun"] for event in events for choice in event["choices"] if "forerun" in choice]
    tokens = [token for step in steps for token in step["tokens"]]
    prompt = asked.get("prompt", "<user>a a a<assistant>")
    assert (
        "".join(token["text"] for token in tokens)
        == offline.generate(prompt, max_new_tokens=60, ignore_eos=True)[0].text
    )
    assert len(tokens) == 60 and all(step["drafted"] >= sum(bool(t["by"]) for t in step["tokens"]) for step in steps)
    speculation = last["metrics"]["speculative_decoding"]
    assert sum(step["drafted"] for step in steps) == speculation["num_draft_tokens"]
    assert sum(bool(token["by"]) for token in tokens) == speculation["num_accepted_draft_tokens"] > 0


def test_words_and_ids(served, offline):
    async def work(serving: Serving) -> Any:
        told = await serving.post("/tokenize", {"prompt": "def f(x): ü"})
        back = await serving.post("/detokenize", {"tokens": told["tokens"]})
        talk = await serving.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]})
        await serving.post("/detokenize", {"tokens": [400]}, 400)
        await serving.post("/tokenize", {}, 400)
        return told, back, talk

    told, back, talk = served(work)
    assert told == {"tokens": offline.encode("def f(x): ü"), "count": told["count"], "max_model_len": CONTEXT}
    assert told["count"] == len(told["tokens"]) and back == {"prompt": "def f(x): ü"}
    assert talk["tokens"] == offline.encode("<user>Hi<assistant>")


def test_everything_at_once_is_what_it_is_alone(served, made, offline):
    """Greedy and seeded requests of both endpoints, more than there are rows, with others that go away in between."""
    asked = [
        {"prompt": f"def f{number}" + " x" * (5 * number), "temperature": number % 2, "seed": number, "max_tokens": 40}
        for number in range(12)
    ]
    expected = [
        offline.generate(one["prompt"], temperature=one["temperature"], seed=one["seed"], max_new_tokens=40)[0].text
        for one in asked
    ]

    async def leave(serving: Serving, after: float) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(after):
                await serving.complete("def " * 20, max_tokens=300, ignore_eos=True)

    async def listen(serving: Serving, one: dict[str, Any]) -> str:
        events = await serving.events(COMPLETIONS, **one)
        return "".join(event["choices"][0]["text"] for event in events)

    async def work(serving: Serving) -> Any:
        gone = [leave(serving, 0.004 * number) for number in range(1, 6)]
        whole = [serving.complete(**one) for one in asked[::2]]
        found, _, streamed = await asyncio.gather(
            asyncio.gather(*whole),
            asyncio.gather(*gone),
            asyncio.gather(*(listen(serving, one) for one in asked[1::2])),
        )
        return [one["choices"][0]["text"] for one in found], streamed

    whole, streamed = served(work, made("hierarchy", 3))
    assert whole == expected[::2] and streamed == expected[1::2]


SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}


def test_answers_have_the_form_that_is_asked_for(served):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    asked = {"response_format": form, "max_tokens": 60, "seed": 1}

    async def work(serving: Serving) -> None:
        [choice] = (await serving.chat(**asked))["choices"]
        assert json.loads(choice["message"]["content"])["n"] in (1, 22) and choice["finish_reason"] == "stop"
        events = await serving.events(CHATS, messages=[{"role": "user", "content": "Hi"}], **asked)
        text = "".join(one["choices"][0]["delta"].get("content") or "" for one in events if one["choices"])
        assert text == choice["message"]["content"]
        for one in (await serving.complete("x", constraint={"regex": "[ab]{3}"}, max_tokens=9, n=2))["choices"]:
            assert re.fullmatch("[ab]{3}", one["text"]) and one["finish_reason"] == "stop"

    served(work)


def test_a_request_may_decode_plainly_beside_others(served, made):
    """Nothing is proposed for it, and its text is the same."""

    async def work(serving: Serving) -> None:
        asked = {"max_tokens": 40, "temperature": 0}
        plain, drafted = await asyncio.gather(
            serving.complete("def main", forerun={"drafts": False, "metrics": True}, **asked),
            serving.complete("def main", forerun={"metrics": True}, **asked),
        )
        assert plain["choices"] == drafted["choices"]
        steps = [one["metrics"]["speculative_decoding"]["num_spec_steps"] for one in (plain, drafted)]
        assert steps[0] == 0 < steps[1]

    served(work, made("maxgram"))


def test_the_page_asks_nobody_else(served):
    async def work(serving: Serving) -> None:
        found = await serving.client.get("/")
        assert found.status_code == 200 and "connect-src 'self'" in found.headers["content-security-policy"]
        assert not re.search(r"""(src|href)=["'](?!data:)|https?://(?!www\.w3\.org/)""", found.text)

    served(work)


def test_what_was_read_is_not_read_again_and_said_to_be_so(served, offline):
    prompt = "def main():\n    " * 30

    async def work(serving: Serving) -> None:
        found = [await serving.complete(prompt, max_tokens=5, temperature=0) for _ in range(2)]
        cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in found]
        assert cached[0] == 0 < cached[1] < found[1]["usage"]["prompt_tokens"]
        assert found[0]["choices"] == found[1]["choices"]
        assert found[0]["choices"][0]["text"] == offline.generate(prompt, max_new_tokens=5)[0].text

    served(work)
