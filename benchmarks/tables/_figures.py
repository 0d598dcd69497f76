"""The rows of a results CSV, asked for by name."""

from __future__ import annotations

from pathlib import Path

from benchmarks import plots
from benchmarks.data import FULL, Shape
from benchmarks.results import Row


class Figures:
    """A CSV of `make bench` or `make gpu`; it notes which rows were asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = {(row.case, row.provider, row.metric, row.x): row for row in plots.read(path)}
        self.asked: dict[Row, None] = {}

    def row(self, case: str, provider: str, metric: str = "time", at: Shape = FULL) -> Row:
        """ValueError where it was not measured."""
        key = (case, provider, metric, str(at))
        if key not in self.rows:
            raise ValueError(f"{self.path}: got no row {', '.join(key)}, want what a document shows")
        self.asked[self.rows[key]] = None
        return self.rows[key]

    def __call__(self, case: str, provider: str, metric: str = "time", at: Shape = FULL) -> float:
        """The median."""
        return self.row(case, provider, metric, at).p50

    def has(self, case: str, provider: str, metric: str = "time", at: Shape = FULL) -> bool:
        return (case, provider, metric, str(at)) in self.rows

    def about(self) -> str:
        """Where and when the rows were measured that were asked for: those of one table may be of several runs."""
        rows = list(self.asked)
        commits = ", ".join(dict.fromkeys(row.commit for row in rows))
        days = " and ".join(sorted({row.time[:10] for row in rows}))
        return f"medians, {rows[0].device}, torch {rows[0].versions.split(',')[0].split()[-1]}, {days}, commit {commits}"
