"""Pictures of a results CSV: `python -m benchmarks.plots CSV [--out DIR]`.  They need nothing but the CSV.

step.png     time of a step, by provider, at each shape where there is something to compare
ops.png      every other case: how many times faster than eager PyTorch
sweep.png    time of step and encoder against B, d, F and L0, with the slope that linear growth has
memory.png   peak memory, by provider
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.data import FULL, Shape
from benchmarks.registry import OURS
from benchmarks.results import COLUMNS, Row
from sae_fast.analysis.plots import ACCENT, INK, empty_figure
from sae_fast.extras import require

FLOOR, OTHER, GUIDE = "#b8bcc2", "#2e86ab", "#999999"
FLOORS = {
    "bare_product": "fp32 product alone",
    "bare_product_out": "fp32 product, existing memory",
    "bf16_product": "bf16 product, existing memory",
    "floor": "floor: bf16 product + bytes to move",
}
NAMES = {**FLOORS, "eager": "eager PyTorch", "eager_compiled": "torch.compile"}
CURVES = {
    ("step", "eager"): ("eager PyTorch, step", OTHER, "-"),
    ("step", "bare_product"): (FLOORS["bare_product"], INK, ":"),
    ("step", OURS): ("sae_fast, step", ACCENT, "-"),
    ("encode_sparse", OURS): ("sae_fast, encode_sparse", ACCENT, "--"),
}
AXES = {"B": "examples in a batch, B", "d": "width, d", "F": "features, F", "l0": "features active on an example, L0"}


def read(path: Path) -> list[Row]:
    """The rows of a CSV that come from the device of its newest row: figures of two machines are never compared."""
    numbers = ("p50", "p20", "p80")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    table: list[dict[str, Any]] = [{n: float(line[n]) if n in numbers else line[n] for n in COLUMNS} for line in lines]
    if not table:
        raise ValueError(f"{path}: got no rows, want the CSV of a run")
    device = max(table, key=lambda line: line["time"])["device"]
    return [Row(**line) for line in table if line["device"] == device]


def shape_of(x: str) -> Shape:
    """The shape that a row's x spells out."""
    found = re.fullmatch(r"B=(\d+) d=(\d+) F=(\d+) L0=([\d.e+]+)", x)
    if not found:
        raise ValueError(f"x: got {x!r}, want such as {str(FULL)!r}")
    return Shape(int(found[1]), int(found[2]), int(found[3]), float(found[4]))


def headline(rows: Iterable[Row]) -> Shape:
    """The shape of the full run if it is there, else the one with the most figures."""
    counts = Counter(row.x for row in rows)
    return shape_of(str(FULL) if str(FULL) in counts else counts.most_common(1)[0][0])


def draw(path: Path, out: Path | None = None) -> list[Path]:
    """Writes the PNGs that the CSV has figures for into ``out`` (by default a folder beside it, of its name); returns their
    paths.  Raises ``MissingExtra`` without matplotlib."""
    require("matplotlib", extra="demo")
    rows = read(path)
    out = out or path.with_suffix("")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, picture in {"step": step, "ops": ops, "sweep": sweep, "memory": memory}.items():
        figure = picture(rows)
        if figure is not None:
            written.append(out / f"{name}.png")
            figure.savefig(written[-1], dpi=130)
    return written


# ---- The pictures ---------------------------------------------------------------------------------------------------


def step(rows: Sequence[Row]) -> Any:
    """Bars of the time of whole steps, a panel for each case and shape at which ours has a rival."""
    at = headline(rows)
    timed = [row for row in rows if (row.mode, row.metric) == ("train", "time")]
    panels = []
    for case, x in dict.fromkeys((row.case, row.x) for row in sorted(timed, key=lambda row: row.x != str(at))):
        here = sorted((row for row in timed if (row.case, row.x) == (case, x)), key=lambda row: row.p50)
        rivals = {row.provider for row in here} - {OURS, *FLOORS}
        # Shapes that differ from the headline's in one size are the sweep's, but for the dense phase.
        swept = len(_differs(at, shape_of(x))) == 1 and shape_of(x) != at.dense
        if rivals and not swept and any(row.provider == OURS for row in here):
            panels.append((f"{case}   {x}", here))
    return _bars("A training step", "ms, median (20th to 80th percentile)", panels, rows)


