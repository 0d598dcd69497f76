"""`python -m benchmarks.claims`: runs the claims, prints what came out, writes results, pictures and the table of them."""

from __future__ import annotations

import importlib
import os

# Before torch starts OpenMP: beside other work on the same cores, threads that spin for each other take many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import jsonfile, machine
from benchmarks.claims import NAMES, _claim, _page, _seeds
from sae_fast.analysis.plots import empty_figure
from sae_fast.extras import require

OUT = Path("out")
COLORS = {_claim.HOLDS: "green", _claim.CONDITION: "yellow", _claim.FAILS: "red"}
app = typer.Typer(add_completion=False)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(NAMES)}; by default all.")] = None,
    out: Annotated[Path, typer.Option(help="The folder for claims.md, and in it claims/, results and pictures.")] = OUT,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few seeds: a test of the programs only.")] = False,
    seeds: Annotated[int | None, typer.Option(min=2, help="Seeds of each claim; by default its own number.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds at a time, a process each.")] = os.cpu_count() or 1,
    work: Annotated[Path, typer.Option(help="Where what each seed measured is kept.")] = _seeds.folder,
) -> None:
    """Runs the claims.  An interrupted run goes on after the seeds that are done: give the same command again."""
    unknown = sorted(set(names or []) - set(NAMES))
    if unknown:
        raise typer.BadParameter(f"got {', '.join(unknown)}, want some of {', '.join(NAMES)}")
    require("matplotlib", extra="demo")
    _seeds.folder = work.absolute()
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)
    for name in names or NAMES:
        claim = importlib.import_module(f"benchmarks.claims.{name}")
        start = time.perf_counter()
        try:
            results = _seeds.measure(name, claim, quick, seeds, jobs)
        except KeyboardInterrupt:
            console.print(
                f"[yellow]interrupted in {name}: the seeds that are done are kept; the same command goes on after them"
            )
            raise typer.Exit(130) from None
        rows = claim.conclude(results)
        about = machine.about() | {"quick": quick, "seeds": len(results)}
        report = {"claim": name, "title": claim.TITLE, "setting": claim.SETTING, "about": about}
        report |= {"rows": [row._asdict() | {"sentence": row.sentence} for row in rows], "results": results}
        jsonfile.write(out / "claims" / f"{name}.json", report)
        draw(claim, results, out / "claims" / f"{name}.png")
        console.print(f"\n[bold]{claim.TITLE}[/bold]  ({time.perf_counter() - start:.0f} s, {len(results)} seeds)")
        for row in rows:
            console.print(f"[{COLORS[row.verdict]}]●[/] {row.sentence}", highlight=False)
    page = _page.write(out)
    console.print(f"\nwritten to {os.path.relpath(page)}, with pictures and results in {os.path.relpath(out / 'claims')}")


def draw(claim: Any, results: list[dict[str, Any]], path: Path) -> None:
    figure = empty_figure(11, 4.2)
    claim.draw(results, figure)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    app()
