"""`sae-fast report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sae_fast.cli._common import Device, Quiet, bars, notes, one_line_errors

ORDER = 4  # in the list of commands


def report(
    run: Annotated[
        str,
        typer.Argument(help="The folder of a demo or train run or its checkpoint, or any SAE of which there is a store."),
    ],
    out: Annotated[Path | None, typer.Option(help="The file to write; by default RUN/report.html.")] = None,
    store: Annotated[Path | None, typer.Option(help="The feature store; by default RUN/store, made if missing.")] = None,
    effects: Annotated[Path | None, typer.Option(help='A JSON of effects to show: {"12": 0.5, ...}.')] = None,
    top: Annotated[int, typer.Option(help="Strongest contexts of a feature.")] = 10,
    bins: Annotated[int, typer.Option(help="Quantiles of its activations.")] = 4,
    per_bin: Annotated[int, typer.Option(help="Contexts of each quantile.")] = 2,
    before: Annotated[int, typer.Option(help="Tokens that are shown before the one that fires.")] = 15,
    after: Annotated[int, typer.Option(help="Tokens that are shown after it.")] = 8,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page to judge features on: contexts, densities, neighbours, and marks to export.

    The page is one file and needs no network.
    """
    with one_line_errors(), notes():
        from sae_fast.devices import usable
        from sae_fast.runs.report import report as write

        page = write(
            run, out, store=store, effects=effects, top=top, bins=bins, per_bin=per_bin, before=before, after=after,
            device=str(usable(device, "--device")), progress=bars(quiet),
        )  # fmt: skip
        if not quiet:
            Console().print(f"{page}, {page.stat().st_size / 1e6:.2g} MB", highlight=False, soft_wrap=True)
