"""Figures as rows of one long table: into a CSV, and onto the screen with their ratios."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import quantiles

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.registry import OURS
from benchmarks.runner import Measurement

FLOORS = ("bare_product", "floor")  # that every figure is set in relation to
UNITS = {"time": "ms", "peak_memory": "MiB", "l0": "features", "candidates_per_entry": "1"}


@dataclass(frozen=True)
class Row:
    """One figure: the median, and the 20th and 80th percentiles, of a metric of a provider of a case at x."""

    case: str
    provider: str
    mode: str
    metric: str
    unit: str
    x: str
    p50: float
    p20: float
    p80: float
    device: str
    versions: str
    commit: str
    time: str


COLUMNS = [f.name for f in fields(Row)]
KEY = ("case", "provider", "mode", "metric", "x", "device")


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(p50, p20, p80), interpolated."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    tenths = quantiles(samples, n=10, method="inclusive")
    return tenths[4], tenths[1], tenths[7]


def rows(measurement: Measurement, peaks: Mapping[str, Sequence[int]]) -> list[Row]:
    """The rows of a case; ``peaks``: bytes by provider."""
    samples = {("time", name): [1e3 * s for s in seconds] for name, seconds in measurement.seconds.items()}
    samples |= {("peak_memory", name): [n / 2**20 for n in sizes] for name, sizes in peaks.items()}
    if OURS in measurement.seconds:
        samples["l0", OURS] = [measurement.l0]
    case, x = measurement.case, str(measurement.shape)
    return [row(case.name, name, case.mode, metric, x, values) for (metric, name), values in samples.items()]


def row(case: str, provider: str, mode: str, metric: str, x: str, values: Sequence[float]) -> Row:
    """The row of one figure, measured here and now."""
    about = (machine.device(), machine.versions(), machine.commit())
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Row(case, provider, mode, metric, UNITS[metric], x, *percentiles(values), *about, now)


def write(path: Path, new: Iterable[Row]) -> None:
    """Writes the CSV; figures of the same case, provider, metric, x and device are replaced, others are kept."""
    table = {}
    if path.exists():
        with path.open(newline="") as file:
            table = {tuple(row[k] for k in KEY): row for row in csv.DictReader(file)}
    for row in new:
        values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
        table[tuple(values[k] for k in KEY)] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table.values())


def show(console: Console, measurement: Measurement, figures: list[Row]) -> None:
    """Prints the table of a case: each figure beside its ratios to ours, to the bare product and to the floor."""
    case = measurement.case
    by = {(row.metric, row.provider): row for row in figures}
    title = f"{case.name} ({case.mode})   {measurement.shape}"
    if measurement.seconds:
        title += f"   measured L0 {measurement.l0:.1f}   medians of {len(next(iter(measurement.seconds.values())))} rounds"
    columns: dict[str, Callable[[Row, Row | None], str]] = {
        "time, ms": lambda time, peak: f"{time.p50:.2f}",
        "p20 – p80": lambda time, peak: f"{time.p20:.2f} – {time.p80:.2f}",
        f"÷ {OURS}": lambda time, peak: _ratio(time, by.get(("time", OURS))),
    }
    for floor in FLOORS:
        if floor in measurement.seconds:
            columns[f"÷ {floor}"] = partial(_over, by["time", floor])
    if any(metric == "peak_memory" for metric, _ in by):
        columns["peak memory, MiB"] = lambda time, peak: f"{peak.p50:.1f}" if peak else ""
        columns[f"÷ {OURS}'s"] = lambda time, peak: _ratio(peak, by.get(("peak_memory", OURS)))
    table = Table()
    table.add_column("provider", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    for name in measurement.seconds:
        figure = by["time", name], by.get(("peak_memory", name))
        table.add_row(name, *(cell(*figure) for cell in columns.values()), style="bold" if name == OURS else "")
    console.print(f"\n{title}", style="bold")
    if measurement.seconds:
        console.print(table)
    for name, reason in measurement.skipped.items():
        console.print(f"  {name} skipped: {reason}", style="yellow", markup=False)
    for name, faults in measurement.faults.items():
        console.print(f"  {name} is wrong, so this case has no figures: {'; '.join(faults)}", style="red", markup=False)
    if measurement.others > 0.05:
        console.print(f"  others took {measurement.others:.0%} of this machine: these times are too high", style="yellow")
    for goal in case.goals:
        a, b = by.get((goal.metric, goal.numerator)), by.get((goal.metric, goal.denominator))
        if goal.at == measurement.shape and a and b:
            ratio = a.p50 / b.p50
            want = f"at most {goal.at_most:g}" if goal.at_most is not None else f"at least {goal.at_least:g}"
            verdict = "[green]reached" if goal.reached(ratio) else "[red]not reached"
            console.print(f"  {goal.label}: {ratio:.3g}, wanted {want}: {verdict}")


def _over(floor: Row, time: Row, peak: Row | None) -> str:
    return _ratio(time, floor)


def _ratio(a: Row | None, b: Row | None) -> str:
    return f"{a.p50 / b.p50:.2f}×" if a and b else ""
