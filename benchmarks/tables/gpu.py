"""`make gpu`: the goals of a step, and each op beside its floors."""

from __future__ import annotations

import csv
import json

from benchmarks.gpu import cuts, model
from benchmarks.gpu.profile import read
from benchmarks.gpu.world import LARGE, SMALL
from benchmarks.registry import OURS
from benchmarks.tables._figures import Figures
from benchmarks.tables._markdown import grid, number, shape, source
from benchmarks.tables._region import RESULTS, table

RUN = RESULTS / "nvidia-h100-80gb-hbm3"
CSV, PROFILE = RUN / "results.csv", RUN / "profile.txt"
OPS = ("encode", "decode", "decode_loss", "sampled_dots", "transpose", "outer", "grad_sqnorm", "weight_step")
SHOWN = 0.05  # ms of a kernel that has a row of its own
SIZES = {str(LARGE): "large", str(SMALL): "small"}
SAID = f"large is {shape(LARGE)}, small {shape(SMALL)}"


@table
def goals() -> str:
    """What a step was to reach and what it did, at uniform and at Zipf frequencies."""
    cells: dict[tuple[str, str, str], dict[bool, str]] = {}
    with CSV.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["metric"] == "goal":
                label, want, verdict = row["note"].split(": ")
                value = number(float(row["p50"]))
                found = cells.setdefault((SIZES[row["x"]], label, want.removeprefix("want ")), {})
                found[row["case"].endswith("_zipf")] = f"**{value}**" if verdict == "met" else value
    rows = [[label, size, want, cells[size, label, want].get(False, ""), cells[size, label, want].get(True, "")]
            for size, label, want in sorted(cells, key=lambda key: key[0])]  # fmt: skip
    figures = Figures(CSV)
    figures.row("step", OURS, at=LARGE)
    return grid(["", "shape", "goal", "uniform", "Zipf"], rows) + source(CSV, f"{SAID}; {figures.about()}")


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
    environment = json.loads((RUN / "environment.json").read_text("utf-8"))
    about = f"uniform frequencies, {shape(LARGE)}; {figures.about()}, Triton {environment['triton']}, driver "
    about += f"{environment['nvidia_smi']['driver_version']}. Its ceilings: cuBLAS bf16 product {number(product)} TFLOP/s, "
    about += f"copy {number(copy)} TB/s, gather of whole rows {number(gather)} TB/s"
    return grid(headings, rows) + source(CSV, about)


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
    runs, counts, here = read(PROFILE), model.counts_of(RUN), model.Machine()
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
    runs, counts = read(PROFILE), model.counts_of(RUN)
    savings = [cuts.saved(run, counts, model.Machine()) for run in runs]
    rows = [[name, *(f"{each[name]:.2f}" for each in savings)] for name in savings[0]]
    left = (run.total - sum(each.values()) for run, each in zip(runs, savings, strict=True))
    rows += [["kernels as measured", *(f"{run.total:.2f}" for run in runs)], ["with all", *(f"{ms:.2f}" for ms in left)]]
    headings = (f"{run.precision}, {SIZES[str(run.shape)]}" for run in runs)
    return grid(["predicted: ms that a step saves", *headings], rows) + source(PROFILE, "`python -m benchmarks.gpu.cuts`")
