"""`make gpu`: the goals of a step, and each op beside its floors."""

from __future__ import annotations

import csv
import json
import re

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
    title, runs = _profile()
    names = dict.fromkeys(name for _, _, kernels in runs for name, ms in kernels.items() if name[0] == "_" and ms >= SHOWN)
    rows = [[f"`{name}`", *(f"{kernels[name]:.2f}" if name in kernels else "" for *_, kernels in runs)] for name in names]
    rest = [total - sum(kernels.get(name, 0.0) for name in names) for _, total, kernels in runs]
    rows.append(["the others", *(f"{value:.2f}" for value in rest)])
    rows.append(["all", *(f"{total:.2f}" for _, total, _ in runs)])
    return grid(["kernel, ms of a step", *(name for name, *_ in runs)], rows) + source(PROFILE, f"{SAID}; {title}")


def _profile() -> tuple[str, list[tuple[str, float, dict[str, float]]]]:
    """(what the file says of itself, its runs: name, milliseconds of all kernels, of each)."""
    first, *blocks = PROFILE.read_text("utf-8").split("\n", 1)
    runs = []
    for block in blocks[0].strip().split("\n\n"):
        head, *lines = block.splitlines()
        precision, x, total = re.fullmatch(r"(\w+), (.+): ([\d.]+) ms of kernels a step", head).groups()  # type: ignore[union-attr]
        kernels: dict[str, float] = {}
        for line in lines:
            ms, name = line.strip().split(" ms  ", 1)
            kernels[name] = float(ms)
        runs.append((f"{precision}, {SIZES[x]}", float(total), kernels))
    return first.removeprefix("# ").removeprefix("python -m benchmarks.gpu.profile, "), runs
