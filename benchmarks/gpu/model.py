"""A cost model of the GPU's kernels: `python -m benchmarks.gpu.model` prints it beside the measured profile.

A kernel's programs go through phases.  Each asks for bytes from memory, bytes from the L2 cache, tensor-core flops and
instructions, and lasts as long as the slowest of these; the programs that share a multiprocessor hide in each other's
phases what one alone could not.  A chain of accesses, each of which waits for the last, is paid once by the kernel, and
by every program where few share a multiprocessor.  Rows that are gathered over and over come from the cache as far as
their slice fits in it.

What the machine does in a second is measured (results.csv), but for three figures that are fitted to the profile: what the
L2 cache delivers, how much of it serves gathers, and an access's latency under load.  Registers, shared memory and
instructions are counted in the machine code (sass.py), of the kernels that were measured: kernels.json beside the profile.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.data import Shape
from benchmarks.gpu.profile import Run, read
from benchmarks.gpu.sass import Compiled

RUN = Path(__file__).parents[1] / "results" / "nvidia-h100-80gb-hbm3"
EXACT, BF16 = "exact", "bf16"
CANDIDATES = 1.05  # that are verified, a member, by the exact screen


@dataclass(frozen=True)
class Machine:
    """An H100.  Of one multiprocessor: registers, shared memory in bytes, programs, warps; of all: bytes and flops a
    second; seconds of an access; bytes of cache that gathers have."""

    multiprocessors: int = 132
    schedulers: int = 4
    clock: float = 1.755e9
    registers: int = 65536
    shared: int = 227 * 1024
    programs: int = 32
    warps: int = 64
    memory: float = 2.99e12
    product: float = 778e12
    cache: float = 5.5e12
    capacity: float = 36e6
    latency: float = 2.2e-6

    def resident(self, it: Compiled) -> int:
        """The programs that share a multiprocessor."""
        warps = it.constant("warps")
        registers = 8 * math.ceil(it.registers / 8) * 32 * warps
        limits = self.programs, self.warps // warps, self.registers // registers, self.shared // max(1, it.shared)
        return min(limits)

    def misses(self, size: float, rows: float, slice_of: float) -> float:
        """Bytes from memory of a gather of ``size`` bytes of rows that are ``rows`` bytes, ``slice_of`` at a time."""
        return rows + max(0.0, size - rows) * max(0.0, 1 - self.capacity / slice_of)


class Phase(NamedTuple):
    """What a part of all programs asks for: bytes, bytes, flops, instructions of a warp."""

    memory: float
    cache: float = 0.0
    product: float = 0.0
    instructions: float = 0.0


class Kernel(NamedTuple):
    """``name``: the profile's; ``chain``: the accesses of a program that wait for one another."""

    name: str
    it: Compiled
    programs: int
    chain: float
    phases: list[Phase]


class Cost(NamedTuple):
    """Milliseconds: what each resource alone would take, what waiting adds, and all."""

    memory: float
    cache: float
    product: float
    instructions: float
    waiting: float
    total: float


def cost(kernel: Kernel, here: Machine) -> Cost:
    warps, resident = kernel.it.constant("warps"), here.resident(kernel.it)
    issue = here.multiprocessors * here.schedulers * here.clock
    rates = here.memory, here.cache, here.product, issue / (warps * kernel.programs)
    by_phase = [[amount / rate for amount, rate in zip(phase, rates, strict=True)] for phase in kernel.phases]
    by_resource = [sum(times) for times in zip(*by_phase, strict=True)]
    slowest = max(by_resource)
    in_turn = sum(map(max, by_phase)) - slowest
    waves = kernel.programs / (here.multiprocessors * resident)
    waiting = in_turn / resident + kernel.chain * here.latency * (1 + waves / resident)
    return Cost(*(1e3 * seconds for seconds in (*by_resource, waiting, slowest + waiting)))


# ---- The kernels of a step ------------------------------------------------------------------------------------------


def step(at: Shape, precision: str, counts: dict[str, Compiled], here: Machine) -> list[Kernel]:
    """Those of a Gated SAE's training step that take time, at uniform frequencies and with β1 = 0."""
    touched = touched_at(at)
    return [
        screen(at, precision, counts),
        dots(at, precision, counts, touched, here),
        residuals(at, counts["residuals"], touched, here),
        *steps(at, counts, touched, here),
        stream("std::enable_if<!", 4 * at.F * at.d, here),  # cuBLAS: Σδ · W_enc, for b_dec
    ]


def touched_at(at: Shape) -> float:
    """Features with entries in a batch."""
    return at.F * -math.expm1(-at.B * at.l0 / at.F)


def stream(name: str, size: float, here: Machine) -> Kernel:
    """One pass over memory, by as many programs as there are multiprocessors."""
    return Kernel(name, Compiled("warps=4", 32, 0, (), 0, 0), here.multiprocessors, 1, [Phase(size)])


def screen(at: Shape, precision: str, counts: dict[str, Compiled]) -> Kernel:
    """Tiles of x and W_enc are read again for every tile of the product; only the first time from memory."""
    B, d, F, wide = at.B, at.d, at.F, at.d > 1024
    name = "screen" + " of wide rows" * wide
    it = counts.get(f"{name} without margins" if precision == BF16 else name, counts[name])  # a kernel of its own once
    rows, features = it.constant("ROWS"), it.constant("FEATURES")
    tiles = math.ceil(B / rows) * math.ceil(F / features)
    weights = math.ceil(B / rows / it.constant("GROUP")) * F  # a group of tiles of examples shares them
    multiply = Phase(2 * d * (B + weights), 0, 2 * B * d * F, d / it.constant("DEPTH") * it.loops[0])
    # A persistent program fetches its next tile meanwhile.
    return Kernel("_screen" + "_persistent" * wide, it, tiles, 2 - wide, [multiply, Phase(B * F / 8, 0, 0, it.epilogue)])


