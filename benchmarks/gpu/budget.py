"""Who gets how much of the run's time."""

from __future__ import annotations

import time
from collections.abc import Callable

PARTS = ("tests", "sanitizer", "bench", "tune", "rest")  # the last: the tests that were green before, of the same sources
SHARES = {"tests": 0.4, "sanitizer": 0.15, "bench": 0.8, "tune": 0.9, "rest": 1.0}  # of what is left when the part begins
RESERVE = 25.0  # seconds for pictures and summary
GRACE = 8.0  # seconds of a part's own time in which it may still end by itself, once it has been told to


class Budget:
    def __init__(self, end: float, now: Callable[[], float] = time.time):
        self.end, self.now = end, now

    @property
    def left(self) -> float:
        return max(0.0, self.end - self.now())

    def share(self, part: str, last: bool) -> float:
        """Seconds for a part that begins now; ``last``: nothing comes after it but the reserve."""
        free = max(0.0, self.left - RESERVE)
        return free if last else free * SHARES[part]
