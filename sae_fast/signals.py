"""Ctrl-C and SIGTERM: work that is worth saving takes note and ends; what would be torn waits for its end; anything else is
left at once, cleanly.  A signal that is ignored, as a script's jobs in the background ignore Ctrl-C, stays so."""

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


_held_back = threading.local()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keeps back what Python handlers do to a SIGINT or SIGTERM until the block has ended, and the one around it.  A few
    microseconds.

    Other handlers, such as the system's, which ends the process, are left alone.  Only the main thread gets signals.
    """
    if getattr(_held_back, "now", False) or threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, Any]] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    handlers: dict[int, Any] = {n: handler for n, handler in before.items() if callable(handler)}
    try:
        _held_back.now = True
        for number in handlers:
            signal.signal(number, lambda number, frame: received.append((number, frame)))
        yield
    finally:
        _held_back.now = False  # first: a signal may come in between
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in received:
            handlers[number](number, frame)


@contextmanager
def _handled(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, signal.SIG_DFL if was is None else was)
