"""Time to quality: the same SAE trained on the demo's activations by dictionary_learning's trainer and by ours.

`python -m benchmarks.peers.quality`.  Same batches in the same order, same λ, same schedule, same number of steps, from two
starts: the peer's own (zero biases, half of all gates open) and calibrated (the demo's: b_dec at the mean, `calibrate_`).
Steps are on the clock, and calibration; drawing batches and evaluation are not.

    quality.csv    the four runs' curves on held-out tokens: step, seconds, fvu, l0, density (the fraction of gates open)
    quality.json   how much sooner ours is as good as the peer was at a quarter, a half, three quarters and all of its steps
    quality.png    the curves
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

import sae_fast as sf
from benchmarks import activations, jsonfile, machine
from benchmarks.peers.dictionary_learning import trainer_of
from benchmarks.registry import OURS
from sae_fast import reference
from sae_fast.analysis.plots import ACCENT, INK, TERMS, empty_figure, label_axes, plain_ticks
from sae_fast.runs.train import Recipe

ROOT = Path(__file__).parents[2]
THEIRS = "dictionary_learning"
ZERO, CALIBRATED = "zero biases", "calibrated"
AS_GOOD = 1.01  # FVU and L0 within 1 %: rounding makes two trainings of one SAE differ by less
EVALUATIONS, EVALUATION_ROWS = 30, 4096


class Point(NamedTuple):
    step: int  # steps taken
    seconds: float
    fvu: float
    l0: float
    density: float


class Target(NamedTuple):
    """Where the peer was, and when each run was first as good: FVU and L0 both within 1 %."""

    step: int
    fvu: float
    l0: float
    theirs_seconds: float
    ours_seconds: float
    ours_step: float

    @property
    def times_sooner(self) -> float:
        return self.theirs_seconds / self.ours_seconds if self.ours_seconds else math.inf


@torch.no_grad()
def quality(sae: sf.GatedSAE, x: Tensor) -> tuple[float, float, float]:
    """(FVU, L0, fraction of gates open) on x, in plain PyTorch."""
    error, l0, gates = 0.0, 0, 0
    for rows in x.split(1024):
        code = reference.gated_encode(rows, sae.W_enc, sae.b_gate, sae.b_mag, sae.r_mag, sae.b_dec)
        error += float((rows - reference.decode(code.f, sae.W_dec, sae.b_dec)).double().pow(2).sum())
        l0 += int(code.f.count_nonzero())
        gates += int(code.gate.count_nonzero())
    variance = float((x - x.mean(0)).double().pow(2).sum())
    return error / variance, l0 / len(x), gates / (len(x) * sae.d_sae)


@dataclass
class Run:
    """One training: by whom, from which start, on its own copy of the SAE, of which ``measure`` says how good it is."""

    provider: str
    start: str
    sae: Any
    step: Callable[[Tensor], Any]
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    measure: Callable[[Any, Tensor], tuple[float, float, float]] = quality

    @property
    def name(self) -> str:
        return f"{self.provider}, {self.start}"

    def train(self, batches: Sequence[Tensor]) -> None:
        start = time.perf_counter()
        for x in batches:
            self.step(x)
        self.seconds += time.perf_counter() - start

    def evaluate(self, step: int, x: Tensor) -> None:
        self.curve.append(Point(step, self.seconds, *self.measure(self.sae, x)))

    def first_as_good(self, fvu: float, l0: float) -> Point | None:
        return next((p for p in self.curve if p.fvu <= AS_GOOD * fvu and p.l0 <= AS_GOOD * l0), None)


class Pair(NamedTuple):
    """What is compared, and the ratio wanted."""

    name: str
    ours: Run
    theirs: Run
    at_least: float | None


def start_runs(mean: Tensor, first_batch: Tensor, recipe: Recipe) -> list[Run]:
    """Both trainers from both starts.  Weights are the demo's; of the peer's own start they have the distribution."""
    zero = sf.GatedSAE(mean.shape[0], recipe.d_sae, seed=recipe.seed)
    calibrated = copy.deepcopy(zero)
    before = time.perf_counter()
    calibrated.b_dec.data.copy_(mean)
    calibrated.calibrate_(first_batch, recipe.init_l0)
    calibration = time.perf_counter() - before
    decay_start = recipe.steps * 4 // 5
    runs = []
    for start, sae, seconds in ((ZERO, zero, 0.0), (CALIBRATED, calibrated, calibration)):
        ours, theirs = copy.deepcopy(sae), copy.deepcopy(sae)
        trainer = sf.Trainer(
            ours, lr=recipe.lr, l1_coefficient=recipe.l1, lr_decay_start=decay_start, total_steps=recipe.steps
        )
        peer = trainer_of(theirs, recipe.lr, recipe.l1, recipe.steps, decay_start=decay_start)
        runs.append(Run(OURS, start, ours, trainer.step, seconds))
        runs.append(Run(THEIRS, start, theirs, partial(peer.update, 0), seconds))
    return runs


def evaluation_steps(steps: int) -> list[int]:
    """0 to ``steps``: half of them evenly, half of them dense at the start."""
    half = EVALUATIONS // 2
    grid = {round(steps * i / half) for i in range(half + 1)} | {round(steps ** (i / half)) for i in range(half)}
    return sorted(grid)


def train(runs: Sequence[Run], batches: Iterable[Tensor], held_out: Tensor, steps: int, progress: bool = True) -> None:
    """Trains all runs on the same batches: in turns, from one evaluation to the next, so that what disturbs the machine
    for a while disturbs all of them."""
    batches = iter(batches)
    points = evaluation_steps(steps)
    with tqdm(total=steps * len(runs), disable=not progress, unit="step", desc="training", dynamic_ncols=True) as bar:
        for run in runs:
            run.evaluate(0, held_out)
        for turn, (first, last) in enumerate(itertools.pairwise(points)):
            block = list(itertools.islice(batches, last - first))
            for i in range(len(runs)):
                run = runs[(turn + i) % len(runs)]
                run.train(block)
                run.evaluate(last, held_out)
                bar.set_postfix(run=run.name, fvu=f"{run.curve[-1].fvu:.3f}", l0=f"{run.curve[-1].l0:.0f}", refresh=False)
                bar.update(len(block))


def pairs(runs: Sequence[Run]) -> list[Pair]:
    by = {(run.provider, run.start): run for run in runs}
    return [
        Pair("both from the peer's own start", by[OURS, ZERO], by[THEIRS, ZERO], 4),
        Pair("both calibrated", by[OURS, CALIBRATED], by[THEIRS, CALIBRATED], 10),
        Pair("ours calibrated, theirs as it comes", by[OURS, CALIBRATED], by[THEIRS, ZERO], None),
    ]


def targets(pair: Pair) -> list[Target]:
    """At a quarter, a half, three quarters and all of the peer's steps."""
    last = pair.theirs.curve[-1].step
    found = []
    for quarter in (1, 2, 3, 4):
        there = min(pair.theirs.curve, key=lambda p: abs(p.step - last * quarter / 4))
        theirs, ours = (run.first_as_good(there.fvu, there.l0) for run in (pair.theirs, pair.ours))
        assert theirs is not None  # it was there
        ours_at = (ours.seconds, ours.step) if ours else (math.nan, math.nan)
        found.append(Target(there.step, there.fvu, there.l0, theirs.seconds, *ours_at))
    return found


