"""Where the dense routes become the faster ones: `python -m benchmarks.crossover`.

For each op of the committed table, times the sparse and the dense route at densities about the committed crossover, and
prints where the two meet beside what is committed.  Nothing is written: the table in sae_fast/ops/crossovers.py is
edited by hand, since the route may depend on the arguments only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import count, pairwise
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import normalize

from benchmarks import machine
from benchmarks.data import FULL, SMALL, Shape
from benchmarks.runner import Evictor, seconds
from sae_fast import GatedSAE, RowGradient, SparseCode, Trainer, ops
from sae_fast.ops import crossovers

FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0)  # of the committed density
ROUNDS = 3


@contextmanager
def forced(op: str, threshold: float) -> Iterator[None]:
    """0 sends an op down its dense route, infinity down its sparse one."""
    committed = dict(crossovers.CROSSOVER)
    crossovers.CROSSOVER[op] = threshold
    if op == "weight_step":  # whose dense route multiplies in outer's
        crossovers.CROSSOVER["outer"] = threshold
    try:
        yield
    finally:
        crossovers.CROSSOVER.update(committed)


class Batch:
    """A code of a density, uniformly at random, and what the ops take beside it."""

    def __init__(self, shape: Shape, density: float, seed: int = 0):
        random = torch.Generator().manual_seed(seed)
        open_ = torch.rand(shape.B, shape.F, generator=random) < density
        indptr = torch.zeros(shape.B + 1, dtype=torch.int64)
        indptr[1:] = open_.sum(1).cumsum(0)
        indices = open_.nonzero()[:, 1].int()
        values = torch.rand(2, indices.shape[0], generator=random) + 0.1
        self.code = SparseCode(torch.Size((shape.B, shape.F)), indptr, indices, values[1].clone(), values)
        self.csc = ops.transpose(self.code)
        self.x = torch.randn(shape.B, shape.d, generator=random)
        self.W = normalize(torch.randn(shape.F, shape.d, generator=random), dim=1)
        self.b, self.weight = torch.zeros(shape.d), torch.ones(shape.F)
        self.v, self.last_step, self.steps = torch.zeros_like(self.W), torch.zeros(shape.F, dtype=torch.int64), count(1)
        self.gradient = RowGradient(self.csc, [self.code.magnitudes], [self.x])
        self.l0 = density * shape.F

    @cached_property
    def trainer(self) -> Trainer:
        sae = GatedSAE(self.x.shape[1], self.code.d_sae, seed=0)
        sae.calibrate_(self.x, self.l0)
        return Trainer(sae, lr=1e-9, l1_coefficient=1.0)

    def weight_step(self) -> None:
        settings: dict[str, Any] = dict(step=next(self.steps), lr=1e-5, beta2=0.999, eps=1e-8, unit_rows=True)
        ops.weight_step(self.W, self.v, self.last_step, self.gradient, **settings)


CALLS: dict[str, Callable[[Batch], Any]] = {
    "decode": lambda e: ops.decode(e.code, e.W),
    "sampled_dots": lambda e: ops.sampled_dots(e.code, e.x, e.W),
    "decode_loss": lambda e: ops.decode_loss(e.code, e.W, e.b, e.x, e.weight, e.x.shape[0]),
    "outer": lambda e: ops.outer(e.csc, [e.code.magnitudes], [e.x]),
    "weight_step": Batch.weight_step,
    "step": lambda e: e.trainer.step(e.x),
}


def routes(op: str, shape: Shape, density: float, rounds: int = ROUNDS) -> tuple[float, float]:
    """Median seconds of the sparse and of the dense route, in turns."""
    batch, evict = Batch(shape, density), Evictor()
    times: dict[float, list[float]] = {math.inf: [], 0.0: []}
    for turn in range(rounds + 1):
        for threshold, found in times.items():
            with forced(op, threshold):
                evict()
                elapsed = seconds(CALLS[op], batch)
            if turn:  # the first is a warm-up
                found.append(elapsed)
    return median(times[math.inf]), median(times[0.0])


def meeting(densities: Sequence[float], sparse: Sequence[float], dense: Sequence[float]) -> float:
    """The density at which the sparse route stops being the faster one, interpolated in the logarithms; 0 if it never
    is, infinity if it always is."""
    ratio = [math.log(s / d) for s, d in zip(sparse, dense, strict=True)]
    if ratio[0] > 0:
        return 0.0
    for (p, q), (a, b) in zip(pairwise(densities), pairwise(ratio), strict=True):
        if a <= 0 < b:
            return p * (q / p) ** (-a / (b - a))
    return math.inf


def main(shapes: Sequence[Shape] = (FULL, SMALL), rounds: int = ROUNDS) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"{machine.device()}   {machine.versions()}   commit {machine.commit() or 'unknown'}")
    table = Table("op", "shape", "committed", "they meet at", *(f"at {k:g}×" for k in FACTORS))
    table.caption = "sparse / dense route in ms at so many times the committed density; 0: dense always wins, inf: never"
    for op, committed in crossovers.CROSSOVER.items():
        for shape in shapes:
            densities = [min(1.0, committed * k) for k in FACTORS]
            sparse, dense = zip(*(routes(op, shape, p, rounds) for p in densities), strict=True)
            points = (f"{1e3 * s:.3g} / {1e3 * d:.3g}" for s, d in zip(sparse, dense, strict=True))
            at = f"B={shape.B} d={shape.d} F={shape.F}"
            table.add_row(op, at, f"{committed:g}", f"{meeting(densities, sparse, dense):.3g}", *points)
    console.print(table)


if __name__ == "__main__":
    main()
