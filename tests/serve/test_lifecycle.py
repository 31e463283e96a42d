"""Who comes, goes, waits, ends and is remembered: nothing stays of a request that is over, however it ended."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Client, Serving, Steps

from forerun.serve.app import Service, app_of
from forerun.serve.desk import Limits
from forerun.serve.keys import Keys
from forerun.serve.run import Server, bound

NAMES = re.compile(r"forerun:\w+")
LONG = {"max_tokens": 400, "ignore_eos": True}


async def until(holds: Any) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_dropped_within_a_step(served, offline, stream):
    drafter = Steps()
    engine = offline.beside(drafter, 1)

    async def work(serving: Serving) -> None:
        client = Client(serving.app, "/v1/completions", prompt="x", stream=stream, **LONG)
        waiting = Client(serving.app, "/v1/completions", prompt="y", stream=stream, **LONG)
        drafter.let(3)
        await until(lambda: drafter.made == 3 and engine.load == (1, 1))
        waiting.went.set()  # it has not had its turn yet
        await until(lambda: waiting.answer.done())
        client.went.set()
        await until(lambda: client.answer.done())
        assert serving.desk.is_empty
        drafter.let()  # the step that was being made
        await until(lambda: engine.is_idle)
        assert drafter.made == 4 and engine.target.cache.rows == 0
        statuses = [sample.labels for sample in samples(serving, "forerun:http_responses_total")]
        assert statuses == [{"endpoint": "/v1/completions", "status": "499"}]

    served(work, engine)


def test_others_come_and_go_while_one_runs(served, offline):
    drafter = Steps()
    engine = offline.beside(drafter, 4)
    expected = offline.generate("x", max_new_tokens=6)[0].text

    async def work(serving: Serving) -> None:
        asked = {"max_tokens": 6, "temperature": 0}
        first = asyncio.create_task(serving.complete("x", **asked))
        drafter.let(2)
        await until(lambda: drafter.made == 2)
        second = asyncio.create_task(serving.complete("def main", **asked))
        gone = Client(serving.app, "/v1/completions", prompt="z", **LONG)
        await until(lambda: sum(engine.load) == 3)
        drafter.let()
        await until(lambda: engine.load == (3, 0) or drafter.let())
        gone.went.set()
        drafter.let(20)
        assert (await first)["choices"][0]["text"] == expected
        assert (await second)["choices"][0]["text"] == offline.generate("def main", max_new_tokens=6)[0].text

    served(work, engine)


def test_the_first_event_does_not_wait_for_the_last(served, offline):
    drafter = Steps()

    async def work(serving: Serving) -> None:
        client = Client(serving.app, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], stream=True)
        drafter.let(2)
        await asyncio.wait_for(client.arrived.wait(), 20)
        assert client.sent.startswith(b'data: {"id":"chatcmpl-') and b'"role":"assistant"' in client.sent
        client.went.set()
        drafter.let()
        await client.answer

    served(work, offline.beside(drafter))


def test_a_slow_reader_keeps_nobody_waiting(served, made):
    """Its events wait for it; the engine goes on, and others are served."""

    async def work(serving: Serving) -> None:
        reads = asyncio.Event()
        client = Client(serving.app, "/v1/completions", reads, prompt="x", stream=True, **LONG)
        await until(lambda: not serving.desk.is_empty)
        await until(lambda: serving.service.engine.is_idle)  # all is said
        await serving.complete(max_tokens=2)
        reads.set()
        await client.answer
        assert client.sent.endswith(b"data: [DONE]\n\n") and client.sent.count(b"data: ") > 10

    served(work, made("none", 1))


def test_tenants_share_nothing(served, made):
    """What a model said to one is not drafted for another, though it is for the same one."""
    keys = Keys([("a", "anna"), ("b", "berta")])

    async def work(serving: Serving) -> list[dict[str, Any]]:
        body = {"model": "tiny", "prompt": "def main", "max_tokens": 40, "seed": 1, "forerun": {"metrics": True}}
        found = []
        for key in "aab":
            answer = await serving.post("/v1/completions", body, authorization=f"Bearer {key}")
            found.append((answer["metrics"]["speculative_decoding"], answer["choices"]))
        return found

    (first, said), (again, same), (other, others) = served(work, made("hierarchy"), keys=keys)
    assert again["num_accepted_draft_tokens"] > 2 * first["num_accepted_draft_tokens"]
    assert other == first and said == same == others


def test_what_is_logged_holds_no_text(served, caplog, monkeypatch):
    secret = "swordfish"

    async def work(serving: Serving) -> Any:
        await serving.complete(secret, max_tokens=3)
        await serving.complete(secret, 400, temperature=-1)
        await serving.complete(secret, 400, **{secret: secret})
        await serving.events("/v1/completions", prompt=secret, max_tokens=3)
        assert (await serving.client.get(f"/{secret}")).status_code == 404

        def broken(*_: object) -> None:
            raise ValueError(secret)

        monkeypatch.setattr(type(serving.service.engine), "encode", broken)
        headers = {"x-request-id": "mine-1"}
        response = await serving.client.post(
            "/v1/completions", json={"model": "tiny", "prompt": secret}, headers=headers
        )
        assert response.status_code == 500 and secret not in response.text
        assert response.headers["x-request-id"] == "mine-1"
        odd = await serving.client.get("/health", headers={"x-request-id": f"{secret} {secret}"})
        assert secret not in odd.headers["x-request-id"]

    with caplog.at_level(logging.DEBUG):
        served(work)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("forerun")]
    assert secret not in "\n".join(ours)
    told = dict(part.split("=") for part in ours[0].split())
    assert told["status"] == "200" and told["new_tokens"] == "3" and told["endpoint"] == "/v1/completions"
    assert any(line.startswith("request=mine-1 failed=ValueError") for line in ours)


# ---- the end


@pytest.fixture
def running(made, offline):
    """A server in a thread: its app, its address, and how to end it."""
    started: list[tuple[Server, threading.Thread]] = []

    def call(engine: Any, **settings: Any) -> tuple[Server, httpx.Client]:
        app = app_of(Service(engine, "tiny", **settings))
        listening = bound("127.0.0.1", 0)
        server = Server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        started.append((server, thread))
        return server, httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=20)

    yield call
    for server, thread in started:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(holds: Any) -> None:
    asyncio.run(until(holds))


def test_a_server_that_is_told_to_end_answers_what_it_has_begun(running, offline):
    drafter = Steps()
    server, client = running(offline.beside(drafter))
    body = {"model": "tiny", "prompt": "x", "max_tokens": 3, "temperature": 0, "stream": True}
    wait_for(lambda: server.started)
    with client.stream("POST", "/v1/completions", json=body) as answer:
        wait_for(lambda: server._desk.engine.load == (1, 0))
        server.handle_exit(signal.SIGTERM, None)
        refused = client.post("/v1/completions", json=body)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert client.get("/health").status_code == 503 and client.get("/metrics").status_code == 200
        drafter.let(3)
        assert answer.read().endswith(b"data: [DONE]\n\n") and b'"error"' not in answer.content
    wait_for(lambda: server.should_exit)


def test_an_answer_that_is_not_at_its_end_in_time_is_broken_off_with_an_error(running, offline):
    drafter = Steps()
    server, client = running(offline.beside(drafter), limits=Limits(drain_seconds=0))
    wait_for(lambda: server.started)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 300, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        wait_for(lambda: server._desk.engine.load == (1, 0))
        server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: server._desk.engine._is_closed)
        drafter.let()
        assert b"the server ends before this answer does" in answer.read()
    wait_for(lambda: server.should_exit)


# ---- the figures


def samples(serving: Serving, name: str) -> list[Any]:
    text = serving.desk.figures.text().decode()
    return [one for family in text_string_to_metric_families(text) for one in family.samples if one.name == name]


def test_metrics_have_the_names_that_dashboards_know(served):
    async def work(serving: Serving) -> None:
        one = await serving.complete(
            "a a a a a", max_tokens=40, temperature=0, ignore_eos=True, forerun={"metrics": True}
        )
        two = await serving.chat(n=2, seed=1, max_tokens=5, ignore_eos=True, forerun={"metrics": True})
        await until(lambda: serving.service.engine.is_idle)
        told = [answer["metrics"]["speculative_decoding"] for answer in (one, two)]
        text = (await serving.client.get("/metrics")).text
        values = {
            sample.name.removeprefix("forerun:"): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.labels.get("model_name") == "tiny" and not {"le", "position"} & sample.labels.keys()
        }
        drafts, drafted = (sum(one[name] for one in told) for name in ("num_spec_steps", "num_draft_tokens"))
        accepted = sum(one["num_accepted_draft_tokens"] for one in told)
        assert values["spec_decode_num_drafts_total"] == drafts > 0
        assert values["spec_decode_num_draft_tokens_total"] == drafted
        assert values["spec_decode_num_accepted_tokens_total"] == accepted > 0
        by_position = samples(serving, "forerun:spec_decode_num_accepted_tokens_per_pos_total")
        assert sum(one.value for one in by_position) == accepted
        at = {int(one.labels["position"]): one.value for one in by_position}
        assert all(at[place] >= at[place + 1] for place in range(len(at) - 1)) and at[0] > 0
        usages = [answer["usage"] for answer in (one, two)]
        assert values["prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
        assert values["generation_tokens_total"] == sum(usage["completion_tokens"] for usage in usages) == 50
        assert values["time_to_first_token_seconds_count"] == values["e2e_request_latency_seconds_count"] == 3
        assert 50 - values["inter_token_latency_seconds_count"] >= 3  # the first ones, by sample
        assert values["num_requests_running"] == values["num_requests_waiting"] == values["kv_cache_usage_perc"] == 0
        assert values["request_success_total"] == 3

    served(work)


def test_what_runs_and_waits_is_told(served, offline):
    drafter = Steps()
    engine = offline.beside(drafter, 1)

    async def work(serving: Serving) -> None:
        client = Client(serving.app, "/v1/completions", prompt="x", n=3, seed=1, max_tokens=2, ignore_eos=True)
        drafter.let()
        await until(lambda: drafter.made == 1 and engine.load == (1, 2))
        (running,) = samples(serving, "forerun:num_requests_running")
        (waiting,) = samples(serving, "forerun:num_requests_waiting")
        (share,) = samples(serving, "forerun:kv_cache_usage_perc")
        assert (running.value, waiting.value) == (1, 2) and 0 < share.value < 1
        drafter.let(9)
        await client.answer

    served(work, engine)


def test_the_dashboard_asks_for_metrics_that_there_are(served):
    board = json.loads((Path(__file__).parents[2] / "deploy" / "grafana.json").read_text())
    asked = {name for panel in board["panels"] for one in panel["targets"] for name in NAMES.findall(one["expr"])}

    async def work(serving: Serving) -> set[str]:
        await serving.complete("a a a a", max_tokens=9, temperature=0, ignore_eos=True)
        await serving.client.get("/health")
        families = list(text_string_to_metric_families(serving.desk.figures.text().decode()))
        return {sample.name for family in families for sample in family.samples}

    assert asked and asked <= served(work)
