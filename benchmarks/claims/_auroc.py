"""AUROCs, and intervals of them by the bootstrap: they keep to what an AUROC can be, which Student's t does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.claims._claim import Interval


def auroc(positive: Any, negative: Any) -> float:
    """P(a positive is above a negative), ties by half."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (positive, negative))
    return float(((a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()).mean())


def bootstrapped(bad: np.ndarray, clean: np.ndarray) -> Interval:
    """AUROC of bad [seeds] against clean [seeds], and the 2.5 % and 97.5 % points of those of seeds drawn anew."""
    return Interval(auroc(bad, clean), *middle(redrawn(bad, clean)))


def redrawn(bad: np.ndarray, clean: np.ndarray, draws: int = 2000) -> np.ndarray:
    """[draws]: AUROCs of seeds drawn anew, the same ones in every call, so that differences are of pairs."""
    drawn = np.random.default_rng(0).integers(0, len(bad), (draws, len(bad)))
    return (np.sign(bad[drawn][:, :, None] - clean[drawn][:, None, :]) / 2 + 0.5).mean((1, 2))


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean, and the 2.5 % and 97.5 % points of the means of values drawn anew, which keep to what an AUROC can be."""
    x = np.asarray(values)
    means = x[np.random.default_rng(0).integers(0, len(x), (2000, len(x)))].mean(1)
    return Interval(float(x.mean()), *middle(means))


def middle(x: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(x, (0.025, 0.975))
    return float(low), float(high)
