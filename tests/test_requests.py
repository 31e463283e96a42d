"""Requests of several callers on one engine: none sees, ends, changes or outlives another's."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import Tensor

from fakes import Near, TableNetwork, Wild, engine_of, plain
from forerun.drafters.none import Nothing
from forerun.engine.engine import Engine
from forerun.engine.load import load
from forerun.engine.requests import Output, Piece, Request
from forerun.engine.session import Session
from forerun.errors import RequestError
from forerun.sampling import SamplingParams
from test_engine import Letters

VOCAB = 4
SMALL = {"drafter": "small", "checkpoint": "small"}
LOOKUP = {"drafter": "lookup", "cost": 0.08}
DRAFTERS: dict[str, Any] = {
    "none": "none",
    "lookup": LOOKUP,
    "small": {**SMALL, "length": 4},
    "small, sampled tree": {**SMALL, "widths": [2, 2, 1]},
    "verified": {"drafter": "verified", "checkpoint": "middle", "inner": {**SMALL, "length": 2}, "length": 4},
    "fallback": {"drafter": "fallback", "sources": [LOOKUP, "small:small"]},
    "wild": lambda: Wild(VOCAB),
}
every_drafter = pytest.mark.parametrize("name", DRAFTERS)
PROMPTS = [[0], [1, 2, 3], [2] * 9, [3, 0, 1, 2, 3, 0, 1], [1, 1], [0, 3, 0], [2, 1, 0, 3, 2], [3, 3, 3, 3]]
LONG = [1, 2, 3] * 400
"""More than is read at a time."""


@cache
def tables() -> dict[str, TableNetwork]:
    target = TableNetwork(VOCAB, 3, 12)
    return {"target": target, "middle": Near(target, 0.4, 1), "small": Near(target, 0.8, 2)}


def engine(name: str, networks: dict[str, TableNetwork] | None = None, **options: Any) -> Engine:
    networks, made = networks or tables(), DRAFTERS[name]
    return engine_of(networks["target"], made() if callable(made) else made, networks, **options)


def wishes(index: int, tokens: int = 30) -> SamplingParams:
    """Greedy, and sampled with a seed."""
    return SamplingParams(max_new_tokens=tokens, temperature=0.0 if index % 2 else 0.9, seed=index)


@cache
def alone(name: str, index: int, tokens: int = 30) -> list[int]:
    """What a request says that has an engine to itself."""
    (output,) = engine(name).generate([PROMPTS[index]], wishes(index, tokens))
    return output.token_ids


def last(pieces: list[Piece]) -> Output:
    assert [piece.output is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    output = pieces[-1].output
    assert output is not None and output.finish_reason == pieces[-1].finish_reason
    assert output.token_ids == [token for piece in pieces for token in piece.token_ids]
    return output


def demand_nothing_left(one: Engine) -> None:
    assert one.is_idle and one.target.cache.rows == 0
    assert not (one._waiting or one._running or one._reading or one._inbox or one._cancelled)
    assert one._driver is None and one._is_whole


# ---- sessions


@every_drafter
def test_streams_side_by_side_see_their_own_pieces(name: str) -> None:
    one = engine(name, max_rows=3)
    streams = [
        one.stream([PROMPTS[index], PROMPTS[index + 4]], [wishes(index), wishes(index + 4)]) for index in range(4)
    ]
    found: list[dict[int, list[Piece]]] = [{0: [], 1: []} for _ in streams]
    open_streams = dict(enumerate(streams))
    for turn in count():
        if not open_streams:
            break
        number = list(open_streams)[turn % len(open_streams)]
        piece = next(open_streams[number], None)
        if piece is None:
            del open_streams[number]
        else:
            found[number][piece.prompt_index].append(piece)
    for index, pieces in enumerate(found):
        assert last(pieces[0]).token_ids == alone(name, index)
        assert last(pieces[1]).token_ids == alone(name, index + 4)
    demand_nothing_left(one)


@every_drafter
@pytest.mark.parametrize("end", ["close", "forget", "with"])
def test_a_stream_that_ends_takes_its_own_requests_along(name: str, end: str) -> None:
    one = engine(name, max_rows=3)
    going, gone = one.stream([PROMPTS[1]], wishes(1)), one.stream([PROMPTS[2], PROMPTS[3], LONG], wishes(2))
    pieces = [next(going)]
    next(gone)
    if end == "close":
        gone.close()
        assert list(gone) == []
    elif end == "with":
        with gone:
            pass
    else:
        del gone
        gc.collect()
    assert [request.prompt_index for request in one._running] == [0] and not one._waiting and not one._reading
    pieces += going
    assert last(pieces).token_ids == alone(name, 1)
    demand_nothing_left(one)


def test_a_stream_that_was_never_begun_leaves_nothing_behind() -> None:
    one = engine("none")
    stream = one.stream(PROMPTS)
    stream.close()
    demand_nothing_left(one)
    del stream
    one.stream(PROMPTS)
    gc.collect()
    demand_nothing_left(one)


def test_an_engine_that_is_closed_ends_all() -> None:
    with engine("small", max_rows=2) as one:
        stream = one.stream(PROMPTS[:3], SamplingParams(max_new_tokens=50))
        one.add(PROMPTS[0])
        next(stream)
    demand_nothing_left(one)
    assert [piece.finish_reason for piece in stream if piece.finish_reason] == ["interrupted"] * 3


@pytest.mark.parametrize("call", ["generate", "stream", "add", "step"])
def test_an_engine_that_is_closed_refuses_whatever_comes(call: str) -> None:
    one = engine("none")
    one.close()
    one.close()  # twice is as good
    with pytest.raises(RequestError, match="this engine is closed"):
        getattr(one, call)(*([] if call == "step" else [PROMPTS[1]]))
    demand_nothing_left(one)


def test_an_engine_that_is_cleared_goes_on() -> None:
    one = engine("small", max_rows=2)
    one.add(PROMPTS[0])
    stream = one.stream(PROMPTS[:3], SamplingParams(max_new_tokens=50))
    next(stream)
    one.clear()
    demand_nothing_left(one)
    assert [piece.finish_reason for piece in stream if piece.finish_reason] == ["interrupted"] * 3
    assert one.generate([PROMPTS[1]], wishes(1))[0].token_ids == alone("small", 1)


def test_threads_run_side_by_side_in_one_batch() -> None:
    """As many forwards as the longest takes and one per prompt, not as many as all of them one after the other."""
    one, gate = engine("none", max_rows=8), threading.Barrier(8)
    one.target.network.forwards = 0

    def work(index: int) -> None:
        with one.stream([PROMPTS[index]], wishes(index, tokens=200), text=False) as stream:
            gate.wait(timeout=60)  # all have asked before anybody drives
            stream.outputs()

    run(work, 8)
    assert one.target.network.forwards < 200 + 8 * 4


def test_ids_come_out_without_their_text() -> None:
    one = engine("lookup", tokenizer=Letters())
    (silent,) = one.stream([PROMPTS[1]], wishes(1), text=False).outputs()
    (spelt,) = one.stream([PROMPTS[1]], wishes(1)).outputs()
    assert silent.text is None and silent.token_ids == spelt.token_ids
    assert spelt.text == "".join("abcd"[token] for token in spelt.token_ids)


def test_engines_on_one_network_have_their_own_rows() -> None:
    one = engine("none")
    other = one.beside(Nothing(), max_rows=1)
    streams = [each.stream(PROMPTS[:3], [wishes(index) for index in range(3)]) for each in (one, other)]
    next(streams[0])
    assert [output.token_ids for output in streams[1].outputs()] == [alone("none", index) for index in range(3)]
    assert [output.token_ids for output in streams[0].outputs()] == [alone("none", index) for index in range(3)]
    assert (one.max_rows, other.max_rows) == (16, 1) and one.target.network is other.target.network


# ---- cancelled


@every_drafter
@pytest.mark.parametrize("state", ["waiting", "read", "runs"])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_request_that_is_cancelled_was_never_there(name: str, state: str, place: int) -> None:
    """The others come before it, after it, or both, and their texts are those of an engine without it, bit for bit."""
    one = engine(name, max_rows=4, tokenizer=Letters())
    inbox: dict[int, list[Piece]] = {}

    def step() -> None:
        for piece in one.step():
            inbox.setdefault(piece.request, []).append(piece)

    stays = [1, 2, 3]
    numbers = {index: one.add(PROMPTS[index], wishes(index))[0] for index in stays[:place]}
    if state == "read":
        step()  # those who run let a long prompt be read a chunk at a time
    prompt = LONG if state == "read" else PROMPTS[0]
    (victim,) = one.add(prompt, SamplingParams(max_new_tokens=40, temperature=0.7, seed=9))
    numbers |= {index: one.add(PROMPTS[index], wishes(index))[0] for index in stays[place:]}
    if state != "waiting":
        step()
    if state == "read":
        assert one._reading is not None and one._reading.number == victim
        assert 0 < one.target.cache.lengths[-1] < len(LONG)
    one.cancel(victim)
    one.cancel(victim, 999)  # once more, and one that never was
    while not one.is_idle:
        step()
    output = last(inbox.pop(victim))
    assert output.finish_reason == "interrupted" and (state == "runs") == bool(output.token_ids)
    assert output.text == "".join("abcd"[token] for token in output.token_ids)
    assert {index: last(inbox[number]).token_ids for index, number in numbers.items()} == {
        index: alone(name, index) for index in stays
    }
    demand_nothing_left(one)


# ---- threads


@pytest.mark.parametrize("name", ["none", "small", "fallback"])
def test_threads_share_an_engine_and_say_what_they_say_alone(name: str) -> None:
    one = engine(name, max_rows=5)
    wrong: list[object] = []

    def work(index: int) -> None:
        for _ in range(3):
            (output,) = one.generate([PROMPTS[index]], wishes(index))
            if output.token_ids != alone(name, index) or output.finish_reason != "length":
                wrong.append((index, output))

    for index in range(8):
        alone(name, index)
    run(work, 8)
    assert wrong == []
    demand_nothing_left(one)


def test_threads_share_a_real_model_and_its_tokenizer() -> None:
    one = load(Path(__file__).parents[1] / "models" / "target", drafter="lookup", max_rows=4)
    prompts = [f"def name_{number}(self, " for number in range(8)]
    params = SamplingParams(max_new_tokens=24, temperature=0.8, seed=3, stop="zzz")
    expected = [output.text for prompt in prompts for output in one.generate(prompt, params)]
    found: dict[int, str | None] = {}

    def work(index: int) -> None:
        found[index] = one.generate(prompts[index], params)[0].text

    run(work, 8)
    assert [found[index] for index in range(8)] == expected and len(set(expected)) > 4
    demand_nothing_left(one)


@pytest.mark.parametrize("seed", range(3))
def test_random_adds_cancels_and_sessions_in_threads(seed: int) -> None:
    """What is not cancelled says what it says alone; what is, a beginning of it."""
    one = engine("small, sampled tree", max_rows=4)
    wrong: list[object] = []

    def work(thread: int) -> None:
        luck = Random(f"{seed} {thread}")
        for _ in range(6):
            chosen = [luck.randrange(8) for _ in range(luck.randint(1, 3))]
            stream = one.stream([PROMPTS[i] for i in chosen], [wishes(i) for i in chosen])
            victim = luck.randrange(len(chosen)) if luck.random() < 0.5 else None
            found: list[list[Piece]] = [[] for _ in chosen]
            for piece in stream:
                found[piece.prompt_index].append(piece)
                if piece.prompt_index == victim and not piece.finish_reason:
                    one.cancel(piece.request)
                if luck.random() < 0.02:
                    stream.close()
                    break
            else:
                for place, (index, pieces) in enumerate(zip(chosen, found, strict=True)):
                    said = last(pieces).token_ids
                    expected = alone("small, sampled tree", index)
                    if said != (expected[: len(said)] if place == victim else expected):
                        wrong.append((index, pieces))

    for index in range(8):
        alone("small, sampled tree", index)
    run(work, 6)
    assert wrong == []
    demand_nothing_left(one)


def run(work: Callable[[int], None], threads: int) -> None:
    """Work in so many threads; none may fail or hang."""
    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    started = [threading.Thread(target=guarded, args=(index,), daemon=True) for index in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a caller waits for ever"
    assert failures == []


def test_a_request_by_hand_is_told_of_steps_that_others_made() -> None:
    one = engine("none")
    (number,) = one.add(PROMPTS[1], wishes(1, tokens=5))
    one.generate([PROMPTS[2]], wishes(2))
    assert not one.is_idle
    pieces = one.step()
    assert {piece.request for piece in pieces} == {number} and last(pieces).token_ids == alone("none", 1, 5)
    demand_nothing_left(one)


# ---- nothing is kept


def test_nothing_is_kept_of_what_has_ended() -> None:
    one = engine("small", max_rows=3, tokenizer=Letters())
    one.generate(PROMPTS, [wishes(index) for index in range(8)])
    number = one.add(PROMPTS[0], wishes(0))[0]
    one.step()
    gone = [weakref.ref(request) for request in one._running]
    one.cancel(number)
    one.step()
    gc.collect()
    assert [ref() for ref in gone] == [None]
    assert not [found for found in gc.get_objects() if type(found) is Request]
    demand_nothing_left(one)


# ---- steps that break off


class Breaking:
    """Lets a method of an object fail at chosen calls, before its work or after it."""

    def __init__(self, error: type[BaseException], luck: Random, share: float):
        self._error, self._luck, self._share = error, luck, share
        self.count = 0
        self.armed = False

    def into(self, owner: Any, method: str) -> None:
        work = getattr(owner, method)

        def broken(*given: Any, **named: Any) -> Any:
            self._perhaps()
            made = work(*given, **named)
            self._perhaps()
            return made

        setattr(owner, method, broken)

    def _perhaps(self) -> None:
        if self.armed and self._luck.random() < self._share:
            self.count += 1
            raise self._error


PLACES = ("propose", "observe", "admit", "score", "keep", "prefill", "feed", "logprobs")


def broken_engine(name: str, place: str, breaking: Breaking, monkeypatch: pytest.MonkeyPatch) -> Engine:
    one = engine(name, max_rows=3, tokenizer=Letters())
    if place in ("propose", "observe", "admit"):
        breaking.into(one.drafter, place)
    elif place == "logprobs":
        breaking.into(one, "_note_logprobs")
    elif place == "feed":
        from forerun.engine.text import TextStream

        feed = TextStream.feed

        def broken(stream: TextStream, token: int) -> str:
            breaking._perhaps()
            return feed(stream, token)

        monkeypatch.setattr(TextStream, "feed", broken)
    else:
        breaking.into(one.target, place)
    return one


@every_drafter
@pytest.mark.parametrize("place", PLACES)
def test_ctrl_c_anywhere_in_a_step_costs_the_others_nothing(
    name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's own requests end with a beginning of their text; the others', with all of it,
    every piece told once."""
    share = 0.5 if place in ("admit", "prefill") else 0.2  # these are not called with every step
    breaking = Breaking(KeyboardInterrupt, Random(f"{name} {place}"), share)
    one = broken_engine(name, place, breaking, monkeypatch)
    monkeypatch.setattr(Request, "_rewind", unarmed(breaking, Request._rewind))
    going = one.stream([PROMPTS[1], PROMPTS[2]], [wishes(1), wishes(2)])
    pieces = [next(going)]
    for index in (3, 4, 5, 6):
        breaking.armed = True
        outputs = one.generate([PROMPTS[index]], wishes(index))
        breaking.armed = False
        for output in outputs:
            assert output.token_ids == alone(name, index)[: len(output.token_ids)]
            assert output.text == "".join("abcd"[token] for token in output.token_ids)
    assert breaking.count
    pieces += going
    for index in (1, 2):
        output = last([piece for piece in pieces if piece.prompt_index == index - 1])
        assert output.token_ids == alone(name, index) and output.finish_reason == "length"
        assert output.text == "".join("abcd"[token] for token in output.token_ids)
    demand_nothing_left(one)


