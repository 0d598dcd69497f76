"""`python -m benchmarks`: checks and times every case, prints the tables, writes the CSV and its pictures."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import candidates, machine, memory, plan, plots, results
from benchmarks.cases import CASES
from benchmarks.data import FULL, QUICK
from benchmarks.runner import measure
from sae_fast.extras import MissingExtra

HERE = Path(__file__).parent
app = typer.Typer(add_completion=False)


@app.command()
def main(
    case: Annotated[list[str] | None, typer.Option(help="Only this case; may be repeated.")] = None,
    provider: Annotated[list[str] | None, typer.Option(help="Only this provider; may be repeated.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Calls of each provider; by default plan.py's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The CSV; by default benchmarks/results/<machine>.csv, or out/ with --quick.")
    ] = None,
    sweep: Annotated[
        bool, typer.Option(help="Instead of every case: step and encoder over B, d, F and L0, without the slow providers.")
    ] = False,
    quick: Annotated[
        bool, typer.Option(help="Small shapes, without the slow providers: a test, not a measurement.")
    ] = False,
    pictures: Annotated[bool, typer.Option(help="Draw the CSV, into a folder beside it.")] = True,
) -> None:
    """Checks and times every case, prints the tables, writes the CSV and its pictures.  Exits with 1 if a provider is
    wrong."""
    providers = {name for each in CASES.values() for name in each.providers}
    for option, given, known in (("--case", case, CASES), ("--provider", provider, providers)):
        unknown = set(given or []) - set(known)
        if unknown:
            raise typer.BadParameter(
                f"got {', '.join(sorted(unknown))}, want one of {', '.join(sorted(known))}", param_hint=option
            )
    folder = HERE.parent / "out" if quick else HERE / "results"
    out = out or folder / f"{machine.slug()}.csv"

    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{machine.device()}   {machine.versions()}   commit {machine.commit() or 'unknown'}")
    wrong = False
    for job in plan.quick(sweep) if quick else plan.sweep() if sweep else plan.full():
        names = provider or job.providers
        if (case and job.case.name not in case) or not job.case.choose(names, quick):
            continue
        with console.status(f"{job.case.name} at {job.shape} …"):
            measurement = measure(job.case, job.shape, rounds or job.rounds, names, quick)
            figures = results.rows(measurement, memory.peaks(measurement, console) if job.memory else {})
        results.show(console, measurement, figures)
        results.write(out, figures)
        wrong |= bool(measurement.faults)
    if not (case or provider or sweep):
        figures = candidates.rows(QUICK if quick else FULL)
        candidates.show(console, figures)
        results.write(out, figures)
    console.print(f"written to {os.path.relpath(out)}")
    if pictures and out.exists():
        try:
            for path in plots.draw(out):
                console.print(f"drawn: {os.path.relpath(path)}")
        except MissingExtra as error:
            console.print(f"[yellow]no pictures: {error}")
    raise typer.Exit(int(wrong))


if __name__ == "__main__":
    logging.captureWarnings(True)
    app()
