"""Sessions: what one caller asked of an engine, and what comes of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, TypeAlias

from forerun.engine.prompts import Prompt, Prompts, separate
from forerun.engine.requests import Output, Piece
from forerun.errors import RequestError
from forerun.sampling import SamplingParams

Wish: TypeAlias = SamplingParams | Mapping[str, Any]
Wishes: TypeAlias = Wish | Sequence[Wish] | None
"""Sampling parameters as callers give them: one for all prompts, or one for each."""


class Server(Protocol):
    """What a session needs of an engine; see there."""

    def encode(self, prompt: Prompt) -> list[int]: ...

    def limit_of(self, tokens: Sequence[int], params: SamplingParams) -> int: ...

    def reserve(self, rows: int, length: int) -> None: ...

    def add(
        self, prompt: Prompt, params: SamplingParams, prompt_index: int, text: bool, inbox: deque[Piece]
    ) -> list[int]: ...

    def cancel(self, *numbers: int) -> None: ...

    def abandon(self, inbox: deque[Piece]) -> None: ...

    def await_piece(self, inbox: deque[Piece]) -> None: ...


class Session(Iterator[Piece]):
    """The requests of one call. Iterating yields their pieces as they are accepted, and drives the
    engine where nobody else does.

    It sees its own requests only. Closing it, or forgetting it, cancels what is left of these; so
    does an error or Ctrl-C while it is iterated, and who goes on iterating then gets their last
    pieces. One thread at a time may iterate. inbox: where its pieces are to come.
    """

    def __init__(
        self,
        engine: Server,
        prompts: Prompts,
        params: Sequence[SamplingParams] | SamplingParams,
        text: bool = True,
        inbox: deque[Piece] | None = None,
    ):
        self._engine = engine
        self._inbox: deque[Piece] = deque() if inbox is None else inbox
        self._open: dict[int, None] = {}
        self._is_broken = False  # an error has been raised; once is enough
        batch = separate(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(batch)
        if len(each) != len(batch):
            raise RequestError(f"{len(each)} sampling parameters for {len(batch)} prompts: give one, or one for each")
        planned = [(engine.encode(prompt), one) for prompt, one in zip(batch, each, strict=True)]
        limits = [engine.limit_of(tokens, one) for tokens, one in planned]
        engine.reserve(sum(one.n for _, one in planned), max(limits, default=1))
        try:
            for index, (tokens, one) in enumerate(planned):
                self._open.update(dict.fromkeys(engine.add(tokens, one, index, text, self._inbox)))
        except BaseException:
            engine.abandon(self._inbox)
            raise

    def __next__(self) -> Piece:
        if not self._open:
            raise StopIteration
        try:
            self._engine.await_piece(self._inbox)
            piece = self._inbox[0]
            if piece.error and not self._is_broken:
                self._is_broken = True
                raise piece.error
        except BaseException:
            self.cancel()
            raise
        if piece.finish_reason:
            self._open.pop(piece.request, None)
        return self._inbox.popleft()

    def outputs(self, watch: Callable[[Piece], None] = lambda piece: None) -> list[Output]:
        """Iterate to the end; one output per prompt and sample, in that order. watch: is shown every piece.

        Interrupted (Ctrl-C), it returns the outputs of those that were begun, with the finish reason "interrupted".
        """
        found: dict[int, Output] = {}
        numbers = list(self._open)
        try:
            for piece in self:
                if piece.output:
                    found[piece.request] = piece.output
                watch(piece)
        except KeyboardInterrupt:
            self.cancel()
            found |= {piece.request: piece.output for piece in self if piece.output and piece.output.stats.seconds}
        finally:
            self.close()
        return [found[number] for number in numbers if number in found]

    @property
    def is_over(self) -> bool:
        """No piece will come any more."""
        return not self._open

    def cancel(self) -> None:
        """End what is left; the last pieces are still to come."""
        self._engine.cancel(*self._open)

    def close(self) -> None:
        """End what is left, and hear no more of it."""
        if self._open:
            self.cancel()
            self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_open"):  # else it was never made
            self.close()


def wanted(params: Wishes, more: Mapping[str, Any]) -> SamplingParams | list[SamplingParams]:
    """What was asked for, as records; `more` holds for all of them."""
    if isinstance(params, Sequence) and not isinstance(params, str):
        return [SamplingParams.of(one, **more) for one in params]
    return SamplingParams.of(params, **more)
