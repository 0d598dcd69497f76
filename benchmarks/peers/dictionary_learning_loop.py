"""A user's whole training loop: dictionary_learning's own `trainSAE`, its trainer and ours on the same batches.

`python -m benchmarks.peers.dictionary_learning_loop`.  `trainSAE` runs our trainer, as with the import changed; the other
takes a step on every n-th of the same batches between two of ours.  Its steps are dense whatever is active, so a few tell
what all would take.  The demo's activations, its λ or k and learning rate; from the package's start, with half of all
features active and both warm-ups, and, ours only and where a kind has it, calibrated (`init_l0`).  What the loop does
around the updates counts for both.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from dictionary_learning.training import trainSAE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks import machine
from benchmarks.ending import close
from benchmarks.peers.trainers import KINDS, THEIRS, Task, config_of, demo_task, made, quick_task
from benchmarks.registry import OURS


@dataclass
class Result:
    """Seconds of each update of ours, of the sampled ones of theirs, of the loop around them, and L0 along the way."""

    kind: str
    start: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    around: list[float] = field(default_factory=list)
    l0: dict[int, float] = field(default_factory=dict)

    def ratio(self, first: int, last: int) -> float:
        """Of the loops' times from one step to another."""
        around = sum(self.around[first:last])
        theirs = statistics.median(self.theirs) * (last - first)
        return (theirs + around) / (sum(self.ours[first:last]) + around)


def timed(cls: type, result: Result) -> type:
    """Our trainer, with a clock on ``update``."""

    class Timed(cls):  # type: ignore[misc, valid-type]
        def update(self, step: int, x: Tensor) -> None:
            before = time.perf_counter()
            super().update(step, x)
            result.ours.append(time.perf_counter() - before)
            if step & (step - 1) == 0 or step % 100 == 0:
                result.l0[step] = self.engine.sae.encode_sparse(x[:256]).nnz / len(x[:256])

    Timed.__name__ = cls.__name__
    return Timed


def race(task: Task, kind: str, calibrated: bool, every: int, progress: bool = True) -> Result:
    result = Result(kind, f"calibrated, init_l0 = {task.shape.l0:g}" if calibrated else "the package's")
    config = config_of(task, kind)
    theirs = made(KINDS[kind].theirs, config)

    def data() -> Iterator[Tensor]:
        iterator = iter(task.batches())
        for step in tqdm(range(task.steps), disable=not progress, desc=f"{kind}, {result.start}", dynamic_ncols=True):
            x = next(iterator)
            if step % every == 0:
                before = time.perf_counter()
                theirs.update(step, x)
                result.theirs.append(time.perf_counter() - before)
            before, spent = time.perf_counter(), len(result.ours)
            yield x
            result.around.append(max(0.0, time.perf_counter() - before - sum(result.ours[spent:])))

    with contextlib.redirect_stderr(sys.stderr if progress else io.StringIO()):
        ours = dict(trainer=timed(KINDS[kind].ours, result), **config)
        trainSAE(data(), [ours | ({"init_l0": task.shape.l0} if calibrated else {})], steps=task.steps, device="cpu")
    result.theirs = result.theirs[1:] or result.theirs  # the first one warms up
    return result


def show(console: Console, task: Task, result: Result) -> dict[str, float]:
    """A row for each part of the run, and for all of it; returns the ratios."""
    marks = sorted({0, *(round(task.steps * f) for f in (1 / 15, 2 / 15, 1 / 3, 2 / 3)), task.steps})
    title = f"trainSAE, {result.kind}, start: {result.start}; {task.name}, {task.shape}"
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("steps", "L0 at their end", f"{THEIRS}, ms", f"{OURS}, ms", "loop"):
        table.add_column(heading, justify="right")
    ratios, theirs = {}, 1e3 * statistics.median(result.theirs)
    for first, last in [*itertools.pairwise(marks), (0, task.steps)]:
        near = max((s for s in result.l0 if s < last), default=0)
        ratios[f"{first}–{last}"] = result.ratio(first, last)
        ours = 1e3 * statistics.mean(result.ours[first:last])
        table.add_row(
            f"{first}–{last}", f"{result.l0[near]:.0f}", f"{theirs:.1f}", f"{ours:.1f}", f"{ratios[f'{first}–{last}']:.2f}×"
        )
    console.print(table)
    return ratios


app = typer.Typer(add_completion=False)


@app.command()
def main(
    kind: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(KINDS)}; by default all.")] = None,
    steps: Annotated[int, typer.Option(min=30, help="Of the loop.")] = 600,
    every: Annotated[int, typer.Option(min=1, help="The package's trainer takes every n-th batch.")] = 20,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures.")] = None,
    quick: Annotated[bool, typer.Option(help="A small shape: a test, not a measurement.")] = False,
) -> None:
    """Times trainSAE with our trainers, and the package's trainers on the same batches."""
    kinds = kind or list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        raise typer.BadParameter(f"got {', '.join(sorted(unknown))}, want one of {', '.join(KINDS)}", param_hint="--kind")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{machine.device()}; {machine.versions()}")
    others, found = machine.Others(), []
    task, every = (quick_task(), 2) if quick else (demo_task(steps), every)
    for name, calibrated in [(each, start) for each in kinds for start in KINDS[each].starts]:
        result = race(task, name, calibrated, every, progress=not quick)
        found.append(
            {
                "kind": name,
                "start": result.start,
                "task": task.about(),
                "every": every,
                "ratios": show(console, task, result),
                "theirs_median_s": statistics.median(result.theirs),
                "l0": result.l0,
                "ours_last_third_median_s": statistics.median(result.ours[2 * len(result.ours) // 3 :]),
            }
        )
    close(console, others, found, out)


if __name__ == "__main__":
    app()
