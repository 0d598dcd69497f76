"""What changes to the kernels should bring, by the cost model, before a GPU has run them: `python -m benchmarks.gpu.cuts`.

Each cut replaces kernels of a measured step by what they would be, or, where the cut is made, by what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.data import Shape
from benchmarks.gpu import model
from benchmarks.gpu.model import Compiled, Kernel, Machine, cost
from benchmarks.gpu.profile import Run, read

NOW = Path(__file__).parent  # of kernels.json: what sass.py counts in the kernels of the tree
DEPTH = 16  # columns of the product that hold bias and bound


def unit_rows_in_slices(at: Shape, precision: str, counts: dict[str, Compiled], here: Machine) -> dict[str, list[Kernel]]:
    """W_dec by slices as W_enc, then a pass that divides its touched rows by their norms."""
    touched = model.touched_at(at)
    both = [model.weight_step(at, counts["step of slices"], touched, here, copied) for copied in (True, False)]
    return {"_step": [*both, model.stream("_step", 8 * touched * at.d, here)]}


def rows_read_once(at: Shape, precision: str, counts: dict[str, Compiled], here: Machine) -> dict[str, list[Kernel]]:
    """decode_loss keeps 64 rows' slices of 128 columns in shared memory for their dots."""
    touched = model.touched_at(at)
    staged = replace(counts["residuals"], shared=64 * 128 * 4)
    now = model.residuals(at, staged, touched, here)
    first, second = now.phases
    return {"_residuals": [now._replace(phases=[first, second._replace(cache=0.0)], chain=now.chain / 2)]}


def bound_in_the_product(at: Shape, precision: str, counts: dict[str, Compiled], here: Machine) -> dict[str, list[Kernel]]:
    """Bits in the accumulator's own order, of a sum that has the bias and the bound already."""
    now = model.screen(at, precision, counts)
    it = model.counts_of(NOW)["screen of wide rows" if at.d > 1024 else "screen"]
    multiply, end = now.phases
    phases = [multiply._replace(product=multiply.product * (1 + DEPTH / at.d)), end._replace(instructions=it.epilogue)]
    return {now.name: [now._replace(it=replace(now.it, registers=it.registers), phases=phases)]}


def narrower_slices(at: Shape, precision: str, counts: dict[str, Compiled], here: Machine) -> dict[str, list[Kernel]]:
    """decode_loss by 128 columns, of which more stays in the L2 cache."""
    return {"_residuals": [model.residuals(at, model.counts_of(NOW)["residuals"], model.touched_at(at), here)]}


def b_dec_on_the_way(at: Shape, precision: str, counts: dict[str, Compiled], here: Machine) -> dict[str, list[Kernel]]:
    """The step of W_enc sums Σδ · W_enc while it has the rows."""
    return {"std::enable_if<!": [model.stream("", 4 * 256 * at.d, here)]}


class Cut(NamedTuple):
    """``kernels``: what takes the place of measured kernels, by their name; ``made``: whether the tree has it."""

    kernels: Callable[..., dict[str, list[Kernel]]]
    made: bool
    of_encode: bool = False

    @property
    def name(self) -> str:
        return self.kernels.__name__.replace("_", " ")


CUTS = (
    Cut(unit_rows_in_slices, made=True),
    Cut(narrower_slices, made=True),
    Cut(rows_read_once, made=False),
    Cut(bound_in_the_product, made=True, of_encode=True),
    Cut(b_dec_on_the_way, made=False),
)


def saved(run: Run, counts: dict[str, Compiled], here: Machine) -> dict[str, float]:
    """Milliseconds that each cut should save of a measured step: the model's ratio, of what was measured."""
    now: dict[str, float] = {}
    for kernel in model.step(run.shape, run.precision, counts, here):
        now[kernel.name] = now.get(kernel.name, 0.0) + cost(kernel, here).total
    found = {}
    for cut in CUTS:
        saving = 0.0
        for name, kernels in cut.kernels(run.shape, run.precision, counts, here).items():
            saving += run.kernels[name] * (1 - sum(cost(kernel, here).total for kernel in kernels) / now[name])
        found[cut.name] = saving
    return found


def main() -> None:
    table = Table(title="predicted: ms of a step that each cut saves", title_justify="left", title_style="bold")
    runs, counts = read(model.RUN / "profile.txt"), model.counts_of(model.RUN)
    table.add_column("cut")
    for run in runs:
        table.add_column(f"{run.precision}, {run.shape}", justify="right")
    savings = [saved(run, counts, Machine()) for run in runs]
    for cut in CUTS:
        table.add_row(f"{cut.name} ({'made' if cut.made else 'not made'})", *(f"{each[cut.name]:.2f}" for each in savings))
    table.add_section()
    table.add_row("kernels now, measured", *(f"{run.total:.2f}" for run in runs))
    left = (run.total - sum(each.values()) for run, each in zip(runs, savings, strict=True))
    table.add_row("with all cuts", *(f"{ms:.2f}" for ms in left))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
