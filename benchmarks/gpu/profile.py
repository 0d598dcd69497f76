"""Where the time of a training step goes, kernel by kernel, and in the host: `python -m benchmarks.gpu.profile`."""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

import sae_fast as sf
from benchmarks.cases.step import SETTINGS
from benchmarks.gpu.cases import PRECISIONS, ours
from benchmarks.gpu.world import LARGE, SMALL, world

STEPS, SHOWN = 8, 14


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
