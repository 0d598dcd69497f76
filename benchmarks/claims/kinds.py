"""What the kinds of SAE reach at equal L0, and what AuxK does for the kinds that are penalised.

Every kind is trained as `sae-fast train --kind` trains it, over a range of λ, targets or k; Gated, ReLU and JumpReLU also
with AuxK, which by itself only TopK and BatchTopK have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tqdm.auto import tqdm

import sae_fast as sf
from benchmarks.claims import _claim, _sweep, _tasks
from benchmarks.claims.pareto import Gap, gap
from sae_fast.analysis.plots import label_axes, plain_ticks
from sae_fast.objectives import AuxK
from sae_fast.runs.recipe import AUX, KINDS, Recipe

TITLE = "The kinds of SAE at equal L0, and AuxK for Gated, ReLU and JumpReLU"
SETTING = (
    "The demo's activations; 2 048 features, batches of 512, 500 steps, one learning rate for all kinds, 0.008, at which "
    "features die, and the command line's settings of each. FVU on held-out tokens is compared at equal L0, averaged over "
    "the range that both curves have; a feature is dead that fires on none of 8 192 held-out tokens. AuxK is SAELens', of "
    "the largest pre-activations of dead features, negative ones too: with a ReLU, a feature whose pre-activations are all "
    "negative has no gradient; it counts as dead what has not fired in a tenth of the training."
)
SEEDS, QUICK_SEEDS = 4, 2
PENALISED = ("gated", "relu", "jumprelu")
AID = AuxK(AUX, dialect="saelens")
MEASURED = ("l0", "fvu", "dead_fraction")
Runs = list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What is trained: values of the option that says how sparse, λ by kind, targets and k the same for all."""

    d_sae: int
    batch_size: int
    steps: int
    held_out: int
    init_l0: float
    lr: float
    l1: dict[str, tuple[float, ...]]
    k: tuple[int, ...]

    def values(self, kind: str) -> tuple[float, ...]:
        return self.l1.get(kind, self.k)


PLAN = Plan(
    2048, 512, 500, 8192, 64.0, 8e-3, {"gated": (1.5, 3.0, 6.0, 12.0), "relu": (0.8, 1.6, 3.2, 6.4)}, (4, 8, 16, 32)
)
QUICK = Plan(96, 256, 40, 1024, 16.0, 3.2e-2, {"gated": (2.0, 8.0), "relu": (1.0, 4.0)}, (4, 16))


def option(kind: str) -> str:
    """The option that says how sparse a kind is."""
    return next(name for name in ("l1", "target_l0", "k") if name in KINDS[kind].options)


def measure(seed: int, quick: bool) -> dict[str, Any]:
    plan = QUICK if quick else PLAN
    task = _tasks.real(seed, plan.batch_size, plan.held_out, quick)
    wanted = [(kind, value, False) for kind in KINDS for value in plan.values(kind)]
    wanted += [(kind, value, True) for kind in PENALISED for value in plan.values(kind)]
    found = []
    for kind, value, aided in tqdm(wanted, desc=f"seed {seed}", unit="SAE", dynamic_ncols=True, leave=False):
        measured = _sweep.measure(trained(kind, value, aided, seed, plan, task), task)
        found.append({"kind": kind, "value": value, "aided": aided} | {name: measured[name] for name in MEASURED})
    return {"runs": found}


