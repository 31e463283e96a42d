"""Ctrl-C in the middle of something that must be done as a whole or not at all."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_back(what: str) -> Iterator[None]:
    """Within it a Ctrl-C waits for the end, where it is raised as KeyboardInterrupt; a second one is raised at once.

    what: what is waited for, which is said. Who handles or ignores Ctrl-C in another way is left alone.
    """
    is_main = threading.current_thread() is threading.main_thread()  # no other thread is ever interrupted
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    has_come = False

    def note(*_: object) -> None:
        nonlocal has_come
        has_come = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(f"waiting for {what}; Ctrl-C again does not wait", file=sys.stderr)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if has_come:
        raise KeyboardInterrupt
