"""The engine under asyncio: right answers, one batch, cancelled tasks that leave nothing behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from fakes import TableNetwork, engine_of, plain
from forerun import AsyncEngine, Engine, Output, Piece, RequestError, SamplingParams

PROMPTS = [[0], [1, 2, 3], [2] * 9, [3, 0, 1, 2, 3, 0, 1], [1, 1], [0, 3, 0]]
TARGET = TableNetwork(4, 3, 12)


def made(max_rows: int = 8, drafter: str = "lookup") -> Engine:
    return engine_of(TARGET, drafter, max_rows=max_rows)


def run(work: Callable[[AsyncEngine], Awaitable[Any]], engine: Engine) -> Any:
    """Work, then close; nothing may be left, and nobody may be waiting for ever."""

    async def main() -> Any:
        async with AsyncEngine(engine) as one:
            found = await work(one)
            await settled(engine)
        return found

    found = asyncio.run(asyncio.wait_for(main(), 60))
    assert engine.is_idle and engine.target.cache.rows == 0
    assert not [thread for thread in threading.enumerate() if thread.name == "forerun"]
    return found


async def settled(engine: Engine) -> None:
    """Whatever has ended or was cancelled is gone, without close."""
    while not engine.is_idle:
        await asyncio.sleep(0.001)


def test_many_tasks_get_what_they_asked_for_in_one_batch() -> None:
    engine = made(drafter="none")

    async def work(one: AsyncEngine) -> list[list[Output]]:
        TARGET.forwards = 0
        return await asyncio.gather(*(one.generate(prompt, max_new_tokens=200) for prompt in PROMPTS))

    found = run(work, engine)
    assert [output.token_ids for (output,) in found] == [plain(TARGET, prompt, 200) for prompt in PROMPTS]
    # One after the other would be 6 * 200. Those that come first may run alone for some steps.
    assert TARGET.forwards < 3 * 200 + 6 * 200


def test_a_batch_comes_in_its_order() -> None:
    async def work(one: AsyncEngine) -> list[Output]:
        counts = [SamplingParams(max_new_tokens=count, temperature=1.0, n=2, seed=count) for count in (9, 3, 6)]
        return await one.generate(PROMPTS[:3], counts)

    outputs = run(work, made())
    assert [(output.prompt_index, output.sample) for output in outputs] == [(i, j) for i in range(3) for j in range(2)]
    assert [len(output.token_ids) for output in outputs] == [9, 9, 3, 3, 6, 6]


def test_pieces_stream_beside_others_and_beside_threads() -> None:
    engine = made(max_rows=3)
    said: list[list[int]] = []
    thread = threading.Thread(target=lambda: said.append(engine.generate(PROMPTS[3], max_new_tokens=50)[0].token_ids))

    async def listen(one: AsyncEngine, prompt: list[int]) -> list[Piece]:
        return [piece async for piece in one.stream(prompt, {"max_tokens": 50})]

    async def work(one: AsyncEngine) -> list[list[Piece]]:
        thread.start()
        return await asyncio.gather(*(listen(one, prompt) for prompt in PROMPTS))

    for prompt, pieces in zip(PROMPTS, run(work, engine), strict=True):
        assert [token for piece in pieces for token in piece.token_ids] == plain(TARGET, prompt, 50)
        assert pieces[-1].output is not None and len(pieces) > 1
    thread.join(timeout=60)
    assert said == [plain(TARGET, PROMPTS[3], 50)]


@pytest.mark.parametrize("end", ["cancel", "break", "timeout"])
def test_a_task_that_ends_early_takes_its_requests_along(end: str) -> None:
    engine = made(drafter="none")
    TARGET.forwards = 0

    async def listen(one: AsyncEngine, begun: asyncio.Event) -> None:
        async for _ in one.stream(PROMPTS[1], max_new_tokens=4000):
            begun.set()
            if end == "break":
                break

    async def work(one: AsyncEngine) -> list[Output]:
        begun = asyncio.Event()
        task = asyncio.ensure_future(listen(one, begun))
        other = asyncio.ensure_future(one.generate(PROMPTS[2], max_new_tokens=60))
        await begun.wait()
        if end == "cancel":
            task.cancel()
        elif end == "timeout":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(task, 0.01)
        await asyncio.wait([task])
        assert task.cancelled() == (end != "break")
        return await other

    (output,) = run(work, engine)  # which waits until nothing is left of the other one
    assert output.token_ids == plain(TARGET, PROMPTS[2], 60)
    assert TARGET.forwards < 2000  # of 4000


def test_the_event_loop_goes_on_while_the_engine_works() -> None:
    async def work(one: AsyncEngine) -> int:
        task, turns = asyncio.ensure_future(one.generate(PROMPTS, max_new_tokens=300)), 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    assert run(work, made()) > 20


def test_what_cannot_be_served_is_refused_to_its_task_alone() -> None:
    async def work(one: AsyncEngine) -> list[Any]:
        asked = [[1, 9], PROMPTS[1]]
        return await asyncio.gather(*(one.generate(p, max_new_tokens=5) for p in asked), return_exceptions=True)

    wrong, right = run(work, made())
    assert isinstance(wrong, RequestError) and "outside the vocabulary" in str(wrong)
    assert right[0].token_ids == plain(TARGET, PROMPTS[1], 5)


@pytest.mark.parametrize("place", ["score", "reserve"])
def test_an_error_reaches_whoever_waits_and_the_engine_goes_on(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step its requests are told; where none is in it yet, everybody is."""
    engine = made()

    def breaks(*_: Any) -> None:
        monkeypatch.undo()
        raise ZeroDivisionError

    async def work(one: AsyncEngine) -> list[Output]:
        monkeypatch.setattr(engine.target, place, breaks)
        with pytest.raises(ZeroDivisionError):
            await one.generate(PROMPTS[1], max_new_tokens=5)
        return await one.generate(PROMPTS[2], max_new_tokens=5)

    assert run(work, engine)[0].token_ids == plain(TARGET, PROMPTS[2], 5)


def test_a_thread_that_is_told_to_exit_leaves_nobody_waiting() -> None:
    def leave(ids: Any, scores: Any) -> Any:
        raise SystemExit

    async def ask(one: AsyncEngine) -> type[BaseException] | None:
        try:
            await one.generate(PROMPTS[0], processors=[leave], max_new_tokens=5)
        except SystemExit as error:  # asyncio would end with it
            return type(error)
        return None

    async def work(one: AsyncEngine) -> list[Output]:
        assert await asyncio.wait_for(ask(one), 20) is SystemExit
        return await asyncio.wait_for(one.generate(PROMPTS[1], max_new_tokens=5), 20)

    (output,) = run(work, made())
    assert output.token_ids == plain(TARGET, PROMPTS[1], 5)


def test_closing_ends_what_runs_and_refuses_what_comes() -> None:
    engine = made()

    async def main() -> Output:
        one = AsyncEngine(engine)
        pieces = one.stream(PROMPTS[1], max_new_tokens=4000)
        await anext(pieces)
        await one.close()
        last = [piece async for piece in pieces][-1]
        with pytest.raises(RequestError, match="closed"):
            await one.generate(PROMPTS[1])
        assert last.output is not None
        return last.output

    assert asyncio.run(asyncio.wait_for(main(), 60)).finish_reason == "interrupted"
    assert engine.is_idle
