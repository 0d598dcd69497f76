"""The runner: checks a case, then times its providers in turns.

A round calls every provider once, in an order drawn afresh, each on another batch, each with a cold cache; what
disturbs the machine for a while disturbs all of them.  Medians over the rounds.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import machine
from benchmarks.data import N_BATCHES, world
from benchmarks.gate import reason, sift
from benchmarks.registry import OURS, Case, Provider, Run, Shape, World

CHECK_ROWS, CHECK_INPUTS = 128, 3  # of the gate: the width and the features are those of the timing
WARM_UP = 2  # calls


@dataclass
class Measurement:
    """What came of a case: seconds by provider (every round's), or why there are none."""

    case: Case
    shape: Shape
    seconds: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    l0: float = float("nan")
    others: float = float("nan")  # share of the machine that other processes took during the rounds


def measure(
    case: Case, shape: Shape, rounds: int, names: Iterable[str] = (), quick: bool = False, seed: int = 0
) -> Measurement:
    """Checks the chosen providers of a case and, if all are correct, times them.  One fault, and no provider of the case
    has a figure: a ratio to something wrong means nothing."""
    providers = case.choose(names, quick)
    result = Measurement(case, shape)
    here = world(shape, n_batches=min(N_BATCHES, max(rounds, CHECK_INPUTS)), seed=seed)
    result.faults, result.skipped = sift(case, here.head(CHECK_ROWS, CHECK_INPUTS), providers)
    if not result.faults:
        chosen = {name: p for name, p in providers.items() if name not in result.skipped}
        _time(case, chosen, rounds, here, result, seed)
    return result


def _time(case: Case, providers: dict[str, Provider], rounds: int, here: World, result: Measurement, seed: int) -> None:
    inputs = case.inputs(here)
    saes = {name: here.new_sae() for name in providers}
    runs: dict[str, Run] = {}
    for name, provider in providers.items():
        try:
            runs[name] = _warm(provider.start(saes[name]), inputs)
        except Exception as error:
            if not provider.optional:
                raise
            result.skipped[name] = reason(error)
    evict, order = Evictor(), random.Random(seed)
    names = list(runs)
    result.seconds = {name: [] for name in names}
    others = machine.Others()
    for turn in range(rounds):
        gc.collect()
        for name in order.sample(names, len(names)):
            x = inputs[(turn + names.index(name)) % len(inputs)]
            evict()
            result.seconds[name].append(seconds(runs[name], x))
    result.others = others.share()
    trained = saes.get(OURS, here.sae)
    result.l0 = sum(case.l0(trained, x) for x in here.batches) / len(here.batches)


def _warm(run: Run, inputs: Sequence[Any]) -> Run:
    for k in range(WARM_UP):
        run(inputs[k % len(inputs)])
    return run


def seconds(run: Run, x: Any) -> float:
    """Wall-clock time of one call, without the garbage collector's."""
    gc.disable()
    try:
        start = time.perf_counter()
        outcome = run(x)
        elapsed = time.perf_counter() - start
        del outcome
        return elapsed
    finally:
        gc.enable()


class Evictor:
    """Calling it rewrites a buffer larger than the largest cache, so that nothing of the last call is left there."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(machine.cache_bytes() * 5 // 4 // 4)

    def __call__(self) -> None:
        self.buffer.add_(1)
