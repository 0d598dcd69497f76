"""The registry on pytest-benchmark: `pytest benchmarks --benchmark-only`, with its statistics, storage and comparison.

pytest-benchmark times one function after another, which would let a disturbance fall on one provider alone.  So
the runner measures each case, interleaved and after its check, and pytest-benchmark is given a clock that replays
what was measured.
"""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.cases import CASES
from benchmarks.data import FULL, QUICK
from benchmarks.runner import Measurement, measure


class Replay:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Replay()


@cache
def measured(name: str, full: bool, rounds: int) -> Measurement:
    """A case is measured once, for all of its providers' tests."""
    return measure(CASES[name], FULL if full else QUICK, rounds, quick=not full)


@pytest.mark.parametrize(
    ("case", "provider"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}", marks=pytest.mark.benchmark(group=case.name, timer=CLOCK.read))
        for case in CASES.values()
        for name in case.providers
    ],
)
def test_bench(benchmark, request, case, provider):
    full = request.config.getoption("--full-size", default=False)
    rounds = (11 if full else 5) if benchmark.enabled else 1
    result = measured(case.name, full, rounds)
    assert not result.faults, result.faults
    if provider not in result.seconds:
        pytest.skip(result.skipped.get(provider, "slow: only at --full-size"))
    benchmark.extra_info.update(x=str(result.shape), mode=case.mode, l0=result.l0)
    seconds = iter(result.seconds[provider])
    benchmark.pedantic(CLOCK.advance, setup=lambda: ((next(seconds),), {}), rounds=rounds)
