"""`python -m benchmarks.tables`: writes the tables of README.md and docs/ from the committed results, or compares them."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.tables._region import ROOT, documents, filled
from benchmarks.tables.demo import keep

app = typer.Typer(add_completion=False)


@app.command()
def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; show what differs, and exit with 1.")] = False,
    demo: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A demo's metrics.json: kept first, as this machine's.")
    ] = None,
) -> None:
    """Writes the tables of the documents."""
    if demo is not None:
        typer.echo(f"kept: {keep(demo).relative_to(ROOT)}")
    differ = False
    for document in documents():
        old, new = document.read_text("utf-8"), filled(document)
        if old == new:
            continue
        differ, name = True, document.relative_to(ROOT).as_posix()
        if check:
            lines = difflib.unified_diff(old.splitlines(), new.splitlines(), name, "the results", lineterm="")
            typer.echo("\n".join(lines))
        else:
            document.write_text(new, "utf-8")
            typer.echo(f"written: {name}")
    raise typer.Exit(int(check and differ))


if __name__ == "__main__":
    app()