def trained(kind: str, value: float, aided: bool, seed: int, plan: Plan, task: _tasks.Task) -> Any:
    """An SAE by the command line's recipe of its kind, with AuxK if it is to be ``aided``."""
    options: dict[str, Any] = {option(kind): value} | ({"init_l0": plan.init_l0} if kind in PENALISED else {})
    recipe = Recipe(plan.d_sae, plan.batch_size, plan.steps, plan.lr, seed=seed, device="cpu", kind=kind, **options)
    trainer = recipe.trainer(recipe.sae(len(task.mean)))
    if aided:
        aid = {"aux": AID, "dead_after": plan.steps * plan.batch_size // 10}
        trainer = sf.Trainer(trainer.sae, **(vars(trainer.settings) | aid))
    _tasks.fit(trainer, task, plan.steps)
    return trainer.sae


def of(result: dict[str, Any], kind: str, aided: bool = False) -> Runs:
    """The runs of a kind in one seed, by how sparse they were asked to be."""
    return sorted((r for r in result["runs"] if (r["kind"], r["aided"]) == (kind, aided)), key=lambda r: r["value"])


def gaps(results: list[dict[str, Any]], ours: Callable[[Any], Runs], other: Callable[[Any], Runs]) -> list[Gap]:
    """Of each seed: log of the FVU of some runs ÷ that of others, at equal log L0."""
    curve_of = lambda runs: [(math.log(r["l0"]), math.log(r["fvu"])) for r in runs]  # noqa: E731
    return [gap(curve_of(ours(result)), curve_of(other(result))) for result in results]


def ratio(found: list[Gap], which: str = "mean") -> _claim.Interval:
    """Over seeds, of a field of `Gap`: the first is at the lowest L0."""
    return _claim.interval(math.exp(getattr(each, which)) for each in found)


def dead(results: list[dict[str, Any]], kind: str, aided: bool) -> _claim.Interval:
    """The share of dead features, averaged over how sparse, over seeds."""
    return _claim.interval(float(np.mean([r["dead_fraction"] for r in of(result, kind, aided)])) for result in results)


def conclude(results: list[dict[str, Any]]) -> list[_claim.Row]:
    return [_better_than_relu(results), _revived(results)]


def _verdict(holds: list[bool]) -> str:
    return _claim.HOLDS if all(holds) else _claim.CONDITION if any(holds) else _claim.FAILS


def _better_than_relu(results: list[dict[str, Any]]) -> _claim.Row:
    others = [kind for kind in KINDS if kind != "relu"]
    ratios = {kind: ratio(gaps(results, partial(of, kind=kind), partial(of, kind="relu"))) for kind in others}
    said = ", ".join(f"{KINDS[kind].title} {found}" for kind, found in ratios.items())
    claim = "At equal L0 every other kind reconstructs better than a ReLU SAE of the same width and training"
    verdict = _verdict([found.high < 1 for found in ratios.values()])
    return _claim.Row(claim, _claim.OURS, "`kinds.gaps`", f"FVU ÷ ReLU's at equal L0: {said}", verdict)


def _revived(results: list[dict[str, Any]]) -> _claim.Row:
    said, helps = [], []
    for kind in PENALISED:
        without, with_aid = (dead(results, kind, aided) for aided in (False, True))
        found = gaps(results, partial(of, kind=kind, aided=True), partial(of, kind=kind))
        cost, sparsest, densest = (ratio(found, which) for which in ("mean", "first", "last"))
        helps.append(with_aid.high < without.low and cost.low <= 1)
        said.append(
            f"{KINDS[kind].title} {without} dead without, {with_aid} with, and {cost} times the FVU at equal L0 "
            f"({sparsest} at the lowest, {densest} at the highest)"
        )
    claim = "AuxK leaves fewer features dead in Gated, ReLU and JumpReLU SAEs too, and FVU at equal L0 is no worse for it"
    result = f"averaged over λ or targets: {'; '.join(said)}"
    return _claim.Row(claim, _claim.OURS, "`kinds.dead`, `kinds.gaps`", result, _verdict(helps))


def draw(results: list[dict[str, Any]], figure: Any) -> None:
    """FVU against L0 of every kind; of three, FVU and the share of dead features with AuxK and without.  Thin lines are
    seeds, points their means, by λ, target or k."""
    figure.set_size_inches(13, 8)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.5, 1))
    fronts, fvu, deads = (figure.add_subplot(grid[where]) for where in ((slice(None), 0), (0, 1), (1, 1)))
    colors = {kind: f"C{i}" for i, kind in enumerate(KINDS)}
    for kind, about in KINDS.items():
        points = curve(fronts, results, kind, False, "fvu", color=colors[kind], label=about.title)
        sign = "λ" if option(kind) == "l1" else "k" if option(kind) == "k" else "target"
        for run, point in zip(of(results[0], kind), points, strict=True):
            fronts.annotate(f"{sign} {run['value']:g}", point, xytext=(4, 4), textcoords="offset points", fontsize=6.5,
                            color=colors[kind])  # fmt: skip
    for axes, what in ((fvu, "fvu"), (deads, "dead_fraction")):
        for kind in PENALISED:
            curve(axes, results, kind, False, what, color=colors[kind], label=KINDS[kind].title)
            curve(axes, results, kind, True, what, color=colors[kind], label="with AuxK", linestyle="--", marker="x")
    seeds = f"seeds 0 to {len(results) - 1}"
    label_axes(fronts, f"Every kind, {seeds}", "L0", "FVU (held out)")
    label_axes(fvu, "With AuxK and without", "L0", "FVU (held out)")
    label_axes(deads, "Dead features", "L0", "share that never fires (held out)")
    for axes in (fronts, fvu, deads):
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.legend(frameon=False, fontsize="small")
    for axes in (fronts, fvu):
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)


def curve(axes: Any, results: list[dict[str, Any]], kind: str, aided: bool, what: str, **style: Any) -> np.ndarray:
    """A number against L0, of each seed as a thin line, of their means as points, which are returned, [values, 2]."""
    seeds = np.array([[(r["l0"], r[what]) for r in of(result, kind, aided)] for result in results])
    for line in seeds:
        axes.plot(*line.T, linewidth=0.6, alpha=0.35, color=style["color"], linestyle=style.get("linestyle", "-"))
    axes.plot(*seeds.mean(0).T, **{"marker": "o", "markersize": 4} | style)
    return seeds.mean(0)
