"""What a claim's result is, and how it is kept: rows with intervals, and one file a seed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks import jsonfile

HOLDS, CONDITION, FAILS = "holds", "holds with condition", "does not hold here"
PAPER, CRITIQUE = "paper", "critique"


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
        return f"The {self.by} says: {claim}. Here: {self.result.rstrip('.')}; {self.verdict}."


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


def kept(folder: Path, of: Callable[..., Any], seed: int, quick: bool, sources: Iterable[Path]) -> dict[str, Any]:
    """of(seed, quick), from ``folder`` if it is there, else computed and written there whole.

    The file's name carries a hash of ``sources``, the programs that made it, so that what an older program measured is not
    taken for what this one would.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:12]
    path = folder / f"{'quick' if quick else 'full'}-{digest}-seed-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    result = of(seed, quick)
    jsonfile.write(path, result)
    return json.loads(path.read_text())  # as a later run will see it
