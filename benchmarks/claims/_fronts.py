"""Fronts of L0 and FVU, and what one costs against another: the L0 it needs at the same FVU.

Models are columns, one entry a model: lr, l1, and "validation l0", "validation fvu", "test l0", "test fvu".  The models of
one learning rate make a curve; a front takes at each FVU the learning rate that needs the least L0 there, chosen on
validation data, measured on test data.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from benchmarks.claims._claim import CONDITION, FAILS, HOLDS, Interval, interval

GRID = 65  # values of FVU at which two fronts are compared
DATA = ("validation", "test")
L0S = tuple(f"{data} l0" for data in DATA)
Models = dict[str, list[float]]


def front(models: Models, fvu: np.ndarray) -> np.ndarray:
    """ln of the L0 that is needed for each ln FVU of ``fvu``, on test data; NaN outside the range of the front."""
    needed = []  # of each learning rate, on validation and on test data
    for lr in sorted(set(models["lr"])):
        alive = [i for i, rate in enumerate(models["lr"]) if rate == lr and min(models[name][i] for name in L0S) > 0]
        pairs = [sorted((models[f"{data} fvu"][i], models[f"{data} l0"][i]) for i in alive) for data in DATA]
        if alive:
            curves = [np.log(pair).T for pair in pairs]
            needed.append([np.interp(fvu, *curve, left=np.nan, right=np.nan) for curve in curves])
    validation, test = np.array(needed).transpose(1, 0, 2)
    best = np.where(np.isnan(validation + test), np.inf, validation).argmin(0)
    return np.take_along_axis(test, best[None], 0)[0]


def fvu_range(models: Models) -> tuple[float, float]:
    """Smallest and largest ln FVU on test data of the models that have features left."""
    l0, fvu = np.array([models[name] for name in L0S]), np.array(models["test fvu"])
    values = np.log(fvu[(l0 > 0).all(0)])
    return float(values.min()), float(values.max())


def cost(models: Models, reference: Models) -> tuple[float, float, float] | None:
    """ln of the L0 that ``models`` need over what ``reference`` needs at the same FVU: the mean over the whole range of ln
    FVU that both fronts have, over its sparse half (large FVU) and its dense half.  None if there is no such range."""
    (low, high), (other_low, other_high) = fvu_range(models), fvu_range(reference)
    low, high = max(low, other_low), min(high, other_high)
    if low >= high:
        return None
    fvu = np.linspace(low, high, GRID)
    ratio = front(models, fvu) - front(reference, fvu)
    whole, sparse, dense = (float(np.nanmean(part)) for part in (ratio, ratio[GRID // 2 :], ratio[: GRID // 2 + 1]))
    return whole, sparse, dense


class Cost(NamedTuple):
    """The intervals of `cost` over seeds, and what they say of "needs more L0"."""

    whole: Interval
    sparse: Interval
    dense: Interval

    @classmethod
    def of(cls, results: list[dict[str, Models]], name: str, reference: str) -> Cost | None:
        """Of the models called ``name``; None where in some seed the fronts have no FVU in common."""
        costs = [cost(result[name], result[reference]) for result in results]
        return None if None in costs else cls(*(interval(values) for values in zip(*costs, strict=True)))

    def __str__(self) -> str:
        halves = f"{times(self.sparse)} in the sparse half, {times(self.dense)} in the dense half"
        return f"{times(self.whole)} times the L0 at the same FVU ({halves})"

    @property
    def verdict(self) -> tuple[str, str]:
        """The verdict on "needs more L0", and what it depends on.  Without evidence for it, it does not hold."""
        halves = {"sparse": self.sparse, "dense": self.dense}
        more = [name for name, half in halves.items() if half.low > 0]
        less = [name for name, half in halves.items() if half.high < 0]
        if self.whole.low > 0 and not less:
            return HOLDS, ""
        if more:
            return CONDITION, f"; it is so in the {more[0]} half of the range of FVU alone"
        return FAILS, "" if self.whole.high < 0 or less else "; no difference can be told from none"


def times(x: Interval) -> str:
    """The interval of a logarithm, as a factor."""
    return str(Interval(*(math.exp(v) for v in x)))
