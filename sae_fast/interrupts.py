"""Ctrl-C between two states that belong together waits until both are there."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keeps SIGINT back while the block runs, and delivers it when it has ended.  A few microseconds.

    Only the main thread gets signals; in others, and where no Python handler is set, the block just runs.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield
        return
    kept: list[Any] = []
    signal.signal(signal.SIGINT, lambda *received: kept.append(received))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if kept and callable(before):
            before(*kept[0])
        elif kept:
            signal.raise_signal(signal.SIGINT)
