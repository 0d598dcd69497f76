"""Gated SAEs and the ReLU baseline, trained by the engine over a range of λ: the runs that `bias` and `pareto` share.

The baseline has 1.5 times the features: a dense training step of a Gated SAE costs as much as one of a baseline so wide,
and the paper compares at equal compute.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

import sae_fast as sf
from benchmarks.claims import _seeds, _tasks
from benchmarks.claims._tasks import Task
from sae_fast.analysis.plots import ACCENT, TERMS
from sae_fast.metrics import Metrics

GATED, RELU, COLLAPSED = "gated", "relu", "collapsed"
REAL, SYNTHETIC = "real", "synthetic"
COLORS = {GATED: ACCENT, RELU: TERMS["reconstruction"]}
WIDER = 1.5
TUNING_SEED = 1_000_003  # none of those reported
FOUND = 0.9  # a true feature whose cosine with a decoder row is above this is found

SOURCES = _seeds.programs(Path(__file__))
Value = Callable[[dict[str, Any]], float]  # a number of a run


@dataclass(frozen=True, eq=False)
class Plan:
    """What is trained on one kind of data."""

    d_sae: int  # of the Gated SAE
    l1: dict[str, tuple[float, ...]]  # λ by kind, chosen so that both kinds cover the same FVU
    steps: int
    lr: float  # where tuning starts
    target_l0: float  # where learning rates are compared
    init_l0: float
    batch_size: int = 512
    held_out: int = 8192

    def features(self, kind: str) -> int:
        return self.d_sae if kind == GATED else round(WIDER * self.d_sae)


PLANS = {
    REAL: Plan(1024, {GATED: (1.5, 3.0, 6.0, 12.0), RELU: (0.8, 1.6, 3.2, 6.4)}, 500, 8e-3, 20.0, 64.0),
    SYNTHETIC: Plan(256, {GATED: (1.0, 2.0, 4.0, 8.0), RELU: (0.5, 1.0, 2.0, 4.0)}, 500, 1.6e-2, 5.0, 12.0),
}
QUICK = {
    REAL: Plan(96, {GATED: (3.0, 6.0, 12.0), RELU: (1.5, 3.0, 6.0)}, 60, 3.2e-2, 8.0, 16.0, 256, 1024),
    SYNTHETIC: Plan(96, {GATED: (3.0, 6.0, 12.0), RELU: (1.5, 3.0, 6.0)}, 60, 3.2e-2, 4.0, 12.0, 256, 1024),
}


def runs(seed: int, quick: bool) -> dict[str, Any]:
    """{"tuned": what `_tune_all` says, "runs": [what `measure` says of each SAE]} of one seed: made once, kept on disk."""
    tuned = tune(quick)

    def train_all(seed: int, quick: bool) -> dict[str, Any]:
        plans, found = QUICK if quick else PLANS, []
        wanted = [(data, kind, l1) for data, plan in plans.items() for kind in (GATED, RELU) for l1 in plan.l1[kind]]
        for data, kind, l1 in tqdm(wanted, desc=f"seed {seed}", unit="SAE", dynamic_ncols=True, leave=False):
            task, lr = _task(data, seed, quick), tuned[data][kind]["lr"]
            about = {"data": data, "kind": kind, "l1": l1, "lr": lr, "d_sae": plans[data].features(kind)}
            found.append(about | measure(_train(task, plans[data], kind, l1, lr, seed), task))
        for data in plans:
            found.append({"data": data, "kind": COLLAPSED, "l1": 0.0} | _collapsed(_task(data, seed, quick)))
        return {"tuned": tuned, "runs": found}

    return _seeds.kept("_sweep", train_all, seed, quick, SOURCES)


def tune(quick: bool) -> dict[str, Any]:
    """What `_tune_all` says, of a seed that is none of those reported: made once, before the seeds, kept on disk."""
    return _seeds.kept("_sweep/tuning", _tune_all, TUNING_SEED, quick, SOURCES)


def of(result: dict[str, Any], data: str, kind: str) -> list[dict[str, Any]]:
    """The runs of one kind on one kind of data, by λ."""
    return sorted((r for r in result["runs"] if r["data"] == data and r["kind"] == kind), key=lambda r: r["l1"])


def curve(axes: Any, results: list[dict[str, Any]], data: str, kind: str, x: Value, y: Value, **style: Any) -> None:
    """y against x over λ: of each seed as a thin line, of their means as points that ``style`` is for."""
    seeds = np.array([[(x(r), y(r)) for r in of(result, data, kind)] for result in results])  # [seeds, λs, 2]
    for line in seeds:
        axes.plot(*line.T, color=COLORS[kind], linewidth=0.6, alpha=0.35)
    axes.plot(*seeds.mean(0).T, **{"color": COLORS[kind], "marker": "o", "markersize": 4, "label": kind} | style)


def climb(score: Callable[[float], float], start: float, factor: float = 2.0, most: int = 4) -> dict[str, Any]:
    """The learning rate start·factor^i with the lowest score: from ``start`` to either side until the score is worse.

    So the best is never at the edge of what was tried; RuntimeError if it lies more than ``most`` factors away.  A score
    that is not a number (training failed, or nothing fires) counts as infinitely bad; RuntimeError if all tried are so.
    """
    scores: dict[int, float] = {}

    def at(i: int) -> float:
        if i not in scores:
            value = score(start * factor**i)
            scores[i] = value if math.isfinite(value) else math.inf
        return scores[i]

    best = 0
    while (step := next((s for s in (-1, 1) if at(best + s) < at(best)), 0)) != 0:
        best += step
        if abs(best) > most:
            raise RuntimeError(f"learning rate: still improving at {start * factor**best:g}, far from {start:g}")
    if at(best) == math.inf:
        raise RuntimeError(f"learning rate: no score at {start:g} nor at its neighbours: all are infinitely bad")
    return {"lr": start * factor**best, "tried": {f"{start * factor**i:g}": s for i, s in sorted(scores.items())}}


def fvu_at(train: Callable[[float], tuple[float, float]], l0: float, l1: float) -> float:
    """FVU at an L0, of train(λ) = (L0, FVU): λ is doubled or halved, from ``l1``, until the L0 lies between two runs, and
    FVU is taken as linear in log L0 between them.  Never beyond them: fronts bend."""
    here = train(l1)
    for _ in range(6):
        l1 *= 2 if here[0] > l0 else 0.5
        there = train(l1)
        (l0_a, fvu_a), (l0_b, fvu_b) = sorted([here, there])
        if 0 < l0_a <= l0 <= l0_b:
            return fvu_a if l0_a == l0_b else fvu_a + (fvu_b - fvu_a) * math.log(l0 / l0_a) / math.log(l0_b / l0_a)
        here = there
    return math.inf


@torch.inference_mode()
def measure(sae: Any, task: Task) -> dict[str, Any]:
    """On the held-out activations: L0, FVU, dead fraction; A, B, C, D and the measures of shrinkage (MATH.md §4), as they
    are ("raw") and with the mean of x taken off x and x̂ ("centred"); recovery of the true features."""
    raw, centred = Metrics(sae.d_sae), Metrics(sae.d_sae)
    mean = task.held_out.double().mean(0)
    for x in task.held_out.split(4096):
        code = sae.encode_sparse(x)
        x_hat = sae.decode(code)
        raw.update(x, x_hat, code)
        centred.update(x.double() - mean, x_hat.double() - mean, code)
    numbers = raw.compute()
    result = {name: numbers[name] for name in ("l0", "fvu", "dead_fraction")}
    result |= {"raw": shrinkage(raw), "centred": shrinkage(centred)}
    if task.directions is not None:
        result |= recovery(sae.W_dec[raw.density() > 0], task.directions)
    return result


def shrinkage(metrics: Metrics) -> dict[str, float]:
    """A = E‖x̂‖², B = E‖x‖², C = E[x̂·x], D = E‖x − x̂‖², ρ² = C²/(AB), and the four measures as `Metrics` has them."""
    state, numbers = metrics.state_dict(), metrics.compute()
    names = {"A": "x_hat_x_hat", "B": "x_x", "C": "x_hat_x", "D": "error_error"}
    sums = {letter: float(state[name]) / numbers["tokens"] for letter, name in names.items()}
    rho_squared = sums["C"] ** 2 / (sums["A"] * sums["B"])
    four = ("relative_reconstruction_bias", "projection_bias", "optimal_rescale", "legacy_bias")
    return sums | {"rho_squared": rho_squared} | {name: numbers[name] for name in four}


def recovery(W_dec: Tensor, directions: Tensor) -> dict[str, float]:
    """How well unit rows [k, d] hold the true features [m, d]: each one's largest cosine with a row, the mean over true
    features, and the fraction above FOUND."""
    if len(W_dec) == 0:
        return {"cosine": 0.0, "found": 0.0}
    best = (directions @ F.normalize(W_dec, dim=1).T).amax(1)
    return {"cosine": float(best.mean()), "found": float((best > FOUND).double().mean())}


def _train(task: Task, plan: Plan, kind: str, l1: float, lr: float, seed: int) -> sf.GatedSAE | sf.ReluSAE:
    sae = (sf.GatedSAE if kind == GATED else sf.ReluSAE)(len(task.mean), plan.features(kind), seed=seed)
    _tasks.train(sae, task, plan.steps, lr=lr, l1_coefficient=l1, init_l0=plan.init_l0)
    return sae


def _collapsed(task: Task) -> dict[str, Any]:
    """Of an SAE of which nothing fires: x̂ is the mean of the training part.  Centred, its A and C are 0: nothing to say."""
    sae = sf.ReluSAE(len(task.mean), 1, seed=0)
    with torch.no_grad():
        sae.b_dec.copy_(task.mean)
        sae.b_enc.fill_(-1e6)
    return {name: value for name, value in measure(sae, task).items() if name != "centred"}


def _tune_all(seed: int, quick: bool) -> dict[str, Any]:
    """{data: {kind: {"lr", "tried": {lr: score}}}}: for each kind alike, the learning rate of the lowest FVU at the plan's
    ``target_l0``."""
    plans = QUICK if quick else PLANS
    tuned: dict[str, Any] = {data: {} for data in plans}
    pairs = list(itertools.product(plans, (GATED, RELU)))
    for data, kind in tqdm(pairs, desc="learning rates", unit="kind", dynamic_ncols=True, leave=False):
        tuned[data][kind] = climb(partial(_score, data, kind, seed, quick), plans[data].lr)
    return tuned


def _score(data: str, kind: str, seed: int, quick: bool, lr: float) -> float:
    plan, task = (QUICK if quick else PLANS)[data], _task(data, seed, quick)

    def train(l1: float) -> tuple[float, float]:
        result = measure(_train(task, plan, kind, l1, lr, seed), task)
        return result["l0"], result["fvu"]

    try:
        return fvu_at(train, plan.target_l0, plan.l1[kind][1])
    except FloatingPointError:  # training diverged
        return math.inf


def _task(data: str, seed: int, quick: bool) -> Task:
    plan = (QUICK if quick else PLANS)[data]
    if data == SYNTHETIC:
        return _tasks.synthetic(seed, plan.batch_size, plan.held_out)
    return _tasks.real(seed, plan.batch_size, plan.held_out, quick)