def dots(at: Shape, precision: str, counts: dict[str, Compiled], touched: float, here: Machine) -> Kernel:
    """The verification of candidates."""
    size, each = (4, CANDIDATES) if precision == EXACT else (2, 1.0)
    it = counts["partial_dots" if precision == EXACT else "partial_dots of 16 bits"]
    n, slices = at.B * at.l0 * each, math.ceil(at.d / it.constant("COLUMNS"))
    gathered, rows = size * n * at.d, size * touched * at.d
    memory = here.misses(gathered, rows, size * at.F * it.constant("COLUMNS")) + size * at.B * at.d + 4 * n * slices
    trips = math.ceil(at.l0 / it.constant("ENTRIES"))
    phase = Phase(memory, gathered, 0, trips * it.loops[0] + it.outside)
    return Kernel("_partial_dots", it, at.B * slices, 2 + 2 * trips, [phase])


def residuals(at: Shape, it: Compiled, touched: float, here: Machine) -> Kernel:
    """Two passes over a row's features: for the residuals, then, from cache, for their dots."""
    n, slices = at.B * at.l0, math.ceil(at.d / it.constant("COLUMNS"))
    gathered = 4 * n * at.d
    trips = math.ceil(at.l0 / it.constant("ENTRIES"))
    first = here.misses(gathered, 4 * touched * at.d, 4 * at.F * it.constant("COLUMNS"))
    phases = [
        Phase(first + 12 * at.B * at.d, gathered, 0, trips * it.loops[0] + it.outside),
        Phase(8 * n * slices, gathered, 0, trips * it.loops[1]),
    ]
    return Kernel("_residuals", it, at.B * slices, 2 + 4 * trips, phases)


def steps(at: Shape, counts: dict[str, Compiled], touched: float, here: Machine) -> list[Kernel]:
    """W_enc's by slices, with its 16-bit copy, and W_dec's by whole rows."""
    whole = counts[f"step of whole rows up to {1024 if at.d <= 1024 else 4096}"]
    return [weight_step(at, counts["step of slices"], touched, here, True), weight_step(at, whole, touched, here, False)]


def weight_step(at: Shape, it: Compiled, touched: float, here: Machine, copied: bool) -> Kernel:
    """Gathers the gradient, then fetches W and v and puts them back."""
    n, columns, rows = at.B * at.l0, it.constant("COLUMNS"), 4 * at.B * at.d
    slices, trips = math.ceil(at.d / columns), math.ceil(n / at.F / it.constant("ENTRIES"))
    gathered = 4 * n * at.d
    gather = here.misses(gathered, rows, rows * min(1, columns / at.d)) + 16 * n * slices
    update = 16 * touched * at.d + (2 * at.F * at.d if copied else 0)
    phases = [Phase(gather, gathered, 0, trips * it.loops[-1]), Phase(update, 0, 0, it.outside)]
    return Kernel("_step", it, at.F * slices, 3 + 2 * trips, phases)


# ---- Beside what was measured ---------------------------------------------------------------------------------------


class Row(NamedTuple):
    run: str
    name: str
    costs: list[Cost]  # of the launches under one name
    measured: float

    @property
    def predicted(self) -> float:
        return sum(it.total for it in self.costs)


def counts_of(folder: Path) -> dict[str, Compiled]:
    raw = json.loads((folder / "kernels.json").read_text("utf-8"))
    return {name: Compiled(**it | {"loops": tuple(it["loops"])}) for name, it in raw.items()}


def compare(runs: list[Run], counts: dict[str, Compiled], here: Machine) -> list[Row]:
    """The model's kernels beside the profile's of the same name."""
    rows = []
    for run in runs:
        by_name: dict[str, list[Cost]] = {}
        for kernel in step(run.shape, run.precision, counts, here):
            by_name.setdefault(kernel.name, []).append(cost(kernel, here))
        rows += [Row(f"{run.precision}, {run.shape}", name, costs, run.kernels[name]) for name, costs in by_name.items()]
    return rows


def main() -> None:
    table = Table(title="predicted and measured, ms a step", title_justify="left", title_style="bold")
    for heading in ("kernel", "memory", "L2", "product", "instructions", "waiting", "predicted", "measured", "÷"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    run = ""
    for row in compare(read(RUN / "profile.txt"), counts_of(RUN), Machine()):
        if row.run != run:
            table.add_section()
            table.add_row(run := row.run)
        parts = [sum(part) for part in zip(*row.costs, strict=True)][:-1]
        figures = (*parts, row.predicted, row.measured)
        table.add_row(row.name, *(f"{ms:.3f}" for ms in figures), f"{row.predicted / row.measured:.2f}")
    console = Console(width=120)
    console.print(table)
    console.print(reached())


def reached() -> Table:
    """The goals of `make gpu` as measured and as predicted of what is in the tree."""
    from benchmarks import plots
    from benchmarks.gpu import goals, predict

    rows = plots.read(RUN / "results.csv")
    measured, predicted = goals.reach(goals.figures(rows)), goals.reach(predict.figures(rows))
    table = Table(title="goals", title_justify="left", title_style="bold")
    for heading in ("", "shape", "goal", "measured", "predicted", ""):
        table.add_column(heading, justify="left" if heading in ("", "shape") else "right")
    for then, now in zip(measured, predicted, strict=True):
        if now.verdict or (then.verdict and then.frequencies == "uniform"):
            cells = (f"{it.got:.3g}" if it.verdict else "" for it in (then, now))
            table.add_row(now.goal.label, str(now.goal.at), now.want, *cells, now.verdict)
    return table


if __name__ == "__main__":
    main()