def show(console: Console, pair: Pair) -> None:
    table = Table(title=pair.name, title_justify="left", title_style="bold")
    for heading in ("peer's step", "FVU", "L0", f"{THEIRS}, s", f"{OURS}, s", "our step", "times sooner"):
        table.add_column(heading, justify="right")
    for t in targets(pair):
        seconds = f"{t.theirs_seconds:.1f}", f"{t.ours_seconds:.1f}"
        table.add_row(str(t.step), f"{t.fvu:.4f}", f"{t.l0:.1f}", *seconds, f"{t.ours_step:g}", f"{t.times_sooner:.1f}×")
    console.print(table)
    if pair.at_least is not None:
        ratio = targets(pair)[-1].times_sooner
        verdict = "[green]reached" if ratio >= pair.at_least else "[red]not reached"
        console.print(f"  at the end: {ratio:.3g} times sooner, wanted at least {pair.at_least:g}: {verdict}\n")


def write(runs: Sequence[Run], compared: Sequence[Pair], about: dict[str, Any], path: Path) -> None:
    """The curves and what was compared, as ``path`` with the endings .csv and .json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["provider", "start", *Point._fields])
        for run in runs:
            writer.writerows([run.provider, run.start, p.step, *(f"{v:.6g}" for v in p[1:])] for p in run.curve)
    found = {
        pair.name: {
            "wanted_at_least": pair.at_least,
            "targets": [{**t._asdict(), "times_sooner": t.times_sooner} for t in targets(pair)],
        }
        for pair in compared
    }
    ends = {run.name: run.curve[-1]._asdict() for run in runs}
    jsonfile.write(path.with_suffix(".json"), {"about": about, "ends": ends, "pairs": found})


def draw_curves(axes: Any, runs: Sequence[Run], x: str, y: str) -> None:
    """A number of every run against another, both logarithmic; the peer's line is broad, ours runs on it."""
    for run in runs:
        ours = run.provider == OURS
        points = [p for p in run.curve if getattr(p, x) > 0]
        axes.plot(
            [getattr(p, x) for p in points], [getattr(p, y) for p in points], label=run.name,
            color=ACCENT if ours else TERMS["reconstruction"], linewidth=1.5 if ours else 3.5, alpha=1 if ours else 0.45,
            linestyle="--" if run.start == ZERO else "-", zorder=2 if ours else 1,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    if y != "density":
        plain_ticks(axes.yaxis)
    plain_ticks(axes.xaxis)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Four panels: FVU and L0 against the clock, FVU and density against the step."""
    figure = empty_figure(11, 7.2)
    panels = (
        ("seconds", "fvu", "FVU against the clock", "seconds of training", "fraction of variance unexplained"),
        ("seconds", "l0", "L0 against the clock", "seconds of training", "features firing per token"),
        ("step", "fvu", "FVU against the step", "step", "fraction of variance unexplained"),
        ("step", "density", "Density", "step", "fraction of gates open"),
    )
    for axes, (x, y, title, x_label, y_label) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        label_axes(axes, title, x_label, y_label)
        draw_curves(axes, runs, x, y)
    figure.axes[0].legend(frameon=False)
    figure.suptitle("The same Gated SAE, batches, λ and schedule; held-out tokens", color=INK)
    figure.savefig(path, dpi=130)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    steps: Annotated[int, typer.Option(min=5, help="Training steps of each of the four runs.")] = 800,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the tokens.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The folder; by default benchmarks/results/<machine>.")] = None,
) -> None:
    """Trains the demo's SAE four times, in turns, and says how much sooner ours is as good."""
    out = out or ROOT / "benchmarks" / "results" / machine.slug()
    recipe = Recipe(steps=steps, seed=seed, device="cpu")
    found = activations.of_demo(recipe.holdout)
    held_out = found.rows(EVALUATION_ROWS, seed)
    batches = found.batches(recipe.batch_size, steps, seed)
    first = next(batches)
    runs = start_runs(found.mean, first, recipe)
    others = machine.Others()
    train(runs, itertools.chain([first], batches), held_out, steps)
    finish(runs, pairs(runs), others, {"recipe": dataclasses.asdict(recipe)}, out / "quality", draw)


def finish(
    runs: Sequence[Run], compared: Sequence[Pair], others: machine.Others, setting: dict[str, Any], path: Path,
    drawn: Callable[[Sequence[Run], Path], None],
) -> None:  # fmt: skip
    """Says what came out, and writes it as ``path`` with the endings .csv, .json and .png."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for pair in compared:
        show(console, pair)
    if others.share() > 0.05:
        console.print(f"others took {others.share():.0%} of this machine: these times are too high", style="yellow")
    write(runs, compared, machine.about() | setting, path)
    drawn(runs, path.with_suffix(".png"))
    console.print(f"written to {os.path.relpath(path)}: .csv, .json and .png")


if __name__ == "__main__":
    app()