def unarmed(breaking: Breaking, work: Callable[[Request], None]) -> Callable[[Request], None]:
    """Ctrl-C comes once, not again while it is dealt with."""

    def quiet(request: Request) -> None:
        armed, breaking.armed = breaking.armed, False
        work(request)
        breaking.armed = armed

    return quiet


@every_drafter
@pytest.mark.parametrize("place", PLACES)
def test_an_error_in_a_step_ends_who_was_in_it_and_nobody_else(
    name: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking = Breaking(ZeroDivisionError, Random(f"{name} {place}"), 1.0)
    one = broken_engine(name, place, breaking, monkeypatch)
    monkeypatch.setattr(Request, "_rewind", unarmed(breaking, Request._rewind))
    going = one.stream(PROMPTS[:5], [wishes(index) for index in range(5)])
    pieces = [next(going) for _ in range(4)]
    one.max_rows = 8  # so that somebody is read
    breaking.armed = True
    with pytest.raises(ZeroDivisionError):
        one.generate([PROMPTS[5]], wishes(5))
    breaking.armed = False
    with pytest.raises(ZeroDivisionError):
        hear(going, pieces)
    hear(going, pieces)
    for index in range(5):
        output = last([piece for piece in pieces if piece.prompt_index == index])
        assert output.finish_reason in ("length", "interrupted")
        expected = alone(name, index)
        assert output.token_ids == (expected if output.finish_reason == "length" else expected[: len(output.token_ids)])
    assert any(piece.finish_reason == "interrupted" for piece in pieces)
    demand_nothing_left(one)
    assert one.generate([PROMPTS[6]], wishes(6))[0].token_ids == alone(name, 6)


def hear(session: Session, pieces: list[Piece]) -> None:
    """To its end or to an error, whichever comes first."""
    for piece in session:
        pieces += [piece]


def test_an_error_is_raised_to_whom_it_concerns_and_not_to_whoever_drives() -> None:
    one = engine("small", max_rows=2)
    breaking = Breaking(ZeroDivisionError, Random(0), 1.0)
    breaking.into(one.target, "score")
    with one.stream([PROMPTS[1], PROMPTS[2]], wishes(1)) as owner:
        next(owner)
        waiting = one.stream([PROMPTS[3]], wishes(3))
        score, calls = one.target.score, count()

        def first_breaks(*given: Any) -> Any:
            breaking.armed = next(calls) == 0
            return score(*given)

        one.target.score = first_breaks  # type: ignore[method-assign]
        assert last(list(waiting)).token_ids == alone("small", 3)
        with pytest.raises(ZeroDivisionError):
            hear(owner, [])
        assert [piece.finish_reason for piece in owner] == ["interrupted", "interrupted"]
    demand_nothing_left(one)


def test_an_error_in_a_step_of_requests_by_hand_is_raised_by_it_and_told() -> None:
    one = engine("none")
    breaking = Breaking(ZeroDivisionError, Random(0), 1.0)
    breaking.into(one.target, "score")
    numbers = one.add(PROMPTS[1], wishes(1)) + one.add(PROMPTS[2], wishes(2))
    one.step()
    breaking.armed = True
    with pytest.raises(ZeroDivisionError):
        one.step()
    breaking.armed = False
    pieces = one.step()
    assert [piece.request for piece in pieces] == numbers
    assert [(piece.finish_reason, type(piece.error)) for piece in pieces] == [("interrupted", ZeroDivisionError)] * 2
    demand_nothing_left(one)


@pytest.mark.parametrize("call", ["generate", "step"])
def test_an_engine_cannot_be_asked_from_within_its_own_step(call: str) -> None:
    one = engine("none")

    def asks(tokens: Tensor, logits: Tensor) -> Tensor:
        one.generate([PROMPTS[2]], wishes(2)) if call == "generate" else one.step()
        return logits

    with pytest.raises(RequestError, match="from within its own step"):
        one.generate([PROMPTS[1]], SamplingParams(max_new_tokens=5, processors=(asks,)))
    demand_nothing_left(one)
    assert one.generate([PROMPTS[3]], wishes(3))[0].token_ids == alone("none", 3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("place", ["propose", "observe", "score", "keep", "prefill"])
def test_ctrl_c_again_while_it_is_dealt_with(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = broken_engine("small", place, Breaking(KeyboardInterrupt, Random(place), 0.0), monkeypatch)
    breaking = Breaking(KeyboardInterrupt, Random(place), 0.2)
    for owner, method in ((one, "_recover"), (one, "_sweep"), (one.target, "release"), (one.drafter, "release")):
        breaking.into(owner, method)
    breaking.into(one.target if place in ("score", "keep", "prefill") else one.drafter, place)
    going = one.stream([PROMPTS[1], PROMPTS[2]], [wishes(1), wishes(2)])
    pieces = [next(going)]
    for index in (3, 4, 5, 6) * 5:
        breaking.armed = True
        with suppress(KeyboardInterrupt):
            one.generate([PROMPTS[index]], wishes(index))
        breaking.armed = False
    assert breaking.count > 10
    hear(going, pieces)
    for index in (1, 2):
        assert last([piece for piece in pieces if piece.prompt_index == index - 1]).token_ids == alone("small", index)
    one.cancel()  # nobody has called since the last Ctrl-C
    demand_nothing_left(one)


@pytest.mark.parametrize("name", ["none", "small"])
def test_requests_by_hand_go_on_after_ctrl_c(name: str) -> None:
    one = engine(name, max_rows=2)
    breaking = Breaking(KeyboardInterrupt, Random(name), 0.3)
    breaking.into(one.target, "score")
    numbers = [one.add(PROMPTS[index], wishes(index))[0] for index in range(4)]
    found: dict[int, list[Piece]] = {number: [] for number in numbers}
    breaking.armed = True
    while not one.is_idle:
        try:
            for piece in one.step():
                found[piece.request].append(piece)
        except KeyboardInterrupt:
            pass
    assert breaking.count > 3
    assert [last(found[number]).token_ids for number in numbers] == [alone(name, index) for index in range(4)]


def test_greedy_texts_here_are_those_of_plain_decoding() -> None:
    assert alone("small", 1) == plain(tables()["target"], PROMPTS[1], 30)
