"""The benchmark, as a process of its own: `python -m benchmarks.gpu.bench --out DIR --seconds N`.

A kernel that hangs or breaks the device's context ends with this process; what it had measured is in results.csv.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.cases import ops
from benchmarks.data import Shape, World
from benchmarks.gpu import cases, world
from benchmarks.gpu.measure import Sink, run


class Worlds:
    """The world of a job; what belonged to the last one is freed first."""

    key: tuple[Shape, str] | None = None

    def __call__(self, shape: Shape, frequencies: str) -> World:
        if self.key != (shape, frequencies):
            for function in (ops.entries, cases.true_losses, world.world):
                function.cache_clear()
            self.key = shape, frequencies
        return world.world(shape, frequencies)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    given = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # past it torch.compile would quietly run eagerly
    sink = Sink(given.out / "results.csv")
    run(cases.jobs(sink=sink), Worlds(), sink, "cuda", given.seconds, after=cases.roofline)


if __name__ == "__main__":
    main()
