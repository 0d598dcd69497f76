"""Ctrl-C and SIGTERM: work that is worth saving takes note and ends; anything else is left at once, cleanly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Interrupted(KeyboardInterrupt):
    """A signal ended the work.  number: which; the message says what is kept."""

    def __init__(self, number: int = signal.SIGINT, message: str = ""):
        super().__init__(message)
        self.number = number


@contextmanager
def leaving() -> Iterator[None]:
    """In the block SIGTERM is an :class:`Interrupted`, as Ctrl-C is a KeyboardInterrupt: temporary files go."""

    def leave(number: int, _frame: Any) -> NoReturn:
        raise Interrupted(number)

    with _handled(leave, signal.SIGTERM):
        yield


@contextmanager
def noticing() -> Iterator[Callable[[], int]]:
    """In the block a first SIGINT or SIGTERM does nothing but make the function that is given return its number, not 0.
    A second one is a KeyboardInterrupt.  Only the main thread gets signals; in others there is nothing to notice."""
    received: list[int] = []

    def notice(number: int, _frame: Any) -> None:
        received.append(number)
        if len(received) > 1:
            raise Interrupted(number)

    with _handled(notice, signal.SIGINT, signal.SIGTERM):
        yield lambda: received[0] if received else 0


@contextmanager
def _handled(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, signal.SIG_DFL if was is None else was)
