"""`python -m benchmarks.peers`: the peers beside ours, checked, timed in turns, into the CSV of `make bench`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import machine, memory, plots, results
from benchmarks.cases import CASES
from benchmarks.data import FULL, QUICK, SMALL
from benchmarks.peers import PACKAGES, kinds
from benchmarks.peers.dictionary_learning import in_columns
from benchmarks.peers.kinds import TRAINERS
from benchmarks.plan import Job
from benchmarks.registry import OURS
from benchmarks.runner import measure

FOLDER = Path(__file__).parents[2]
PROVIDERS = {
    "step": (OURS, "eager", "bare_product", "dictionary_learning"),
    "step_saelens": (OURS, "bare_product", "sae_lens"),
    "step_topk": ("bare_product", "sparsify"),
    "decode": (OURS, "eager", "embedding_bag"),
    **{f"kind_{name}": (OURS, "bare_product", "dictionary_learning") for name in TRAINERS},
}
REFERENCES = {"step": in_columns} | {f"kind_{name}": kinds.in_columns(name) for name in TRAINERS}
app = typer.Typer(add_completion=False)


def jobs(quick: bool) -> Iterator[Job]:
    """Shape by shape, so that the cases of one share its world."""
    for shape in (QUICK,) if quick else (FULL, SMALL):
        for name, providers in PROVIDERS.items():
            case = replace(CASES[name], reference=REFERENCES.get(name, CASES[name].reference))
            yield Job(case, shape, 3 if quick else 7, providers, memory=case.memory)


@app.command()
def main(
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be repeated.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Calls of each provider; by default 7, or 3.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The CSV; by default that of `make bench`, or out/ with --quick.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Small shapes: a test, not a measurement.")] = False,
) -> None:
    """Checks and times the peers beside ours, prints the tables, writes the CSV.  Exits with 1 if a provider is wrong."""
    if unknown := set(case or ()) - set(PROVIDERS):
        raise typer.BadParameter(
            f"got {', '.join(sorted(unknown))}, want one of {', '.join(PROVIDERS)}", param_hint="--case"
        )
    out = out or (FOLDER / "out" if quick else FOLDER / "benchmarks" / "results") / f"{machine.slug()}.csv"
    console = Console(width=None if sys.stdout.isatty() else 120)
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES.values())
    console.print(f"{machine.device()}   {machine.versions()}, {packages}   commit {machine.commit() or 'unknown'}")
    wrong = False
    for job in jobs(quick):
        if case and job.case.name not in case:
            continue
        with console.status(f"{job.case.name} at {job.shape} …"):
            measurement = measure(job.case, job.shape, rounds or job.rounds, job.providers)
            figures = results.rows(
                measurement, memory.peaks(measurement, console, "benchmarks.peers.memory") if job.memory else {}
            )
        results.show(console, measurement, figures)
        results.write(out, [with_package(row) for row in figures])
        wrong |= bool(measurement.faults)
    console.print(f"written to {os.path.relpath(out)}")
    for path in plots.draw(out):
        console.print(f"drawn: {os.path.relpath(path)}")
    raise typer.Exit(int(wrong))


def with_package(row: results.Row) -> results.Row:
    """A peer's row names the peer's version too."""
    package = PACKAGES.get(row.provider)
    return replace(row, versions=f"{row.versions}, {package} {version(package)}") if package else row


if __name__ == "__main__":
    logging.captureWarnings(True)
    app()
