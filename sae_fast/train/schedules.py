"""Schedules as plain functions of the step, which counts from 0: factors in [0, 1] on a base value."""

from __future__ import annotations


def warmup(step: int, steps: int) -> float:
    """Linear from 0 at step 0 to 1 at ``steps``; dictionary_learning's convention (its first step has rate 0)."""
    return 1.0 if steps <= 0 else min(step / steps, 1.0)


def decay(step: int, start: int | None, total: int | None) -> float:
    """1 up to ``start``, then linear to 0 at ``total``."""
    if start is None or total is None or step < start:
        return 1.0
    return max(total - step, 0) / max(total - start, 1)
