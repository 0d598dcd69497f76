"""A user's whole training loop: dictionary_learning's own `trainSAE`, its trainer and ours on the same batches.

`python -m benchmarks.peers.dictionary_learning_loop`.  One call of `trainSAE` trains both, a batch by one and then by the
other, as it does with any list of trainers; what differs is the class that was imported.  The demo's activations, its λ and
learning rate, and the package's start: zero biases, half of all features active, both warm-ups.  A step of the loop is an
update and what the loop does around it, which is counted to each of the two.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

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
from benchmarks.registry import OURS
from sae_fast import demo
from sae_fast.interop import dictionary_learning as ours
from sae_fast.train.harvest import harvest
from sae_fast.train.text import stdlib_documentation

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
    batches: Any  # an iterable of [B, d]


@dataclass
class Result:
    """Seconds of each update, of the loop around it, and L0 and loss along the way."""

    task: str
    kind: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {THEIRS: [], OURS: []})
    around: list[float] = field(default_factory=list)
    l0: dict[int, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    def ratio(self, first: int, last: int) -> float:
        """Of the loops' times from one step to another."""
        around = sum(self.around[first:last])
        theirs, ours = (sum(self.seconds[name][first:last]) + around for name in (THEIRS, OURS))
        return theirs / ours


def timed(cls: type, name: str, result: Result, quiet: list[float]) -> type:
    """The trainer, with a clock on ``update``; ``quiet`` collects what is not the loop's."""

    class Timed(cls):  # type: ignore[misc, valid-type]
        def update(self, step: int, x: Tensor) -> None:
            before = time.perf_counter()
            super().update(step, x)
            after = time.perf_counter()
            result.seconds[name].append(after - before)
            if name == OURS and (step & (step - 1) == 0 or step % 250 == 0):
                result.l0[step] = self.engine.sae.encode_sparse(x[:256]).nnz / len(x[:256])
            quiet.append(time.perf_counter() - before)

    Timed.__name__ = cls.__name__
    return Timed


def race(task: Task, kind: str, progress: bool = True) -> Result:
    result, quiet = Result(task.name, kind), [0.0]
    configs = []
    for name in (THEIRS, OURS):
        configs.append(
            dict(
                trainer=timed(CLASSES[kind][name], name, result, quiet), steps=task.steps, activation_dim=task.shape.d,
                dict_size=task.shape.F, layer=3, lm_name="", lr=task.lr, l1_penalty=task.l1, warmup_steps=task.warmup,
                sparsity_warmup_steps=2 * task.warmup, seed=0, device="cpu",
            )
        )  # fmt: skip

    def data() -> Iterator[Tensor]:
        iterator = iter(task.batches)
        for _ in tqdm(range(task.steps), disable=not progress, desc=f"{task.name}, {kind}", dynamic_ncols=True):
            before, spent = time.perf_counter(), sum(quiet)
            yield next(iterator)
            result.around.append(time.perf_counter() - before - (sum(quiet) - spent))
            quiet[:] = [0.0]

    with contextlib.redirect_stderr(sys.stderr if progress else io.StringIO()):
        trainSAE(data(), configs, steps=task.steps, device="cpu")
    return result


def demo_task(steps: int) -> Task:
    """The demo's activations: layer 3 of MiniLM on the standard library's documentation, scaled."""
    recipe = demo.Recipe(device="cpu")
    train_part, _ = harvest(demo.demo_model(), stdlib_documentation(), 3, device="cpu").split(recipe.holdout)
    _, scale = demo._mean_and_scale(train_part)
    batches = (x / scale for x in train_part.batches(recipe.batch_size, steps=steps, seed=0))
    shape = Shape(recipe.batch_size, train_part.d, recipe.d_sae, recipe.init_l0)
    return Task("demo's activations", shape, recipe.lr, recipe.l1, steps // 15, steps, batches)


def quick_task(steps: int = 30) -> Task:
    source = Superposition(QUICK.d, QUICK.F, 4 * QUICK.d, seed=0)
    return Task("synthetic activations", QUICK, 1e-3, 1.0, 5, steps, [source.batch(QUICK.B) for _ in range(steps)])


def show(console: Console, task: Task, result: Result) -> dict[str, float]:
    """A row for each part of the run, and for all of it; returns the ratios."""
    marks = sorted({0, *(round(task.steps * f) for f in (1 / 15, 2 / 15, 1 / 3, 2 / 3)), task.steps})
    table = Table(title=f"trainSAE, {result.kind}, {task.name}, {task.shape}", title_justify="left", title_style="bold")
    for heading in ("steps", "L0 at their end", f"{THEIRS}, ms", f"{OURS}, ms", "loop"):
        table.add_column(heading, justify="right")
    ratios = {}
    for first, last in [*itertools.pairwise(marks), (0, task.steps)]:
        medians = [f"{1e3 * statistics.median(result.seconds[name][first:last]):.1f}" for name in (THEIRS, OURS)]
        near = max((s for s in result.l0 if s < last), default=0)
        ratios[f"{first}–{last}"] = result.ratio(first, last)
        table.add_row(f"{first}–{last}", f"{result.l0[near]:.0f}", *medians, f"{ratios[f'{first}–{last}']:.2f}×")
    console.print(table)
    return ratios


app = typer.Typer(add_completion=False)


@app.command()
def main(
    kind: Annotated[list[str] | None, typer.Option(help="gated or standard; by default gated.")] = None,
    steps: Annotated[int, typer.Option(min=30, help="Of the loop.")] = 3000,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures.")] = None,
    quick: Annotated[bool, typer.Option(help="A small shape: a test, not a measurement.")] = False,
) -> None:
    """Times trainSAE with the package's trainer and with ours, batch by batch in turns."""
    kinds = kind or ["gated"]
    if unknown := set(kinds) - set(CLASSES):
        raise typer.BadParameter(f"got {', '.join(sorted(unknown))}, want one of {', '.join(CLASSES)}", param_hint="--kind")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{machine.device()}; {machine.versions()}")
    others, found = machine.Others(), []
    for name in kinds:
        task = quick_task() if quick else demo_task(steps)
        result = race(task, name, progress=not quick)
        ratios = show(console, task, result)
        medians = {n: statistics.median(s[len(s) // 2 :]) for n, s in result.seconds.items()}
        about = {k: v for k, v in asdict(task).items() if k != "batches"}
        found.append({"kind": name, "task": about, "ratios": ratios, "second_half_median_s": medians, "l0": result.l0})
    if others.share() > 0.05:
        console.print(f"others took {others.share():.0%} of this machine: ratios hold better than times", style="yellow")
    if out is not None:
        about = {"device": machine.device(), "versions": machine.versions(), "commit": machine.commit()}
        out.write_text(json.dumps({"about": about, "results": found}, indent=2) + "\n")


if __name__ == "__main__":
    app()
