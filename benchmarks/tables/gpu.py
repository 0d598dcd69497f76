"""`make gpu`: the goals of a step, and each op beside its floors."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import plots
from benchmarks.gpu import cuts, model, predict
from benchmarks.gpu import goals as aims
from benchmarks.gpu.profile import read
from benchmarks.gpu.record import lines
from benchmarks.gpu.world import LARGE, SMALL
from benchmarks.registry import OURS, Goal
from benchmarks.tables._figures import Figures
from benchmarks.tables._markdown import grid, number, shape, source
from benchmarks.tables._region import RESULTS, table

PROFILE = model.RUN / "profile.txt"


def newest(results: Path = RESULTS) -> Path:
    """The CSV of the device that `make gpu` ran on last."""
    return max(results.glob("nvidia-*/results.csv"), key=lambda path: max(line["time"] for line in lines(path)))


CSV = newest()
OPS = ("encode", "decode", "decode_loss", "sampled_dots", "transpose", "outer", "grad_sqnorm", "weight_step")
SHOWN = 0.05  # ms of a kernel that has a row of its own
SIZES = {str(LARGE): "large", str(SMALL): "small"}
SAID = f"large is {shape(LARGE)}, small {shape(SMALL)}"


@table
def goals() -> str:
    """What a step was to reach and what it did, at uniform and at Zipf frequencies."""
    cells: dict[Goal, dict[str, str]] = {}
    for it in aims.reach(aims.figures(plots.read(CSV))):
        if it.verdict:
            cells.setdefault(it.goal, {"want": it.want})[it.frequencies] = _ratio(it)
    rows = [
        [goal.label, SIZES[str(goal.at)], *(found.get(column, "") for column in ("want", "uniform", "zipf"))]
        for goal, found in sorted(cells.items(), key=lambda item: SIZES[str(item[0].at)])
    ]
    figures = Figures(CSV)
    figures.row("step", OURS, at=LARGE)
    return grid(["", "shape", "goal", "uniform", "Zipf"], rows) + source(CSV, f"{SAID}; {figures.about()}")


def _ratio(it: aims.Reached) -> str:
    return f"**{number(it.got)}**" if it.verdict == "met" else number(it.got) if it.verdict else ""


@table
def reached() -> str:
    """The goals at uniform frequencies, measured and, of what is in the tree, predicted."""
    rows = plots.read(model.RUN / "results.csv")
    measured, predicted = aims.reach(aims.figures(rows)), aims.reach(predict.figures(rows))
    both = [(then, now) for then, now in zip(measured, predicted, strict=True) if now.verdict]
    cells = [[now.goal.label, SIZES[str(now.goal.at)], now.want, _ratio(then), _ratio(now)]
             for then, now in sorted(both, key=lambda each: SIZES[str(each[1].goal.at)])]  # fmt: skip
    said = "`python -m benchmarks.gpu.model`"
    return grid(["", "shape", "goal", "measured once", "**predicted**"], cells) + source(PROFILE, said)


@table
def measured() -> str:
    """Each op by Triton and by CUDA, beside what its bytes alone would take on this device."""
    figures = Figures(CSV)

    def cell(op: str, name: str, metric: str = "time") -> str:
        return number(figures(op, name, metric, LARGE)) if figures.has(op, name, metric, LARGE) else ""

    rows = []
    for op in OPS:
        floors = [cell(op, name, "floor") for name in ("floor", "gather_floor")]
        rows.append([op, cell(op, "triton") or cell(op, OURS), cell(op, "cuda"), *floors])
    headings = ["op, ms", "Triton", "CUDA", "distinct rows and streams, or flops", "gathered"]
    product = figures("ceilings", "bf16_product", "tflops", LARGE)
    copy, gather = (figures("ceilings", name, "rate", LARGE) / 1e3 for name in ("copy", "gather"))
    about = f"uniform frequencies, {shape(LARGE)}; {figures.about()}, {_compiler(figures)}. "
    about += f"Its ceilings: cuBLAS bf16 product {number(product)} TFLOP/s, "
    about += f"copy {number(copy)} TB/s, gather of whole rows {number(gather)} TB/s"
    return grid(headings, rows) + source(CSV, about)


def _compiler(figures: Figures) -> str:
    """Triton and driver: of the row, or of the run where rows don't say so yet."""
    words = figures.row("ceilings", "bf16_product", "tflops", LARGE).versions.split(", ")
    environment = json.loads((CSV.parent / "environment.json").read_text("utf-8"))
    of_run = f"Triton {environment['triton']}", f"driver {environment['nvidia_smi']['driver_version']}"
    return ", ".join([word for word in words if word.startswith(("Triton", "driver"))] or of_run)


@table
def profile() -> str:
    """Where the time of a step goes, kernel by kernel."""
    title = PROFILE.read_text("utf-8").partition("\n")[0].removeprefix("# python -m benchmarks.gpu.profile, ")
    runs = read(PROFILE)
    names = dict.fromkeys(name for run in runs for name, ms in run.kernels.items() if name[0] == "_" and ms >= SHOWN)
    rows = [[f"`{name}`", *(f"{run.kernels[name]:.2f}" if name in run.kernels else "" for run in runs)] for name in names]
    rest = [run.total - sum(run.kernels.get(name, 0.0) for name in names) for run in runs]
    rows.append(["the others", *(f"{value:.2f}" for value in rest)])
    rows.append(["all", *(f"{run.total:.2f}" for run in runs)])
    headings = (f"{run.precision}, {SIZES[str(run.shape)]}" for run in runs)
    return grid(["kernel, ms of a step", *headings], rows) + source(PROFILE, f"{SAID}; {title}")


@table
def modelled() -> str:
    """The kernels that take time as the cost model has them, over what was measured."""
    runs, counts, here = read(PROFILE), model.counts_of(model.RUN), model.Machine()
    cells: dict[str, dict[str, str]] = {}
    for row in model.compare(runs, counts, here):
        if row.measured > 0.1:
            cells.setdefault(row.name, {})[row.run] = f"{row.predicted:.2f} / {row.measured:.2f}"
    columns = {f"{run.precision}, {run.shape}": f"{run.precision}, {SIZES[str(run.shape)]}" for run in runs}
    rows = [[f"`{name}`", *(found.get(run, "") for run in columns)] for name, found in cells.items()]
    return grid(["kernel, ms: model / measured", *columns.values()], rows) + source(
        PROFILE, "`python -m benchmarks.gpu.model`"
    )


@table
def predicted() -> str:
    """What changes to these kernels should bring."""
    runs, counts = read(PROFILE), model.counts_of(model.RUN)
    savings = [cuts.saved(run, counts, model.Machine()) for run in runs]
    rows = [[f"{cut.name} ({'made' if cut.made else 'not made'})", *(f"{each[cut.name]:.2f}" for each in savings)]
            for cut in cuts.CUTS]  # fmt: skip
    left = (run.total - sum(each.values()) for run, each in zip(runs, savings, strict=True))
    rows += [["kernels as measured", *(f"{run.total:.2f}" for run in runs)], ["with all", *(f"{ms:.2f}" for ms in left)]]
    headings = (f"{run.precision}, {SIZES[str(run.shape)]}" for run in runs)
    return grid(["predicted: ms that a step saves", *headings], rows) + source(PROFILE, "`python -m benchmarks.gpu.cuts`")
