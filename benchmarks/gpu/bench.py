"""The benchmark, as a process of its own: `python -m benchmarks.gpu.bench --out DIR --known DIR --seconds N`.

A kernel that hangs or breaks the device's context ends with this process; what it had measured is in results.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.cases import ops
from benchmarks.data import Shape, World
from benchmarks.gpu import cases, environment, goals, sources, world
from benchmarks.gpu.measure import Sink, row_of, run
from benchmarks.gpu.record import ROWS, Record, lines

MEASURED = (
    *sources.ALL,
    "benchmarks/cases/*.py",
    *(f"benchmarks/gpu/{name}.py" for name in ("cases", "kinds", "rivals", "world")),
)


class Worlds:
    """The world of a job; what belonged to the last one is freed first."""

    key: tuple[Shape, str] | None = None

    def __call__(self, shape: Shape, frequencies: str) -> World:
        if self.key != (shape, frequencies):
            for function in (ops.entries, cases.true_losses, world.world):
                function.cache_clear()
            self.key = shape, frequencies
        return world.world(shape, frequencies)


def stamp() -> str:
    """Of all that a figure hangs on."""
    return sources.digest(sources.of(*MEASURED), environment.versions())


def pieces(known: Path) -> dict[str, str]:
    """The sources of each job."""
    jobs = cases.jobs(earned=goals.twins(goals.figures(map(row_of, lines(known / ROWS))))[0])
    return dict.fromkeys((job.name for job in jobs), stamp())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--known", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args(arguments)
    torch._dynamo.config.recompile_limit = 64  # past it torch.compile would quietly run eagerly
    sink = Sink(given.out / ROWS, given.known / ROWS)
    record = Record(given.out, given.known)
    jobs = lambda: cases.jobs(earned=goals.twins(goals.figures(sink.rows))[0])  # noqa: E731
    run(jobs, Worlds(), sink, record, stamp(), "cuda", given.seconds, after=cases.roofline)


if __name__ == "__main__":
    main()
