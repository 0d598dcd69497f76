"""Time to quality of the kinds that keep the largest: dictionary_learning's trainers and ours, of the same names.

`python -m benchmarks.peers.quality_kinds`.  The same constructor, seed, k, schedule and batches, from the package's own
start; curves on held-out tokens, of which FVU is what the package's own `encode` and `decode` make of the k largest.
The clock is of updates alone.

    quality_kinds.csv, .json, .png    as `benchmarks.peers.quality` has them, a pair of runs for each kind
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks import machine
from benchmarks.peers import quality
from benchmarks.peers.quality import Pair, Run
from benchmarks.peers.trainers import KINDS, THEIRS, Task, config_of, demo_task, made, quick_task
from benchmarks.registry import OURS
from sae_fast.analysis.plots import INK, empty_figure, label_axes

OF_K = tuple(name for name, kind in KINDS.items() if len(kind.starts) == 1)
AT_LEAST = 6  # times sooner, wanted
ROWS = 2048


@torch.no_grad()
def measure(trainer: Any, x: Tensor) -> tuple[float, float, float]:
    """(FVU, L0, fraction of entries that fire) on x, of the trainer's dictionary with the largest of each 1 024 rows."""
    error, fires, ae = 0.0, 0, trainer.ae
    for rows in x.split(1024):
        f = ae.encode(rows, use_threshold=False)
        error += float((rows - ae.decode(f)).double().pow(2).sum())
        fires += int(f.count_nonzero())
    variance = float((x - x.mean(0)).double().pow(2).sum())
    return error / variance, fires / len(x), fires / (len(x) * ae.dict_size)


def start_runs(task: Task, kind: str) -> list[Run]:
    """Both trainers, from the same weights."""
    config = config_of(task, kind) | {"decay_start": task.steps * 4 // 5}
    trainers = {OURS: made(KINDS[kind].ours, config), THEIRS: made(KINDS[kind].theirs, config)}
    return [Run(name, kind, trainer, updates(trainer), measure=measure) for name, trainer in trainers.items()]


def updates(trainer: Any) -> Callable[[Tensor], Any]:
    """The trainer's ``update``, with the number of the step."""
    steps = itertools.count()
    return lambda x: trainer.update(next(steps), x)


def pairs(runs: Sequence[Run]) -> list[Pair]:
    return [Pair(ours.start, ours, theirs, AT_LEAST) for ours, theirs in zip(runs[::2], runs[1::2], strict=True)]


def draw(runs: Sequence[Run], path: Path) -> None:
    """FVU against the clock and against the step, a row for each kind."""
    compared = pairs(runs)
    figure = empty_figure(11, 0.6 + 3.3 * len(compared))
    for row, pair in zip(figure.subplots(len(compared), 2, squeeze=False), compared, strict=True):
        for axes, x in zip(row, ("seconds", "step"), strict=True):
            what = "seconds of training" if x == "seconds" else x
            against = "clock" if x == "seconds" else x
            label_axes(axes, f"{pair.name}: FVU against the {against}", what, "fraction of variance unexplained")
            quality.draw_curves(axes, (pair.theirs, pair.ours), x, "fvu")
        row[0].legend(frameon=False)
    figure.suptitle("The same SAE, k, batches and schedule; held-out tokens", color=INK)
    figure.savefig(path, dpi=130)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    kind: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(OF_K)}; by default the last two.")] = None,
    steps: Annotated[int, typer.Option(min=30, help="Training steps of each run.")] = 500,
    out: Annotated[Path | None, typer.Option(help="The folder; by default benchmarks/results/<machine>.")] = None,
    quick: Annotated[bool, typer.Option(help="A small shape, into out/: a test, not a measurement.")] = False,
) -> None:
    """Trains each kind by both trainers, in turns, and says how much sooner ours is as good."""
    kinds = kind or OF_K[-2:]
    if unknown := set(kinds) - set(OF_K):
        raise typer.BadParameter(f"got {', '.join(sorted(unknown))}, want one of {', '.join(OF_K)}", param_hint="--kind")
    out = out or (quality.ROOT / "out" if quick else quality.ROOT / "benchmarks" / "results" / machine.slug())
    task = quick_task() if quick else demo_task(steps)
    held_out, others, runs = task.held_out(ROWS), machine.Others(), []
    for name in kinds:
        runs += start_runs(task, name)
        quality.train(runs[-2:], task.batches(), held_out, task.steps, progress=not quick)
    quality.finish(runs, pairs(runs), others, {"task": task.about()}, out / "quality_kinds", draw)


if __name__ == "__main__":
    app()
