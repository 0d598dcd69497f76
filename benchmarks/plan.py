"""What a run measures: which cases, at which shapes, by whom, how often.

The full run (`make bench`) is every case at the headline's shape, and the step in two more places: where the SAE is small,
and in the dense phase.  The sweep varies B, d, F and L0 one at a time, for the step and the encoder only, and
leaves out what the full run has: both write into one CSV.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.cases import CASES
from benchmarks.data import FULL, QUICK, SMALL, Shape
from benchmarks.registry import OURS, Case

FACTORS = {"B": (1 / 8, 1 / 4, 1 / 2, 1, 2, 4), "d": (1 / 4, 1 / 2, 1, 2), "F": (1 / 4, 1 / 2, 1, 2)}
L0_FACTORS = (1 / 4, 1, 4, 16, 64)  # as far as they are sparse; then the dense phase
AFFORDABLE = FULL.B * FULL.d * FULL.F / 4  # B · d · F up to which the sweep times eager PyTorch too


@dataclass(frozen=True)
class Job:
    """A case at a shape, by these providers or, without any, by all; ``memory``: with their peak memory."""

    case: Case
    shape: Shape
    rounds: int
    providers: tuple[str, ...] = ()
    memory: bool = False


def full(base: Shape = FULL, small: Shape | None = SMALL) -> Iterator[Job]:
    """Every case at ``base``, and the step at ``small`` and in the dense phase."""
    step = CASES["step"]
    for case in sorted(CASES.values(), key=lambda case: case.mode != "train"):
        yield Job(case, base, 7 if case.mode == "train" else 5, memory=case.memory)
    if small:
        yield Job(step, small, 7, (OURS, "eager", "bare_product", "floor"))
    yield Job(step, base.dense, 3, (OURS, "eager", "bare_product"))


def around(base: Shape) -> list[Shape]:
    """``base`` with one of B, d, F and L0 varied at a time; the last is the dense phase."""
    shapes = [replace(base, **{name: round(getattr(base, name) * k)}) for name, ks in FACTORS.items() for k in ks]
    shapes += [replace(base, l0=base.l0 * k) for k in L0_FACTORS if base.l0 * k < base.F / 4]
    return list(dict.fromkeys([*shapes, base.dense]))


def sweep(base: Shape = FULL) -> Iterator[Job]:
    """The step and the encoder around ``base``, case by case at each shape, so that they share its world."""
    known = {(job.case.name, job.shape) for job in full(base)}
    for shape in around(base):
        eager = ("eager",) if shape.B * shape.d * shape.F <= AFFORDABLE else ()
        for name, providers in (("step", (OURS, "bare_product", *eager)), ("encode_sparse", (OURS,))):
            if (name, shape) not in known:
                yield Job(CASES[name], shape, 3, providers)


def quick(swept: bool = False) -> Iterator[Job]:
    """The same two runs over small shapes."""
    for job in sweep(QUICK) if swept else full(QUICK, small=None):
        yield replace(job, rounds=3)