def memory(rows: Sequence[Row]) -> Any:
    """Bars of peak memory, a panel for each case that has it, at the headline's shape."""
    at = headline(rows)
    panels = []
    for case in dict.fromkeys(row.case for row in rows):
        here = [row for row in rows if (row.case, row.metric, row.x) == (case, "peak_memory", str(at))]
        if len(here) > 1:
            panels.append((case, sorted(here, key=lambda row: row.p50)))
    return _bars(f"Peak memory above parameters and optimizer state   {at}", "MiB", panels, rows)


def ops(rows: Sequence[Row]) -> Any:
    """For every case at the headline's shape: eager PyTorch's time ÷ ours, and ours in milliseconds."""
    at = headline(rows)
    time = {(r.case, r.provider): r.p50 for r in rows if (r.metric, r.x) == ("time", str(at))}
    cases = [c for c in dict.fromkeys(c for c, _ in time) if {(c, OURS), (c, "eager")} <= time.keys()]
    if not cases:
        return None
    figure = _figure(8.5, 1.3 + 0.36 * len(cases), rows)
    axes = figure.subplots()
    ratios = [time[c, "eager"] / time[c, OURS] for c in cases]
    axes.barh(cases, [r - 1 for r in ratios], left=1, color=[ACCENT if c == "step" else OTHER for c in cases], height=0.65)
    axes.set_xscale("log")
    axes.set_xlim(min(0.7, *(0.7 * r for r in ratios)), 3 * max(1, *ratios))
    axes.axvline(1, color=INK, linewidth=1)
    for y, (case, ratio) in enumerate(zip(cases, ratios, strict=True)):
        label = f" {ratio:.3g}×   {_number(time[case, OURS])} ms"
        axes.text(max(ratio, 1), y, label, va="center", fontsize="small", color=INK)
    axes.invert_yaxis()
    _finish(axes, f"Times faster than eager PyTorch   {at}", "eager PyTorch's time ÷ sae_fast's", grid="x")
    _plain(axes.xaxis)
    return figure


def sweep(rows: Sequence[Row]) -> Any:
    """Curves of time against B, d, F and L0 through the headline's shape."""
    at = headline(rows)
    time = {(r.case, r.provider, shape_of(r.x)): r for r in rows if r.metric == "time" and (r.case, r.provider) in CURVES}
    shapes = {shape for _, _, shape in time}
    lines = {name: sorted(s for s in (getattr(s, name) for s in shapes if _differs(at, s) <= {name})) for name in AXES}
    if all(len(set(line)) < 3 for line in lines.values()):
        return None
    figure = _figure(11, 7.6, rows)
    panels = figure.subplots(2, 2, sharey=True)
    for axes, (name, title) in zip(panels.flat, AXES.items(), strict=True):
        for (case, provider), (label, color, style) in CURVES.items():
            points = [r for (c, p, s), r in time.items() if (c, p) == (case, provider) and _differs(at, s) <= {name}]
            points.sort(key=lambda r: getattr(shape_of(r.x), name))
            x = [getattr(shape_of(r.x), name) for r in points]
            axes.fill_between(x, [r.p20 for r in points], [r.p80 for r in points], color=color, alpha=0.15, linewidth=0)
            axes.plot(x, [r.p50 for r in points], color=color, linestyle=style, marker="o", markersize=4, label=label)
            if (case, provider) == ("step", OURS) and points:
                middle = min(points, key=lambda r: abs(getattr(shape_of(r.x), name) - getattr(at, name)))
                here = getattr(shape_of(middle.x), name)
                guide = [middle.p50 * v / here for v in x] if name != "l0" else [middle.p50] * len(x)
                what = "flat" if name == "l0" else "linear"
                axes.plot(x, guide, color=GUIDE, linewidth=1, zorder=0, label=what)
                axes.annotate(what, (x[-1], guide[-1]), color=GUIDE, fontsize="small", xytext=(4, -3),
                              textcoords="offset points")  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        _finish(axes, title, "", grid="both")
        if lines[name]:
            ticks = sorted(set(lines[name]))
            axes.set_xticks(ticks, [_number(v) for v in ticks])
            axes.minorticks_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("ms, median (20th to 80th percentile)")
        _plain(axes.yaxis)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    keys = [(h, label) for h, label in zip(handles, labels, strict=True) if label != "linear"]
    figure.legend(
        *zip(*keys, strict=True), loc="outside upper left", ncols=5, frameon=False, alignment="left",
        title=f"One size varied at a time around {at}", title_fontproperties={"weight": "bold", "size": "large"},
    )  # fmt: skip
    return figure


