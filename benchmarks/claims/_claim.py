"""What a claim's result is: rows, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy import stats

HOLDS, CONDITION, FAILS = "holds", "holds with condition", "does not hold here"
PAPER, CRITIQUE, OURS = "the paper", "the critique", "sae_fast"


class Row(NamedTuple):
    """One statement: what was claimed and by whom, what came out (with its interval where there are seeds), the verdict.

    ``checked``: the function that measures it, and the test if there is one.
    """

    claim: str
    by: str
    checked: str
    result: str
    verdict: str

    @property
    def sentence(self) -> str:
        claim = self.claim.rstrip(".")
        who = self.by if self.by == OURS else self.by[0].upper() + self.by[1:]
        return f"{who} says: {claim}. Here: {self.result.rstrip('.')}; {self.verdict}."


class Interval(NamedTuple):
    """A mean over seeds and its 95 % confidence interval (Student's t)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


def interval(values: Iterable[float]) -> Interval:
    """Of at least two seeds; what is not finite is an error, never left out."""
    x = np.asarray(list(values), dtype=float)
    if len(x) < 2 or not np.isfinite(x).all():
        raise ValueError(f"values: got {x.tolist()}, want at least two, all finite")
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)
