"""How many firing features a Gated SAE needs for the reconstruction of a baseline of the same training compute.

The runs are `_sweep`'s.  Each seed gives each kind a front: the pairs of FVU and L0 that its λs reach.  A seed's ratio of
the two L0s is taken at equal FVU, averaged over the FVU that both fronts reach, and the interval is over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.claims import _claim, _sweep
from benchmarks.claims._sweep import GATED, REAL, RELU, SYNTHETIC, Value, curve, of
from sae_fast.analysis.plots import label_axes, plain_ticks

TITLE = "Firing features that a Gated SAE and a baseline of the same compute need"
SETTING = (
    "The SAEs of the claim on shrinkage. The baseline has 1.5 times the features, so that a dense training step costs "
    "both the same; each kind's learning rate is tuned on a seed of its own. *Half* is a mean ratio of at most 0.5; "
    "recovery is as good within 0.02 of cosine and 0.05 of the fraction found."
)
SEEDS, QUICK_SEEDS = 5, 2
HALF = 0.5  # of the baseline's L0: reached where the mean over seeds is not above it
MARGINS = {"cosine": 0.02, "found": 0.05}  # recovery that is surely worse by less than this is as good
NAMES = {REAL: "real activations (MiniLM, block 2)", SYNTHETIC: "synthetic activations with known features"}

Curve = Sequence[tuple[float, float]]  # points (x, y)


class Gap(NamedTuple):
    """y of one curve minus that of another where both have an x: the mean over x, the largest, and at the two ends."""

    mean: float
    largest: float
    first: float
    last: float
    x: tuple[float, float]


prepare = _sweep.tune


def measure(seed: int, quick: bool) -> dict[str, Any]:
    return _sweep.runs(seed, quick)


def front(points: Curve) -> list[tuple[float, float]]:
    """The points (FVU, log L0) that no other point beats in both, by FVU.  A run that training has left worse than a
    neighbour in FVU and in L0 is no part of what its kind can reach."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def gap(a: Curve, b: Curve) -> Gap:
    """y_a(x) − y_b(x) of two curves, linear between their points: exact, for the gap is linear between all points of both.
    ValueError if they share no range of x, for to compare there would be to extrapolate."""
    (xa, ya), (xb, yb) = (np.array(sorted(points), dtype=float).T for points in (a, b))
    low, high = max(xa[0], xb[0]), min(xa[-1], xb[-1])
    if not low < high:
        raise ValueError(f"fronts: they do not overlap: {xa[0]:.3g} to {xa[-1]:.3g}, and {xb[0]:.3g} to {xb[-1]:.3g}")
    x = np.unique(np.clip(np.concatenate([xa, xb]), low, high))
    y = np.interp(x, xa, ya) - np.interp(x, xb, yb)
    mean = float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum() / (high - low))
    return Gap(mean, float(y.max()), float(y[0]), float(y[-1]), (float(low), float(high)))


def l0(run: dict[str, Any]) -> float:
    return run["l0"]


def fvu(run: dict[str, Any]) -> float:
    return run["fvu"]


def rescaled_fvu(run: dict[str, Any]) -> float:
    """FVU once x̂ is rescaled by the best factor about the mean, which undoes overall shrinkage: 1 − ρ² (MATH.md §4)."""
    return 1 - run["centred"]["rho_squared"]


def l0_gaps(results: list[dict[str, Any]], data: str, error: Value = fvu) -> list[Gap]:
    """Of each seed: log of the L0 ratio, Gated ÷ baseline, at equal FVU."""
    fronts = [
        [front([(error(r), math.log(r["l0"])) for r in of(result, data, kind)]) for kind in (GATED, RELU)]
        for result in results
    ]
    return [gap(*pair) for pair in fronts]


def recovery_gaps(results: list[dict[str, Any]], what: str, x: Value) -> list[Gap]:
    """Of each seed: recovery of the true features, Gated − baseline, at equal x."""
    pairs = [[[(x(r), r[what]) for r in of(result, SYNTHETIC, kind)] for kind in (GATED, RELU)] for result in results]
    return [gap(*pair) for pair in pairs]


def conclude(results: list[dict[str, Any]]) -> list[_claim.Row]:
    rows = [_half(results, data) for data in (REAL, SYNTHETIC)]
    return [*rows, _beyond_shrinkage(results), _recovery(results)]


def _ratio(gaps: Sequence[Gap], which: str = "mean") -> _claim.Interval:
    return _claim.interval(math.exp(getattr(g, which)) for g in gaps)


def _half(results: list[dict[str, Any]], data: str) -> _claim.Row:
    gaps = l0_gaps(results, data)
    ratio, worst, first, last = (_ratio(gaps, which) for which in ("mean", "largest", "first", "last"))
    low, high = (float(np.mean([g.x[i] for g in gaps])) for i in (0, 1))
    lr = {kind: results[0]["tuned"][data][kind]["lr"] for kind in (GATED, RELU)}
    result = (
        f"{ratio} times the baseline's L0 at equal FVU, averaged over FVU {low:.2f} to {high:.2f}; {first} at the lowest, "
        f"{last} at the highest, at most {worst} between; learning rates tuned to {lr[GATED]:g} (Gated) and {lr[RELU]:g}"
    )
    everywhere, half = worst.high < 1, ratio.mean <= HALF
    if ratio.high >= 1:
        verdict = _claim.FAILS
        result += "; no difference can be told from none" if ratio.low <= 1 else ""
    else:
        verdict = _claim.HOLDS if everywhere and half else _claim.CONDITION
        ends = " and ".join(where for where, end in (("lowest", first), ("highest", last)) if end.mean <= HALF)
        result += f"; fewer {'at every FVU' if everywhere else 'on average only'}, half as many "
        result += "on average" if half else f"at the {ends} FVU only" if ends else "at neither end"
    claim = (
        "Gated SAEs are a Pareto improvement over a baseline of the same training compute (1.5 times the features), and "
        f"need half as many firing features for the same reconstruction; on {NAMES[data]}"
    )
    return _claim.Row(claim, _claim.PAPER, "`pareto.l0_gaps`", result, verdict)


