"""A user's whole training loop: dictionary_learning's own `trainSAE`, its trainer and ours on the same batches.

`python -m benchmarks.peers.dictionary_learning_loop`.  `trainSAE` runs our trainer, as with the import changed; the other
takes a step on every n-th of the same batches between two of ours.  Its steps are dense whatever is active, so a few tell
what all would take.  The demo's activations, its λ and learning rate; from the package's start, with half of all features
active and both warm-ups, and, ours only, calibrated (`init_l0`).  What the loop does around the updates counts for both.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.training import trainSAE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks import machine
from benchmarks.data import QUICK, Shape, Superposition
from benchmarks.ending import close
from benchmarks.registry import OURS
from sae_fast.data.harvest import harvest
from sae_fast.data.text import stdlib_documentation
from sae_fast.demo import demo_model
from sae_fast.interop import dictionary_learning as ours
from sae_fast.runs.train import Recipe

THEIRS = "dictionary_learning"
CLASSES = {
    "gated": {THEIRS: GatedSAETrainer, OURS: ours.GatedSAETrainer},
    "standard": {THEIRS: StandardTrainer, OURS: ours.StandardTrainer},
}


@dataclass(frozen=True)
class Task:
    name: str
    shape: Shape
    lr: float
    l1: float
    warmup: int  # steps of the learning rate's warm-up; λ's takes twice as many, as the package's defaults do
    steps: int
    batches: Callable[[], Iterable[Tensor]]  # of [B, d]


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
    config = dict(
        steps=task.steps, activation_dim=task.shape.d, dict_size=task.shape.F, layer=3, lm_name="", lr=task.lr,
        l1_penalty=task.l1, warmup_steps=task.warmup, sparsity_warmup_steps=2 * task.warmup, seed=0, device="cpu",
    )  # fmt: skip
    theirs = CLASSES[kind][THEIRS](**config)

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
        ours = dict(trainer=timed(CLASSES[kind][OURS], result), **config)
        trainSAE(data(), [ours | ({"init_l0": task.shape.l0} if calibrated else {})], steps=task.steps, device="cpu")
    result.theirs = result.theirs[1:] or result.theirs  # the first one warms up
    return result


def demo_task(steps: int) -> Task:
    """The demo's activations: block 2 of MiniLM on the standard library's documentation, scaled."""
    recipe = Recipe(device="cpu")
    train_part, _ = harvest(demo_model(), stdlib_documentation(), 2, device="cpu").split(recipe.holdout)
    _, scale = train_part.mean_and_scale()

    def batches() -> Iterator[Tensor]:
        return (x / scale for x in train_part.batches(recipe.batch_size, steps=steps, seed=0))

    shape = Shape(recipe.batch_size, train_part.d, recipe.d_sae, recipe.init_l0)
    return Task("demo's activations", shape, recipe.lr, recipe.l1, steps // 15, steps, batches)


def quick_task(steps: int = 30) -> Task:
    source = Superposition(QUICK.d, QUICK.F, 4 * QUICK.d, seed=0)
    batches = [source.batch(QUICK.B) for _ in range(steps)]
    return Task("synthetic activations", QUICK, 1e-3, 1.0, 5, steps, lambda: batches)


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
    kind: Annotated[list[str] | None, typer.Option(help="gated or standard; by default gated.")] = None,
    steps: Annotated[int, typer.Option(min=30, help="Of the loop.")] = 3000,
    every: Annotated[int, typer.Option(min=1, help="The package's trainer takes every n-th batch.")] = 20,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures.")] = None,
    quick: Annotated[bool, typer.Option(help="A small shape: a test, not a measurement.")] = False,
) -> None:
    """Times trainSAE with our trainer, and the package's trainer on the same batches."""
    kinds = kind or ["gated"]
    if unknown := set(kinds) - set(CLASSES):
        raise typer.BadParameter(f"got {', '.join(sorted(unknown))}, want one of {', '.join(CLASSES)}", param_hint="--kind")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{machine.device()}; {machine.versions()}")
    others, found = machine.Others(), []
    for name, calibrated in itertools.product(kinds, (False, True)):
        task = quick_task() if quick else demo_task(steps)
        result = race(task, name, calibrated, 2 if quick else every, progress=not quick)
        about = {k: v for k, v in asdict(task).items() if k != "batches"}
        found.append(
            {
                "kind": name,
                "start": result.start,
                "task": about,
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