# ---- Their parts ----------------------------------------------------------------------------------------------------


def _differs(a: Shape, b: Shape) -> set[str]:
    """The sizes in which two shapes differ."""
    return {name for name in AXES if getattr(a, name) != getattr(b, name)}


def _bars(title: str, unit: str, panels: Sequence[tuple[Any, Sequence[Row]]], rows: Sequence[Row]) -> Any:
    """Horizontal bars, a panel under the other; ours in colour, floors in grey, each with its ratio to ours."""
    if not panels:
        return None
    counts = [len(here) for _, here in panels]
    figure = _figure(8.5, 1.0 + 0.7 * len(panels) + 0.34 * sum(counts), rows)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[n + 1.2 for n in counts])[:, 0]
    for axes, (subtitle, here) in zip(grid, panels, strict=True):
        ours = next((row.p50 for row in here if row.provider == OURS), None)
        names = [NAMES.get(row.provider, row.provider) for row in here]
        colors = [ACCENT if row.provider == OURS else FLOOR if row.provider in FLOORS else OTHER for row in here]
        errors = [[max(0.0, r.p50 - r.p20) for r in here], [max(0.0, r.p80 - r.p50) for r in here]]
        axes.barh(names, [r.p50 for r in here], color=colors, xerr=errors, ecolor=INK, height=0.65)
        for y, row in enumerate(here):
            ratio = "" if ours is None or row.provider == OURS else f"   {row.p50 / ours:.3g}×"
            axes.text(max(row.p50, row.p80), y, f"  {_number(row.p50)}{ratio}", va="center", fontsize="small", color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.22 * max(row.p80 for row in here))
        _finish(axes, str(subtitle), "", grid="x")
    grid[-1].set_xlabel(f"{unit};   × sae_fast's" if any(len(here) > 1 for _, here in panels) else unit)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def _figure(width: float, height: float, rows: Sequence[Row]) -> Any:
    """An empty figure with the machine and the versions under it, outside of every backend and style."""
    figure = empty_figure(width, height + 0.3)
    figure.supxlabel(provenance(rows), x=0.01, ha="left", fontsize="x-small", color=GUIDE)
    return figure


def provenance(rows: Sequence[Row]) -> str:
    """Where and with what: the device; every version; the commits and the days."""
    versions = dict.fromkeys(part for row in rows for part in row.versions.split(", "))
    commits = dict.fromkeys(row.commit for row in rows if row.commit)
    days = sorted({row.time[:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{rows[0].device}\n{', '.join(versions)}   commit {', '.join(commits) or 'unknown'}   {when}"


def _finish(axes: Any, title: str, x: str, grid: str) -> None:
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(x)
    axes.grid(alpha=0.25, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(axis: Any) -> None:
    """Numbers instead of powers of ten on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1,) if high / low > 1000 else (1, 3)))
    formatter: Callable[[float, Any], str] = lambda value, _: _number(value)  # noqa: E731
    axis.set_major_formatter(FuncFormatter(formatter))
    axis.set_minor_formatter(NullFormatter())


def _number(value: float) -> str:
    """Three digits, thousands apart."""
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return text.replace(",", "\u202f")


app = typer.Typer(add_completion=False)


@app.command()
def main(
    path: Annotated[Path, typer.Argument(metavar="CSV", exists=True, dir_okay=False)],
    out: Annotated[Path | None, typer.Option(help="The folder; by default beside the CSV, of its name.")] = None,
) -> None:
    """Draws a results CSV."""
    for written in draw(path, out):
        print(written)


if __name__ == "__main__":
    app()