def _beyond_shrinkage(results: list[dict[str, Any]]) -> _claim.Row:
    said, fewer, everywhere = [], [], []
    for data in (REAL, SYNTHETIC):
        gaps = l0_gaps(results, data, rescaled_fvu)
        ratio, worst = _ratio(gaps), _ratio(gaps, "largest")
        fewer.append(ratio.high < 1)
        everywhere.append(fewer[-1] and worst.high < 1)
        how = "fewer at every FVU" if everywhere[-1] else "fewer on average only" if fewer[-1] else "not surely fewer"
        said.append(
            f"{ratio} times the baseline's L0 on {data} activations, averaged over FVU, and at most {worst} between: {how}"
        )
    verdict = _claim.HOLDS if all(everywhere) else _claim.CONDITION if any(fewer) else _claim.FAILS
    result = f"{'; '.join(said)}; at equal FVU, each x̂ rescaled about the mean"
    claim = "A Gated SAE still needs fewer firing features once the baseline's shrinkage is undone by rescaling x̂"
    return _claim.Row(claim, _claim.PAPER, "`pareto.rescaled_fvu`", result, verdict)


def as_well(differences: dict[str, _claim.Interval]) -> str:
    """Of Gated − baseline in each of MARGINS: as well (not inferior by its margin in any), worse (surely, in one), or
    undecided."""
    if all(differences[what].low > -margin for what, margin in MARGINS.items()):
        return "as well"
    return "worse" if any(differences[what].high < 0 for what in MARGINS) else "undecided"


def _recovery(results: list[dict[str, Any]]) -> _claim.Row:
    at = {
        name: {what: _claim.interval(g.mean for g in recovery_gaps(results, what, x)) for what in MARGINS}
        for name, x in (("L0", lambda r: math.log(r["l0"])), ("FVU", fvu))
    }
    found = {name: as_well(differences) for name, differences in at.items()}
    rows = [of(results[0], SYNTHETIC, kind)[0]["d_sae"] for kind in (GATED, RELU)]
    result = (
        f"{at['L0']['cosine']} is Gated − baseline ({rows[0]} and {rows[1]} rows) in the mean over true features of the "
        f"largest cosine with a decoder row, at equal L0, and {at['L0']['found']} in the fraction of them above "
        f"{_sweep.FOUND}; at equal FVU {at['FVU']['cosine']} and {at['FVU']['found']}; with margins of "
        f"{' and '.join(f'{margin:g}' for margin in MARGINS.values())}: {found['L0']} at equal L0, {found['FVU']} at "
        "equal FVU"
    )
    answers = set(found.values())
    verdict = _claim.CONDITION  # at one of the two alone, or undecided
    if answers == {"as well"}:
        verdict = _claim.HOLDS
    elif "worse" in answers and "as well" not in answers:
        verdict = _claim.FAILS
    claim = (
        "A Gated SAE's features are as meaningful as the baseline's (the paper had people rate them; here: it recovers the "
        "true features of synthetic activations as well)"
    )
    return _claim.Row(claim, _claim.PAPER, "`pareto.recovery_gaps`", result, verdict)


def draw(results: list[dict[str, Any]], figure: Any) -> None:
    """FVU against L0 on both kinds of data, and recovery against L0; thin lines are seeds, points their means."""
    real, synthetic, found = figure.subplots(1, 3)
    labels = {kind: f"{name}, F = {{{kind}}}" for kind, name in ((GATED, "Gated"), (RELU, "baseline"))}
    for axes, data in ((real, REAL), (synthetic, SYNTHETIC)):
        widths = {kind: of(results[0], data, kind)[0]["d_sae"] for kind in labels}
        for kind, label in labels.items():
            curve(axes, results, data, kind, l0, fvu, label=label.format(**widths))
        rescaled = {"linestyle": ":", "markersize": 2.5, "label": "baseline, x̂ rescaled"}
        curve(axes, results, data, RELU, l0, rescaled_fvu, **rescaled)
        ratio = _ratio(l0_gaps(results, data))
        label_axes(axes, f"{ratio.mean:.2f} × the L0 at equal FVU", f"L0 ({data} activations)", "FVU (held out)")
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    for kind, name in ((GATED, "Gated"), (RELU, "baseline")):
        curve(found, results, SYNTHETIC, kind, l0, lambda r: r["cosine"], label=name)
    label_axes(found, "True features recovered", "L0 (synthetic activations)", "mean of the largest cosine")
    for axes in (real, synthetic, found):
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.legend(frameon=False, fontsize="small")
