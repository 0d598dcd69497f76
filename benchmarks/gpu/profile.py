"""Where the time of a training step goes, kernel by kernel, and in the host: `python -m benchmarks.gpu.profile`; and
what such a run printed, read again."""

from __future__ import annotations

import cProfile
import pstats
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import sae_fast as sf
from benchmarks.cases.step import SETTINGS
from benchmarks.data import Shape
from benchmarks.gpu.cases import ours
from benchmarks.gpu.goals import PRECISIONS
from benchmarks.gpu.world import LARGE, SMALL, world

STEPS, SHOWN = 8, 14


class Run(NamedTuple):
    """Of a step: precision, shape, milliseconds of all kernels and of each that was printed."""

    precision: str
    shape: Shape
    total: float
    kernels: dict[str, float]


def read(path: Path) -> list[Run]:
    """The runs of a committed profile."""
    found = []
    for block in path.read_text("utf-8").split("\n", 1)[1].strip().split("\n\n"):
        head, *lines = block.splitlines()
        match = re.fullmatch(r"(\w+), B=(\d+) d=(\d+) F=(\d+) L0=(\d+): ([\d.]+) ms of kernels a step", head)
        if match is None:
            raise ValueError(f"{path}: got {head!r}, want a precision, a shape and its milliseconds")
        precision, *sizes, total = match.groups()
        kernels = {name: float(ms) for ms, name in (line.strip().split(" ms  ", 1) for line in lines)}
        found.append(Run(precision, Shape(*map(int, sizes)), float(total), kernels))
    return found


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("profile: there is no NVIDIA GPU that torch can use here")
    for shape in (LARGE, SMALL):
        here = world(shape, "uniform")
        for precision in PRECISIONS.values():
            trainer = sf.Trainer(ours(here, precision), **SETTINGS)
            for n in range(2 * STEPS):  # graphs are captured on the way
                trainer.step(here.batches[n % len(here.batches)])
            trainer.wait()
            with profile(activities=[ProfilerActivity.CUDA]) as recorded:
                for n in range(STEPS):
                    trainer.step(here.batches[n % len(here.batches)])
                trainer.wait()
            spent: Counter[str] = Counter()
            for event in recorded.events():
                spent[event.name.split("(")[0][-60:]] += event.device_time / 1e3 / STEPS
            start = time.perf_counter()
            for n in range(8 * STEPS):
                trainer.step(here.batches[n % len(here.batches)])
            trainer.wait()
            took = 1e3 * (time.perf_counter() - start) / (8 * STEPS)
            print(f"\n{precision}, {shape}: {took:.3f} ms a step, {sum(spent.values()):.3f} ms of kernels")
            for name, ms in spent.most_common(SHOWN):
                print(f"{ms:8.3f} ms  {name}")
        host = cProfile.Profile()
        host.enable()
        for n in range(8 * STEPS):
            trainer.step(here.batches[n % len(here.batches)])
        host.disable()
        pstats.Stats(host).sort_stats("tottime").print_stats(SHOWN)


if __name__ == "__main__":
    main()
