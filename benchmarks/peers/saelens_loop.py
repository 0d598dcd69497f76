"""A user's whole training loop: SAELens' `SAETrainer.fit` with SAELens' class and with ours, on the same batches.

`python -m benchmarks.peers.saelens_loop`.  The trainer, its clip, its Adam, its statistics and its logging are SAELens' in
both; what differs is the class that was imported.  Both train in turns, a block of steps each, from the same weights, from
two starts: SAELens' own (zero biases, half of all features active) and calibrated, as the demo (b_dec at the mean, gates
that a few features pass, unit decoder rows, which SAELens has as `decoder_init_norm=1`).  Before the clock starts both have
to give the same losses.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from sae_lens import GatedTrainingSAE, GatedTrainingSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

import sae_fast as sf
from benchmarks import activations, machine
from benchmarks.data import DIRECTIONS, FULL, QUICK, Shape, Superposition
from benchmarks.ending import close
from benchmarks.registry import OURS
from sae_fast.interop import saelens
from sae_fast.runs.train import Recipe

THEIRS = "sae_lens"
CLASSES = {
    "gated": {THEIRS: (GatedTrainingSAE, GatedTrainingSAEConfig),
              OURS: (saelens.GatedTrainingSAE, saelens.GatedTrainingSAEConfig)},
    "standard": {THEIRS: (StandardTrainingSAE, StandardTrainingSAEConfig),
                 OURS: (saelens.StandardTrainingSAE, saelens.StandardTrainingSAEConfig)},
}  # fmt: skip
OWN, CALIBRATED = "SAELens' own start", "calibrated"


@dataclass(frozen=True)
class Task:
    """What is trained on, and how long."""

    name: str
    shape: Shape  # l0: what `calibrated` starts from
    lr: float
    l1: float
    batches: list[Tensor]
    block: int  # steps in a turn
    turns: int


@dataclass
class Result:
    """Seconds a step in each block, by the clock and of processor time, and how dense the code was at its end."""

    task: str
    kind: str
    start: str
    seconds: dict[str, list[float]] = field(default_factory=lambda: {THEIRS: [], OURS: []})
    processor: dict[str, list[float]] = field(default_factory=lambda: {THEIRS: [], OURS: []})
    l0: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for theirs, ours in zip(self.seconds[THEIRS], self.seconds[OURS], strict=True)]

    @property
    def processor_ratio(self) -> float:
        """On a machine that is shared, and with one thread, what the clock would give if it were not."""
        return statistics.median(self.processor[THEIRS]) / statistics.median(self.processor[OURS])


def demo_task() -> Task:
    recipe = Recipe(device="cpu")
    found = activations.of_demo(recipe.holdout)
    block, turns = 5, 8
    batches = list(found.batches(recipe.batch_size, block * turns))
    shape = Shape(recipe.batch_size, found.train.d, recipe.d_sae, recipe.init_l0)
    return Task("demo's activations", shape, 3e-4, recipe.l1, batches, block, turns)


def synthetic_task(shape: Shape = FULL, block: int = 1, turns: int = 5) -> Task:
    source = Superposition(shape.d, shape.F, max(4, DIRECTIONS * shape.d), seed=0)
    return Task("synthetic activations", shape, 3e-4, 3.0, [source.batch(shape.B) for _ in range(8)], block, turns)


@torch.no_grad()
def sae_of(task: Task, kind: str, start: str) -> Any:
    """SAELens' SAE, seeded; calibrated by ours."""
    torch.manual_seed(0)
    sae_class, config = CLASSES[kind][THEIRS]
    own = {} if start == OWN else {"decoder_init_norm": 1.0}
    sae = sae_class(config(d_in=task.shape.d, d_sae=task.shape.F, l1_coefficient=task.l1, **own))
    if start == CALIBRATED:
        few = max(2, 8192 // task.shape.B)
        sae.b_dec.copy_(torch.cat(task.batches[:few]).mean(0))
        like = (sf.GatedSAE if kind == "gated" else sf.ReluSAE)(task.shape.d, task.shape.F, seed=0)
        like.W_enc.copy_(sae.W_enc.T)
        like.b_dec.copy_(sae.b_dec)
        like.calibrate_(torch.cat(task.batches[:few])[:4096], task.shape.l0)
        for name in like.per_feature:
            sae.get_parameter(name).copy_(like.get_parameter(name))
    return sae


def with_our_class(sae: Any, kind: str) -> Any:
    our_class, config = CLASSES[kind][OURS]
    ours = our_class(config(d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, l1_coefficient=sae.cfg.l1_coefficient))
    ours.load_state_dict(sae.state_dict())
    return ours


@torch.no_grad()
def check(theirs: Any, ours: Any, x: Tensor, l1: float) -> None:
    """ValueError unless both give the same losses, and ours on the engine."""
    step = TrainStepInput(x, {"l1": l1}, None, 0, False)
    if ours.why_dense() is not None:
        raise ValueError(f"ours: not on the engine: {ours.why_dense()}")
    wanted, got = (sae.training_forward_pass(step).losses for sae in (theirs, ours))
    if list(got) != list(wanted):
        raise ValueError(f"ours: got the losses {list(got)}, want {list(wanted)}")
    for name, loss in wanted.items():
        if not torch.allclose(got[name], loss, rtol=1e-4):
            raise ValueError(f"ours: got {name} {float(got[name])}, want {float(loss)}")


def loop(task: Task, sae: Any) -> Callable[[int], tuple[float, float]]:
    """Trains for some steps more by `fit`, and returns seconds a step: by the clock, of processor time."""
    size = task.shape.B
    steps = task.turns * task.block
    cfg = SAETrainerConfig(steps * size, size, lr=task.lr, lr_end=task.lr)
    trainer = SAETrainer(cfg, sae, itertools.cycle(task.batches))

    def fit(more: int) -> tuple[float, float]:
        cfg.total_training_samples = trainer.n_training_samples + more * size
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            before = time.perf_counter(), time.process_time()
            trainer.fit()
            return (time.perf_counter() - before[0]) / more, (time.process_time() - before[1]) / more

    return fit


@torch.no_grad()
def l0_of(sae: Any, x: Tensor) -> float:
    return float(sae.encode(x[:256]).count_nonzero()) / min(256, len(x))


def race(task: Task, kind: str, start: str) -> Result:
    theirs = sae_of(task, kind, start)
    ours = with_our_class(theirs, kind)
    check(theirs, ours, task.batches[0], task.l1)
    for twin in (copy.deepcopy(theirs), copy.deepcopy(ours)):
        loop(task, twin)(1)  # threads, pages, caches
    result = Result(task.name, kind, start)
    loops = {THEIRS: loop(task, theirs), OURS: loop(task, ours)}
    for turn in range(task.turns):
        for name in (THEIRS, OURS) if turn % 2 else (OURS, THEIRS):
            seconds, processor = loops[name](task.block)
            result.seconds[name].append(seconds)
            result.processor[name].append(processor)
        result.l0.append(l0_of(ours, task.batches[-1]))
    return result


def show(console: Console, task: Task, results: list[Result]) -> None:
    table = Table(title=f"{task.name}, {task.shape}", title_justify="left", title_style="bold")
    for heading in (
        "start",
        "L0, first and last",
        f"{THEIRS}, ms a step",
        f"{OURS}, ms a step",
        "first",
        "last",
        "median",
        "of processor time",
    ):
        table.add_column(heading, justify="left" if heading == "start" else "right")
    for r in results:
        medians = [f"{1e3 * statistics.median(r.seconds[name]):.0f}" for name in (THEIRS, OURS)]
        ratios = [f"{x:.1f}×" for x in (r.ratios[0], r.ratios[-1], statistics.median(r.ratios), r.processor_ratio)]
        table.add_row(f"{r.kind}, {r.start}", f"{r.l0[0]:.0f}, {r.l0[-1]:.0f}", *medians, *ratios)
    console.print(table)


app = typer.Typer(add_completion=False)


@app.command()
def main(
    kind: Annotated[list[str] | None, typer.Option(help="gated or standard; by default gated.")] = None,
    only: Annotated[str | None, typer.Option(help="demo or synthetic; by default both.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Torch's threads; by default as many as it takes.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures.")] = None,
    quick: Annotated[bool, typer.Option(help="A small shape: a test, not a measurement.")] = False,
) -> None:
    """Times SAELens' training loop with its own class and with ours, in turns."""
    kinds = kind or ["gated"]
    if unknown := set(kinds) - set(CLASSES):
        raise typer.BadParameter(f"got {', '.join(sorted(unknown))}, want one of {', '.join(CLASSES)}", param_hint="--kind")
    if only not in (None, "demo", "synthetic"):
        raise typer.BadParameter(f"got {only}, want demo or synthetic", param_hint="--only")
    if threads is not None:
        torch.set_num_threads(threads)
    if quick:
        tasks = [lambda: synthetic_task(QUICK, block=1, turns=2)]
    else:
        tasks = [make for name, make in (("demo", demo_task), ("synthetic", synthetic_task)) if only in (None, name)]
    console = Console(width=None if sys.stdout.isatty() else 120)
    others, found = machine.Others(), []
    console.print(f"{machine.device()}; {machine.versions()}")
    for make in tasks:
        task = make()
        results = [race(task, k, start) for k in kinds for start in (OWN, CALIBRATED)]
        show(console, task, results)
        found += [{**asdict(r), "ratios": r.ratios, "processor_ratio": r.processor_ratio} for r in results]
    close(console, others, found, out)


if __name__ == "__main__":
    app()
