"""Load on a server: what is sent when, what is read of the answers, and how it is summed up."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forerun.bench.traffic import Ask, Closed, Open, Promise, Seen, Server, summary
from forerun.cli import run
from forerun.errors import ForerunError

USAGE = {"prompt_tokens": 10, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 4}}


class Fake(BaseHTTPRequestHandler):
    """Answers three events of two tokens each; what a prompt says goes wrong goes wrong."""

    protocol_version = "HTTP/1.1"
    bodies: list[dict[str, Any]]
    running = most = 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "toy"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        with self.lock:
            kind.bodies.append(body)
            kind.running += 1
            kind.most = max(kind.most, kind.running)
        self._answer(body)

    def _leave(self) -> None:
        """Before the client can know that it is answered, for then it asks again at once."""
        with self.lock:
            type(self).running -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        if body["prompt"] == "busy":
            self._leave()
            return self._send(429, {"error": {"message": "too many"}})
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for number in range(3):
            self._event({"choices": [{"text": f"t{number}"}]})
            time.sleep(0.02)
        self._leave()
        if body["prompt"] == "broken":
            return None
        self._event({"choices": [], "usage": USAGE})
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def serving() -> Iterator[tuple[type[Fake], str]]:
    kind = type("One", (Fake,), {"bodies": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield kind, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_stream_is_timed_by_its_events_and_counted_by_the_server() -> None:
    with serving() as (kind, url):
        server = Server.named(f"toy={url}/v1")
        (seen,) = server.run(Closed(1), Ask(["hello"], {"model": server.model(), "max_tokens": 6}), 1)
    assert kind.bodies == [
        {
            "prompt": "hello",
            "stream": True,
            "stream_options": {"include_usage": True},
            "model": "toy",
            "max_tokens": 6,
        }
    ]
    assert (seen.text, seen.tokens, seen.read, seen.cached, seen.events, seen.error) == ("t0t1t2", 6, 10, 4, 3, "")
    assert seen.begun < seen.first < seen.ended and 0 < seen.silence <= seen.ended - seen.first
    assert seen.pace == pytest.approx((seen.ended - seen.first) / 4)  # four tokens came behind the first event


def test_what_goes_wrong_is_told_and_does_not_stop_the_others() -> None:
    with serving() as (_, url):
        seen = Server.named(url).run(Closed(2), Ask(["fine", "busy", "broken"], {}), 6)
    assert sorted(one.error for one in seen) == [
        "",
        "",
        *["429 too many"] * 2,
        *["ValueError the stream ended before it was done"] * 2,
    ]
    found = summary(Closed(2), seen, Promise(60, 60))
    assert (found.answered, found.failed, found.cached) == (2, 4, 0.4)


def test_so_many_clients_and_no_more_ask_at_a_time() -> None:
    with serving() as (kind, url):
        seen = Server.named(url).run(Closed(3), Ask([str(n) for n in range(8)], {}), 8)
    assert len(seen) == 8 and kind.most <= 3
    assert sorted(body["prompt"] for body in kind.bodies) == [str(n) for n in range(8)]


class Clock:
    """A client that answers at once, on a clock that sleeping moves."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return self.at

    async def sleep(self, seconds: float) -> None:
        self.at += seconds
        await YIELD(0)

    async def ask(self, number: int) -> Seen:
        return Seen(self.at)


YIELD = asyncio.sleep


def test_open_loads_arrive_as_a_poisson_process_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def arrivals(seed: int) -> list[float]:
        clock = Clock()
        monkeypatch.setattr("forerun.bench.traffic.asyncio.sleep", clock.sleep)
        return [one.begun for one in asyncio.run(Open(5.0, seed).send(clock, 4000))]  # type: ignore[arg-type]

    times = arrivals(1)
    assert times == arrivals(1) != arrivals(2)
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05) == gaps.std()  # those of an exponential law
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0, abs=0.05)


def test_goodput_counts_what_kept_the_promise() -> None:
    fine = Seen(0.0, first=0.5, ended=2.0, tokens=8, events=4)  # six tokens in 1.5 seconds
    late = Seen(0.0, first=1.5, ended=2.0, tokens=8, events=4)
    slow = Seen(1.0, first=1.2, ended=4.0, tokens=8, events=4)
    lost = Seen(0.0, ended=4.0, error="429")
    found = summary(Open(2.0), [fine, late, slow, lost], Promise(wait=1.0, pace=0.3))
    assert (found.load, found.answered, found.failed, found.seconds) == ("2/s", 3, 1, 4.0)
    assert found.goodput == pytest.approx(1 / 4) and found.tokens_per_second == pytest.approx(24 / 4)
    assert found.wait == pytest.approx(0.5) and found.pace == pytest.approx(0.25)
    nothing = summary(Open(2.0), [lost], Promise(1, 1))
    assert math.isnan(nothing.wait) and nothing.goodput == 0


@pytest.mark.parametrize(
    ("word", "name", "base"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("ours=http://host:1/v1/", "ours", "http://host:1"),
        ("https://host/?a=b", "host/?a=b", "https://host/?a=b"),
    ],
)
def test_servers_have_names(word: str, name: str, base: str) -> None:
    assert Server.named(word) == Server(name, base)


@pytest.mark.parametrize("word", ["host:8000", "ours=host", ""])
def test_what_is_no_server_is_refused(word: str) -> None:
    with pytest.raises(ForerunError, match="is no server"):
        Server.named(word)


def test_the_command_says_what_came_of_every_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "out.json", tmp_path / "load.png"
    rest = ["--requests", "3", "--rounds", "2", "--clients", "1,2", "--out", str(out), "--plot", str(plot)]
    with serving() as (_, url):
        assert run(["bench", "serve", f"a={url}", f"b={url}", *rest]) == 0
    said = capsys.readouterr()
    assert said.out.count("3 of 3") == 4 and "2 clients" in said.out
    turns = json.loads(out.read_text())
    assert [(turn["server"], turn["load"], len(turn["rounds"])) for turn in turns] == [
        ("a", "1 client", 2),
        ("b", "1 client", 2),
        ("a", "2 clients", 2),
        ("b", "2 clients", 2),
    ]
    assert turns[0]["rounds"][0]["requests"][0]["tokens"] == 6 and plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--clients", "1", "--rate", "1"], "give one of them"),
        (["--clients", "1.5"], "whole numbers"),
        (["--rate", "0"], "numbers above 0"),
        (["--body", "[1]"], "a JSON object"),
        ([], "nothing answers at http://127.0.0.1:1"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", "http://127.0.0.1:1", *arguments]) == 2
    assert sentence in capsys.readouterr().err
